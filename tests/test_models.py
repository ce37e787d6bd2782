"""The kernel's networks: shapes, odd sizes, causality, CLIP's own vocabulary."""

from dataclasses import replace

import pytest
import torch

from profusion.models import configs
from profusion.models.clip import TextModel, VisionModel
from profusion.models.mmdit import MMDiT, grid_embedding
from profusion.models.tokenizer import END, START, id_to_text, tokenize, words_to_ids
from profusion.models.unet import UNet
from profusion.models.vae import VAE
from profusion.toybox.pipeline import load_network, save_network

TINY = configs.UNetConfig(32, (1, 2), 1, (1, 1), 1, 16, num_heads=2)


def unet(config=TINY) -> UNet:
    torch.manual_seed(0)
    return UNet(config).eval().requires_grad_(False)


def test_unet_keeps_odd_sizes():
    x = torch.randn(2, 4, 7, 9)
    assert unet()(x, torch.tensor([1, 900]), torch.randn(2, 5, 16)).shape == x.shape


def test_unet_hands_every_patch_its_layer_and_honours_what_it_returns():
    seen = []

    def patch(n, context, value, options):
        seen.append((*options["block"], options["block_index"], tuple(options["activations_shape"])))
        return n, context, value * 0

    network, x, t, context = unet(), torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 5, 16)
    changed = network(x, t, context, transformer_options={"patches": {"attn2_patch": [patch]}})
    assert [layer[:3] for layer in seen] == [
        ("input", 1, 0),
        ("input", 3, 0),
        ("middle", 0, 0),
        ("output", 0, 0),
        ("output", 1, 0),
        ("output", 2, 0),
        ("output", 3, 0),
    ]
    assert seen[0][3] == (1, 32, 8, 8) and seen[2][3] == (1, 64, 4, 4)
    assert not torch.allclose(changed, network(x, t, context))


def test_looking_at_the_maps_changes_nothing():
    maps = {}
    network, x, t, context = unet(), torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 5, 16)
    seen = network(x, t, context, transformer_options={"attention_probe": maps.__setitem__})
    assert torch.allclose(seen, network(x, t, context), atol=1e-5)
    assert len(maps) == 7 and all(torch.allclose(p.sum(-1), torch.ones(())) for p in maps.values())


SMALL_JOINT = configs.MMDiTConfig(heads=1, blocks=2, context_dim=16)


def mmdit() -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(SMALL_JOINT).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_mmdit_draws_any_whole_patches_and_looking_at_its_maps_changes_nothing(size):
    maps, network = {}, mmdit()
    x, t, context = torch.randn(2, 4, *size), torch.tensor([5.5, 900]), torch.randn(2, 5, 16)
    drawn = network(x, t, context)
    assert drawn.shape == x.shape
    assert torch.allclose(network(x, t, context, maps.__setitem__), drawn, atol=1e-5)
    tokens = size[0] * size[1] // 4
    assert [found.shape for found in maps.values()] == [(2, 1, tokens, 5 + tokens)] * 2
    assert all(torch.allclose(found.sum(-1), torch.ones(())) for found in maps.values())


def test_mmdits_places_depend_on_where_a_patch_is_and_not_on_the_pictures_size():
    small, large = (grid_embedding(64, side, side, torch.device("cpu")).view(side, side, 64) for side in (3, 9))
    assert torch.allclose(small[0, 0], large[0, 0]) and torch.allclose(small[1, 2], large[4, 8], atol=1e-5)
    assert len({tuple(row.tolist()) for row in large.view(-1, 64)}) == 81
    wide = grid_embedding(64, 2, 4, torch.device("cpu"))
    assert not torch.allclose(wide[0, 0], wide[0, 1])


def test_mmdits_text_and_time_reach_the_picture():
    network, x, t, context = mmdit(), torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, 16)
    drawn = network(x, t, context)
    assert not torch.allclose(drawn, network(x, t, context + 1)) and not torch.allclose(
        drawn, network(x, t + 99, context)
    )


@pytest.mark.parametrize(("field", "value"), [("heads", 0), ("blocks", 1.5), ("mlp_ratio", 0), ("context_dim", -1)])
def test_an_impossible_mmdit_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(SMALL_JOINT, **{field: value})


def test_vae_halves_the_sides_three_times():
    torch.manual_seed(0)
    vae = VAE(configs.VAEConfig(32, (1, 1, 1, 1), 1)).eval()
    pictures = torch.rand(1, 32, 48, 3)
    latents = vae.latents(pictures)
    assert latents.shape == (1, 4, 4, 6)
    decoded = vae.pictures(latents)
    assert decoded.shape == pictures.shape and decoded.min() >= 0 and decoded.max() <= 1


def filled(network):
    """Every parameter a wave of its own: weights that any implementation can be given."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(network.named_parameters())):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = 0.15 * torch.sin(numbers * (0.7 + 0.01 * index) + index)
            parameter.copy_(wave.view(parameter.shape) + ("norm" in name and name.endswith("weight")))
    return network.eval()


def some(values):
    """Six numbers from all over a tensor."""
    return values.flatten()[:: values.numel() // 6][:6]


def assert_recorded(values, expected):
    torch.testing.assert_close(some(values), torch.tensor(expected), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_text_tower_computes_what_it_always_did():
    """Recorded from the pack's own towers, which these took the place of and which were tested against the host's."""
    text, ids = filled(TextModel(configs.TextConfig(32, 2, 4, 64))), tokenize(["a photo of a cat", "snow"])
    recorded = [-1.414158, -0.688082, 0.812795, 0.137900, -0.062494, 0.065560]
    assert_recorded(text(ids), recorded)
    embeddings = text.text_model.embeddings
    given = embeddings.token_embedding(ids) + embeddings.position_embedding.weight
    assert_recorded(text.encode_embeddings(given), recorded)
    assert torch.equal(text(ids), text.encode_embeddings(given)), "and no hook is left"
    assert_recorded(text.embed(ids), [-0.214140, -0.200856, -0.185872, -0.169316, -0.223261, -0.233519])


@torch.no_grad()
def test_the_image_tower_computes_what_it_always_did():
    vision = filled(VisionModel(configs.VisionConfig(32, 2, 4, 64, image_size=24, patch_size=8, projection=16)))
    pixels = vision.preprocess(torch.linspace(0, 1, 2 * 30 * 24 * 3).view(2, 30, 24, 3))
    assert_recorded(vision(pixels), [0.277246, -0.612878, -1.462891, -0.545318, 1.270919, -0.681498])
    assert_recorded(vision.embed(pixels), [-0.330893, -0.214949, 0.313012, 0.240989, 0.096141, -0.370451])


def test_given_embeddings_are_encoded_in_any_mode_and_no_hook_stays():
    text = filled(TextModel(configs.TextConfig(32, 2, 4, 64)))
    x = torch.randn(2, 9, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(text.encode_embeddings(x)[0, 4].square().sum(), x)
    assert gradient[0, :5].all(dim=-1).all() and not gradient[0, 5:].any() and not gradient[1].any()
    with pytest.raises(RuntimeError):
        text.encode_embeddings(torch.randn(1, 3, 31))
    assert not text.text_model.embeddings._forward_hooks


def test_towers_start_as_torch_draws_them():
    """Spread out over +-1/sqrt(inputs), and with no bias of zero as transformers has it."""
    text = TextModel(configs.TextConfig(32, 2, 4, 64))
    layer = text.text_model.encoder.layers[0].mlp.fc1
    bound = 32**-0.5
    assert layer.bias.any() and 0.8 * bound < layer.weight.abs().max() <= bound


def test_text_is_causal_and_pools_its_first_end_token():
    torch.manual_seed(0)
    text = TextModel(configs.TextConfig(32, 2, 2, 64)).eval()
    one, two = tokenize(["a red ball", "a red star"])
    a, b = text(one[None]), text(two[None])
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3], b[:, 3])
    assert torch.equal(text.pool(a, one[None])[0], a[0, 4])


def test_vision_embeds_any_size_to_unit_length():
    torch.manual_seed(0)
    vision = VisionModel(configs.VisionConfig(32, 1, 2, 64, image_size=24, patch_size=8, projection=16)).eval()
    embedded = vision.embed(vision.preprocess(torch.rand(3, 40, 30, 3)))
    assert embedded.shape == (3, 16) and torch.allclose(embedded.norm(dim=-1), torch.ones(3))


def test_the_tokenizer_is_clips():
    """Ids from CLIP's published vocabulary."""
    assert words_to_ids("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert words_to_ids("  A  Photo of a\nCAT ") == [320, 1125, 539, 320, 2368]
    assert id_to_text(2368) == "cat</w>"
    row = tokenize("a cat")[0]
    assert row.tolist() == [START, 320, 2368, *[END] * 74]
    assert words_to_ids("it's 12 ice-cream!") == [585, 568, 272, 273, 733, 268, 3867, 256]
    assert id_to_text(49408) == ""


def test_long_prompts_keep_their_end_token():
    assert tokenize("cat " * 100)[0, -1] == END


def test_a_network_in_eight_bits_is_rounded_by_half_a_step_of_its_rows(tmp_path):
    network = mmdit()
    with torch.no_grad():
        network.joint_blocks[0].x_block.attn.qkv.weight[0] *= 100  # one row's size is not the others'
    written = save_network("mmdit", network, tmp_path)
    state, loaded = network.state_dict(), load_network("mmdit", tmp_path)
    assert written < 1.3 * sum(value.numel() for value in state.values()) and loaded.keys() == state.keys()
    for name, value in state.items():
        rows = value.flatten(1) if value.ndim > 1 else value[None]
        bound = rows.abs().amax(dim=1) / 127 * 0.501 if value.ndim > 1 else rows.abs().amax(dim=1) * 2**-10
        assert ((loaded[name].reshape(rows.shape) - rows).abs().amax(dim=1) <= bound + 1e-7).all(), name
    again = mmdit()
    again.load_state_dict(loaded)
    save_network("mmdit", again, tmp_path / "again")
    assert all(torch.equal(value, loaded[name]) for name, value in load_network("mmdit", tmp_path / "again").items())
