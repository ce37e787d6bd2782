"""Training under dynamic VRAM, whose weights come and go: bit for bit what a plain host trains."""

import copy
import gc
import importlib
import types

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")
pytest.importorskip("comfy_aimdo", reason="this ComfyUI has no dynamic VRAM")

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.supported_models_base  # noqa: E402
import tiny  # noqa: E402
from dynamic_vram import CARD, dynamic_vram  # noqa: E402, F401 (a fixture)
from pooled import PooledVae, pictures  # noqa: E402
from test_finetune_nodes import PooledVision, promptnet  # noqa: E402
from test_pretrain_node import small_networks  # noqa: E402
from test_trained_patches import lora  # noqa: E402

RESIDUAL = {
    "images": pictures(),
    "noun": "ball",
    "steps": 3,
    "learning_rate": 0.02,
    "batch_size": 2,
    "seed": 0,
    "flip": True,
    "preserve": 1.0,
    "sample_every": 0,
    "sample_prompt": "a photo of a %noun% on grass",
    "sample_steps": 1,
    "sample_cfg": 2.0,
}
FINETUNE = {
    "images": pictures(1),
    "steps": 3,
    "learning_rate": 1e-3,
    "train_attention": True,
    "attention_learning_rate": 5e-3,
    "rank": 2,
    "batch_size": 2,
    "seed": 0,
    "filename_prefix": "me/cat",
    "save_promptnet": False,
}
AUGMENT = {
    "image": pictures(1),
    "noun": "ball",
    "prompts": "a %noun% on snow",
    "count": 1,
    "seed": 3,
    "steps": 2,
    "cfg": 2.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "feather": 2,
    "include_picture": True,
}


PRETRAIN = {
    "folder": "none",
    "images": pictures(3),
    "steps": 3,
    "learning_rate": 1e-3,
    "batch_size": 2,
    "seed": 0,
    "filename_prefix": "me/mine",
    "sample_every": 2,
    "sample_steps": 1,
}


WORK = ("train", "finetune", "pretrain", "seed_residual")


@pytest.fixture(scope="module")
def host(pack):
    names = ("trainer", "finetune", "pretrain", "augment", "promptnet", "host.words")
    nodes = {name.split(".")[-1]: importlib.import_module(f"{pack.__name__}.nodes.{name}") for name in names}
    kernel = {
        f"{name}_kernel": importlib.import_module(f"{pack.__name__}.profusion.{path}")
        for name, path in {"configs": "models.configs", "network": "promptnet.network"}.items()
    }
    return types.SimpleNamespace(pack=pack, **nodes, **kernel)


@pytest.fixture(autouse=True)
def small(pack, monkeypatch):
    small_networks(monkeypatch, pack)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The host's folders, moved to empty places."""
    import folder_paths

    for name in ("loras", "profusion_promptnets", "profusion_residuals"):
        entry = ([str(tmp_path / name)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="module")
def file():
    """A checkpoint's tensors, in float32: the UNet's and the text encoder's.

    The text encoder's fit into float16 too. The host computes with its small ones as they are in the file under dynamic
    VRAM, and only there: a context would differ by that alone.
    """
    unet, text = tiny.model().model.diffusion_model.state_dict(), tiny.clip().cond_stage_model.state_dict()
    return {name: value.clone() for name, value in unet.items()}, {
        name: value.half().float() for name, value in text.items()
    }


def _read(file):
    """A file's tensors, made anew as reading makes them: in inference mode, where nodes run."""
    return {name: value.clone() for name, value in file.items()}


class Loader:
    """Loads the file as the host's own loaders do: weights stay as they are in the file
    where the host keeps them so."""

    def __init__(self, file, dtype):
        self._unet, self._text, self._dtype = *file, dtype

    def model(self, disable_dynamic=False):
        management, patchers = comfy.model_management, comfy.model_patcher
        config = tiny.TinySD(tiny.UNET)
        config.set_inference_dtype(self._dtype, None)
        network = config.get_model({}, "", torch.device("cpu")).eval()
        kind = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
        patcher = kind(network, load_device=self._device(), offload_device=torch.device("cpu"))
        network.load_model_weights(_read(self._unet), assign=patcher.is_dynamic())
        assert management.module_size(network) > 0
        patcher.cached_patcher_init = (self.model, ())
        return patcher

    def clip(self, disable_dynamic=False):
        target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
        options = {"clip_l_model_config": tiny.TEXT, "dtype": self._dtype}
        options |= {"load_device": self._device(), "offload_device": torch.device("cpu")}
        clip = comfy.sd.CLIP(
            target, state_dict=_read(self._text), model_options=options, disable_dynamic=disable_dynamic
        )
        clip.patcher.cached_patcher_init = (lambda **options: self.clip(**options).patcher, ())
        return clip

    def _device(self):
        """Where dynamic VRAM is off, the CPU."""
        return CARD if comfy.memory_management.aimdo_enabled else torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float32 run as float16"])
def plain(request, host, file):
    """Work on a plain host."""
    return Work(host, Loader(file, request.param))


@pytest.fixture
def dynamic(plain, request, host, file, dynamic_vram):  # noqa: F811
    """The same under dynamic VRAM."""
    work = Work(host, Loader(file, plain.model.model.get_dtype()))
    assert work.model.is_dynamic() and work.clip.patcher.is_dynamic()
    return work


class Work:
    """What a user does, one thing after the other, with one MODEL and one CLIP."""

    def __init__(self, host, loader):
        self.host = host
        with torch.inference_mode():
            self.model, self.clip = loader.model(), loader.clip()

    def draw(self):
        positive, negative = (tiny.encode(self.clip, text) for text in ("a photo of a ball", ""))
        return tiny.sample(self.model, positive, negative, steps=2)

    def train(self, **inputs):
        node = self.host.trainer.ResidualTrainer
        with torch.inference_mode():
            made = node.execute(self.model, self.clip, PooledVae(), **{**RESIDUAL, **inputs}).args
        return [made[0].delta, made[2]]

    def finetune(self, images=None, masks=None):
        given = {**FINETUNE, "images": FINETUNE["images"] if images is None else images, "masks": masks}
        node = self.host.finetune.PromptNetFinetune
        with torch.inference_mode():
            made = node.execute(
                promptnet(self.host), self.model, self.clip, clip_vision=PooledVision(), vae=PooledVae(), **given
            ).args
        changes = [part for entry in made[1].patches.values() for part in entry[-1][1].weights[:2]]
        return [*made[0].network.state_dict().values(), *changes]

    def pretrain(self):
        node = self.host.pretrain.PromptNetTrainer
        with torch.inference_mode():
            given = {"clip_vision": PooledVision(), "vae": PooledVae(), **PRETRAIN}
            made = node.execute(model=self.model, clip=self.clip, **given).args
        return [*made[0].network.state_dict().values(), made[3]]

    def seed_residual(self):
        given = {"images": FINETUNE["images"], "noun": "ball", "clip_vision": PooledVision(), "vae": PooledVae()}
        node = self.host.promptnet.ResidualFromPromptNet
        with torch.inference_mode():
            return [node.execute(promptnet(self.host), self.clip, model=self.model, **given).args[0].delta]

    def augment(self):
        mask = torch.zeros(1, 64, 64)
        mask[:, 16:48, 16:48] = 1
        with torch.inference_mode():
            return self.host.augment.ConceptAugment.execute(
                self.model, self.clip, PooledVae(), mask=mask, **AUGMENT
            ).args


def same(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert one.isfinite().all() and torch.equal(one, other), (one - other).abs().max()


def test_the_simulation_draws_what_a_plain_host_draws(plain, dynamic, dynamic_vram):  # noqa: F811
    """And keeps weights as the host keeps them: resident, and inference tensors."""
    expected = plain.draw()
    assert torch.equal(dynamic.draw(), expected)
    resident = [part for part in dynamic.model.model.modules() if hasattr(part, "_v_weight")]
    assert resident and all(part._v_weight.is_inference() for part in resident)
    dynamic_vram.evict()
    assert torch.equal(dynamic.draw(), expected)
    dynamic_vram.fits = False
    assert torch.equal(dynamic.draw(), expected)


@pytest.mark.parametrize("work", WORK)
def test_before_any_drawing(plain, dynamic, work):
    same(getattr(dynamic, work)(), getattr(plain, work)())


@pytest.mark.parametrize("work", WORK)
def test_after_a_drawing(plain, dynamic, work):
    dynamic.draw()
    same(getattr(dynamic, work)(), getattr(plain, work)())


def test_between_drawings(plain, dynamic):
    same(dynamic.train(sample_every=1), plain.train(sample_every=1))


@pytest.mark.parametrize("work", WORK)
def test_after_eviction(plain, dynamic, work, dynamic_vram):  # noqa: F811
    same(getattr(dynamic, work)(), getattr(plain, work)())
    dynamic_vram.evict()
    assert torch.equal(dynamic.draw(), plain.draw())
    same(getattr(dynamic, work)(), getattr(plain, work)())


@pytest.mark.parametrize("work", WORK)
def test_with_no_room_for_weights(plain, dynamic, work, dynamic_vram):  # noqa: F811
    dynamic_vram.fits = False
    same(getattr(dynamic, work)(), getattr(plain, work)())


@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this host has no bypass LoRA")
@pytest.mark.parametrize("drawn_before", [False, True])
@pytest.mark.parametrize("work", ["train", "finetune", "pretrain"])
def test_with_a_bypass_lora(plain, dynamic, work, drawn_before):
    without = getattr(plain, work)()
    for one in (plain, dynamic):
        with torch.inference_mode():
            tensors = {name: value.clone() for name, value in lora().items()}
            one.model = comfy.sd.load_bypass_lora_for_models(one.model, None, tensors, 0.5, 0.0)[0]
    if drawn_before:
        assert torch.equal(dynamic.draw(), plain.draw())
    expected = getattr(plain, work)()
    assert not all(torch.equal(one, other) for one, other in zip(expected, without, strict=True))
    same(getattr(dynamic, work)(), expected)


def test_adapters_of_which_nobody_knows_how_they_are_made_are_named(dynamic):
    from comfy.patcher_extension import PatcherInjection

    def nothing(_):
        pass

    dynamic.model = dynamic.model.clone()
    dynamic.model.set_injections("their adapters", [PatcherInjection(nothing, nothing)])
    with pytest.raises(Exception, match="dynamic VRAM.*'their adapters'.*--disable-dynamic-vram") as caught:
        dynamic.train()
    assert type(caught.value).__name__ == "TrainingError"


def test_fine_tuning_after_concept_augment(plain, dynamic):
    expected, found = plain.augment(), dynamic.augment()
    same(found, expected)
    same(dynamic.finetune(*found), plain.finetune(*expected))


def changed(work):
    """The work with a LoRA, an object patch, a wrapper and an attention patch on its MODEL and a LoRA on its CLIP."""
    values = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"
    query = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    shapes = {
        key: part.model.state_dict()[key].shape for key, part in {values: work.model, query: work.clip.patcher}.items()
    }
    noise = {key: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for key, shape in shapes.items()}
    work.model, work.clip = work.model.clone(), work.clip.clone()
    work.model.add_patches({values: ("diff", (noise[values],))})
    work.clip.add_patches({query: ("diff", (noise[query],))})
    # No model_sampling: the host mixes up the buffers of one that is exchanged under dynamic VRAM (its issue 16490).
    scaled = copy.copy(work.model.get_model_object("latent_format"))
    scaled.scale_factor *= 0.8
    work.model.add_object_patch("latent_format", scaled)
    work.model.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"] * 0.9, given["timestep"], **given["c"])
    )
    work.model.set_model_attn1_patch(lambda n, context, value, options: (n, context, value * 1.1))
    return work


@pytest.mark.parametrize("plain", [torch.float32], indirect=True)  # LoRAs are rounded to float16 in another way there
@pytest.mark.parametrize("work", ["train", "finetune"])
def test_what_is_on_the_model_takes_part(plain, dynamic, work):
    bare = getattr(plain, work)()
    dynamic.draw()
    expected = getattr(changed(plain), work)()
    same(getattr(changed(dynamic), work)(), expected)
    assert not all(map(torch.equal, bare, expected))


def test_the_callers_model_is_as_it_was_and_its_double_is_gone(plain, dynamic):
    before = dynamic.draw()
    held = set(map(id, comfy.model_management.loaded_models()))
    weights = {name: value.clone() for name, value in dynamic.model.model.state_dict().items()}
    dynamic.train()
    assert all(torch.equal(value, weights[name]) for name, value in dynamic.model.model.state_dict().items())
    gc.collect()
    assert set(map(id, comfy.model_management.loaded_models())) <= held
    assert torch.equal(dynamic.draw(), before)


@pytest.mark.parametrize(
    ("work", "part"),
    [("train", "model"), ("finetune", "model"), ("finetune", "clip"), ("pretrain", "model"), ("pretrain", "clip")],
)
def test_where_the_host_gives_no_way_the_error_names_one(dynamic, work, part):
    (dynamic.model if part == "model" else dynamic.clip.patcher).cached_patcher_init = None
    with pytest.raises(Exception, match="--disable-dynamic-vram") as raised:
        getattr(dynamic, work)()
    assert type(raised.value).__name__ == "TrainingError"


def test_a_file_that_has_gone_is_such_a_case(dynamic):
    def load(disable_dynamic=False):
        raise FileNotFoundError("model.safetensors is not there")

    dynamic.model.cached_patcher_init = (load, ())
    with pytest.raises(Exception, match="model.safetensors is not there.*--disable-dynamic-vram"):
        dynamic.train()


def test_a_patch_that_brings_the_dynamic_network_back_is_refused(dynamic):
    network = dynamic.model.model.diffusion_model
    dynamic.draw()
    dynamic.model = dynamic.model.clone()
    dynamic.model.add_object_patch("diffusion_model", network)
    with pytest.raises(Exception, match="come and go.*--disable-dynamic-vram"):
        dynamic.train()
