"""Residual Loader and Saver in a real ComfyUI: their folder, their schemas, and graphs through its executor."""

import errno
import os
import sys
import types
import uuid
from pathlib import Path

import pytest
import torch

comfy = pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

LOADER, SAVER = "ProFusion_ResidualLoader", "ProFusion_ResidualSaver"
SD15_BLOCKS = [f"input.{i}" for i in (1, 2, 4, 5, 7, 8)] + ["middle.0"] + [f"output.{i}" for i in range(3, 12)]


@pytest.fixture
def host(pack):
    """The pack's modules that are tested here, and the host's that they deal with."""
    import folder_paths

    modules = {name: sys.modules[f"{pack.__name__}.nodes.{name}"] for name in ("host.files", "residual")}
    modules = {name.rpartition(".")[2]: module for name, module in modules.items()}
    kernel = sys.modules[f"{pack.__name__}.profusion.residual"]
    return types.SimpleNamespace(folder_paths=folder_paths, kernel=kernel, **modules)


@pytest.fixture
def folder(host, tmp_path, monkeypatch):
    """The host's folder of residuals, moved to an empty place."""
    folder = tmp_path / "models" / "profusion_residuals"
    paths = ([str(folder)], {".safetensors"})
    monkeypatch.setitem(host.folder_paths.folder_names_and_paths, "profusion_residuals", paths)
    monkeypatch.setattr(host.folder_paths, "filename_list_cache", {})
    return folder


@pytest.fixture
def residual(host):
    delta = torch.randn(16, 1, 768, generator=torch.Generator().manual_seed(0))
    return host.kernel.Residual(delta, "cat", tuple(f"{block}.0" for block in SD15_BLOCKS), "SD 1.x", steps=300, seed=7)


@pytest.fixture
def execute(host, residual, folder, monkeypatch):
    """Run an API-format graph through the host's own validation and executor: -> (history, messages by node)."""
    import asyncio

    import execution
    from comfy_api.latest import io
    from executor import prompt_executor

    import nodes

    class MakeResidual(io.ComfyNode):
        """Stands for the trainer."""

        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="MakeResidual", inputs=[], outputs=[io.Custom("RESIDUAL").Output()])

        @classmethod
        def execute(cls):
            return io.NodeOutput(residual)

    for node in [MakeResidual, *host.residual.NODES]:
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    executor = prompt_executor()

    def run(graph):
        graph = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", graph, None))
        if not valid:
            return None, [error["message"] + repr(node_errors)]
        executor.execute(graph, str(uuid.uuid4()), execute_outputs=outputs)
        messages = [data.get("exception_message") for event, data in executor.status_messages]
        ran = {key: executor.history_result["outputs"].get(key) for key in graph}
        return ran, [message for message in messages if message]

    return run


def save_graph(**inputs):
    return {
        "1": ("MakeResidual", {}),
        "2": (SAVER, {"residual": ["1", 0], "filename_prefix": "%noun%", "precision": "int6"} | inputs),
    }


def load_graph(name):
    saver = {"residual": ["1", 0], "filename_prefix": "again", "precision": "float32"}
    return {"1": (LOADER, {"residual": name}), "2": (SAVER, saver)}


# The folder


def test_the_folder_is_in_models_lists_safetensors_and_keeps_added_paths(host, monkeypatch, tmp_path):
    table = host.folder_paths.folder_names_and_paths
    own = str(Path(host.folder_paths.models_dir) / "profusion_residuals")
    assert table["profusion_residuals"][0][0] == own
    monkeypatch.setitem(table, "profusion_residuals", ([str(tmp_path)], set()))  # as extra_model_paths.yaml leaves it
    for _ in range(2):
        host.files.register(host.files.RESIDUALS)
        assert table["profusion_residuals"] == ([own, str(tmp_path)], {".safetensors"})


def test_a_default_base_folder_comes_before_models(host, monkeypatch, tmp_path):
    """As `is_default: true` in extra_model_paths.yaml leaves the host's own lists."""
    paths, table = host.folder_paths, host.folder_paths.folder_names_and_paths
    big, other = tmp_path / "big", tmp_path / "other"
    for kind in ("loras", "profusion_residuals"):
        before, suffixes = table.get(kind, ([], set()))
        monkeypatch.setitem(table, kind, (list(before), suffixes))
    table["profusion_residuals"] = ([], set())
    for base, is_default in ((other, False), (big, True)):
        for kind in ("loras", "profusion_residuals"):
            paths.add_model_folder_path(kind, str(base / kind), is_default)
    assert table["loras"][0][0] == str(big / "loras")
    host.files.register(host.files.RESIDUALS)
    own = str(Path(paths.models_dir) / "profusion_residuals")
    assert table["profusion_residuals"][0] == [
        str(big / "profusion_residuals"),
        own,
        str(other / "profusion_residuals"),
    ]


def test_the_loader_lists_residuals_of_subfolders_and_nothing_else(host, folder, residual):
    assert host.residual.ResidualLoader.INPUT_TYPES()["required"]["residual"][1]["options"] == []
    host.kernel.save_residual(residual, folder / "pets" / "cat.safetensors")
    (folder / "notes.txt").touch()
    (folder / "old.ckpt").touch()
    listed = host.residual.ResidualLoader.INPUT_TYPES()["required"]["residual"][1]["options"]
    assert listed == [os.path.join("pets", "cat.safetensors")]


# The schemas, frozen: only append


@pytest.mark.parametrize(
    "name, inputs, outputs",
    [
        ("ResidualLoader", ["residual:COMBO"], ["RESIDUAL", "STRING"]),
        (
            "ResidualSaver",
            ["residual:RESIDUAL", "filename_prefix:STRING", "precision:COMBO", "preview:IMAGE"],
            ["RESIDUAL", "STRING"],
        ),
    ],
)
def test_schemas_are_frozen_and_explained(host, name, inputs, outputs):
    schema = getattr(host.residual, name).GET_SCHEMA()
    assert schema.node_id == f"ProFusion_{name}"
    assert [f"{entry.id}:{entry.get_io_type()}" for entry in schema.inputs] == inputs
    assert [output.io_type for output in schema.outputs] == outputs
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])
    assert schema.description
    root = Path(host.residual.__file__).parents[1]
    assert (root / "web" / "docs" / f"{schema.node_id}.md").is_file()


def test_the_default_precision_is_the_smallest(host):
    precision = host.residual.ResidualSaver.GET_SCHEMA().inputs[2]
    assert precision.options == ["int6", "float16", "float32"]
    assert precision.default == "int6"


# Saving


def test_a_graph_saves_under_the_noun_and_shows_path_and_size(execute, folder, host):
    ran, errors = execute(save_graph())
    assert not errors
    path = folder / "cat_00001_.safetensors"
    assert ran["2"]["text"] == [f"{path}\n{path.stat().st_size:,} bytes"]
    assert path.stat().st_size <= 11_000
    assert host.kernel.load_residual(path).noun == "cat"


def test_no_file_is_overwritten(execute, folder):
    folder.mkdir(parents=True)
    (folder / "cat_00003_.png").touch()
    before = {}
    for precision in ("int6", "float16", "float32"):
        assert not execute(save_graph(precision=precision))[1]
        after = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert len(after) == len(before) + 1 + (not before)  # the picture was there already
        assert before.items() <= after.items()
        before = after
    assert sorted(before)[-1] == "cat_00006_.safetensors"


def test_subfolders_and_dates_are_understood(execute, folder):
    assert not execute(save_graph(filename_prefix="pets/%year%/my %noun%"))[1]
    (saved,) = folder.rglob("*.safetensors")
    assert saved.name == "my cat_00001_.safetensors"
    assert saved.parents[2] == folder
    assert saved.parent.name.isdigit()


@pytest.mark.parametrize("prefix", ["", " ", ".", "../cat", "pets/../../cat", "/tmp/cat", "..\\cat"])
def test_a_prefix_cannot_lead_out_of_the_folder(execute, tmp_path, prefix):
    ran, errors = execute(save_graph(filename_prefix=prefix))
    assert "is no name within" in errors[0]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_noun_that_is_no_file_name_is_made_one(host, folder, residual):
    import dataclasses

    odd = dataclasses.replace(residual, noun="a/../b: c?")
    path = host.files.next_residual_path("%noun%", odd.noun)
    assert path == folder / "a_b_c__00001_.safetensors"


def test_a_read_only_folder_is_an_error_in_the_node_and_leaves_nothing(execute, folder, monkeypatch):
    folder.mkdir(parents=True)
    plain_open = Path.open

    def refuse(path, mode="r", *args, **kwargs):
        if "x" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return plain_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    _, errors = execute(save_graph())
    assert "cat_00001_.safetensors" in errors[0]
    assert "read-only" in errors[0]
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_in_the_node(execute, folder):
    folder.parent.write_bytes(b"a file where the folder should be")
    _, errors = execute(save_graph())
    assert str(folder) in errors[0]


@pytest.mark.parametrize("channels, values", [(3, 0.5), (4, 2.0), (1, float("nan"))])
def test_the_model_browser_finds_the_preview(host, folder, residual, channels, values):
    from app.model_manager import ModelFileManager
    from PIL import Image

    images = torch.full((2, 300, 600, channels), values)
    _, path = host.residual.ResidualSaver.execute(residual, "cat", "int6", images).result
    assert ModelFileManager().get_model_previews(path) == [str(Path(path).with_suffix(".png"))]
    with Image.open(Path(path).with_suffix(".png")) as picture:
        assert picture.size == (256, 128)
        assert picture.getpixel((0, 0)) == {0.5: (128,) * 3, 2.0: (255,) * 3}.get(values, (0,) * 3)
    assert [file["name"] for file in ModelFileManager().get_model_file_list("profusion_residuals")] == [Path(path).name]


def test_a_preview_that_cannot_be_written_is_told_and_costs_nothing(host, folder, residual, monkeypatch):
    kernel_file = sys.modules[f"{host.kernel.__name__}.file"]

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kernel_file, "_write_preview", fail)
    output = host.residual.ResidualSaver.execute(residual, "cat", "int6", torch.zeros(1, 8, 8, 3))
    assert "No preview picture could be saved: the disk is full" in output.ui["text"][0]
    assert host.kernel.load_residual(output.result[1]).noun == "cat"


# Loading


def test_a_graph_loads_what_was_saved(execute, folder, host, residual):
    saved = host.kernel.save_residual(residual, folder / "pets" / "cat.safetensors")
    ran, errors = execute(load_graph(os.path.join("pets", "cat.safetensors")))
    assert not errors
    assert ran["1"]["text"] == ["cat: SD 1.x, 300 steps"]
    again = host.kernel.load_residual(folder / "again_00001_.safetensors")
    assert torch.equal(again.delta, host.kernel.load_residual(saved.path).delta)


def test_a_replaced_file_is_loaded_again_and_an_unchanged_one_is_not(execute, folder, host, residual, monkeypatch):
    path = host.kernel.save_residual(residual, folder / "cat.safetensors").path
    loads = []
    load = host.residual.load_residual
    monkeypatch.setattr(host.residual, "load_residual", lambda path: loads.append(path) or load(path))
    for expected in (1, 1):
        assert not execute(load_graph("cat.safetensors"))[1]
        assert len(loads) == expected
    os.utime(path, ns=(1, 1))
    assert not execute(load_graph("cat.safetensors"))[1]
    assert len(loads) == 2


def test_a_missing_residual_is_refused_before_anything_runs(execute, folder, host, residual):
    host.kernel.save_residual(residual, folder / "dog.safetensors")
    ran, errors = execute(load_graph("cat.safetensors"))
    assert ran is None
    assert f"There is no residual 'cat.safetensors'. Searched: {folder}. Found: dog.safetensors." in errors[0]


def test_where_there_are_none_the_folder_is_named(execute, folder):
    _, errors = execute(load_graph("cat.safetensors"))
    assert f"Searched: {folder}. Found: no residual." in errors[0]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "pets/../../secret.safetensors"])
def test_a_name_cannot_lead_out_of_the_folder(host, folder, residual, name):
    folder.mkdir(parents=True)
    host.kernel.save_residual(residual, folder.parent / "secret.safetensors")
    with pytest.raises(host.kernel.ResidualError, match="There is no residual"):
        host.residual.ResidualLoader.execute(name)


def test_a_damaged_file_is_an_error_in_the_node(execute, folder, host, residual):
    path = host.kernel.save_residual(residual, folder / "cat.safetensors").path
    path.write_bytes(path.read_bytes()[:-1])
    _, errors = execute(load_graph("cat.safetensors"))
    assert str(path) in errors[0]
    assert "cut short" in errors[0]
    assert "train the residual again" in errors[0]


def test_what_is_loaded_can_be_trained_on(execute, folder, host, residual):
    host.kernel.save_residual(residual, folder / "cat.safetensors")
    with torch.inference_mode():
        loaded, noun = host.residual.ResidualLoader.execute("cat.safetensors").result
    assert noun == "cat"
    assert not loaded.delta.is_inference()


def test_text_reaches_the_frontend_of_a_running_server(host, folder, residual, monkeypatch):
    sent = []
    server = types.SimpleNamespace(send_progress_text=lambda text, node: sent.append((text, node)))
    stand_in = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", stand_in)
    saver = host.residual.ResidualSaver.PREPARE_CLASS_CLONE(None)
    monkeypatch.setattr(saver, "hidden", types.SimpleNamespace(unique_id="12"))
    path = saver.execute(residual, "cat", "int6").result[1]
    assert sent == [(f"{path}\n{Path(path).stat().st_size:,} bytes", "12")]
