"""Small random transformers in the host's own classes: a model of each family that this host has, a few blocks deep."""

import functools
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import pytest
import tiny
import torch

WIDTH, HEAD, TEXT, POOLED = 128, 64, 96, 32
"""Numbers a row has in the network, in a head of it, in the text, and in the pooled text."""

HEADS = WIDTH // HEAD
ROWS = 24
"""Rows of a prompt's context."""

PICTURE, VIDEO = (16, 8, 8), (16, 1, 8, 8)


def sd3():
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": WIDTH}}
    return {
        "in_channels": 16,
        "patch_size": 2,
        "depth": HEADS,
        "input_size": None,
        "adm_in_channels": POOLED,
        "context_embedder_config": embedder,
        "context_size": TEXT,
        "pos_embed_max_size": 32,
        "num_patches": 1024,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0],
    }


def _flux():
    blocks = {"hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": HEADS, "depth": 2, "depth_single_blocks": 2}
    places = {"axes_dim": [16, 24, 24], "theta": 10000, "patch_size": 2, "context_in_dim": TEXT}
    new = {"txt_ids_dims": []} if _has("ZImage") else {}
    return {**blocks, **places, **new, "qkv_bias": True}


def flux():
    ends = {"in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "guidance_embed": True}
    return {"image_model": "flux", **_flux(), **ends}


def flux2():
    """Its contexts are filled up from the front to 512 rows."""
    new = {"global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index"}
    ends = {"in_channels": 128, "out_channels": 128, "vec_in_dim": None, "guidance_embed": True, "txt_ids_dims": [3]}
    places = {"axes_dim": [16, 16, 16, 16], "patch_size": 1, "qkv_bias": False, "ref_index_scale": 10.0}
    return {**_flux(), **new, **ends, **places, "image_model": "flux2", "mlp_ratio": 3.0, "theta": 2000}


def chroma():
    ends = {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": WIDTH, "hidden_dim": WIDTH, "n_layers": 2}
    new = {"vec_in_dim": None} if _has("ZImage") else {}
    return {"image_model": "chroma", **_flux(), **ends, **new}


def qwen():
    return {
        "image_model": "qwen_image",
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": HEAD,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (16, 24, 24),
    }


def _lumina(width, key_heads):
    return {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": width,
        "cap_feat_dim": TEXT,
        "n_layers": 3,
        "n_heads": width // HEAD,
        "n_kv_heads": key_heads,
        "qk_norm": True,
        "axes_dims": [16, 24, 24],
    }


def lumina2():
    new = {"rope_theta": 10000.0, "ffn_dim_multiplier": 4.0} if _has("ZImage") else {}
    return {**_lumina(WIDTH, 1), **new, "axes_lens": [300, 512, 512]}


def zimage():
    width = 256  # the host reckons the width of its modulation from 256 on
    return {
        **_lumina(width, width // HEAD),
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8 / 3,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }


def _cosmos(image_model):
    return {
        "image_model": image_model,
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": WIDTH,
        "concat_padding_mask": True,
        "crossattn_emb_channels": TEXT,
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "pos_emb_interpolation": "crop",
        "min_fps": 1,
        "max_fps": 30,
        "use_adaln_lora": True,
        "adaln_lora_dim": 16,
        "num_blocks": 3,
        "num_heads": HEADS,
        "extra_per_block_abs_pos_emb": False,
        "rope_h_extrapolation_ratio": 4.0,
        "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0,
    }


def cosmos2():
    return _cosmos("cosmos_predict2")


def anima():
    return _cosmos("anima")


def wan():
    return {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": WIDTH,
        "out_dim": 16,
        "in_dim": 16,
        "num_heads": HEADS,
        "ffn_dim": 2 * WIDTH,
        "num_layers": 3,
        "patch_size": (1, 2, 2),
        "freq_dim": 64,
        "text_dim": TEXT,
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
    }


def pixart():
    return {
        "image_model": "pixart_sigma",
        "patch_size": 2,
        "input_size": 64,
        "in_channels": 4,
        "hidden_size": WIDTH,
        "depth": 2,
        "num_heads": HEADS,
        "caption_channels": TEXT,
        "pe_interpolation": None,
        "pe_precision": 2,
        "micro_condition": False,
        "model_max_length": 300,
    }


FAMILIES = {
    "sd3": ("SD3", sd3, PICTURE),
    "flux": ("Flux", flux, PICTURE),
    "flux2": ("Flux2", flux2, (128, 4, 4)),
    "chroma": ("Chroma", chroma, PICTURE),
    "qwen": ("QwenImage", qwen, VIDEO),
    "lumina2": ("Lumina2", lumina2, PICTURE),
    "zimage": ("ZImage", zimage, PICTURE),
    "anima": ("Anima", anima, VIDEO),
    "cosmos2": ("CosmosT2IPredict2", cosmos2, VIDEO),
    "wan": ("WAN21_T2V", wan, VIDEO),
    "pixart": ("PixArtSigma", pixart, (4, 40, 40)),
}
"""By family: the host's class, the numbers of its network, and the shape of one latent."""


def _has(host_class):
    return hasattr(comfy.supported_models, host_class)


def randomise(module, seed=0):
    """`tiny.randomise`, also of scales and of the places of picture cells, which come with a checkpoint."""
    tiny.randomise(module, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("scale"):
                parameter.add_(1.0)
        for name, buffer in module.named_buffers():
            if name.endswith("pos_embed"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return module


def model(family, dtype=torch.float32, compute=None):
    """A MODEL of the family; skips the test by name where this host has no such class."""
    host_class, numbers, _ = FAMILIES[family]
    if not _has(host_class):
        pytest.skip(f"this ComfyUI has no {host_class}")
    config = getattr(comfy.supported_models, host_class)(numbers())
    config.set_inference_dtype(dtype, compute)
    with _small_adapter(family):
        network = config.get_model({}, "", torch.device("cpu")).eval()
    randomise(network.diffusion_model)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=torch.device("cpu"))


@contextmanager
def _small_adapter(family):
    """Anima's text adapter is 1024 wide, whatever a model's numbers say."""
    with pytest.MonkeyPatch.context() as patch:
        if family == "anima":
            from comfy.ldm.anima import model as host

            small = {"source_dim": TEXT, "target_dim": TEXT, "model_dim": TEXT, "num_layers": 1, "num_heads": 4}
            patch.setattr(host, "LLMAdapter", functools.partial(host.LLMAdapter, **small))
        yield


@functools.cache
def shared(family):
    """One model of a family for all tests, float32; none may change it, clones are theirs."""
    return model(family)


def latent(family, batch=1):
    """An empty latent for `sample`."""
    return torch.zeros(batch, *FAMILIES[family][2])


def conditioning(family, rows=ROWS, seed=1):
    """A random CONDITIONING as the family's text encoder would make one, of so many rows."""
    generator = torch.Generator().manual_seed(seed)
    context, extras = torch.randn(1, rows, TEXT, generator=generator), {}
    if family in ("sd3", "flux", "chroma"):
        extras["pooled_output"] = torch.randn(1, POOLED, generator=generator)
    if family in ("zimage", "lumina2"):
        extras["attention_mask"] = torch.ones(1, rows, dtype=torch.long)
    return [[context, extras]]


def sample(family, model, positive, negative, batch=1, **options):
    """`tiny.sample` from an empty latent of the family, with the schedule that suits flow models."""
    return tiny.sample(
        model, positive, negative, **{"scheduler": "simple", "latent": latent(family, batch), "cfg": 3.0, **options}
    )
