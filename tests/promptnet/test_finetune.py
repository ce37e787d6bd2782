"""Fine-tuning: what a change of an attention layer is and becomes in a file, what moves, what it
minimises, how it resumes."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from profusion.diffusion import timestep_of
from profusion.infusion import UnsupportedModelError
from profusion.loop import TrainingError
from profusion.losses import masked_weighted_noise_error, weighted_noise_error
from profusion.promptnet import PromptNetError
from profusion.promptnet.changes import (
    FullChange,
    LowRankChange,
    attention_layers,
    changed,
    patch_tensors,
    save_patch,
    start_changes,
)
from profusion.promptnet.file import load_training, save_promptnet
from profusion.promptnet.finetune import FinetuneOptions, FinetunePictures, FinetuneTraining, trainable_copy
from profusion.promptnet.pseudo_word import encode_tokens, prompt_tokens

LAYER = "middle_block.1.transformer_blocks.0.attn2.to_k"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed_weight(weight, change):
    """W', by the definition."""
    return weight.float() + change.matrix()


def stirred_changes(small, rank=2):
    """Changes that are not nothing."""
    changes = start_changes(
        attention_layers(dict(small.unet.named_parameters())), rank, torch.Generator().manual_seed(3)
    )
    for seed, change in enumerate(changes.values()):
        for value in change.parameters().values():
            value.copy_(0.3 * random(*value.shape, seed=seed) / value.shape[-1] ** 0.5)
    return changes


def pictures(count=2, masks=None):
    return FinetunePictures(
        random(count, 4, 8, 8, seed=5), random(count, 5, 20, seed=6), random(count, 4, 8, 8, seed=7), masks
    )


def training(small, network=None, given=None, changes=None, predict=None, encode=None, sigmas=None, **options):
    options = FinetuneOptions(**{"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "prompts": ("S*",), **options})
    place = prompt_tokens("S*")

    def evaluate(x, sigma, context):
        return small.unet(x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt(), timestep_of(sigma), context)

    return FinetuneTraining(
        network or trainable_copy(small.stirred()),
        predict or evaluate,
        encode or (lambda prompt, word: encode_tokens(small.text, *place, word)),
        given or pictures(),
        options,
        changes,
        sigmas=sigmas,
    )


def new_changes(small, rank=2):
    return start_changes(attention_layers(dict(small.unet.named_parameters())), rank, torch.Generator().manual_seed(3))


def finish(small, run):
    with changed(small.unet, run.changes):
        return list(run.steps())


# Changes


def test_all_attention_layers_take_part_and_nothing_else(small):
    layers = attention_layers(dict(small.unet.named_parameters()))
    assert len(layers) == 8 * small.config.cross_attentions  # two attentions of four matrices in each block
    weights = {name.removesuffix(".weight"): value for name, value in small.unet.named_parameters()}
    assert all(tuple(weights[name].shape) == shape for name, shape in layers.items())
    assert {name.split(".attn")[-1][2:] for name in layers} == {"to_q", "to_k", "to_v", "to_out.0"}
    with pytest.raises(UnsupportedModelError, match="no attention layers"):
        attention_layers({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)})


def test_changes_start_as_nothing_and_alike_from_a_seed():
    layers = {"a.attn1.to_q": (6, 4), "b": (3, 8)}
    one, other = (start_changes(layers, 4, torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(not change.matrix().any() for change in one.values())
    assert torch.equal(one["a.attn1.to_q"].down, other["a.attn1.to_q"].down) and one["a.attn1.to_q"].down.all()
    assert one["b"].down.shape == (3, 8)  # a rank above the weight's own is cut
    (full,) = start_changes({"b": (3, 8)}, 0, torch.Generator()).values()
    assert isinstance(full, FullChange) and full.difference.shape == (3, 8)
    with pytest.raises(ValueError, match="rank=-1"):
        start_changes(layers, -1, torch.Generator())


@pytest.mark.parametrize("change", [LowRankChange(random(6, 2), random(2, 4, seed=1), 0.5), FullChange(random(6, 4))])
def test_a_changed_weight_is_the_weight_and_the_change(change):
    weight, x = random(6, 4, seed=8), random(3, 5, 4, seed=9)
    by_hand = weight + (0.5 * change.up @ change.down if isinstance(change, LowRankChange) else change.difference)
    torch.testing.assert_close(changed_weight(weight, change), by_hand)
    torch.testing.assert_close(x @ weight.T + change.on(x), x @ by_hand.T, rtol=0, atol=1e-5)
    assert change.on(x.half()).dtype == torch.float16


@pytest.mark.parametrize("rank", [0, 2])
def test_hooks_compute_what_the_changed_weights_would(small, rank):
    changes = stirred_changes(small, rank)
    x, timesteps, context = random(1, 4, 8, 8), torch.tensor([500]), random(1, 7, 24, seed=1)
    plain = small.unet(x, timesteps, context)
    with changed(small.unet, changes) as counts:
        hooked = small.unet(x, timesteps, context)
    assert set(counts.values()) == {1} and torch.equal(small.unet(x, timesteps, context), plain)
    weights = {name: value.clone() for name, value in small.unet.state_dict().items()}
    for name, change in changes.items():
        weights[f"{name}.weight"] = changed_weight(weights[f"{name}.weight"], change)
    merged = torch.func.functional_call(small.unet, weights, (x, timesteps, context))
    torch.testing.assert_close(hooked, merged, rtol=0, atol=1e-5)
    assert not torch.allclose(hooked, plain, rtol=0, atol=1e-3)


def test_hooks_are_gone_after_an_error(small):
    before = [len(module._forward_hooks) for module in small.unet.modules()]
    with pytest.raises(RuntimeError, match="stop"), changed(small.unet, stirred_changes(small)):
        raise RuntimeError("stop")
    with pytest.raises(KeyError), changed(small.unet, {LAYER: FullChange(torch.zeros(2, 2)), "nothing": None}):
        pass
    assert [len(module._forward_hooks) for module in small.unet.modules()] == before


def test_a_patch_file_has_the_names_that_readers_know(small, tmp_path):
    tensors = patch_tensors({LAYER: LowRankChange(random(6, 2), random(2, 4), 0.5)})
    stem = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        f"{stem}.lora_up.weight": (6, 2),
        f"{stem}.lora_down.weight": (2, 4),
        f"{stem}.alpha": (),
    }
    assert tensors[f"{stem}.alpha"] / 2 == 0.5
    assert patch_tensors({LAYER: FullChange(random(6, 4))}).keys() == {f"{stem}.diff"}
    size = save_patch(tensors, tmp_path / "new" / "one.safetensors", {"rank": "2"})
    assert size == (tmp_path / "new" / "one.safetensors").stat().st_size
    read = safetensors.torch.load_file(tmp_path / "new" / "one.safetensors")
    assert all(torch.equal(read[name], value) and value.dtype == torch.float16 for name, value in tensors.items())
    with pytest.raises(PromptNetError, match="grew out of bounds"):
        patch_tensors({LAYER: FullChange(torch.full((2, 2), 1e6))})
    (tmp_path / "file").touch()
    with pytest.raises(PromptNetError, match="could not be saved"):
        save_patch(tensors, tmp_path / "file" / "one.safetensors")


# Training


def test_the_masked_loss_is_each_rows_mean_over_its_mask():
    predicted, noise, weight = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1), torch.tensor([2.0, 5.0])
    everywhere = masked_weighted_noise_error(predicted, noise, weight, torch.ones(2, 3, 5))
    torch.testing.assert_close(everywhere, weighted_noise_error(predicted, noise, weight))
    mask = torch.zeros(2, 3, 5)
    mask[0, 1, 2], mask[1, :, :2] = 1, 0.5
    square = (predicted - noise) ** 2
    expected = (2 * square[0, :, 1, 2].mean() + 5 * square[1, :, :, :2].mean()) / 2
    torch.testing.assert_close(masked_weighted_noise_error(predicted, noise, weight, mask), expected)


def test_a_copy_learns_and_the_original_does_not(small):
    with torch.inference_mode():
        loaded = small.stirred().half()
        copy = trainable_copy(loaded)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert {value.dtype for value in copy.state_dict().values()} == {torch.float32}
    losses = list(training(small, copy).steps())
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    assert not torch.equal(copy.output.bias, loaded.output.bias.float())


@pytest.mark.parametrize("rank", [0, 2])
def test_both_learn_at_their_own_rates_and_the_base_stays(small, rank):
    frozen = {name: value.clone() for name, value in small.unet.state_dict().items()}
    run = training(
        small, changes=new_changes(small, rank), steps=1, learning_rate=1e-3, attention_learning_rate=1e-2, rank=rank
    )
    before = run.network.output.bias.detach().clone()
    finish(small, run)
    moved = (run.network.output.bias - before).abs()
    torch.testing.assert_close(moved.max(), torch.tensor(1e-3), rtol=0.05, atol=0)  # AdamW's first step
    one = run.changes[LAYER].parameters()["up" if rank else "difference"]
    torch.testing.assert_close(one.abs().max().detach(), torch.tensor(1e-2), rtol=0.05, atol=0)
    assert all(torch.equal(value, small.unet.state_dict()[name]) for name, value in frozen.items())
    assert all(item.grad is None for item in small.unet.parameters())


def test_what_is_shown_and_what_is_drawn_may_differ(small):
    """The loss by hand, with the naive forms of everything."""
    mask = torch.zeros(2, 8, 8)
    mask[:, 2:5, 1:7] = 1
    given = pictures(masks=mask)
    run = training(small, given=given)
    batch = run.batch()
    sigma = batch.sigma.view(-1, 1, 1, 1)
    noisy = given.targets[batch.rows] + sigma * batch.noise
    with torch.no_grad():
        word = run.network(given.latents[batch.rows], timestep_of(batch.sigma), given.image_tokens[batch.rows])
        context = encode_tokens(small.text, *prompt_tokens("S*"), word)
        predicted = small.unet(noisy / (1 + sigma**2).sqrt(), timestep_of(batch.sigma), context)
        expected = ((predicted - batch.noise) ** 2)[:, :, 2:5, 1:7].mean()
        torch.testing.assert_close(run.loss(batch), expected)


def test_mixed_shows_one_picture_and_draws_another(small):
    """Nothing else of a batch depends on it, and of one picture it makes no difference."""
    words = []

    def encode(prompt, word):
        words.append(word.detach())
        return encode_tokens(small.text, *prompt_tokens("S*"), word)

    own = training(small, batch_size=64, encode=encode)
    mixed = training(small, batch_size=64, encode=encode, mixed=True)
    one, other = own.batch(), mixed.batch()
    assert one.shown is None and torch.equal(one.rows, other.rows) and torch.equal(one.noise, other.noise)
    assert torch.equal(one.sigma, other.sigma) and one.prompt == other.prompt
    pairs = {(int(shown), int(drawn)) for shown, drawn in zip(other.shown, other.rows, strict=True)}
    assert pairs == {(0, 0), (0, 1), (1, 0), (1, 1)}
    mixed.loss(other)
    own.loss(one)
    crossed = other.shown != other.rows
    assert (words[0] != words[1]).flatten(1).any(dim=1).equal(crossed)  # the loss of random networks hardly tells
    straight = replace(other, shown=other.rows)
    torch.testing.assert_close(mixed.loss(straight), own.loss(one), rtol=0, atol=0)
    alone = [training(small, given=pictures(1), steps=3, mixed=mixed) for mixed in (False, True)]
    assert finish(small, alone[0]) == finish(small, alone[1]) and alone[0].batch().shown is None


def test_a_checkpoint_from_before_there_were_mixed_pictures_goes_on(small, tmp_path):
    run = training(small, steps=4, given=pictures(2))
    steps = run.steps()
    next(steps)
    steps.close()
    run.save(tmp_path / "old.safetensors")
    network, state, notes = load_training(tmp_path / "old.safetensors")
    options = json.loads(notes["options"])
    assert options.pop("mixed") is False
    save_promptnet(network, tmp_path / "old.safetensors", "float32", {**notes, "options": json.dumps(options)}, state)
    again = training(small, steps=4, given=pictures(2))
    again.resume(tmp_path / "old.safetensors", same_start=True)
    assert again.step == 1 and again.identity == run.identity
    with pytest.raises(TrainingError, match="trained with mixed=False, not True"):
        training(small, steps=4, given=pictures(2), mixed=True).resume(tmp_path / "old.safetensors")
    assert training(small, given=pictures(2), mixed=True).identity != run.identity


def test_targets_of_another_size_than_the_references_are_learned(small):
    given = FinetunePictures(random(2, 4, 8, 8), random(2, 5, 20), random(2, 4, 12, 10, seed=3), torch.ones(2, 12, 10))
    run = training(small, network=trainable_copy(small.stirred(second_latent="noisy")), given=given, steps=2)
    assert all(torch.isfinite(torch.tensor(loss)) for loss in finish(small, run))
    assert run.batch().noise.shape[1:] == (4, 12, 10)


def test_one_picture_is_learned(small):
    """A model that can only guess the picture's level from the row of S*."""
    flat = torch.full((1, 4, 8, 8), 2.0)

    def guess(x, sigma, context):
        return (x - context[:, 1, :1, None, None]) / sigma.view(-1, 1, 1, 1)

    model = {"predict": guess, "sigmas": torch.linspace(1, 5, 20)}
    run = training(small, given=FinetunePictures(flat, random(1, 5, 20)), steps=100, learning_rate=1e-2, **model)
    before = run.loss_on(run.pictures, 4)
    list(run.steps())
    assert run.loss_on(run.pictures, 4) < 0.3 * before


def test_a_resumed_training_is_the_same_bit_for_bit(small, tmp_path):
    whole = training(small, changes=new_changes(small))
    losses = finish(small, whole)
    first = training(small, changes=new_changes(small))
    with changed(small.unet, first.changes):
        next(first.steps())
    first.save(tmp_path / "one.safetensors")
    again = training(small, trainable_copy(small.promptnet()), changes=new_changes(small))
    again.resume(tmp_path / "one.safetensors")
    assert finish(small, again) == losses[1:]
    for name, value in whole.state().items():
        assert torch.equal(value, again.state()[name]), name
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    other = training(small, given=pictures(masks=torch.ones(2, 8, 8)), changes=new_changes(small))
    with pytest.raises(TrainingError, match="other pictures"):
        other.resume(tmp_path / "one.safetensors")


def test_a_part_that_no_gradient_reaches_is_named(small):
    place = prompt_tokens("S*")
    detached = training(
        small, changes=new_changes(small), encode=lambda _, word: encode_tokens(small.text, *place, word).detach()
    )
    with pytest.raises(TrainingError, match="no gradient reaches PromptNet"):
        finish(small, detached)
    with pytest.raises(TrainingError, match="no gradient reaches the attention layers"):
        list(training(small, changes=new_changes(small)).steps())  # outside `changed`
    failing = training(small, predict=lambda x, sigma, context: x * float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        list(failing.steps())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"attention_learning_rate": 0}, "attention_learning_rate=0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_options_are_validated(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(**options)


def test_pictures_are_validated():
    good = SimpleNamespace(latents=random(2, 4, 8, 8), tokens=random(2, 5, 20))
    with pytest.raises(ValueError, match="same pictures"):
        FinetunePictures(good.latents, good.tokens, good.latents[:1])
    with pytest.raises(ValueError, match="must be .N, H, W. of the targets' cells"):
        FinetunePictures(good.latents, good.tokens, masks=torch.ones(2, 4, 4))
    with pytest.raises(TrainingError, match="a mask is empty"):
        FinetunePictures(good.latents, good.tokens, masks=torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]))
    with pytest.raises(TrainingError, match="not finite"):
        FinetunePictures(good.latents, good.tokens, good.latents * float("nan"))
