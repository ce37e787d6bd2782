"""Toybox Loader in graphs, with weights of a folder of its own: both of its bases in the host's KSampler, graphs from
before there were two, and what the nodes that need a UNet say of the other one."""

import asyncio
import copy
import importlib
import types
import uuid

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import execution
import tiny
from comfy_api.latest import io
from executor import prompt_executor
from infused import Infused

import nodes
from profusion.models.clip import TextModel, VisionModel
from profusion.models.mmdit import MMDiT
from profusion.models.tokenizer import tokenize
from profusion.models.unet import UNet
from profusion.models.vae import VAE
from profusion.promptnet.network import PromptNet
from profusion.toybox.configs import (
    TOYBOX,
    TOYBOX_MMDIT,
    TOYBOX_PROMPTNET,
    TOYBOX_TEXT,
    TOYBOX_VAE,
    TOYBOX_VISION,
)
from profusion.toybox.drawing import SIZE
from profusion.toybox.pipeline import save_network, save_weights
from training.vision import write_host_config

PROMPT, NOUN = "a photo of a ball on grass", "ball"
BASES = {"UNet": "UNetModel", "MMDiT": "OpenAISignatureMMDITWrapper"}


class Kept(io.ComfyNode):
    """Notes what reaches it."""

    seen = []

    @classmethod
    def define_schema(cls):
        given = [io.Model.Input("model"), io.Image.Input("images")]
        return io.Schema("Kept", inputs=given, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, model, images):
        cls.seen.append((type(model.model.diffusion_model).__name__, images))
        return io.NodeOutput()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights of every network, under which signals neither die nor explode."""
    folder = tmp_path_factory.mktemp("toybox")
    networks = {
        "unet": UNet(TOYBOX),
        "vae": VAE(TOYBOX_VAE),
        "text": TextModel(TOYBOX_TEXT),
        "vision": VisionModel(TOYBOX_VISION),
    }
    for seed, network in enumerate(networks.values()):
        tiny.randomise(network, seed)
    save_weights(folder, **networks, tokens=torch.unique(tokenize([PROMPT, ""])))
    save_network("mmdit", tiny.randomise(MMDiT(TOYBOX_MMDIT), 4), folder)
    write_host_config(folder)
    return folder


@pytest.fixture
def host(pack, folder, monkeypatch):
    """The pack, whose Toybox has these weights; `run(graph)` gives the class of the network that drew, and pictures."""
    for name in ("profusion.toybox.pipeline", "nodes.host.toybox"):
        monkeypatch.setattr(importlib.import_module(f"{pack.__name__}.{name}"), "WEIGHTS", folder)
    for node in [*pack.NODES, Kept]:
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    executor = prompt_executor()

    def run(graph):
        graph = copy.deepcopy(graph)  # the host notes in it what has not changed
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", graph, None))
        assert valid, (error, node_errors)
        Kept.seen.clear()
        executor.execute(graph, str(uuid.uuid4()), execute_outputs=outputs)
        failures = [event for event in executor.status_messages if event[0] == "execution_error"]
        assert not failures, failures[0][1]["exception_message"]
        (seen,) = Kept.seen
        return seen

    def load(**inputs):
        return pack.nodes.toybox.ToyboxLoader.execute("teal and coral ball", 1, 0, **inputs).args

    return types.SimpleNamespace(pack=pack, run=run, load=load)


def drawing(**inputs):
    """The Loader, and one picture of its MODEL by the host's own nodes; inputs: of the Loader, besides the old ones."""
    links = {"model": ["1", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["2", 0]}
    values = {"seed": 3, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    graph = {
        "1": ("ProFusion_ToyboxLoader", {"toy": "teal and coral ball", "count": 1, "seed": 0, **inputs}),
        "2": ("EmptyLatentImage", {"width": SIZE, "height": SIZE, "batch_size": 1}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": PROMPT}),
        "4": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
        "5": ("KSampler", links | values),
        "6": ("VAEDecode", {"samples": ["5", 0], "vae": ["1", 2]}),
        "7": ("Kept", {"model": ["1", 0], "images": ["6", 0]}),
    }
    return {number: {"class_type": kind, "inputs": given} for number, (kind, given) in graph.items()}


def test_its_schema_is_frozen_and_base_is_optional(pack):
    schema = pack.nodes.toybox.ToyboxLoader.GET_SCHEMA()
    assert [f"{entry.id}:{entry.get_io_type()}" for entry in schema.inputs] == [
        "toy:COMBO",
        "count:INT",
        "seed:INT",
        "base:COMBO",
    ]
    assert [entry.id for entry in schema.inputs if entry.optional] == ["base"]
    assert schema.inputs[-1].options == list(BASES) and schema.inputs[-1].default == "UNet"


def test_either_base_draws_in_a_plain_ksampler(host):
    pictures = {}
    for base, network in BASES.items():
        drew, pictures[base] = host.run(drawing(base=base))
        assert drew == network
        assert pictures[base].shape == (1, SIZE, SIZE, 3) and pictures[base].isfinite().all()
        assert pictures[base].std() > 0.01
        assert torch.equal(host.run(drawing(base=base, count=2))[1], pictures[base])
    assert (pictures["UNet"] - pictures["MMDiT"]).abs().mean() > 0.01


def test_the_prompt_reaches_the_mmdit(host):
    other = drawing(base="MMDiT")
    other["3"]["inputs"]["text"] = "grass"
    assert not torch.equal(host.run(other)[1], host.run(drawing(base="MMDiT"))[1])


def test_a_graph_from_before_there_were_two_bases_draws_with_the_unet(host):
    drew, picture = host.run(drawing())
    assert drew == BASES["UNet"] and torch.equal(picture, host.run(drawing(base="UNet"))[1])


def needing_a_unet(host, model, clip, vae, vision, pictures, masks, noun):
    """Each node that acts on a UNet's cross-attention: its name, and a run of it on the model."""
    toybox, pack = Infused(host.pack, host.load()[0], clip), host.pack.nodes
    network = tiny.randomise(PromptNet(TOYBOX_PROMPTNET), 5).eval()
    promptnet = pack.host.words.handed_to_the_host(network, "random")
    pair = {"clip": clip, "vae": vae, "images": pictures}
    rates = {"learning_rate": 1e-3, "attention_learning_rate": 1e-3, "rank": 2}
    once = {"steps": 1, "batch_size": 1, "seed": 0}
    report = {"class_prompt": "a %noun%", "prompts": "grass", "draws": 1, "seed": 0, "steps": 1, "cfg": 2.0}
    report |= {"sampler_name": "euler", "scheduler": "simple", "latent": {"samples": torch.zeros(2, 4, 8, 8)}}
    seeded = {**pair, "promptnet": promptnet, "clip_vision": vision, "noun": noun}
    yield "Residual from PromptNet", lambda: pack.promptnet.ResidualFromPromptNet.execute(model=model, **seeded)
    tuned = {**pair, **once, **rates, "clip_vision": vision, "promptnet": promptnet, "train_attention": True}
    tuned |= {"filename_prefix": "never", "save_promptnet": False}
    yield "PromptNet Finetune", lambda: pack.finetune.PromptNetFinetune.execute(model=model, **tuned)
    report |= {"clip": clip, "noun": noun, "residual": toybox.residual()}
    yield "Overfit Report", lambda: pack.overfit.OverfitReport.execute(model=model, **report)


def test_what_needs_a_unet_refuses_the_mmdit_and_says_where_there_is_one(host):
    drawn = "SD3 is drawn with by joint attention over text and picture, on which .* and this takes a UNet"
    none = "there is no PromptNet for SD3, since one looks at a picture with a UNet's encoder. Show it the picture by"
    with torch.inference_mode():
        for name, run in needing_a_unet(host, *host.load(base="MMDiT")):
            why = none if "PromptNet" in name else drawn
            with pytest.raises(
                ValueError, match=rf"SD3 \(OpenAISignatureMMDITWrapper\) is not supported: {why}.*is UNet"
            ):
                run()
                pytest.fail(f"{name} took it")
        for name, run in needing_a_unet(host, *host.load(base="UNet")):
            if name == "Residual from PromptNet":
                run()  # the same call, where it is possible
