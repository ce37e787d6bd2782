"""The kernel's networks: shapes, odd sizes, causality, CLIP's own vocabulary."""

import torch

from profusion.models import configs
from profusion.models.clip import TextModel, VisionModel
from profusion.models.tokenizer import END, START, id_to_text, tokenize, words_to_ids
from profusion.models.unet import UNet
from profusion.models.vae import VAE

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


def test_vae_halves_the_sides_three_times():
    torch.manual_seed(0)
    vae = VAE(configs.VAEConfig(32, (1, 1, 1, 1), 1)).eval()
    pictures = torch.rand(1, 32, 48, 3)
    latents = vae.latents(pictures)
    assert latents.shape == (1, 4, 4, 6)
    decoded = vae.pictures(latents)
    assert decoded.shape == pictures.shape and decoded.min() >= 0 and decoded.max() <= 1


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


def test_long_prompts_keep_their_end_token():
    assert tokenize("cat " * 100)[0, -1] == END
