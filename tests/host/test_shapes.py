"""Infusion on the host's own networks of real checkpoints: the same names and shapes, and SD 1.5 at work."""

import copy
import gc

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.ldm.modules.diffusionmodules.openaimodel  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.supported_models  # noqa: E402
import tiny  # noqa: E402
from pooled import PooledVae, pictures  # noqa: E402

from profusion.infusion import cross_attention_layers  # noqa: E402
from profusion.models.configs import SD15, SD21, SDXL  # noqa: E402
from profusion.models.unet import UNet  # noqa: E402

LAYERS = {"SD15": (SD15, 16, 768), "SD20": (SD21, 16, 1024), "SDXL": (SDXL, 70, 2048)}


def detected(config):
    """The host's configuration of a checkpoint with our names and shapes: what it would load the checkpoint into."""
    with torch.device("meta"):
        state = dict(UNet(config).state_dict())
    # the host looks at one tensor's values, to tell velocity from noise prediction
    name = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    values = {name: torch.zeros(state[name].shape)} if name in state else {}
    return state, comfy.model_detection.model_config_from_unet({**state, **values}, "")


@pytest.mark.parametrize("family", LAYERS)
def test_the_host_s_network_has_the_kernel_s_parameters(family):
    config, count, width = LAYERS[family]
    state, found = detected(config)
    assert type(found) is getattr(comfy.supported_models, family)
    sizes = {name: value for name, value in found.unet_config.items() if name != "dtype"}
    model = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel
    with torch.device("meta"):
        network = model(**sizes, device="meta", operations=comfy.ops.disable_weight_init)
    assert {name: value.shape for name, value in network.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }
    layers = cross_attention_layers(dict(network.named_parameters()))
    assert layers == cross_attention_layers(state)
    assert len(layers) == count and {layer.context_dim for layer in layers} == {width}


class FullClip:
    """Stands for SD 1.5's text encoder: the tiny one's tokens, contexts of 768."""

    def __init__(self):
        self._clip = tiny.clip()
        self.tokenizer, self.tokenize = self._clip.tokenizer, self._clip.tokenize

    def encode_from_tokens_scheduled(self, tokens):
        encoded = copy.deepcopy(self._clip.encode_from_tokens_scheduled(tokens))
        return [[context.repeat(1, 1, 768 // context.shape[-1]), extras] for context, extras in encoded]


def test_sd15_trains_a_step_and_samples_a_step(pack, tmp_path, monkeypatch):
    """The whole UNet in the host, with random weights, on a latent of 8x8. 3.5 GB, and most of a minute on one core."""
    import folder_paths
    from profusion_pack.nodes.trainer import ResidualTrainer

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", ([str(tmp_path)], {".safetensors"}))
    _, config = detected(SD15)
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode():
        network = config.get_model({}, "", torch.device("cpu")).eval()
        fill(network.diffusion_model)
        model = comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))
        residual, _, samples, masks = ResidualTrainer.execute(
            model, FullClip(), PooledVae(), pictures(1), "cat", 1, 0.02, 1, 0, False, 1.0, 0, "a cat", 1, 1.0
        ).args
    assert residual.architecture == "SD 1.x" and residual.delta.shape == (16, 1, 768)
    assert (residual.delta != 0).any(-1).all()
    assert samples.shape == (2, 64, 64, 3) and samples.isfinite().all()
    assert masks.shape == (1, 64, 64)
    assert list((tmp_path / "training").glob("cat_1_steps_*.safetensors"))
    del model, network
    gc.collect()


def fill(module):
    """As tiny.randomise, and far quicker: every row of a weight takes its values from one short random strip."""
    strip = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for name, parameter in module.named_parameters():
        values = strip.repeat(-(-parameter.numel() // strip.numel()))[: parameter.numel()].view(parameter.shape)
        if parameter.ndim > 1:
            parameter.copy_(values / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(values * 0.1 + (1.0 if name.endswith("weight") else 0.0))
