"""A residual's training without a host: what its file says of its base, and what interrupts and refusals leave."""

import hashlib
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from profusion import interrupts, keeping, learning
from profusion.infusion import Layer
from profusion.learning import Concept, train, weights_sample
from profusion.residual import automatic, load_residual, save_residual
from profusion.residual.origin import other_base
from profusion.residual.training import NOUN_PROMPTS, Reference, ResidualTraining, TrainingOptions
from profusion.stable_diffusion import StableDiffusion
from tests import shrunken

SIZE = 16
OPTIONS = TrainingOptions(steps=4, learning_rate=0.5)
IDENTITY = "fab79ed397fd3c42"  # as it was before a training could be automatic


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    return shrunken.written(path, shrunken.checkpoint("SD 1.x"))


@pytest.fixture(scope="module")
def model(path):
    return StableDiffusion.load(path, SIZE)


@pytest.fixture(scope="module")
def concept():
    pictures = torch.rand(2, SIZE, SIZE, 3, generator=torch.manual_seed(0))
    return Concept("your cat", "cat", pictures, torch.ones(2, SIZE, SIZE))


def silent(_):
    pass


def test_a_residual_says_what_it_was_trained_on(model, path, concept, tmp_path):
    residual = train(model, concept, OPTIONS, silent).residual
    kept = load_residual(save_residual(residual, tmp_path / "cat.safetensors").path).origin
    assert (kept.base, kept.base_hash) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest()[:10])
    assert kept.learning_rate == 0.5 and kept.prompts == NOUN_PROMPTS and kept.version and kept.day
    assert kept.sample == weights_sample(model)


def test_another_base_of_the_same_architecture_is_warned_of(model, concept, tmp_path):
    origin = train(model, concept, replace(OPTIONS, steps=1), silent).residual.origin
    assert other_base("cat", origin, weights_sample(model)) is None
    assert other_base("cat", None, weights_sample(model)) is None
    tensors = shrunken.checkpoint("SD 1.x")
    tensors = {name: 1.3 * x if "attn2.to_v" in name else x for name, x in tensors.items()}
    other = StableDiffusion.load(shrunken.written(tmp_path / "other.safetensors", tensors), SIZE)
    warning = other_base("cat", origin, weights_sample(other))
    assert warning.startswith(f"The residual of 'cat' was trained on model.safetensors ({origin.base_hash})")


@pytest.mark.parametrize("number", interrupts.NUMBERS)
def test_an_interrupt_is_saved_after_its_step_and_the_same_training_goes_on_bit_for_bit(
    model, concept, tmp_path, monkeypatch, number
):
    whole = train(model, concept, OPTIONS, silent)
    step = ResidualTraining._one_step

    def interrupted(training):
        if training.step == 1:
            os.kill(os.getpid(), number)
        return step(training)

    handlers, said = [signal.getsignal(each) for each in interrupts.NUMBERS], []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResidualTraining, "_one_step", interrupted)
        train(model, concept, OPTIONS, said.append, tmp_path)
    assert [signal.getsignal(each) for each in interrupts.NUMBERS] == handlers
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith("training_") and load_residual(partial).steps == 2
    assert f"saved {partial} at step 2" in said
    again = train(model, concept, OPTIONS, said.append, tmp_path)
    assert again.first == 2 and torch.equal(again.residual.delta, whole.residual.delta)
    assert again.losses == whole.losses[2:]


def test_interrupts_that_come_together_are_one_and_a_later_one_is_not_waited_for(monkeypatch):
    with interrupts.gathered() as signals:
        for number in interrupts.NUMBERS:
            os.kill(os.getpid(), number)
        assert signals == interrupts.NUMBERS
    monkeypatch.setattr(interrupts, "TOGETHER", 0.0)
    with pytest.raises(KeyboardInterrupt), interrupts.gathered():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_has_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.gathered() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not signals and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_model_with_other_words_or_another_prediction_goes_on_from_nothing(model, concept, tmp_path):
    train(model, concept, OPTIONS, silent, tmp_path)
    tensors = shrunken.checkpoint("SD 1.x")
    name = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    path = shrunken.written(tmp_path / "other.safetensors", {**tensors, name: 2 * tensors[name]})
    for other in (StableDiffusion.load(path, SIZE), replace(model, prediction="v")):
        assert train(other, concept, OPTIONS, silent, tmp_path).first == 0
    assert train(model, concept, replace(OPTIONS, steps=5), silent, tmp_path).first == 4


def test_a_finished_residual_is_trained_further_bit_for_bit(model, concept, tmp_path):
    whole = train(model, concept, OPTIONS, silent)
    begun = train(model, concept, replace(OPTIONS, steps=2), silent).residual
    path = save_residual(begun, tmp_path / "begun.safetensors", "float32").path
    further = train(model, concept, OPTIONS, silent, tmp_path / "folder", resume=load_residual(path))
    assert further.first == 2 and torch.equal(further.residual.delta, whole.residual.delta)


def test_progress_says_how_long_it_will_take_and_is_said_now_and_then(model, concept, monkeypatch):
    said = []
    train(model, concept, OPTIONS, said.append)
    assert len(said) == 1 and "train 4/4" in said[0] and said[0].endswith("s a step, 0 min left")
    monkeypatch.setattr(learning, "REPORT_SECONDS", 0.0)
    train(model, concept, OPTIONS, said.append)
    assert len(said) == 5


def test_an_automatic_training_says_what_it_found_and_goes_on_bit_for_bit(model, concept, tmp_path, monkeypatch):
    monkeypatch.setattr(automatic, "CHECK_EVERY", 2)
    monkeypatch.setattr(automatic, "STRANGE", 0.0)
    options, said = replace(OPTIONS, learning_rate=0.0), []
    whole = train(model, concept, options, said.append)
    report = whole.found()
    assert report["masks"] == "found" and whole.masks.shape == (2, SIZE // model.cell, SIZE // model.cell)
    assert report["strangeness"] > 0 and report["error_left"] > 0 and report["trained_steps"] == 4
    assert "times as much" in report["remarks"][-1] and f"note: {report['remarks'][-1]}" in said
    begun = train(model, concept, replace(options, steps=3), silent).residual
    path = save_residual(begun, tmp_path / "begun.safetensors", "float32").path
    further = train(model, concept, options, silent, tmp_path / "folder", resume=load_residual(path))
    assert further.first == 3 and torch.equal(further.residual.delta, whole.residual.delta)


def test_it_says_why_it_ended_before_its_last_step(model, concept, monkeypatch):
    monkeypatch.setattr(automatic, "CHECK_EVERY", 1)
    monkeypatch.setattr(automatic, "WORTHWHILE", 2.0)
    said = []
    trained = train(model, concept, replace(OPTIONS, learning_rate=0.0, steps=50), said.append)
    assert trained.residual.steps == automatic.PATIENCE + 1 and said[-1] == trained.remarks[-1]
    assert said[-1].startswith(f"ended at step {automatic.PATIENCE + 1}: the loss has hardly fallen")


def test_a_training_of_before_is_told_apart_as_before():
    """By what its unfinished file is called. Of fixed numbers, since processors encode pictures to other last bits."""
    references = [Reference(torch.arange(16.0).view(4, 2, 2) / 16, torch.ones(2, 2))]
    layers = [Layer("input.1.0", 4), Layer("middle.1.0", 4)]

    def identity(options):
        return ResidualTraining(None, references, [(5,)], layers, "cat", options).identity

    for options in (OPTIONS, replace(OPTIONS, steps=9), replace(OPTIONS, stop_early=None, find_object=None)):
        assert identity(options) == IDENTITY
    assert identity(replace(OPTIONS, stop_early=True)) != IDENTITY


def test_a_checkpoint_in_half_precision_keeps_its_vae_in_single(path):
    half = StableDiffusion.load(path, SIZE, torch.float16)
    types = {next(network.parameters()).dtype for network in (half.unet, *half.text.towers)}
    assert types == {torch.float16} and next(half.vae.parameters()).dtype == torch.float32
    assert half.pictures(torch.zeros(1, 4, 8, 8)).isfinite().all()
    assert next(StableDiffusion.load(path, SIZE, torch.bfloat16).vae.parameters()).dtype == torch.bfloat16


def test_pictures_are_encoded_one_after_another(model, concept, monkeypatch):
    seen, latents = [], type(model.vae).latents
    monkeypatch.setattr(type(model.vae), "latents", lambda vae, x: (seen.append(len(x)), latents(vae, x))[1])
    assert len(model.references(concept.pictures, concept.masks)) == 2 and seen == [1, 1]


def test_what_is_learned_is_written_meanwhile_with_its_base(model, concept, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    monkeypatch.setattr(keeping, "SHARE", 1e9)
    train(model, concept, OPTIONS, silent, tmp_path)
    (partial,) = tmp_path.iterdir()
    assert load_residual(partial).origin.base == model.base
