"""Checkpoints in their real layout: what is told from names and shapes, and every tensor of theirs in its place."""

from dataclasses import replace

import pytest
import torch

from profusion.checkpoints import CheckpointError, load_checkpoint, plan
from profusion.models import configs
from profusion.models.clip import TextModel
from profusion.models.unet import UNet
from profusion.models.vae import VAE
from tests import shrunken

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=shrunken.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tensors(family):
    return shrunken.checkpoint(family)


@pytest.fixture(scope="module")
def path(tmp_path_factory, family, tensors):
    return shrunken.written(tmp_path_factory.mktemp("checkpoint") / "model.safetensors", tensors)


def test_all_configurations_are_told_from_the_header(family, path):
    made = plan(path)
    assert made.family.name == family
    assert made.unet == shrunken.UNETS[family]
    assert made.vae == shrunken.vae_config(family)
    assert [tower.config for tower in made.towers] == shrunken.TEXTS[family]


def test_every_weight_is_where_it_was_drawn_for(family, path, tensors):
    loaded = load_checkpoint(path)
    for network, prefix in ((loaded.unet, "model.diffusion_model."), (loaded.vae, "first_stage_model.")):
        state = network.state_dict()
        assert len(state) > 50
        assert all(torch.equal(value, tensors[prefix + name]) for name, value in state.items())
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    for seed, (tower, config) in enumerate(zip(loaded.text.towers, shrunken.TEXTS[family], strict=True)):
        drawn = shrunken.text_state(config, 3 + seed)
        state = tower.state_dict()
        assert drawn.keys() == state.keys()
        assert all(torch.equal(state[name], value) for name, value in drawn.items())


def test_what_a_text_tower_gives_is_what_transformers_says_of_its_layers(family, path):
    loaded = load_checkpoint(path)
    context, pooled = loaded.text.encode(shrunken.PROMPTS)
    assert context.shape == (3, 77, shrunken.UNETS[family].context_dim) and context.isfinite().all()
    assert (pooled is None) == (family != "SDXL")
    assert not torch.allclose(context[0], context[1])


@pytest.mark.parametrize(("kind", "prediction"), shrunken.KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_file_of_any_precision_loads_as_the_precision_asked_for(tmp_path, kind, dtype, prediction):
    path = shrunken.written(tmp_path / "model.safetensors", shrunken.checkpoint(kind, prediction), dtype)
    for wanted in {torch.float32, dtype}:
        loaded = load_checkpoint(path, wanted)
        assert {p.dtype for network in (loaded.unet, *loaded.text.towers) for p in network.parameters()} == {wanted}
        vae = torch.float32 if wanted == torch.float16 else wanted  # in float16 SDXL's overflows
        assert {p.dtype for p in loaded.vae.parameters()} == {vae}
        assert loaded.prediction == prediction


def test_the_averages_beside_the_weights_are_left_alone(tmp_path):
    tensors = shrunken.checkpoint("SD 1.x")
    averages = {f"model_ema.{name.replace('.', '')}": x.clone() for name, x in tensors.items() if x.ndim == 4}
    path = shrunken.written(tmp_path / "model.safetensors", tensors | averages)
    assert load_checkpoint(path).family.name == "SD 1.x"


SCHEDULE = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar"
)
BESIDE = {
    "SD 1.x": f"{SCHEDULE} model_ema.decay model_ema.num_updates first_stage_model.loss.logvar",
    "SD 2.x": f"{SCHEDULE} cond_stage_model.model.logit_scale cond_stage_model.model.attn_mask",
    "SDXL": "denoiser.sigmas conditioner.embedders.1.model.logit_scale conditioner.embedders.0.logit_scale "
    "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
}


def test_what_released_files_hold_beside_their_networks_is_left_alone(tmp_path, family, tensors):
    beside = {name: torch.zeros(3) for name in BESIDE[family].split()}
    loaded = load_checkpoint(shrunken.written(tmp_path / "model.safetensors", tensors | beside))
    assert loaded.family.name == family


def test_the_oldest_names_of_sd_1s_text_encoder_load(tmp_path):
    tensors = shrunken.checkpoint("SD 1.x")
    old = {name.replace("transformer.text_model.", "transformer."): x for name, x in tensors.items()}
    one, other = (
        load_checkpoint(shrunken.written(tmp_path / f"{index}.safetensors", x))
        for index, x in enumerate((tensors, old))
    )
    assert torch.equal(one.text.encode("a cat")[0], other.text.encode("a cat")[0])


def test_matrices_where_others_have_convolutions_of_one_cell_load(tmp_path):
    tensors = shrunken.checkpoint("SD 1.x")
    flat = {
        name: x[..., 0, 0] if "first_stage_model" in name and ".attn_1." in name and x.ndim == 4 else x
        for name, x in tensors.items()
    }
    assert sum(x.ndim != tensors[name].ndim for name, x in flat.items()) == 8
    state = load_checkpoint(shrunken.written(tmp_path / "model.safetensors", flat)).vae.state_dict()
    assert all(torch.equal(x, tensors[f"first_stage_model.{name}"]) for name, x in state.items())


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ("model.diffusion_model.input_blocks.1.0.out_layers.0.weight", "1 tensors of its UNet are missing"),
        ("first_stage_model.decoder.norm_out.bias", "1 tensors of its VAE are missing"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "of its text encoder are missing"),
        ("model.diffusion_model.out.2.weight", "lacks 'out.2.weight'"),
    ],
)
def test_a_tensor_that_is_missing_is_named(tmp_path, taken, said):
    tensors = shrunken.checkpoint("SD 1.x")
    tensors.pop(taken)
    path = shrunken.written(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=said) as raised:
        load_checkpoint(path)
    assert taken.rsplit(".", 2)[1] in str(raised.value)


@pytest.mark.parametrize("added", ["model.diffusion_model.extra.weight", "extra.weight", "first_stage_model.extra"])
def test_a_tensor_that_nobody_knows_is_named_and_not_left_out(tmp_path, added):
    tensors = shrunken.checkpoint("SD 1.x") | {added: torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match="tensors more.*extra"):
        load_checkpoint(shrunken.written(tmp_path / "model.safetensors", tensors))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tensors = shrunken.checkpoint("SD 1.x")
    tensors["model.diffusion_model.time_embed.0.weight"] = torch.zeros(128, 31)
    with pytest.raises(CheckpointError, match=r"time_embed.0.weight.*\(128, 31\) where \(128, 32\)"):
        load_checkpoint(shrunken.written(tmp_path / "model.safetensors", tensors))


def full_size(family):
    """The names and shapes of a checkpoint at full size."""
    unets = {"SD 1.x": configs.SD15, "SD 2.x": configs.SD21, "SDXL": configs.SDXL}
    large = {"SD 2.x": (1024, 24), "SDXL": (1280, 32)}
    towers = [replace(x, width=768, heads=12, layers=12, intermediate=3072) for x in shrunken.TEXTS[family]]
    if family in large:
        width, layers = large[family]
        towers[-1] = replace(towers[-1], width=width, heads=width // 64, layers=layers, intermediate=4 * width)
    vae = configs.VAEConfig(128, (1, 2, 4, 4), 2, scale_factor=shrunken.VAES[family])
    with torch.device("meta"):
        shapes = {f"model.diffusion_model.{name}": x.shape for name, x in UNet(unets[family]).state_dict().items()}
        shapes |= {f"first_stage_model.{name}": x.shape for name, x in VAE(vae).state_dict().items()}
        for prefix, config in zip(shrunken.TEXT_PREFIXES[family], towers, strict=True):
            state = TextModel(config).state_dict()
            state = shrunken.as_open_clip(state) if config.pad == 0 else state
            shapes |= {prefix + name: x.shape for name, x in state.items()}
    return shapes, (unets[family], vae, towers)


PARAMETERS = {"SD 1.x": 859_520_964, "SD 2.x": 865_910_724, "SDXL": 2_567_463_684}
TEXT_PARAMETERS = {"SD 1.x": [123_060_480], "SD 2.x": [354_032_641 - 1], "SDXL": [123_060_480, 694_659_841 - 1]}


def test_the_sizes_that_people_have_are_told_without_reading_a_weight(tmp_path, family):
    shapes, expected = full_size(family)
    made = plan(shrunken.sparse(tmp_path / "model.safetensors", shapes))
    assert (made.unet, made.vae, [tower.config for tower in made.towers]) == expected
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(made.unet).parameters()) == PARAMETERS[family]
        assert sum(p.numel() for p in VAE(made.vae).parameters()) == 83_653_863
        counts = [sum(p.numel() for p in TextModel(it.config).parameters()) for it in made.towers]
    assert counts == TEXT_PARAMETERS[family]  # CLIP's own, whose logit scale is one more


def test_sd_2_without_its_unused_last_layer_takes_the_layer_that_is_the_last(tmp_path):
    shapes, _ = full_size("SD 2.x")
    shapes = {name: x for name, x in shapes.items() if "resblocks.23." not in name and "text_projection" not in name}
    config = plan(shrunken.sparse(tmp_path / "model.safetensors", shapes)).towers[0].config
    assert (config.layers, config.skip, config.final_norm, config.projected) == (23, 0, True, False)
