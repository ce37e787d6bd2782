"""PromptNet Trainer in a real ComfyUI: on Toybox as the kernel trains, and on tiny models of SD's shapes."""

import importlib
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import tiny  # noqa: E402
from pooled import PooledVae, pictures  # noqa: E402
from reports import on_report  # noqa: E402
from test_finetune_nodes import PooledVision, fingerprint, same, values  # noqa: E402

RATE = 1e-3


@pytest.fixture(scope="module")
def host(pack):
    """The pack's modules that are tested here."""
    nodes = {
        name.rpartition(".")[2]: importlib.import_module(f"{pack.__name__}.nodes.{name}")
        for name in (
            "pretrain",
            "host.pretraining",
            "host.picture_folders",
            "host.words",
            "host.weights",
            "host.toybox",
            "host.display",
        )
    }
    names = (
        "promptnet.network",
        "promptnet.training",
        "promptnet.unfinished",
        "promptnet.file",
        "toybox.pipeline",
        "toybox.promptnet",
        "toybox.configs",
        "toybox.picture_sets",
        "models.configs",
        "loop",
        "keeping",
    )
    kernel = {
        f"{name.replace('.', '_')}": importlib.import_module(f"{pack.__name__}.profusion.{name}") for name in names
    }
    return types.SimpleNamespace(pack=pack, **nodes, **kernel)


@pytest.fixture(scope="module")
def clip():
    return tiny.clip()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The host's folders of PromptNets and of inputs, moved to empty places."""
    import folder_paths

    entry = ([str(tmp_path / "profusion_promptnets")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_promptnets", entry)
    folder_paths.filename_list_cache.clear()
    (tmp_path / "input").mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    return tmp_path


@pytest.fixture(autouse=True)
def small(host, monkeypatch):
    """Pictures of 64 x 64 pixels for models that nobody knows, in place of 128 x 128."""
    network = host.promptnet_network
    usual = network.PromptNetConfig
    monkeypatch.setattr(host.pretraining, "PromptNetConfig", lambda *more: usual(*more, grid=4, projection=8))


def defaults(**inputs):
    return {
        "folder": "none",
        "images": pictures(12),
        "steps": 3,
        "learning_rate": RATE,
        "batch_size": 2,
        "seed": 0,
        "filename_prefix": "me/cat",
        "sample_every": 0,
        "sample_steps": 1,
        **inputs,
    }


@pytest.fixture
def train(host, clip, folders):
    """Run the node as the host does, in inference mode: -> (PROMPTNET, file, loss plot, samples)."""

    def run(**inputs):
        with torch.inference_mode():
            given = {"clip": clip, "clip_vision": PooledVision(), "vae": PooledVae()}
            given |= {} if "model" in inputs else {"model": tiny.model()}
            return host.pretrain.PromptNetTrainer.execute(**{**given, **defaults(), **inputs}).args

    yield run
    host.promptnet_unfinished.unsaved.clear()


# What comes out


def test_it_gives_a_promptnet_its_file_a_plot_and_samples(host, train, folders, clip):
    model, seen = tiny.model(), []
    untouched = fingerprint(model, clip)
    on_report(lambda done, total, _: seen.append((done, total)))
    made, name, plot, samples = train(model=model)
    assert fingerprint(model, clip) == untouched
    assert name == str(Path("me") / "cat_00001_.safetensors") and plot.shape == (1, 288, 512, 3)
    assert samples.shape == (2, 64, 64, 3) and torch.equal(samples[1], pictures(12)[6])
    saved = host.promptnet_file.load_promptnet(folders / "profusion_promptnets" / name, torch.float16)
    assert same(values(saved), values(made.network.half()))
    assert (12, 12) in seen and (3, 3) in seen
    assert not any(value.requires_grad for value in made.network.parameters())
