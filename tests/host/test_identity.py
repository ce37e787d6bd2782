"""Which model a residual was trained on: its file by the graph, its weights by a sample, and a warning elsewhere."""

import hashlib
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management  # noqa: E402
import tiny  # noqa: E402
from pooled import PooledVae, pictures  # noqa: E402

GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sub\\base.safetensors"}},
    "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": "style.safetensors"}},
    "3": {"class_type": "ModelMergeSimple", "inputs": {"model1": ["1", 0], "model2": ["2", 0]}},
    "4": {"class_type": "ProFusion_ToyboxLoader", "inputs": {}},
    "5": {"class_type": "Loop", "inputs": {"model": ["5", 0]}},
    "6": {"class_type": "MotionLoader", "inputs": {"model": ["2", 0], "model_name": "motion.ckpt"}},
    "7": {"class_type": "MotionOnMerged", "inputs": {"model": ["3", 0], "model_name": "motion.ckpt"}},
    "8": {"class_type": "Mixer", "inputs": {"base_model": ["1", 0], "model_name": "other.safetensors"}},
    "9": {"class_type": "UNETLoader", "inputs": {"unet_name": "unet.safetensors", "weight_dtype": "default"}},
    "10": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": ["11", 0]}},
    "trainer": {"class_type": "ProFusion_ResidualTrainer", "inputs": {"model": ["2", 0]}},
}


@pytest.fixture
def identity(pack):
    return sys.modules[f"{pack.__name__}.nodes.host.identity"]


def before(identity, node):
    graph = {**GRAPH, "trainer": {"inputs": {"model": [node, 0]}}}
    return identity.BaseFile(graph, "trainer").name


def test_the_graph_names_the_file(identity):
    assert before(identity, "2") == before(identity, "1") == "base.safetensors"
    assert before(identity, "4") == "Toybox" and before(identity, "9") == "unet.safetensors"
    assert before(identity, "6") == "base.safetensors"  # not the motion module
    assert before(identity, "7") == before(identity, "8") == before(identity, "10") == ""
    assert before(identity, "3") == before(identity, "5") == before(identity, "absent") == ""  # a merge is of no file
    for graph in (None, {}, {"trainer": None}, {"trainer": {"inputs": {"model": "text"}}}):
        assert identity.BaseFile(graph, "trainer").name == ""


def test_the_file_is_hashed_once(identity, tmp_path, monkeypatch):
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"weights" * 1000)
    found = {"checkpoints": str(path)}
    monkeypatch.setattr(identity.folder_paths, "get_full_path", lambda kind, name: found.get(kind))
    monkeypatch.setattr(identity, "_hashes", {})
    expected = hashlib.sha256(b"weights" * 1000).hexdigest()[:10]
    for _ in range(2):
        base = identity.BaseFile(GRAPH, "trainer")
        base.wait()
        assert base.hash_so_far() == expected
        monkeypatch.setattr(hashlib, "sha256", None)  # is not asked again


def test_the_weights_are_known_again_without_their_patches_and_others_are_told(identity, infused, generator):
    origin_of = sys.modules[f"{infused.pack.__name__}.profusion.residual"].Origin
    sample = identity.weights_sample(infused.model)
    assert len(sample.numbers) == 44 and sample.rounding == 0
    patched = infused.model.clone()
    key = next(name for name in patched.model_state_dict() if name.endswith("attn2.to_v.weight"))
    patched.add_patches({key: (torch.ones_like(patched.model_state_dict()[key]),)})
    infused.run(patched, infused.positive, steps=1)  # the patches are in the weights now
    assert identity.weights_sample(patched) == sample
    told = replace(infused.residual(), origin=origin_of("base.ckpt", "0123456789", sample))
    assert identity.other_bases([told], infused.model) == []
    assert identity.other_bases([infused.residual()], infused.model) == []  # nobody knows
    tuned = tiny.model()
    with torch.no_grad():
        for weight in tuned.model.diffusion_model.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)
    (warning,) = identity.other_bases([told, infused.residual()], tuned)
    assert "was trained on base.ckpt (0123456789). This model" in warning


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8], ids=str)
def test_the_same_weights_in_eight_bits_are_no_other_base(identity, infused, kind):
    """Those of 4 bits in bytes, and those that have a scale beside them, say nothing."""
    origin_of = sys.modules[f"{infused.pack.__name__}.profusion.residual"].Origin
    told = replace(infused.residual(), origin=origin_of("base.ckpt", sample=identity.weights_sample(infused.model)))
    eight = tiny.model()
    for name, layer in eight.model.diffusion_model.named_modules():
        if name.endswith("attn2.to_v"):
            layer.weight = torch.nn.Parameter(layer.weight.detach().to(kind), requires_grad=False)
    sample = identity.weights_sample(eight)
    assert bool(sample.numbers) == kind.is_floating_point and identity.other_bases([told], eight) == []
    assert kind.is_floating_point or sample.numbers == ""
    for name, layer in eight.model.diffusion_model.named_modules():
        if name.endswith("attn2.to_v"):
            layer.convert_weight = lambda weight, inplace=False: 8 * weight.float()
    assert identity.weights_sample(eight).numbers == ""


@pytest.mark.parametrize("weights", ["the same", "others"])
def test_a_residual_of_another_base_is_drawn_with_a_warning(identity, infused, weights, monkeypatch, caplog, generator):
    origin_of = sys.modules[f"{infused.pack.__name__}.profusion.residual"].Origin
    model = infused.model
    if weights == "others":
        model = tiny.model()
        tiny.randomise(model.model.diffusion_model, seed=99)
    sample = identity.weights_sample(infused.model)
    told = replace(infused.residual(), origin=origin_of("base.ckpt", sample=sample))
    patched, positive = infused.patch(told, model)
    assert [("trained on base.ckpt" in record.message) for record in caplog.records] == [True] * (weights == "others")
    assert infused.run(patched, positive).isfinite().all()


@pytest.fixture
def train(pack, tmp_path, monkeypatch):
    """`train()`: what a training of one step learned on a base of seven bytes, and the origin in its file."""
    import folder_paths

    folder = tmp_path / "profusion_residuals"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", ([str(folder)], {".safetensors"}))
    trainer = sys.modules[f"{pack.__name__}.nodes.trainer"].ResidualTrainer
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"weights")
    monkeypatch.setattr(folder_paths, "get_full_path", lambda kind, name: str(base) if kind == "checkpoints" else None)
    monkeypatch.setattr(trainer, "hidden", types.SimpleNamespace(prompt=GRAPH, unique_id="trainer"), raising=False)
    monkeypatch.setattr(sys.modules[f"{pack.__name__}.nodes.host.identity"], "_hashes", {})
    values = {
        "noun": "ball",
        "steps": 1,
        "learning_rate": 0.03,
        "batch_size": 1,
        "seed": 0,
        "flip": False,
        "preserve": 0.0,
        "sample_every": 0,
        "sample_prompt": "a %noun%",
        "sample_steps": 1,
        "sample_cfg": 1.0,
    }
    load = sys.modules[f"{pack.__name__}.profusion.residual"].load_residual

    def saved():
        (path,) = folder.rglob("*.safetensors")
        return load(path)

    def executed(model=None, **more):
        with torch.inference_mode():
            given = {**values, **more}
            return trainer.execute(model or tiny.model(), tiny.clip(), PooledVae(), pictures(), **given)

    def run(model=None):
        learned, *_ = executed(model).args
        return learned, saved().origin

    return types.SimpleNamespace(run=run, saved=saved, executed=executed)


def test_a_training_says_what_it_was_on(train, identity):
    model = tiny.model()
    learned, origin = train.run(model)
    assert origin == learned.origin
    assert (origin.base, origin.base_hash) == ("base.safetensors", hashlib.sha256(b"weights").hexdigest()[:10])
    assert origin.learning_rate == 0.03 and "a photo of a {}" in origin.prompts and origin.version and origin.day
    assert origin.sample == identity.weights_sample(model)


def test_a_training_says_that_other_weights_lay_over_its_base(train):
    model = tiny.model()
    keys = [name for name in model.model_state_dict() if "attn2.to_" in name and name.endswith("weight")][:3]
    model.add_patches({key: (torch.zeros_like(model.model_state_dict()[key]),) for key in keys})
    assert train.run(model)[1].patched == 3


@pytest.mark.parametrize("weights", ["the same", "others"])
def test_going_on_with_the_residual_of_another_base_is_said(train, weights, caplog):
    learned, _ = train.run()
    model = tiny.model()
    if weights == "others":
        tiny.randomise(model.model.diffusion_model, seed=99)
    found = train.executed(model, resume=learned, steps=2)
    other = weights == "others"
    (text,) = found.ui["text"]
    assert ("was trained on base.safetensors" in text) == ("was trained on base.safetensors" in caplog.text) == other
    assert text.startswith("ball: 2 steps\n") and found.args[0].steps == 2


@pytest.fixture
def slow_disk(identity, monkeypatch):
    """The model's file is not read to its end until the test is over."""
    over = threading.Event()
    monkeypatch.setattr(identity.BaseFile, "_read", lambda base, path: over.wait())
    yield
    over.set()


def test_a_training_does_not_wait_long_for_the_hash(train, identity, slow_disk, monkeypatch):
    monkeypatch.setattr(identity, "MOST_SECONDS", 0.3)
    learned, origin = train.run()
    assert (origin.base, origin.base_hash) == ("base.safetensors", "") and learned.delta.any()


def test_cancel_acts_while_the_hash_is_waited_for_and_loses_nothing(train, identity, slow_disk, monkeypatch):
    """What has been learned is in its file, as if nobody had pressed it."""
    wait, cancel = identity.BaseFile.wait, comfy.model_management.interrupt_current_processing
    monkeypatch.setattr(identity, "MOST_SECONDS", 600)
    monkeypatch.setattr(identity.BaseFile, "wait", lambda base: (cancel(True), wait(base)))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train.run()
    assert train.saved().delta.any() and train.saved().steps == 1 and train.saved().origin.base_hash == ""
