"""Small random models of Stable Diffusion's shape in the host's own classes, and one way to sample from them."""

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch

CONTEXT = 64
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
TEXT = {"hidden_size": CONTEXT, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}


class TinySD(comfy.supported_models.SD15):
    unet_extra_config = {"num_heads": 2, "num_head_channels": -1}


def randomise(module, seed=0):
    """Weights under which signals neither die nor explode, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                values /= parameter[0].numel() ** 0.5
            else:
                values = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(values)
    return module


def model(dtype=torch.float32, compute=None, **unet):
    """A MODEL; `compute` is the dtype it is cast to while it runs."""
    config = TinySD({**UNET, **unet})
    config.set_inference_dtype(dtype, compute)
    device = comfy.model_management.get_torch_device()
    network = config.get_model({}, "", torch.device("cpu")).eval()
    randomise(network.diffusion_model)
    return comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=torch.device("cpu"))


def clip():
    """A CLIP with the real tokenizer."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    built = comfy.sd.CLIP(target, model_options={"clip_l_model_config": TEXT, "dtype": torch.float32})
    randomise(built.cond_stage_model, seed=1)
    return built


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(
    model,
    positive,
    negative,
    sampler="euler",
    scheduler="normal",
    steps=3,
    cfg=5.0,
    seed=7,
    size=(8, 8),
    batch=1,
    latent=None,
    denoise=1.0,
    mask=None,
    callback=None,
):
    """What the KSampler node does, without its node."""
    latent = torch.zeros(batch, 4, *size) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            latent,
            denoise=denoise,
            noise_mask=mask,
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )


def controlnet(strength=1.0):
    """A random ControlNet of the tiny model, for hints of eight times the latent's size."""
    import comfy.cldm.cldm
    import comfy.ops

    config = {key: value for key, value in UNET.items() if key != "out_channels"}
    network = comfy.cldm.cldm.ControlNet(
        hint_channels=3, num_heads=2, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast, **config
    )
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(randomise(network.eval(), seed=2), load_device=device)
