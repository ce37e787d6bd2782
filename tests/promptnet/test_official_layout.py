"""The authors' released layout: names and shapes as their module makes them, and their formulas written out plainly."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from profusion.models.configs import SD21, UNetConfig
from profusion.promptnet import PromptNetError, load_promptnet
from profusion.promptnet.file import _told_from_shapes, official_promptnet

CHANNELS, ATTENDS, LAYERS, CONTEXT, IMAGE, TEXT, HEADS = (32, 32, 64, 64), (1, 1, 1, 0), 1, 24, 20, 28, (2, 2, 4, 4)
UNET = UNetConfig(32, (1, 1, 2, 2), 1, ATTENDS, 1, CONTEXT, head_channels=16, use_linear=True)


def official_shapes(channels, attends, layers, context, image, text, grid=8, projection=128):
    """name -> shape of everything in their state dict."""
    shapes, temb = {}, 4 * channels[0]

    def both(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def res_block(name, before, after):
        both(f"{name}.norm1", before)
        both(f"{name}.conv1", after, before, 3, 3)
        both(f"{name}.time_emb_proj", after, temb)
        both(f"{name}.norm2", after)
        both(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            both(f"{name}.conv_shortcut", after, before, 1, 1)

    def transformer(name, width):
        both(f"{name}.norm", width)
        both(f"{name}.proj_in", width, width)
        both(f"{name}.proj_out", width, width)
        block = f"{name}.transformer_blocks.0"
        for attention, inner in (("attn1", width), ("attn2", context)):
            shapes[f"{block}.{attention}.to_q.weight"] = (width, width)
            shapes[f"{block}.{attention}.to_k.weight"] = (width, inner)
            shapes[f"{block}.{attention}.to_v.weight"] = (width, inner)
            both(f"{block}.{attention}.to_out.0", width, width)
        both(f"{block}.ff.net.0.proj", 8 * width, width)
        both(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            both(f"{block}.{norm}", width)

    both("conv_in", channels[0], 4, 3, 3)
    both("time_embedding.linear_1", temb, channels[0])
    both("time_embedding.linear_2", temb, temb)
    both("promptnet_cond_embedding.conv_in", channels[0], 4, 3, 3)
    both("promptnet_cond_embedding.conv_out", channels[0], channels[0], 3, 3)
    both("vision_embedding", context, image)
    both("first_prompt_projection", projection, channels[0], 8, 8)
    both("residual_projections.0", channels[0], channels[0], 1, 1)  # made, saved, and never used by their sampler
    shapes["residual_projections_2.0.weight"] = (channels[0], channels[0], 1, 1)
    before = channels[0]
    for level, width in enumerate(channels):
        for index in range(layers):
            res_block(f"down_blocks.{level}.resnets.{index}", before, width)
            before = width
            if attends[level]:
                transformer(f"down_blocks.{level}.attentions.{index}", width)
        if level < len(channels) - 1:
            both(f"down_blocks.{level}.downsamplers.0.conv", width, width, 3, 3)
        side = max(8 >> (level + 1), 1)
        both(f"down_prompt_projections.{level}", projection, width, side, side)
    res_block("mid_block.resnets.0", before, before)
    transformer("mid_block.attentions.0", before)
    res_block("mid_block.resnets.1", before, before)
    both("mid_prompt_projection", projection, before, 1, 1)
    both("mid_residual_projection", before, before, 1, 1)
    shapes["mid_residual_projection_2.weight"] = (before, before, 1, 1)
    both("region_prompt_output", text, projection * (len(channels) + 2), grid, grid)
    return shapes


@pytest.fixture
def official():
    shapes = official_shapes(CHANNELS, ATTENDS, LAYERS, CONTEXT, IMAGE, TEXT, grid=2, projection=8)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        norm = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = norm + scale * torch.randn(shape, generator=generator)
    return state


def restated(p, latent, timesteps, image_tokens, second):
    """Their forward in plain functions of their state dict p."""

    def linear(name, x):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def conv(name, x, **options):
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options)

    def group_norm(name, x, eps):
        return F.group_norm(x, 32, p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def layer_norm(name, x):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def res_block(name, x, temb):
        h = conv(f"{name}.conv1", F.silu(group_norm(f"{name}.norm1", x, 1e-5)), padding=1)
        h = h + linear(f"{name}.time_emb_proj", F.silu(temb))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(group_norm(f"{name}.norm2", h, 1e-5)), padding=1)
        return (conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in p else x) + h

    def attend(name, x, context, heads):
        q, k, v = (linear(f"{name}.to_{part}", of) for part, of in (("q", x), ("k", context), ("v", context)))
        d, outs = q.shape[-1] // heads, []
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            outs.append((q[..., rows] @ k[..., rows].transpose(1, 2) / math.sqrt(d)).softmax(-1) @ v[..., rows])
        return linear(f"{name}.to_out.0", torch.cat(outs, -1))

    def transformer(name, x, context, heads):
        h = linear(f"{name}.proj_in", group_norm(f"{name}.norm", x, 1e-6).flatten(2).transpose(1, 2))
        block = f"{name}.transformer_blocks.0"
        n = layer_norm(f"{block}.norm1", h)
        h = h + attend(f"{block}.attn1", n, n, heads)
        h = h + attend(f"{block}.attn2", layer_norm(f"{block}.norm2", h), context, heads)
        value, gate = linear(f"{block}.ff.net.0.proj", layer_norm(f"{block}.norm3", h)).chunk(2, -1)
        h = h + linear(f"{block}.ff.net.2", value * F.gelu(gate))
        return x + linear(f"{name}.proj_out", h).transpose(1, 2).reshape(x.shape)

    half = CHANNELS[0] // 2
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    temb = linear("time_embedding.linear_1", torch.cat([angles.cos(), angles.sin()], -1))
    temb = linear("time_embedding.linear_2", F.silu(temb))
    context = linear("vision_embedding", image_tokens)
    embedded = conv("promptnet_cond_embedding.conv_in", second, padding=1)
    embedded = conv("promptnet_cond_embedding.conv_out", F.silu(embedded), padding=1)
    sample = conv("conv_in", latent, padding=1) + embedded
    grids = [conv("first_prompt_projection", sample, stride=8)]
    for level in range(4):
        sample = res_block(f"down_blocks.{level}.resnets.0", sample, temb)
        if ATTENDS[level]:
            sample = transformer(f"down_blocks.{level}.attentions.0", sample, context, HEADS[level])
        if level < 3:
            sample = conv(f"down_blocks.{level}.downsamplers.0.conv", sample, stride=2, padding=1)
        grids.append(conv(f"down_prompt_projections.{level}", sample, stride=max(8 >> (level + 1), 1)))
    sample = res_block("mid_block.resnets.0", sample, temb)
    sample = transformer("mid_block.attentions.0", sample, context, HEADS[3])
    sample = res_block("mid_block.resnets.1", sample, temb)
    grids.append(conv("mid_prompt_projection", sample))
    word = conv("region_prompt_output", torch.cat(grids, 1), stride=2)
    return word.flatten(2).transpose(1, 2)  # (B, 1, TEXT) for the native size


def written(tmp_path, state):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(state, path)
    return path


@pytest.mark.parametrize("with_noise", [True, False])
def test_both_forwards_agree(official, tmp_path, with_noise):
    network = load_promptnet(written(tmp_path, official), unet=UNET, with_noise=with_noise)
    assert network.config.with_noise == with_noise and network.config.holds_position
    generator = torch.Generator().manual_seed(1)
    latent, noisy = torch.randn(2, 3, 4, 16, 16, generator=generator)
    timesteps, image_tokens = torch.tensor([3, 500, 999]), torch.randn(3, 5, IMAGE, generator=generator)
    expected = restated(official, latent, timesteps, image_tokens, noisy if with_noise else latent)
    word = network(latent, timesteps, image_tokens, noisy if with_noise else None)
    assert word.shape == expected.shape == (3, 1, TEXT) and expected.std() > 0.05
    torch.testing.assert_close(word, expected, rtol=1e-4, atol=1e-5)


def test_the_released_checkpoints_sizes_are_told_from_its_shapes():
    shapes = official_shapes((320, 640, 1280, 1280), (1, 1, 1, 0), 2, 1024, 1280, 1024)
    config = _told_from_shapes(shapes)
    assert config.unet == SD21 and config.architecture == "SD 2.x"
    assert (config.image_width, config.text_widths, config.tokens, config.grid, config.projection) == (
        1280,
        (1024,),
        1,
        8,
        128,
    )
    assert config.with_noise and config.holds_position


def test_what_is_missing_or_strange_is_named(official, tmp_path):
    def broken(change):
        state = dict(official)
        change(state)
        return written(tmp_path, state)

    with pytest.raises(PromptNetError, match="not all of it"):
        load_promptnet(broken(lambda state: state.pop("conv_in.weight")), unet=UNET)
    with pytest.raises(PromptNetError, match="and is absent"):
        load_promptnet(broken(lambda state: state.pop("mid_block.resnets.0.conv1.bias")), unet=UNET)
    with pytest.raises(PromptNetError, match="also up_blocks.0.weight"):
        load_promptnet(broken(lambda state: state.update({"up_blocks.0.weight": torch.ones(1)})), unet=UNET)
    with pytest.raises(PromptNetError, match="do not fit a PromptNet of SD 2.x"):
        load_promptnet(written(tmp_path, official), unet=SD21)
    nan = torch.full((CHANNELS[0],), float("nan"))
    with pytest.raises(PromptNetError, match="input_blocks.0.0.bias has values that are not finite"):
        load_promptnet(broken(lambda state: state.update({"conv_in.bias": nan})), unet=UNET)


# What is around the tensors: prefixes of other programs, and config.json


@pytest.mark.parametrize("prefix", ["module.", "promptnet.", "module.promptnet.", "_orig_mod.model.", "state_dict."])
def test_names_with_a_known_prefix_are_the_same_network(official, tmp_path, prefix):
    plain = load_promptnet(written(tmp_path, official), unet=UNET).state_dict()
    named = {f"{prefix}{name}": value for name, value in official.items()}
    for more in ({}, {"unet.conv_in.weight": torch.zeros(3)}):  # a whole pipeline's has other parts too
        found = load_promptnet(written(tmp_path, {**named, **more}), unet=UNET).state_dict()
        assert found.keys() == plain.keys() and all(torch.equal(value, plain[name]) for name, value in found.items())


def test_a_missing_tensor_is_named_as_the_file_names_it(official, tmp_path):
    state = {name: value for name, value in official.items() if name != "conv_in.bias"}
    with pytest.raises(PromptNetError, match="conv_in.bias; the first should be .* and is absent") as problem:
        load_promptnet(written(tmp_path, state), unet=UNET)
    assert "input_blocks" not in str(problem.value)


def test_an_unknown_prefix_is_not_guessed_at(official, tmp_path):
    with pytest.raises(PromptNetError, match="else than the authors' PromptNet"):
        load_promptnet(written(tmp_path, {f"banana.{name}": value for name, value in official.items()}), unet=UNET)


CONFIG = {
    "_class_name": "PromptNetModel",
    "act_fn": "silu",
    "attention_head_dim": list(HEADS),
    "block_out_channels": list(CHANNELS),
    "cross_attention_dim": CONTEXT,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "norm_num_groups": 32,
    "only_cross_attention": [False] * 4,
    "use_linear_projection": True,
    "with_noise": True,
}


def beside(tmp_path, official, **changes):
    path = written(tmp_path, official)
    path.with_name("config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


@pytest.mark.parametrize("with_noise", [True, False])
def test_config_json_says_what_the_tensors_do_not(official, tmp_path, with_noise):
    """Heads of 16 channels, which nobody would guess, and whether the noisy latent is seen."""
    network = load_promptnet(beside(tmp_path, official, with_noise=with_noise))
    assert network.config.unet == UNET and network.config.with_noise == with_noise
    generator = torch.Generator().manual_seed(1)
    latent, noisy = torch.randn(2, 3, 4, 16, 16, generator=generator)
    timesteps, image_tokens = torch.tensor([3, 500, 999]), torch.randn(3, 5, IMAGE, generator=generator)
    expected = restated(official, latent, timesteps, image_tokens, noisy if with_noise else latent)
    word = network(latent, timesteps, image_tokens, noisy if with_noise else None)
    torch.testing.assert_close(word, expected, rtol=1e-4, atol=1e-5)
    eight = load_promptnet(beside(tmp_path, official, attention_head_dim=8)).config.unet
    assert eight == replace(UNET, num_heads=8, head_channels=None)


OTHER_SIZES = {"block_out_channels": [320, 640, 1280, 1280]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({**CONFIG, "with_noise": False, **OTHER_SIZES}), "a network of other sizes (320, 640, 1280, 1280)"),
        (
            json.dumps({**CONFIG, "_class_name": "UNet2DConditionModel"}),
            "'UNet2DConditionModel' and not PromptNetModel",
        ),
        ('{"with_noise": false}', "says of no class"),
        ("[]", "says of no class"),
        ('"x"', "says of no class"),
        (f'{{"with_noise": false, "x": "{"y" * (1 << 20)}"}}', "larger than"),
    ],
    ids=lambda text: text[:40],
)
def test_a_config_json_that_is_not_its_own_is_not_used_and_that_is_said(official, tmp_path, text, said):
    guessed = replace(UNET, num_heads=8, head_channels=None)
    path, told = written(tmp_path, official), []
    path.with_name("config.json").write_text(text)
    network = load_promptnet(path, unet=guessed, warn=told.append)
    assert network.config.with_noise and network.config.unet == guessed
    (note,) = told
    assert str(path.with_name("config.json")) in note and said in note
    assert "was not used" in note and "the latent being denoised" in note
    path.with_name("config.json").unlink()
    assert load_promptnet(path, unet=guessed, warn=told.append).config.with_noise and len(told) == 1


def test_where_nobody_listens_the_log_has_it_once(official, tmp_path, caplog):
    load_promptnet(beside(tmp_path, official, **OTHER_SIZES), unet=replace(UNET, num_heads=8, head_channels=None))
    assert [record.getMessage().count("was not used") for record in caplog.records] == [1]


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00", "", "<html>", "\ufeff{]", b"\xff\xfe{", '{"a": NaN'])
def test_a_config_json_that_cannot_be_read_is_an_error_that_names_it(official, tmp_path, text):
    path = written(tmp_path, official)
    path.with_name("config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(
        PromptNetError, match=r"config\.json' beside it cannot be read as JSON.*[Dd]ownload it once more"
    ):
        load_promptnet(path)


@pytest.mark.parametrize("said", ["false", 0, None, [True], "yes"])
def test_with_noise_must_be_true_or_false(official, tmp_path, said):
    with pytest.raises(PromptNetError, match=r"config\.json' beside it says with_noise=.*write true or false"):
        load_promptnet(beside(tmp_path, official, with_noise=said))


def test_a_config_json_may_begin_with_a_mark_of_its_encoding(official, tmp_path):
    path = beside(tmp_path, official, with_noise=False)
    path.with_name("config.json").write_bytes(b"\xef\xbb\xbf" + path.with_name("config.json").read_bytes())
    assert not load_promptnet(path).config.with_noise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "config.json beside it says act_fn='gelu', and only 'silu' can be built"),
        ({"only_cross_attention": [True] * 4}, "only_cross_attention=.True"),
        ({"attention_head_dim": [1, 2, 8, 4]}, "attention_head_dim=.1, 2, 8, 4., which is neither"),
    ],
)
def test_a_network_that_cannot_be_built_is_named_by_its_field(official, tmp_path, change, message):
    with pytest.raises(PromptNetError, match=message):
        load_promptnet(beside(tmp_path, official, **change))


def test_a_state_dict_by_itself_is_as_before(official):
    assert official_promptnet(official, unet=UNET).config.with_noise
