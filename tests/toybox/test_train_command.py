"""`python -m profusion promptnet train` on Toybox itself, a few steps of it."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from profusion import __main__ as program
from profusion import keeping
from profusion.loop import TrainingError
from profusion.models.tokenizer import words_to_ids
from profusion.pictures import to_image
from profusion.promptnet import PromptNetError, load_promptnet
from profusion.promptnet.file import load_training
from profusion.toybox import train_command as commands
from profusion.toybox.configs import TOYBOX_PROMPTNET
from profusion.toybox.drawing import SIZE
from profusion.toybox.picture_sets import drawn_pictures, encoded_pictures, read_cache, toybox_pictures
from profusion.toybox.pipeline import Toybox
from profusion.toybox.promptnet import new_promptnet


@pytest.fixture(scope="module")
def toybox():
    return Toybox.load()


def arguments(out, *more):
    return ["promptnet", "train", "--out", str(out), "--pictures", "10", "--batch", "2", "--warmup", "0", *more]


def command(out, *more):
    return commands.from_arguments(program.parser().parse_args(arguments(out, *more)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(toybox, tmp_path, number):
    said = []
    whole = commands.run(command(tmp_path / "whole.safetensors", "--steps", "3"), toybox, said.append)
    assert whole["steps"] == 3 and whole["pictures"] == 9 and whole["bytes"] <= 8_400_000
    assert any(text.startswith("step 3/3") for text in said) and any("kept from it" in text for text in said)

    def interrupt(text):
        if text.startswith("encoding"):
            real = commands.PromptNetTraining.loss

            def once(training, batch):
                monkeypatch.setattr(commands.PromptNetTraining, "loss", real)
                os.kill(os.getpid(), number)
                return real(training, batch)

            monkeypatch.setattr(commands.PromptNetTraining, "loss", once)

    halved = command(tmp_path / "halved.safetensors", "--steps", "3")
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        commands.run(halved, toybox, interrupt)
    assert load_training(halved.checkpoint)[1]["step"].item() == 1 and not halved.out.exists()
    said.clear()
    commands.run(halved, toybox, said.append)
    assert "10 pictures from" in said[0] and "going on from step 1" in said[1]
    one, other = (load_promptnet(tmp_path / f"{name}.safetensors") for name in ("whole", "halved"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    with pytest.raises(Exception, match="seed=0, not 1"):
        commands.run(command(tmp_path / "halved.safetensors", "--steps", "3", "--seed", "1"), toybox, said.append)


def test_a_run_in_slices_of_minutes_ends_as_one_in_one_go_and_leaves_sheets_to_look_at(toybox, tmp_path, monkeypatch):
    said = []
    whole = command(tmp_path / "whole.safetensors", "--steps", "4", "--sheet-every", "2")
    commands.run(whole, toybox, said.append)
    sliced = command(tmp_path / "sliced.safetensors", "--steps", "4", "--sheet-every", "2", "--minutes", "1")
    clock = iter(range(0, 10_000, 61))
    monkeypatch.setattr(commands.time, "monotonic", lambda: next(clock))
    for step in (1, 2, 3):
        assert commands.run(sliced, toybox, said.append)["steps"] == step and not sliced.out.exists()
        assert said[-1] == "the minutes are over; the same command goes on from here"
    assert commands.run(sliced, toybox, said.append)["promptnet"] == str(sliced.out)
    one, other = (load_promptnet(made.out).state_dict() for made in (whole, sliced))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for made in (whole, sliced):
        for name in ("00002", "finished"):
            path = commands.sheet(made, name)
            assert f"look at {path}" in said
            with Image.open(path) as shown:
                assert shown.width >= SIZE and shown.height >= 2 * SIZE
    looks = [np.asarray(Image.open(commands.sheet(whole, name))) for name in ("00002", "finished")]
    assert looks[0].shape == looks[1].shape and (looks[0] != looks[1]).any()


def test_bfloat16_trains_to_nearly_the_same(toybox, tmp_path):
    losses = []
    for more in ((), ("--bf16",)):
        made = command(tmp_path / f"{len(more)}.safetensors", "--steps", "2", *more)
        losses.append(commands.run(made, toybox, lambda text: None)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_it_is_saved_every_so_many_seconds_too_and_never_goes_on_from_another_start(toybox, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    monkeypatch.setattr(keeping, "SHARE", 1e9)
    one, step = command(tmp_path / "one.safetensors", "--steps", "3"), commands.PromptNetTraining._one_step

    def killed(training):
        if training.step == 2:
            raise SystemExit
        return step(training)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(commands.PromptNetTraining, "_one_step", killed)
        commands.run(one, toybox, lambda text: None)
    assert load_training(one.checkpoint)[1]["step"].item() == 2
    with pytest.raises(TrainingError, match="began with another PromptNet"):
        commands.run(command(one.out, "--steps", "3", "--noun", "ball"), toybox, lambda text: None)
    assert commands.run(one, toybox, lambda text: None)["steps"] == 3


def test_it_begins_from_another_of_the_same_sizes(toybox, tmp_path):
    first = tmp_path / "first.safetensors"
    commands.run(command(first, "--steps", "1"), toybox, lambda text: None)
    second = command(tmp_path / "second.safetensors", "--steps", "1", "--start", str(first), "--learning-rate", "1e-9")
    commands.run(second, toybox, lambda text: None)
    begun, ended = load_promptnet(first).state_dict(), load_promptnet(second.out).state_dict()
    fresh = new_promptnet(toybox).state_dict()
    for name, value in ended.items():
        torch.testing.assert_close(value, begun[name], rtol=1e-3, atol=1e-6)
    assert not torch.equal(ended["output.weight"], fresh["output.weight"])
    with pytest.raises(PromptNetError, match="--start .*sizes"):
        commands.run(
            command(tmp_path / "third.safetensors", "--tokens", "2", "--start", str(first)), toybox, lambda text: None
        )


def test_the_command_line_reports_and_says_what_is_wrong(toybox, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands.Toybox, "load", lambda: toybox)
    assert program.main(arguments(tmp_path / "one.safetensors", "--steps", "1")) == 0
    report = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert report["steps"] == 1 and report["parameters"] == 4_178_848
    for more, message in (
        (("--steps", "0"), "steps=0"),
        (("--save-every", "0"), "--save-every"),
        (("--minutes", "0"), "--minutes 0.0"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--data", str(tmp_path / "none")), "is not a folder"),
    ):
        assert program.main(arguments(tmp_path / "two.safetensors", *more)) == 1
        assert message in capsys.readouterr().err
    assert program.main(arguments(tmp_path / "two.pt")) == 1
    assert "ends in .safetensors" in capsys.readouterr().err

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    assert program.main(arguments(tmp_path / "one.safetensors")) == 130


def test_pictures_of_a_folder_are_read_and_kept(toybox, tmp_path):
    folder, cache = tmp_path / "pictures", tmp_path / "kept.safetensors"
    folder.mkdir()
    drawn = list(drawn_pictures(2, 3))
    for name, picture in zip("ab", drawn, strict=True):
        to_image(picture).save(folder / f"{name}.png")
    said = []
    found = toybox_pictures(toybox, str(folder), 99, 0, cache, said.append)
    expected = encoded_pictures(toybox, drawn)
    torch.testing.assert_close(found.latents, expected.latents)
    assert found.image_tokens.dtype == torch.float16 and found.image_tokens.shape == (2, 65, 128)
    again = toybox_pictures(toybox, str(folder), 99, 0, cache, said.append)
    assert torch.equal(again.latents, found.latents) and said[-1] == f"2 pictures from {cache}"
    (folder / "b.png").unlink()
    assert len(toybox_pictures(toybox, str(folder), 99, 0, cache, said.append)) == 1
    assert read_cache(cache, "another key") is None
    cache.write_bytes(cache.read_bytes()[:-9])
    assert len(toybox_pictures(toybox, str(folder), 99, 0, cache, said.append)) == 1


def test_drawn_pictures_are_what_the_seed_says():
    one, again, other = (list(drawn_pictures(3, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True)) and not torch.equal(one[0], other[0])
    assert one[0].shape == (SIZE, SIZE, 3) and one[0].min() >= 0 and one[0].max() <= 1


def test_toyboxs_starts_from_its_networks(toybox):
    network = new_promptnet(toybox, noun="ball")
    embeddings = toybox.text.text_model.embeddings
    ball, positions = embeddings.token_embedding.weight[words_to_ids("ball")[0]], embeddings.position_embedding.weight
    assert torch.equal(network.start, ball + positions[4:8])  # after the start token, "a", "photo" and "of"
    assert torch.equal(network.middle_block[0].in_layers[2].weight, toybox.unet.middle_block[0].in_layers[2].weight)
    assert network.config == TOYBOX_PROMPTNET
    with pytest.raises(PromptNetError, match="never taught the word 'giraffe'"):
        new_promptnet(toybox, noun="giraffe")
