"""Memory in the two trainings: gradient checkpointing changes nothing but it, and what cannot fit is refused at
once."""

import importlib
import math
import types

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management  # noqa: E402
import tiny  # noqa: E402
from pooled import PooledVae  # noqa: E402
from test_finetune_nodes import PooledVision, promptnet  # noqa: E402
from test_finetune_nodes import defaults as finetune_defaults  # noqa: E402
from test_pretrain_node import defaults as pretrain_defaults  # noqa: E402
from test_pretrain_node import small_networks  # noqa: E402
from test_trainer import defaults, fingerprint  # noqa: E402


@pytest.fixture(scope="module")
def host(pack):
    names = ("trainer", "finetune", "pretrain", "host.words", "host.budget", "host.evaluation", "host.streams")
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
def clip():
    return tiny.clip()


def trained(host, clip, model=None, **inputs):
    """What a residual has learned, and its optimizer."""
    model = tiny.model() if model is None else model
    with torch.inference_mode():
        node = host.trainer.ResidualTrainer
        residual = node.execute(model, clip, PooledVae(), **{**defaults(), **inputs}).args[0]
    return [residual.delta, residual.training_state["exp_avg"], residual.training_state["exp_avg_sq"]]


def finetuned(host, clip, model=None, **inputs):
    """PromptNet's parameters after it, and the attention layers' changes."""
    model = tiny.model() if model is None else model
    given = {**finetune_defaults(), "clip_vision": PooledVision(), "vae": PooledVae(), **inputs}
    with torch.inference_mode():
        made = host.finetune.PromptNetFinetune.execute(promptnet(host), model, clip, **given).args
    return [*made[0].network.state_dict().values()]


def pretrained(host, clip, model=None, **inputs):
    """A new PromptNet's parameters after its training."""
    model = tiny.model() if model is None else model
    given = {**pretrain_defaults(), "clip_vision": PooledVision(), "vae": PooledVae(), **inputs}
    with torch.inference_mode():
        made = host.pretrain.PromptNetTrainer.execute(model=model, clip=clip, **given).args
    return [*made[0].network.state_dict().values()]


METHODS = {"residual": trained, "finetune": finetuned, "pretrain": pretrained}


@pytest.fixture(params=METHODS)
def method(request, host, clip):
    return lambda *models, **inputs: METHODS[request.param](host, clip, *models, **inputs)


@pytest.fixture
def computed(monkeypatch):
    """How often the host's transformer blocks are computed, forward and back."""
    from comfy.ldm.modules.attention import BasicTransformerBlock

    calls, forward = [], BasicTransformerBlock.forward

    def counting(self, *arguments, **options):
        calls.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BasicTransformerBlock, "forward", counting)
    return calls


def room(host, monkeypatch, size):
    """Let the device have this much memory."""
    monkeypatch.setattr(host.budget, "_memory_of", lambda device: size)


def close(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def test_checkpointing_learns_the_same(method, computed):
    expected = method(gradient_checkpointing="off")
    once = sum(computed)
    computed.clear()
    close(method(gradient_checkpointing="on"), expected)
    assert sum(computed) > 1.5 * once


def test_the_gradient_of_one_step_is_the_same(host, clip):
    """AdamW's first moment is a tenth of it."""
    close(
        trained(host, clip, steps=1, gradient_checkpointing="on"),
        trained(host, clip, steps=1, gradient_checkpointing="off"),
    )


def test_packs_patches_take_part_in_what_is_computed_twice(host, clip):
    def model():
        found = tiny.model()
        found.set_model_attn1_patch(lambda n, context, value, options: (n, context, value * 1.1))
        found.set_model_attn2_output_patch(lambda n, options: n * (1.0 + 0.1 * options["block_index"]))
        return found

    expected = trained(host, clip, model(), gradient_checkpointing="off")
    close(trained(host, clip, model(), gradient_checkpointing="on"), expected)
    assert not torch.equal(expected[0], trained(host, clip)[0])


def test_nothing_is_left_on_the_model(method):
    model = tiny.model()
    before = fingerprint(model)
    method(model, gradient_checkpointing="on")
    assert fingerprint(model) == before


@pytest.mark.parametrize(("size", "twice"), [(math.inf, False), ("between", True)])
def test_auto_is_for_where_memory_is_short(method, host, monkeypatch, computed, size, twice):
    room(host, monkeypatch, math.inf)
    method(gradient_checkpointing="off")
    once = sum(computed)
    computed.clear()
    room(host, monkeypatch, _between(host, monkeypatch, method) if size == "between" else size)
    computed.clear()
    method(gradient_checkpointing="auto")
    assert (sum(computed) > once) is twice


def _between(host, monkeypatch, method):
    """Room for a step with gradient checkpointing, and not for one without."""
    needed = {}
    plan = host.budget.plan_training
    for choice in ("on", "off"):
        budgets = []
        for module in ("residual_training", "finetuning", "pretraining"):
            place = importlib.import_module(f"{host.pack.__name__}.nodes.host.{module}")
            monkeypatch.setattr(
                place,
                "plan_training",
                lambda *a, budgets=budgets, **k: (budgets.append((plan(*a, **k), a)), budgets[-1])[1][0],
            )
        method(gradient_checkpointing=choice)
        (budget, (model, *_)) = budgets[0]
        needed[choice] = budget.step
    weights = sum(value.nbytes for value in model.model.parameters()) + 10e6  # and the text encoder's
    return (needed["on"] + needed["off"]) / 2 + weights


@pytest.mark.parametrize(
    ("size", "choice", "advice"),
    [
        (0.5, "off", "Set gradient_checkpointing to auto"),
        (0.3, "auto", "Set batch_size to [1-3]"),
        (0.3, "off", "Set batch_size to [1-3] and gradient_checkpointing to auto"),
        (0.06, "auto", "Set batch_size to 1, and give smaller pictures: [0-9]+% of this width and height"),
        (0.0, "auto", "use a smaller model"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_input_to_change(host, clip, monkeypatch, computed, size, choice, advice):
    model = tiny.model()
    weights = sum(value.nbytes for value in model.model.parameters())
    step = model.memory_required([4, 4, 8, 8]) * 12  # of a model that was not measured
    room(host, monkeypatch, weights + size * step)
    with pytest.raises(Exception, match=f"pictures of 8x8 latent cells.*GB, and this GPU has .*GB.*{advice}") as raised:
        trained(host, clip, model, batch_size=4, gradient_checkpointing=choice)
    assert type(raised.value).__name__ == "TrainingError" and not computed


def test_pictures_of_the_models_own_size_are_not_asked_to_be_smaller(host, clip, monkeypatch, computed):
    model = tiny.model()
    room(host, monkeypatch, 3e6)
    with pytest.raises(Exception, match="use a smaller model, or one in float16") as raised:
        pretrained(host, clip, model, batch_size=1)
    assert type(raised.value).__name__ == "TrainingError" and not computed


def test_an_unknown_choice_is_refused(host, clip):
    with pytest.raises(ValueError, match="gradient_checkpointing='some': choose one of auto, on, off"):
        trained(host, clip, gradient_checkpointing="some")


def test_memory_that_nobody_tells_is_not_reckoned_with(host, monkeypatch):
    management, card = comfy.model_management, torch.device("cuda:0")
    monkeypatch.setattr(management, "get_total_memory", lambda device: 12e9)
    assert host.budget._memory_of(torch.device("cpu")) == math.inf
    assert host.budget._memory_of(card) == 12e9 - management.extra_reserved_memory()
    monkeypatch.setattr(management, "directml_enabled", True)
    assert host.budget._memory_of(card) == math.inf


def test_sdxl_on_a_card_of_12_gb(host, monkeypatch):
    """By arithmetic: with gradient checkpointing four pictures of 1024 pixels at a time, without it not."""
    model = types.SimpleNamespace(load_device=torch.device("cpu"), model=_SDXL())
    model.get_model_object = lambda name: model.model.diffusion_model
    room(host, monkeypatch, 12e9 - 1e9)  # for the system's picture and CUDA
    shape = 4, 4, 128, 128
    budget = host.budget.plan_training(model, shape, "auto")
    assert budget.checkpointing and budget.step < 3e9
    with pytest.raises(Exception, match="Set gradient_checkpointing to auto"):
        host.budget.plan_training(model, shape, "off")
    assert not host.budget.plan_training(model, (1, 4, 64, 64), "auto").checkpointing


class _SDXL(torch.nn.Module):
    """SDXL's UNet without memory, as a host's model."""

    def __init__(self):
        from profusion.models.configs import SDXL
        from profusion.models.unet import UNet

        super().__init__()
        with torch.device("meta"):
            self.diffusion_model = UNet(SDXL).half()

    def get_dtype(self):
        return torch.float16
