"""PromptNet: what it starts from, what S* depends on, sizes and odd shapes, and what it refuses."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from profusion.models.configs import UNetConfig
from profusion.models.mmdit import MMDiT
from profusion.models.unet import UNet
from profusion.promptnet import network as networks
from profusion.promptnet.file import save_promptnet
from profusion.promptnet.network import (
    SD15_PROMPTNET,
    SD21_PROMPTNET,
    SDXL_PROMPTNET,
    PromptNet,
    PromptNetConfig,
    PromptNetError,
    check_fits,
    feature_blocks,
    in_cells,
    interpolated,
    merged,
    parts,
    typical_embedding,
)
from profusion.toybox.configs import TOYBOX, TOYBOX_MMDIT, TOYBOX_PROMPTNET
from profusion.toybox.pipeline import CELLS, WEIGHTS, save_network


@pytest.fixture(scope="module")
def small(small, device):
    """The same on every device, with `inputs` and `randn` for it."""
    there = SimpleNamespace(**vars(small))
    there.unet, there.text = (copy.deepcopy(network).to(device) for network in (small.unet, small.text))
    there.promptnet, there.stirred = (
        lambda make=make, **changes: make(**changes).to(device) for make in (small.promptnet, small.stirred)
    )
    there.inputs = lambda *given, **options: tuple(value.to(device) for value in inputs(*given, **options))
    there.randn = lambda *size: torch.randn(*size).to(device)
    return there


def inputs(rows=2, size=(8, 8), image_width=20, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 4, *size, generator=generator)
    timesteps = torch.randint(1000, (rows,), generator=generator)
    return latent, timesteps, torch.randn(rows, tokens, image_width, generator=generator)


def unet_features(unet, x, timesteps, context, blocks):
    """What hooks on the UNet itself see at these input blocks and after the middle."""
    seen = {}
    hooks = [
        unet.input_blocks[index].register_forward_hook(lambda _, __, out, index=index: seen.__setitem__(index, out))
        for index in blocks
    ]
    hooks.append(unet.middle_block.register_forward_hook(lambda _, __, out: seen.__setitem__("middle", out)))
    unet(x, timesteps, context)
    for hook in hooks:
        hook.remove()
    return [seen[index] for index in (*blocks, "middle")]


@pytest.mark.parametrize("second_latent", networks.SECOND_LATENTS)
def test_it_starts_as_the_unets_encoder_and_as_the_given_word(small, second_latent):
    network = small.promptnet(second_latent=second_latent)
    latent, timesteps, image_tokens = small.inputs(size=(8, 6))
    noisy = torch.randn_like(latent) if network.config.with_noise else None
    context = small.randn(2, 7, 24)
    ours = network.encoder_features(latent, timesteps, context, noisy)
    theirs = unet_features(small.unet, latent, timesteps, context, (0, 2, 3))
    assert len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    mean, _ = typical_embedding(small.text.text_model.embeddings.token_embedding.weight)
    assert torch.equal(network(latent, timesteps, image_tokens, noisy), mean.expand(2, 1, 24))


@pytest.mark.parametrize("normalise", [False, True])
def test_s_is_the_formula(small, normalise):
    """start + spread * conv(concat(norm(proj(h)))), by plain sums over windows."""
    network = small.stirred(tokens=3, normalise=normalise)
    latent, timesteps, image_tokens = small.inputs(size=(4, 4))  # native: nothing is averaged
    features = unet_features(
        # The same walk with PromptNet's own, now different, weights.
        _as_unet(network, small.config),
        latent,
        timesteps,
        network.image_projection(image_tokens),
        (0, 2, 3),
    )
    grid = []
    for h, projection in zip(features, network.projections, strict=True):
        stride = h.shape[-1] // 2
        windows = h.unfold(2, stride, stride).unfold(3, stride, stride)  # (B, C, 2, 2, stride, stride)
        grid.append(torch.einsum("bcyxij,ocij->boyx", windows, projection.weight) + projection.bias.view(1, -1, 1, 1))
    if normalise:
        grid = [(part - part.mean((1, 2, 3), True)) / (part.var((1, 2, 3), False, True) + 1e-5).sqrt() for part in grid]
    joined = torch.cat(grid, dim=1)
    flat = torch.einsum("bcyx,ocyx->bo", joined, network.output.weight) + network.output.bias
    expected = network.start + network.spread * flat.view(2, 3, 24)
    torch.testing.assert_close(network(latent, timesteps, image_tokens), expected, rtol=1e-4, atol=1e-5)


def _as_unet(network, config):
    unet = UNet(config)
    unet.load_state_dict(network.state_dict(), strict=False)
    return unet.eval().to(network.start.device)


def test_everything_it_is_given_matters(small):
    network = small.stirred(second_latent="noisy")
    latent, timesteps, image_tokens = small.inputs()
    noisy = torch.randn_like(latent)
    base = network(latent, timesteps, image_tokens, noisy)
    assert base.shape == (2, 1, 24)
    changed = [
        network(latent + 1, timesteps, image_tokens, noisy),
        network(latent, (timesteps + 400) % 1000, image_tokens, noisy),
        network(latent, timesteps, image_tokens + torch.randn_like(image_tokens), noisy),
        network(latent, timesteps, image_tokens, noisy + 1),
    ]
    assert all((word - base).abs().max() > 1e-5 for word in changed)


def test_the_reference_as_second_latent_is_used(small):
    network = small.stirred(second_latent="reference")
    latent, timesteps, image_tokens = small.inputs()
    added = network.second_latent(latent)
    outputs, _ = network.encode(
        latent, network.embed_timesteps(timesteps, latent.dtype), network.image_projection(image_tokens), {}, added
    )
    features = network.encoder_features(latent, timesteps, network.image_projection(image_tokens))
    assert torch.equal(features[0], outputs[0]) and torch.equal(outputs[0], network.input_blocks[0][0](latent) + added)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (5, 9), (8, 8), (17, 4), (33, 31)])
@pytest.mark.parametrize("second_latent", networks.SECOND_LATENTS)
def test_any_latent_of_at_least_one_cell_has_a_word(small, size, second_latent):
    network = small.stirred(second_latent=second_latent, tokens=2)
    latent, timesteps, image_tokens = small.inputs(size=size)
    word = network(latent, timesteps, image_tokens, latent if network.config.with_noise else None)
    assert word.shape == (2, 2, 24) and torch.isfinite(word).all()


def test_a_constant_picture_has_the_same_grid_at_any_size(small):
    """Bringing a feature to the grid averages: it neither crops nor scales."""
    network = small.stirred()
    h = torch.arange(32.0).view(1, 32, 1, 1).to(network.start.device)
    grids = [
        network.to_grid(h.expand(1, 32, *size), network.projections[0]) for size in ((4, 4), (1, 1), (9, 5), (64, 3))
    ]
    assert all(torch.allclose(grid, grids[0], atol=1e-5) for grid in grids)


def test_all_timesteps_at_once_are_those_one_by_one(small):
    network = small.stirred(tokens=2)
    latent, _, image_tokens = small.inputs(rows=1)
    timesteps = torch.tensor([999, 700, 333, 0, 12]).to(latent.device)
    together = network.embed_all(latent, image_tokens, timesteps)
    alone = torch.cat([network(latent, t[None], image_tokens) for t in timesteps])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_interpolation_stays_at_the_ends():
    words = torch.tensor([1.0, 3.0, 11.0]).view(3, 1, 1)
    at = interpolated(words, torch.tensor([10.0, 20.0, 40.0]), torch.tensor([0.0, 10.0, 15.0, 20.0, 25.0, 40.0, 99.0]))
    assert at.flatten().tolist() == [1.0, 1.0, 2.0, 3.0, 5.0, 11.0, 11.0]
    assert torch.equal(interpolated(words, torch.tensor([10.0, 20.0, 40.0]), torch.tensor([40, 20, 10])), words.flip(0))
    assert interpolated(torch.zeros(2, 5), torch.tensor([0.0, 1.0]), torch.tensor([0.3, 0.5, 0.9])).shape == (3, 5)


def test_early_steps_do_not_throw_the_word_away(small):
    """Whatever the scale of the features, ten steps of AdamW leave S* within what words differ by."""
    network, (latent, timesteps, image_tokens) = small.promptnet(), small.inputs()
    with torch.no_grad():
        network.input_blocks[0][0].weight.mul_(100)
    _, spread = typical_embedding(small.text.text_model.embeddings.token_embedding.weight)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        network(latent, timesteps, image_tokens).sum().backward()
        optimizer.step()
    moved = ((network(latent, timesteps, image_tokens) - network.start) / spread).abs()
    assert moved.mean() > 0.01 and moved.max() < 1


def test_several_pictures_are_merged_by_weight():
    words = [torch.full((5, 2, 4), value) for value in (1.0, 5.0)]
    assert torch.equal(merged(words), torch.full((5, 2, 4), 3.0))
    assert torch.equal(merged(torch.stack(words)), merged(words))
    assert torch.equal(merged(words, [3, 1]), torch.full((5, 2, 4), 2.0))
    assert torch.equal(merged(words[:1]), words[0])
    for bad in ([0, 0], [1, -1], [1], [float("nan"), 1]):
        with pytest.raises(PromptNetError, match="weights"):
            merged(words, bad)
    with pytest.raises(PromptNetError, match="no pictures"):
        merged([])
    with pytest.raises(PromptNetError, match="one shape"):
        merged([words[0], words[0][:1]])


def test_a_word_is_cut_between_text_encoders():
    one, other = parts(torch.arange(10.0).view(1, 10), (4, 6))
    assert one.tolist() == [[0, 1, 2, 3]] and other.tolist() == [[4, 5, 6, 7, 8, 9]]


def test_words_never_taught_do_not_count_as_typical():
    table = torch.zeros(9, 3)
    table[2], table[5] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 5.0])
    mean, spread = typical_embedding(table)
    assert mean.tolist() == [2.0, 2.0, 4.0] and torch.allclose(spread, torch.tensor([2.0, 0.0, 2.0]).sqrt())
    with pytest.raises(ValueError, match="0 rows"):
        typical_embedding(torch.zeros(9, 3))


@pytest.mark.parametrize(
    ("config", "name", "blocks", "strides", "parameters", "encoder"),
    [
        (networks.SD15_PROMPTNET, "SD 1.x", (0, 3, 6, 9, 11), (8, 4, 2, 1, 1, 1), 391_346_432, 348_712_960),
        (networks.SD21_PROMPTNET, "SD 2.x", (0, 3, 6, 9, 11), (8, 4, 2, 1, 1, 1), 407_403_264, 351_662_080),
        (networks.SDXL_PROMPTNET, "SDXL", (0, 3, 6, 8), (4, 2, 1, 1, 1), 1_325_862_656, 1_238_121_600),
        (TOYBOX_PROMPTNET, "Toybox", (0, 2, 4, 5), (4, 2, 1, 1, 1), 4_178_848, 2_797_696),
    ],
)
def test_the_models_people_have(config, name, blocks, strides, parameters, encoder):
    """Names and shapes of the encoder are those of the UNet; the rest is counted."""
    with torch.device("meta"):
        network, unet = PromptNet(config), UNet(config.unet)
    assert config.architecture == name
    assert feature_blocks(config.unet) == (blocks, strides)
    theirs = {key: tuple(value.shape) for key, value in unet.state_dict().items() if key.startswith(networks.ENCODER)}
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert theirs.items() <= ours.items()
    assert not any(key.startswith(("label_emb", "output_blocks", "out.")) for key in ours)
    counts = {key: value.numel() for key, value in network.named_parameters()}
    assert sum(counts.values()) == parameters
    assert sum(count for key, count in counts.items() if key in theirs) == encoder
    side = config.grid * strides[0]
    with torch.device("meta"):
        word = network(torch.empty(2, 4, side, side), torch.empty(2), torch.empty(2, 9, config.image_width))
    assert word.shape == (2, config.tokens, config.text_width)


def test_all_of_toyboxs_weights_fit_their_budget(tmp_path):
    """40 MB for all that is shipped, also where some is still to be trained."""
    own = {"promptnet": PromptNet(TOYBOX_PROMPTNET), "mmdit": MMDiT(TOYBOX_MMDIT)}
    others = [path for path in WEIGHTS.glob("*.safetensors") if path.name.removeprefix("toybox_")[:-12] not in own]
    mmdit = save_network("mmdit", own["mmdit"], tmp_path)
    promptnet = save_promptnet(own["promptnet"], tmp_path / "promptnet.safetensors")
    assert mmdit + promptnet + sum(path.stat().st_size for path in others) <= 40_000_000
    assert mmdit <= 5_000_000


def test_a_unet_with_a_pooled_vector_is_served_without_it():
    with_y = UNetConfig(32, (1, 2), 1, (0, 1), 1, 24, num_heads=2, adm_channels=12)
    torch.manual_seed(0)
    unet = UNet(with_y)
    config = PromptNetConfig(with_y, 20, (10, 14), grid=2, projection=8)
    network = PromptNet.from_unet(unet.state_dict(), config, torch.Generator().manual_seed(0))
    assert network(*inputs()).shape == (2, 1, 24)


def test_the_same_generator_makes_the_same_network_and_leaves_the_global_one(small):
    before = torch.random.get_rng_state()
    one, other = small.promptnet(), small.promptnet()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.real_device
def test_made_in_inference_mode_it_can_still_be_trained(small):
    with torch.inference_mode():
        network = small.promptnet()
    network(*small.inputs()).square().sum().backward()
    assert network.output.weight.grad.abs().sum() > 0


def test_another_unet_is_refused(small):
    other = dict(small.unet.state_dict())
    name = "input_blocks.1.0.in_layers.2.weight"
    with pytest.raises(PromptNetError, match=rf"{name} of \(32, 32, 3, 3\), it has nothing"):
        del other[name]
        PromptNet.from_unet(other, small.promptnet().config, torch.Generator())
    other[name] = torch.zeros(1)
    with pytest.raises(PromptNetError, match=r"it has one of \(1,\)"):
        PromptNet.from_unet(other, small.promptnet().config, torch.Generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_widths": ()}, "text_widths"),
        ({"image_width": 0}, "image_width=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"grid": 0}, "grid=0"),
        ({"second_latent": "clean"}, "second_latent='clean'; choose one of none, noisy, reference"),
    ],
)
def test_a_configuration_is_validated(small, change, message):
    with pytest.raises(ValueError, match=message):
        small.promptnet(**change)


def test_wrong_inputs_are_named(small):
    network, (latent, timesteps, image_tokens) = small.stirred(), small.inputs()
    with pytest.raises(PromptNetError, match="width 20.*CLIP vision"):
        network(latent, timesteps, image_tokens[..., :7])
    for bad in (latent[:, :3], latent[..., :0], latent[0]):
        with pytest.raises(PromptNetError, match="4, height, width"):
            network(bad, timesteps, image_tokens)
    with pytest.raises(PromptNetError, match="give it none"):
        network(latent, timesteps, image_tokens, latent)
    noisy = small.stirred(second_latent="noisy")
    with pytest.raises(PromptNetError, match="none was given"):
        noisy(latent, timesteps, image_tokens)
    with pytest.raises(PromptNetError, match="before sampling"):
        noisy.embed_all(latent[:1], image_tokens[:1], timesteps)


def test_a_misfit_names_both_sides(small):
    config = small.promptnet().config
    check_fits(config, config.architecture, (24,), 20)
    check_fits(config)
    with pytest.raises(PromptNetError, match="24.*768 \\+ 1280"):
        check_fits(config, text_widths=(768, 1280))
    with pytest.raises(PromptNetError, match="width 20.*width 1024"):
        check_fits(config, image_width=1024)
    with pytest.raises(PromptNetError, match="7 cross-attentions of 24, but the model is SD 1.x"):
        check_fits(config, architecture="SD 1.x")


# Latents being denoised that are no reference's size


def test_a_noisy_latent_of_any_size_keeps_its_noise_and_its_middle():
    noise = torch.randn(50, 4, 40, 24, generator=torch.Generator().manual_seed(0))
    for cells in ((8, 8), (24, 24), (6, 10), (64, 64)):
        there = in_cells(noise, cells)
        assert there.shape == (50, 4, *cells) and abs(there.std() - 1) < 0.03
        assert set(there.flatten().tolist()) <= set(noise.flatten().tolist()), "cells were mixed"
    assert in_cells(noise, (40, 24)) is noise
    assert torch.equal(in_cells(noise, (24, 24)), noise[:, :, 8:32])
    places = torch.arange(40.0).view(1, 1, 40, 1).expand(1, 1, 40, 24)
    assert in_cells(places, (4, 4))[0, 0, :, 0].tolist() == [11, 17, 23, 29]


def test_a_promptnet_s_frame_is_its_models_own_size():
    assert SD15_PROMPTNET.frame == SD21_PROMPTNET.frame == 64 and SDXL_PROMPTNET.frame == 128
    widest = feature_blocks(TOYBOX)[1][0]
    assert TOYBOX_PROMPTNET.frame == CELLS == TOYBOX_PROMPTNET.grid * widest  # so nothing is averaged
    unet = replace(SD15_PROMPTNET.unet, context_dim=40)
    assert PromptNetConfig(unet, 20, (40,), grid=4).frame == 32
