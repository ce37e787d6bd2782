"""Both trainings on models with what people put on them: it takes part, is left out and said, or is named."""

import importlib
import inspect
import sys
import types

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import test_finetune_nodes  # noqa: E402
import test_trainer  # noqa: E402
import tiny  # noqa: E402
from pooled import PooledVae  # noqa: E402

freelunch = importlib.import_module("comfy_extras.nodes_freelunch")
easycache = importlib.import_module("comfy_extras.nodes_easycache")
windows = importlib.import_module("comfy_extras.nodes_context_windows")


@pytest.fixture(scope="module")
def host(pack):
    """The pack's modules, as both files of tests want them."""
    names = ("trainer", "finetune", "host.finetuning", "host.display", "host.words", "host.evaluation")
    nodes = {name.rpartition(".")[2]: importlib.import_module(f"{pack.__name__}.nodes.{name}") for name in names}
    kernel = {
        f"{name.rpartition('.')[2]}_kernel": sys.modules[f"{pack.__name__}.profusion.{name}"]
        for name in ("promptnet.network", "models.configs", "loop", "patched")
    }
    return types.SimpleNamespace(pack=pack, **nodes, **kernel)


@pytest.fixture(scope="module")
def clip():
    return tiny.clip()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    import folder_paths

    for name in ("profusion_residuals", "profusion_promptnets", "loras"):
        entry = ([str(tmp_path / name)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
    folder_paths.filename_list_cache.clear()
    return tmp_path


@pytest.fixture
def told(host, monkeypatch):
    """What is told under the node while it runs."""
    told = []
    monkeypatch.setattr(host.display, "_tell", lambda _, text, preview: told.append(text))
    return told


@pytest.fixture(params=["residual", "promptnet"])
def train(request, host, clip, folders):
    """Run one of the trainings on a MODEL, in inference mode as the host does: the values that were learned."""

    def residual(model, **inputs):
        inputs = {**test_trainer.defaults(), "steps": 3, "clip": clip, "vae": PooledVae(), **inputs}
        found = host.trainer.ResidualTrainer.execute(model=model, **inputs).args[0]
        return {"delta": found.delta}

    def promptnet(model, **inputs):
        parts = {"promptnet": test_finetune_nodes.promptnet(host), "clip_vision": test_finetune_nodes.PooledVision()}
        inputs = {**test_finetune_nodes.defaults(), **parts, "steps": 3, "clip": clip, "vae": PooledVae(), **inputs}
        return host.finetune.PromptNetFinetune.execute(model=model, **inputs).args[0].network.state_dict()

    def run(model, **inputs):
        with torch.inference_mode():
            return (residual if request.param == "residual" else promptnet)(model, **inputs)

    return run


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def apart(one, other):
    return torch.cat([(value - other[name]).flatten() for name, value in one.items()]).norm().item()


# What takes part


def free(name, model):
    """By the host's node: newer ones are classes of another kind."""
    node = getattr(freelunch, name)
    made = getattr(node, "execute", None) or node().patch
    found = made(model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    return getattr(found, "args", found)[0]


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("node", ["FreeU", "FreeU_V2"])
def test_patches_that_write_into_what_they_are_given_take_part(train, monkeypatch, node, checkpointing):
    """The hosts' FreeU, against the same computed with nothing written over."""

    def patch(h, hsp, options):
        if h.shape[1] != 64:
            return h, hsp
        mean = h.mean(1, keepdim=True)
        most, least = mean.amax((1, 2, 3), keepdim=True), mean.amin((1, 2, 3), keepdim=True)
        share = (mean - least) / (most - least) if node == "FreeU_V2" else 1
        first, second = h.chunk(2, 1)
        return torch.cat([first * ((1.4 - 1) * share + 1), second], 1), freelunch.Fourier_filter(hsp, 1, 0.2)

    theirs = free(node, tiny.model())
    ours, untouched = tiny.model(), repr(theirs.model_options)
    ours.set_model_output_block_patch(patch)
    found = train(theirs, gradient_checkpointing=checkpointing)
    assert apart(found, train(ours)) < 0.01 * apart(found, train(tiny.model()))
    assert repr(theirs.model_options) == untouched


def lora():
    generator = torch.Generator().manual_seed(3)
    stem = "diffusion_model.input_blocks.1.1.transformer_blocks.0"
    found = {}
    for layer, width in (("attn1.to_q", 32), ("attn2.to_v", tiny.CONTEXT), ("attn2.to_out.0", 32)):
        name = f"lora_unet_{stem.removeprefix('diffusion_model.').replace('.', '_')}_{layer.replace('.', '_')}"
        found[f"{name}.lora_up.weight"] = 0.3 * torch.randn(32, 4, generator=generator)
        found[f"{name}.lora_down.weight"] = 0.3 * torch.randn(4, width, generator=generator)
        found[f"{name}.alpha"] = torch.tensor(4.0)
    return found


needs_bypass = pytest.mark.skipif(
    not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this host has no bypass LoRA"
)


def bypassed(model, times=1):
    with torch.inference_mode():  # as the host's node does
        for _ in range(times):
            tensors = {name: value.clone() for name, value in lora().items()}
            model = comfy.sd.load_bypass_lora_for_models(model, None, tensors, 0.5, 0.0)[0]
    return model


@needs_bypass
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_a_bypass_lora_takes_part_as_the_patched_one_does(train, checkpointing):
    model = bypassed(tiny.model())
    patched = comfy.sd.load_lora_for_models(tiny.model(), None, lora(), 0.5, 0.0)[0]
    found = train(model, gradient_checkpointing=checkpointing)
    assert apart(found, train(patched)) < 0.01 * apart(found, train(tiny.model()))


@needs_bypass
def test_a_bypass_lora_on_the_text_encoder_takes_part_too(train, request, clip):
    def text_lora():
        generator, name = torch.Generator().manual_seed(5), "lora_te_text_model_encoder_layers_0_self_attn_v_proj"
        down, up = (0.3 * torch.randn(4, 64, generator=generator), 0.3 * torch.randn(64, 4, generator=generator))
        return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(4.0)}

    with torch.inference_mode():
        tensors = {name: value.clone() for name, value in text_lora().items()}
        around = comfy.sd.load_bypass_lora_for_models(None, tiny.clip(), tensors, 0.0, 0.7)[1]
        within = comfy.sd.load_lora_for_models(None, tiny.clip(), text_lora(), 0.0, 0.7)[1]
    found = train(tiny.model(), clip=around)
    assert apart(found, train(tiny.model(), clip=within)) < 0.01 * apart(found, train(tiny.model(), clip=clip))


# What is left out, and said


def cached(model):
    return easycache.EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).args[0]


def lazily_cached(model):
    return easycache.LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False).args[0]


def windowed(model):
    node = windows.ContextWindowsManualNode.execute
    more = {"freenoise": False} if "freenoise" in inspect.signature(node).parameters else {}
    return node(model, 1, 0, "standard_static", 1, False, "pyramid", 0, **more).args[0]


@pytest.mark.parametrize(
    ("put", "name"), [(cached, "EasyCache"), (lazily_cached, "LazyCache"), (windowed, "Context Windows")]
)
def test_what_only_a_whole_sampling_can_use_is_left_out_and_said(train, told, caplog, put, name):
    model, plain = put(tiny.model()), train(tiny.model())
    untouched = repr((model.model_options, model.wrappers))
    told.clear()
    assert equal(train(model), plain)
    line, last = [text for text in told if "left out" in text]
    assert line in last.splitlines() and last == told[-1] and "3 steps" in last
    assert line.startswith(f"{name} on the model: left out of the training") and line in caplog.text
    assert repr((model.model_options, model.wrappers)) == untouched


# What is named


def failing_patch(error):
    def attention(q, k, v, extra_options):
        raise error

    model = tiny.model()
    model.set_model_attn1_patch(attention)
    return model


class Tiles:
    """As a pack that samples in tiles: the network is called without gradient."""

    def __call__(self, apply_model, arguments):
        with torch.no_grad():
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])


Tiles.__module__ = "/comfy/custom_nodes/ComfyUI-Tiles.tiles"


def test_what_knows_no_gradient_is_named(host, train):
    model = tiny.model()
    model.set_model_unet_function_wrapper(Tiles())
    with pytest.raises(host.loop_kernel.TrainingError, match=r"cannot go through Tiles \(ComfyUI-Tiles\)") as caught:
        train(model)
    assert "no gradient reaches" in str(caught.value)
    model = tiny.model()
    model.add_wrapper("diffusion_model", lambda executor, *given, **named: executor(*given, **named).detach())
    with pytest.raises(host.loop_kernel.TrainingError, match="no gradient reaches") as caught:
        train(model)
    assert "On the model: test_what_knows_no_gradient_is_named\n" in str(caught.value)


class Halves:
    """As a pack that mixes tiles: each call is of a part, and C's parts are not F's."""

    calls = 0

    def __call__(self, apply_model, arguments):
        Halves.calls += 1
        raise RuntimeError("the foundation stream left no queries for layer input.1.0")


def test_what_calls_the_model_in_a_way_of_its_own_is_named_first(host, train):
    model = tiny.model()
    model.set_model_unet_function_wrapper(Halves())
    with pytest.raises(
        host.loop_kernel.TrainingError, match="cannot go through Halves, which calls the model"
    ) as caught:
        train(model)
    assert "left no queries" in str(caught.value) and Halves.calls


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (9) must match the size of tensor b (8) at non-singleton dimension 1"),
        RuntimeError("one of the variables needed for gradient computation has been modified by an inplace operation"),
        IndexError("tuple index out of range"),
        NotImplementedError("no such kernel"),
    ],
)
def test_no_sentence_of_torchs_reaches_a_person_alone(host, train, error):
    with pytest.raises(host.loop_kernel.TrainingError) as caught:
        train(failing_patch(error))
    said = str(caught.value)
    assert said.startswith("the model cannot be evaluated in a training") and str(error) in said
    assert "On the model: failing_patch. Connect the model as it was before that" in said
    with pytest.raises(host.loop_kernel.TrainingError) as caught:
        broken = tiny.model()
        broken.model.diffusion_model.out[2].forward = lambda *_: (_ for _ in ()).throw(error)
        train(broken)
    assert str(caught.value).startswith("the model cannot be evaluated in a training") and "On the model" not in str(
        caught.value
    )


def test_a_model_with_nothing_on_it_has_no_names_and_our_own_are_none(host, infused):
    names = host.patched_kernel.names_on
    assert names(tiny.model()) == []
    assert names(free("FreeU_V2", tiny.model())) == ["FreeU_V2"]
    assert names(cached(lazily_cached(tiny.model()))) == ["EasyCache", "LazyCache"]
