"""Checkpoints of SD 1.x, SD 2.x and SDXL in their real layout, shrunken, with random weights."""

import json
import math

import torch
from safetensors.torch import save_file

from profusion.models.clip import TextModel, VisionModel
from profusion.models.configs import TextConfig, UNetConfig, VAEConfig, VisionConfig
from profusion.models.unet import UNet
from profusion.models.vae import VAE

PROMPTS = ["a photo of a cat", "", "snow on a wide, quiet street"]
VAES = {"SD 1.x": 0.18215, "SD 2.x": 0.18215, "SDXL": 0.13025}
UNETS = {
    "SD 1.x": UNetConfig(32, (1, 2), 1, (1, 0), 1, 64, num_heads=8),
    # as deep as the real one: what it predicts is told from its output block 11
    "SD 2.x": UNetConfig(64, (1, 1, 1, 1), 2, (1, 1, 1, 0), 1, 128, head_channels=64, use_linear=True),
    "SDXL": UNetConfig(64, (1, 1, 2), 1, (0, 1, 2), 2, 192, head_channels=64, use_linear=True, adm_channels=1664),
}
TEXTS = {
    "SD 1.x": [TextConfig(64, 2, 1, 128, projected=False)],
    "SD 2.x": [TextConfig(128, 3, 2, 192, activation="gelu", skip=1, pad=0)],
    "SDXL": [
        TextConfig(64, 3, 1, 128, skip=1, final_norm=False, projected=False),
        TextConfig(128, 3, 2, 192, activation="gelu", skip=1, final_norm=False, pad=0),
    ],
}
TEXT_PREFIXES = {
    "SD 1.x": ["cond_stage_model.transformer."],
    "SD 2.x": ["cond_stage_model.model."],
    "SDXL": ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."],
}
FAMILIES = tuple(UNETS)
VISIONS = {  # as deep as the real ones, by which they are told apart
    "ViT-L/14": VisionConfig(32, 24, 16, 64, image_size=28, patch_size=7, projection=24),
    "ViT-H/14": VisionConfig(48, 32, 16, 64, image_size=21, patch_size=7, projection=16, activation="gelu"),
}
KINDS = [("SD 1.x", "eps"), ("SD 2.x", "eps"), ("SD 2.x", "v"), ("SDXL", "eps"), ("SDXL", "v")]
STATISTIC = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def vae_config(family):
    return VAEConfig(32, (1, 2), 1, scale_factor=VAES[family])


def drawn(network, seed):
    """A network's state dict with weights under which signals neither die nor explode, norms included."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, tensor in network.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            values /= tensor[0].numel() ** 0.5
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.05 * values
        state[name] = values
    return state


_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_WHOLE = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm.weight": "ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "ln_pre.bias",
    "vision_model.post_layernorm.weight": "ln_post.weight",
    "vision_model.post_layernorm.bias": "ln_post.bias",
}
_TURNED = {"text_projection.weight": "text_projection", "visual_projection.weight": "proj"}


def as_open_clip(state):
    """A tower's state dict in open_clip's names and layout."""
    found = {}
    for name, value in state.items():
        if name in _TURNED:
            found[_TURNED[name]] = value.T.contiguous()
        elif name in _WHOLE:
            found[_WHOLE[name]] = value
        elif ".q_proj." in name:
            layer, kind = name.split(".")[3], name.split(".")[-1]
            joined = torch.cat([state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
        elif not (".k_proj." in name or ".v_proj." in name):
            _, _, _, layer, *part, kind = name.split(".")
            found[f"transformer.resblocks.{layer}.{_PARTS['.'.join(part)]}.{kind}"] = value
    return found


def text_state(config, seed):
    with torch.device("meta"):
        tower = TextModel(config)
    return drawn(tower, seed)


def vision_state(config, seed=5):
    with torch.device("meta"):
        tower = VisionModel(config)
    return drawn(tower, seed)


def checkpoint(family, prediction="eps", unet=None):
    """The tensors of a checkpoint, by their real names, with what such files also hold."""
    with torch.device("meta"):
        networks = UNet(unet or UNETS[family]), VAE(vae_config(family))
    tensors = {f"model.diffusion_model.{name}": value for name, value in drawn(networks[0], 1).items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in drawn(networks[1], 2).items()}
    for seed, (prefix, config) in enumerate(zip(TEXT_PREFIXES[family], TEXTS[family], strict=True)):
        state = text_state(config, 3 + seed)
        tensors |= {prefix + name: x for name, x in (as_open_clip(state) if config.pad == 0 else state).items()}
    return tensors | _beside(family, prediction, tensors)


def _beside(family, prediction, tensors):
    found = {"betas": torch.rand(10), "alphas_cumprod": torch.rand(10), "model_ema.decay": torch.tensor(0.9)}
    if family == "SDXL":
        found = {"denoiser.sigmas": torch.rand(10), "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6)}
        found |= {"v_pred": torch.tensor([])} if prediction == "v" else {}
    prefix = TEXT_PREFIXES[family][0]
    if family != "SD 2.x":
        found[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif prediction == "v":
        found[STATISTIC] = tensors[STATISTIC] * 10
    return found


def written(path, tensors, dtype=torch.float32):
    """The file of these tensors, their weights of this type."""
    save_file({name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}, path)
    return path


def sparse(path, shapes, dtype="F16"):
    """A file of these shapes at full size, whose tensors are a hole in it: nothing can be read but its header."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * {"F16": 2, "F32": 4}.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
