"""The shipped workflows in a real server: every node is known, every widget has its value, and Toybox finishes them."""

import io
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: the workflows are not run")

from conftest import HOST
from live import REPOSITORY, running, to_prompt
from PIL import Image

from tools import thumbnails

pytestmark = pytest.mark.xdist_group("workflows")  # one server for all

WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
ON_TOYBOX = [path for path in WORKFLOWS if '"ProFusion_ToyboxLoader"' in path.read_text()]
FOR_FILES = [path for path in WORKFLOWS if path not in ON_TOYBOX]
READING = {  # a file that is the user's
    "CheckpointLoaderSimple",
    "CLIPLoader",
    "DualCLIPLoader",
    "LoadImage",
    "ProFusion_ResidualLoader",
    "UNETLoader",
    "VAELoader",
}
SHORTER = {"steps": 3, "draws": 2}  # the same graphs, shorter trainings and runs: what they make is measured elsewhere
FILES = {
    "ProFusion_ResidualSaver": ("profusion_residuals",),
    "ProFusion_PromptNetTrainer": ("profusion_promptnets",),
    "ProFusion_PromptNetFinetune": ("profusion_promptnets", "loras"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(HOST, tmp_path_factory.mktemp("comfy")) as server:
        yield server


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def names(pack):
    """The ids of all of the pack's nodes."""
    names = {node.GET_SCHEMA().node_id for node in pack.NODES}
    assert len(names) == len(pack.NODES) and "ProFusion_ResidualFromPromptNet" in names
    return names


def test_every_node_is_there_with_a_tooltip_on_every_input_and_output(names, object_info):
    assert {name for name in object_info if name.startswith("ProFusion_")} == names
    for name in names:
        definition = object_info[name]
        for part in ("required", "optional"):
            for field, entry in definition["input"].get(part, {}).items():
                assert entry[1].get("tooltip"), f"{name}.{field} has no tooltip"
        assert all(definition["output_tooltips"]) and definition["description"]


def test_every_node_has_a_help_page_with_each_of_its_inputs(names, server, object_info):
    for name in names:
        page = server.fetch(f"/extensions/profusion/docs/{name}.md").decode()
        for part in ("required", "optional"):
            for field in object_info[name]["input"].get(part, {}):
                first = re.sub(r"_[2-9]$", "", field)  # weight, of weight_2
                assert re.search(rf"\b({field}|{first})\b", page), f"{name}'s help page says nothing of {field}"


def test_the_template_browser_lists_them(server):
    assert set(server.get("/workflow_templates")["profusion"]) == {path.stem for path in WORKFLOWS}
    for path in WORKFLOWS:
        thumbnail = Image.open(io.BytesIO(server.fetch(f"/api/workflow_templates/profusion/{path.stem}.jpg")))
        assert min(thumbnail.size) >= 128


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_only_known_nodes_and_carries_its_origin(path, object_info):
    workflow = json.loads(path.read_text())
    assert workflow["version"] == 0.4
    to_prompt(workflow, object_info)
    for node in workflow["nodes"]:
        if node["type"] in object_info:
            assert node["properties"]["Node name for S&R"] == node["type"]
            ours = node["type"].startswith("ProFusion_")
            assert node["properties"]["cnr_id"] == ("profusion" if ours else "comfy-core") and node["properties"]["ver"]
            assert ours or object_info[node["type"]]["python_module"].split(".")[0] in ("nodes", "comfy_extras")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_picture_stands_beside_a_control_of_its_seed(path, object_info):
    prompt = to_prompt(json.loads(path.read_text()), object_info)
    seeds = {
        node["inputs"]["seed"]
        for node in prompt.values()
        if node["class_type"] in ("KSampler", "ProFusion_FusionKSampler")
    }
    seeds |= {node["inputs"]["noise_seed"] for node in prompt.values() if node["class_type"] == "RandomNoise"}
    assert len(seeds) == 1
    loaders = [
        number
        for number, node in prompt.items()
        if node["class_type"] in ("ProFusion_ToyboxLoader", "CheckpointLoaderSimple", "UNETLoader")
    ]
    assert any(node["class_type"] == "KSampler" and node["inputs"]["model"][0] in loaders for node in prompt.values())


@pytest.mark.parametrize("path", FOR_FILES, ids=lambda path: path.stem)
def test_a_workflow_for_real_models_lacks_nothing_but_their_files(path, server, object_info):
    """The host validates every node before it runs any, and says of each value that it does not have."""
    workflow = json.loads(path.read_text())
    prompt = to_prompt(workflow, object_info)
    with pytest.raises(AssertionError, match="/prompt: 400") as refused:
        server.post("/prompt", {"prompt": prompt})
    faulty = json.loads(str(refused.value).partition(": 400 ")[2])["node_errors"]
    assert {node["class_type"] for node in faulty.values()} == {
        node["class_type"] for node in prompt.values() if node["class_type"] in READING
    }
    errors = [error for node in faulty.values() for error in node["errors"]]
    assert {error["type"] for error in errors} <= {"value_not_in_list", "custom_validation_failed"}
    missing = {error["extra_info"].get("received_value") for error in errors}
    assert {file["name"] for node in workflow["nodes"] for file in node["properties"].get("models", [])} <= missing


@pytest.mark.parametrize("path", ON_TOYBOX, ids=lambda path: path.stem)
def test_a_toybox_workflow_finishes(path, server, object_info):
    prompt = to_prompt(json.loads(path.read_text()), object_info)
    for node in prompt.values():
        node["inputs"].update({name: value for name, value in SHORTER.items() if name in node["inputs"]})
        if node["class_type"] == "ProFusion_FusionKSampler" and "with_infusion" in path.stem:
            node["inputs"]["steps"] = 25  # as many as it takes for both to leave evaluations out, each in its own turn
    entry = server.run(prompt)
    pictures = [item for output in entry["outputs"].values() for item in output.get("images", [])]
    assert pictures
    for item in pictures:
        data = server.fetch(f"/view?filename={item['filename']}&subfolder={item['subfolder']}&type={item['type']}")
        Image.open(io.BytesIO(data)).verify()
    kinds = {node["class_type"] for node in prompt.values()}
    for kind, folders in FILES.items():
        for folder in folders if kind in kinds else ():
            assert list(Path(server.base, "models", folder).rglob("*.safetensors")), f"{kind} left no file in {folder}"


def test_a_thumbnail_shows_what_its_workflow_learns_from():
    for thumbnail in thumbnails.THUMBNAILS.values():
        workflow = json.loads((REPOSITORY / "workflows" / f"{thumbnail.workflow}.json").read_text())
        toys = [node for node in workflow["nodes"] if node["type"] == "ProFusion_ToyboxLoader"]
        shown = thumbnails.shown(workflow)
        assert len(shown) == sum(min(4 if len(toys) == 1 else 2, node["widgets_values"][1]) for node in toys)
