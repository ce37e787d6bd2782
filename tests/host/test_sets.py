"""Every node that takes pictures takes one set: a batch, a list of the host's own loaders, mixed sizes, masks alike."""

import asyncio
import copy
import sys
import types
import uuid

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import execution
import folder_paths
from comfy_api.latest import io
from executor import prompt_executor
from PIL import Image

import nodes
from profusion.toybox.drawing import SIZE

TOY = "slate and apricot mushroom"
TRAINING = {
    "noun": "mushroom",
    "steps": 2,
    "learning_rate": 0.02,
    "batch_size": 1,
    "seed": 0,
    "flip": True,
    "preserve": 1.0,
    "sample_every": 0,
    "sample_prompt": "a photo of a %noun%",
    "sample_steps": 1,
    "sample_cfg": 2.0,
}


class Listed(io.ComfyNode):
    """Whatever a test has put into `made`, as a list or a batch."""

    made = {"images": [], "masks": [], "texts": []}

    @classmethod
    def define_schema(cls):
        outputs = [io.Image.Output(is_output_list=True), io.Mask.Output(is_output_list=True)]
        return io.Schema("Listed", inputs=[], outputs=[*outputs, io.String.Output(is_output_list=True)])

    @classmethod
    def fingerprint_inputs(cls):
        return uuid.uuid4().hex

    @classmethod
    def execute(cls):
        return io.NodeOutput(*(cls.made[name] for name in ("images", "masks", "texts")))


class Counted(io.ComfyNode):
    """Notes what reaches it, once for each."""

    seen = []

    @classmethod
    def define_schema(cls):
        return io.Schema("Counted", inputs=[io.AnyType.Input("anything")], outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, anything):
        cls.seen.append(anything)
        return io.NodeOutput()


@pytest.fixture
def host(pack, tmp_path, monkeypatch):
    """The host with the pack's nodes, empty folders, and `run(graph)`: what the nodes showed, by their numbers."""
    for name in ("profusion_residuals", "profusion_promptnets", "loras"):
        entry = ([str(tmp_path / name)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
    for node in [*pack.NODES, Listed, Counted]:
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    Counted.seen.clear()
    executor = prompt_executor()

    def run(graph):
        graph = copy.deepcopy(graph)  # the host notes in it what has not changed
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", graph, None))
        assert valid, (error, node_errors)
        executor.execute(graph, str(uuid.uuid4()), execute_outputs=outputs)
        failures = [event for event in executor.status_messages if event[0] == "execution_error"]
        if failures:
            raise RuntimeError(failures[0][1]["exception_message"])
        return executor.history_result["outputs"]

    return types.SimpleNamespace(run=run, folder=tmp_path, pack=pack)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def toybox(count=3):
    return node("ProFusion_ToyboxLoader", toy=TOY, count=count, seed=0)


def trainer(images=("2", 0), **more):
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": list(images)}
    return node("ProFusion_ResidualTrainer", **TRAINING, **links, **more)


def mushrooms(pack, count=3):
    drawn = sys.modules[f"{pack.__name__}.profusion.toybox.concepts"].drawn_concept(TOY, count, 0)
    return drawn.pictures, drawn.masks


def in_a_list(pack, count=3):
    """A list of pictures, each a batch of one, and of their masks."""
    pictures, masks = mushrooms(pack, count)
    return {"images": list(pictures.split(1)), "masks": list(masks.split(1)), "texts": []}


def trained(host):
    return sorted((host.folder / "profusion_residuals" / "training").glob("*.safetensors"))


def test_a_list_is_one_training_and_the_one_of_the_batch(host):
    graph = {"1": toybox(), "2": node("Listed"), "3": trainer(masks=["2", 1]), "4": node("Counted", anything=["3", 0])}
    Listed.made = in_a_list(host.pack)
    shown = host.run(graph)
    assert len(trained(host)) == 1 and len(Counted.seen) == 1
    assert f"3 pictures of {SIZE}x{SIZE} pixels" in shown["3"]["text"][0]
    graph["3"] = trainer(("1", 4), masks=["1", 5])
    host.run(graph)
    batch, listed = Counted.seen[1], Counted.seen[0]
    assert torch.equal(batch.delta, listed.delta) and listed.delta.any()


def test_the_hosts_own_loader_of_folders_feeds_one_training(host, monkeypatch):
    loaders = pytest.importorskip("comfy_extras.nodes_dataset", reason="this host's loader of folders gives a batch")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(host.folder / "input"))
    folder = host.folder / "input" / "mushroom"
    folder.mkdir(parents=True)
    for index, side in enumerate((160, 96, 160)):
        Image.effect_noise((side, 96), 60).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a mushroom")
    names = ("LoadImageDataSetFromFolderNode", "LoadImageTextDataSetFromFolderNode")
    kinds = [getattr(loaders, name) for name in names if hasattr(loaders, name)]
    assert kinds
    for number, kind in enumerate(kinds, start=1):
        name = kind.GET_SCHEMA().node_id
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
        graph = {"1": toybox(), "2": node(name, folder="mushroom"), "3": trainer()}
        said = host.run({**graph, "4": node("Counted", anything=["3", 0])})["3"]["text"][0]
        assert len(trained(host)) == number and len(Counted.seen) == number
        assert "3 pictures of 152x104 pixels, cropped and resized from " in said
        assert f"own size is {SIZE}x{SIZE}" in said


def test_mixed_sizes_with_masks_alike_are_one_training(host):
    pictures, masks = mushrooms(host.pack)
    larger = torch.nn.functional.interpolate(pictures[:1].movedim(-1, 1), scale_factor=2.0).movedim(1, -1)
    Listed.made = {
        "images": [larger, pictures[1:]],
        "masks": [masks[0].repeat_interleave(2, 0).repeat_interleave(2, 1), masks[1], masks[2:]],
        "texts": [],
    }
    graph = {"1": toybox(), "2": node("Listed"), "3": trainer(masks=["2", 1])}
    said = host.run(graph)["3"]["text"][0]
    sizes = f"{2 * SIZE}x{2 * SIZE}, {SIZE}x{SIZE}"
    assert f"3 pictures of {SIZE}x{SIZE} pixels, cropped and resized from {sizes}" in said
    Listed.made["masks"].pop()
    with pytest.raises(RuntimeError, match="2 masks for 3 pictures"):
        host.run(graph)
    Listed.made["masks"] = [1 - masks[1]]
    with pytest.raises(RuntimeError, match="mask 1 is white all around.*Invert Mask"):
        host.run(graph)
    assert len(trained(host)) == 1


def test_what_is_no_picture_runs_once_for_each_as_before(host):
    """A list of texts makes a CONDITIONING of each, from all of the pictures."""
    Listed.made = {**in_a_list(host.pack, 2), "texts": ["a photo of S*", "S* on snow"]}
    encode = node(
        "ProFusion_PromptNetEncode",
        promptnet=["5", 0],
        clip=["1", 1],
        clip_vision=["1", 3],
        vae=["1", 2],
        images=["2", 0],
        text=["2", 2],
        noun="mushroom",
    )
    graph = {
        "1": toybox(),
        "2": node("Listed"),
        "3": encode,
        "5": node("ProFusion_PromptNetLoader", promptnet="Toybox"),
    }
    host.run({**graph, "4": node("Counted", anything=["3", 0])})
    assert len(Counted.seen) == 2 and not torch.equal(Counted.seen[0][0][0], Counted.seen[1][0][0])
    encode["inputs"]["images"] = ["1", 4]
    graph["1"] = toybox(2)
    host.run({**graph, "4": node("Counted", anything=["3", 0])})
    for listed, batch in zip(Counted.seen[:2], Counted.seen[2:], strict=True):
        assert torch.equal(listed[0][0], batch[0][0])


def test_scores_take_lists_of_pictures_and_of_prompts(host):
    Listed.made = {**in_a_list(host.pack), "texts": ["a mushroom", "a mushroom\non grass", "a ball"]}
    scores = node("ProFusion_ConceptScores", images=["2", 0], references=["1", 4], prompt=["2", 2], masks=["2", 1])
    graph = {"1": toybox(2), "2": node("Listed"), "3": scores, "4": node("Counted", anything=["3", 0])}
    host.run(graph)
    assert len(Counted.seen) == 1 and "CLIP-T" in Counted.seen[0]
    scores["inputs"] = {**scores["inputs"], "prompt": "a mushroom\na mushroom on grass\na ball", "images": ["1", 4]}
    scores["inputs"]["masks"] = ["1", 5]
    scores["inputs"]["references"] = ["5", 4]
    host.run({**graph, "1": toybox(3), "5": toybox(2)})
    assert Counted.seen[0] == Counted.seen[1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", "a mushroom", " \n"], "prompt: of the 3 texts in its list these are empty: 1, 3. Give"),
        (["a mushroom", "", "a ball"], "prompt: of the 3 texts in its list these are empty: 2. Give"),
        (["", "", ""], "0 prompts for 3 pictures"),
    ],
)
def test_an_empty_text_of_a_list_is_not_left_out_for_the_next_one(host, texts, message):
    """A loader of folders gives one for each picture that has no caption."""
    Listed.made = {**in_a_list(host.pack), "texts": texts}
    scores = node("ProFusion_ConceptScores", images=["2", 0], references=["1", 4], prompt=["2", 2])
    with pytest.raises(RuntimeError, match=message):
        host.run({"1": toybox(2), "2": node("Listed"), "3": scores})


def test_an_empty_list_and_one_of_nonsense_are_named(host):
    graph = {"1": toybox(), "2": node("Listed"), "3": trainer()}
    for made, message in (
        ([], "images is an empty list"),
        ([None], "images has None in it"),
        ([3], "images has 3 in it"),
    ):
        Listed.made = {"images": made, "masks": [], "texts": []}
        with pytest.raises(RuntimeError, match=message):
            host.run(graph)
    assert not trained(host)


def test_every_node_with_pictures_takes_sets_but_the_savers_preview(pack):
    for kind in pack.NODES:
        schema = kind.GET_SCHEMA()
        images = {one.id for one in schema.inputs if one.get_io_type() == "IMAGE"}
        sets = set(getattr(kind, "SETS", ()))
        assert images <= sets or (schema.node_id, images) == ("ProFusion_ResidualSaver", {"preview"})
        assert sets <= {one.id for one in schema.inputs}
        assert schema.is_input_list == bool(sets)
        assert all(output.is_output_list == bool(sets) for output in schema.outputs)
        if sets:
            assert {one.id for one in schema.inputs if one.get_io_type() == "MASK"} <= sets


def promptnets(folder="none", **more):
    slots = ((0, "model"), (1, "clip"), (2, "vae"), (3, "clip_vision"))
    values = {"steps": 1, "learning_rate": 1e-4, "batch_size": 1, "seed": 0, "filename_prefix": "made"}
    samples = {"sample_steps": 1, "sample_every": 0, "folder": folder}
    return node(
        "ProFusion_PromptNetTrainer", **{name: ["1", slot] for slot, name in slots}, **values, **samples, **more
    )


def test_a_promptnet_is_trained_once_on_a_list_and_a_folder(host, tmp_path, monkeypatch):
    """And again where a file of the folder has changed, from the same inputs otherwise."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    folder = tmp_path / "input" / "toys" / "mushrooms"
    folder.mkdir(parents=True)
    drawn, _ = mushrooms(host.pack)
    Image.fromarray((drawn[0] * 255).byte().numpy()).save(folder / "one.png")
    Listed.made = {"images": [drawn[1:2], drawn[2:3, :80]], "masks": [], "texts": []}
    graph = {"1": toybox(), "2": node("Listed"), "3": promptnets("toys", images=["2", 0])}
    assert f"3 pictures of {SIZE}x{SIZE} pixels" in host.run(graph)["3"]["text"][0]
    graph = {"1": toybox(), "3": promptnets("toys")}
    made = lambda: len(list((tmp_path / "profusion_promptnets").glob("made_*")))  # noqa: E731
    host.run(graph)
    assert made() == 2
    host.run(graph)
    assert made() == 2
    Image.fromarray((drawn[1] * 255).byte().numpy()).save(folder / "two.png")
    assert f"2 pictures of {SIZE}x{SIZE} pixels" in host.run(graph)["3"]["text"][0] and made() == 3


@pytest.mark.parametrize("folder", ["gone", "../..", "/etc"])
def test_a_folder_that_is_not_there_is_refused_before_anything_runs(host, tmp_path, monkeypatch, folder):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    graph = {"1": toybox(), "3": promptnets(folder)}
    valid, _, _, errors = asyncio.run(execution.validate_prompt("test", graph, None))
    assert not valid and "no folder" in errors["3"]["errors"][0]["details"]
