"""Wrong files are named: what a file is, and where it belongs, whichever loader it was given to."""

import argparse
import importlib
import operator
import os
import pickle
import re
import runpy
import subprocess
import sys
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from profusion.kinds import EMBEDDING, Inside, kind_of, names_in
from profusion.promptnet.file import load_promptnet
from profusion.promptnet.network import PromptNetError
from profusion.residual import Residual, ResidualError, load_residual, save_residual

KINDS = {
    "lora of kohya's": (["lora_unet_input_blocks_1_1_proj_in.lora_up.weight"], "it is a LoRA.*models/loras"),
    "lora of diffusers'": (["unet.down_blocks.0.attn1.to_q.lora_A.weight"], "it is a LoRA"),
    "GLoRA": (["x.a1.weight", "x.a2.weight", "x.b1.weight", "x.b2.weight"], "it is a LoRA"),
    "LoRA of differences": (["diffusion_model.blocks.0.diff", "diffusion_model.blocks.0.diff_b"], "it is a LoRA"),
    "T2I-Adapter": (["adapter.body.0.block1.weight"], "a T2I-Adapter.*models/controlnet"),
    "T2I-Adapter of its authors'": (["body.0.block1.weight", "conv_in.weight"], "a T2I-Adapter"),
    "TAESD": (["1.weight", "3.conv.0.weight"], "TAESD.*models/vae_approx"),
    "ESRGAN": (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "an upscaler.*models/upscale_models"),
    "Real-ESRGAN": (["conv_first.weight", "body.0.rdb1.conv1.weight"], "an upscaler"),
    "hypernetwork": (["768.0.linear.0.weight"], "a hypernetwork.*models/hypernetworks"),
    "LoKr": (["lycoris_input_blocks_1.lokr_w1"], "it is a LoRA"),
    "embedding of SD 1.5": (["emb_params"], "textual-inversion embedding.*models/embeddings.*embedding:its_name"),
    "embedding of SDXL": (["clip_g", "clip_l"], "textual-inversion embedding"),
    "embedding of diffusers'": (["<my-cat>"], "textual-inversion embedding"),
    "checkpoint": (
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
        "whole checkpoint.*models/checkpoints",
    ),
    "VAE": (["decoder.conv_in.weight", "encoder.conv_in.weight"], "it is a VAE.*models/vae"),
    "UNet of diffusers'": (
        ["conv_in.weight", "time_embedding.linear_1.weight"],
        "promptnet/diffusion_pytorch_model.bin",
    ),
    "UNet": (["input_blocks.0.0.weight", "time_embed.0.weight"], "a diffusion model alone.*models/diffusion_models"),
    "ControlNet": (["control_model.input_hint_block.0.weight"], "a ControlNet"),
    "IP-Adapter": (["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], "an IP-Adapter"),
    "CLIP": (["text_model.embeddings.token_embedding.weight"], "a text encoder"),
    "CLIP's image tower": (["vision_model.embeddings.class_embedding"], "an image encoder"),
    "Infusion's own": (
        ["input_blocks.1.1.transformer_blocks.0.attn2.to_v.target_output"],
        "Infusion's own released code",
    ),
}


def loaded_by(load, path):
    with pytest.raises((ResidualError, PromptNetError)) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("load", [load_residual, load_promptnet])
@pytest.mark.parametrize("names, sentence", KINDS.values(), ids=KINDS)
def test_a_file_of_another_kind_is_named(names, sentence, load, tmp_path):
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file({name: torch.zeros(2, 2) for name in names}, path)
    message = loaded_by(load, path)
    assert str(path) in message and re.search(sentence, message), message
    assert "copy it once more" not in message  # advice for damaged files


def test_our_own_kinds_in_each_others_loader(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_residual(Residual(torch.ones(1, 1, 8), "cat", ("input.1.0",), "SD 1.x"), path)
    assert "it is a residual of ours. Put it into models/profusion_residuals" in loaded_by(load_promptnet, path)
    path = tmp_path / "word.safetensors"
    safetensors.torch.save_file({"output.weight": torch.zeros(1)}, path, {"format": "profusion.promptnet"})
    assert "it is a PromptNet. Put it into models/profusion_promptnets" in loaded_by(load_residual, path)


def test_an_archive_of_torchs_is_named_by_the_names_in_it(tmp_path):
    embedding, infusion = tmp_path / "cat.pt", tmp_path / "cat.ckpt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 768)}, "name": "cat"}, embedding)
    torch.save({"state_dict": {"attn2.to_v.target_output": torch.zeros(320)}, "global_step": 500}, infusion)
    assert "textual-inversion embedding" in loaded_by(load_residual, embedding)
    assert "Infusion's own released code" in loaded_by(load_residual, infusion)


class Calls:
    """Becomes a call of `what` with these when it is read."""

    def __init__(self, what, *arguments):
        self.what, self.arguments = what, arguments

    def __reduce__(self):
        return self.what, self.arguments


HARM = {
    "os.system": Calls(os.system, "touch /tmp/harm"),
    "Popen": Calls(subprocess.Popen, ["touch", "/tmp/harm"]),
    "__import__": Calls(__import__, "antigravity"),
    "import_module": Calls(importlib.import_module, "antigravity"),
    "run_path": Calls(runpy.run_path, "/tmp/harm.py"),
    "exec": Calls(exec, "1"),
    "eval": Calls(eval, "1"),
    "getattr": Calls(getattr, "", "join"),
    "attrgetter": Calls(operator.attrgetter, "system"),
    "open": Calls(open, "/tmp/harm", "w"),
    "torch.load": Calls(torch.load, "/tmp/harm"),
    "torch.hub.load": Calls(torch.hub.load, "a/b", "c"),
    "bytes that torch loads": Calls(torch.storage._load_from_bytes, b""),
    "numpy.load": Calls(np.load, "/tmp/harm"),
}
WORDS = {"cat": [1], "string_to_param": {}, "region_prompt_output.weight": 0, "lora_unet_a.lora_up.weight": 0}


def written(path, thing, protocol, how):
    """In torch's archive, in its old format, or as a pickle alone."""
    if how == "pickle":
        path.write_bytes(pickle.dumps(thing, protocol))
    else:
        torch.save(thing, path, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "archive")


@pytest.mark.parametrize("how", ["archive", "old format", "pickle"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_pickle_that_would_run_code_is_named_and_not_run(tmp_path, harm, protocol, how, monkeypatch):
    """Whatever else it seems to be: it is never called an embedding that belongs into a folder."""
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    path = tmp_path / "cat.safetensors"
    for word, value in WORDS.items():
        written(path, {word: value, "then": harm}, protocol, how)
        message = loaded_by(load_residual, path)
        assert "it is a file that would run code if it were opened" in message, (word, message)
        assert "Delete it without opening it" in message and "Put it into" not in message
    assert not ran


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_pickles_are_text_and_begin_like_nothing(tmp_path, protocol):
    path = tmp_path / "cat.safetensors"
    path.write_bytes(pickle.dumps({"string_to_param": HARM["os.system"]}, protocol))
    assert kind_of(path) is None and "Put it into" not in loaded_by(load_residual, path)


def hidden(*names):
    """A program that calls os.system by names that are put together, fetched again or passed off as others."""
    push = b"".join(b"\x8c" + bytes([len(name)]) + name.encode() for name in names)
    return b"\x80\x04\x8c\x0fstring_to_param" + push


@pytest.mark.parametrize(
    "program",
    [
        hidden("os", "system", "collections", "OrderedDict") + b"00\x93.",  # two texts, dropped again
        hidden("os", "system") + b"q\x01h\x01\x93.",
        hidden("collections") + b"q\x000" + hidden("os")[2:] + b"q\x000h\x00" + hidden("system")[19:] + b"\x93.",
        hidden() + b"\x82\x01.",
        hidden("torch.nn", "Module.load_state_dict") + b"\x93.",
    ],
    ids=["dropped", "fetched", "kept anew", "by number", "dotted"],
)
def test_names_that_are_passed_off_as_others_are_not_believed(tmp_path, program):
    path = tmp_path / "cat.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    assert "would run code" in kind_of(path).what


def test_two_programs_in_an_archive_are_no_kind(tmp_path):
    """Readers do not agree on which of them counts."""
    path = tmp_path / "cat.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"string_to_param": 1}, 2))
        archive.writestr("other/data.pkl", pickle.dumps(HARM["os.system"], 2))
    assert kind_of(path) is None


class ModelCheckpoint:
    """As those who train with Lightning have it in their checkpoints."""


@pytest.mark.parametrize("how", ["archive", "old format"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_checkpoints_hold_besides_tensors_runs_no_code(tmp_path, protocol, how, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for end in (17, 27, None):
        monkeypatch.setitem(sys.modules, name[:end], types.ModuleType(name[:end]))
    sys.modules[name].ModelCheckpoint = ModelCheckpoint
    monkeypatch.setattr(ModelCheckpoint, "__module__", name)
    held = {
        "string_to_token": {"*": 265},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(1, 8))}),
        "ordered": [OrderedDict(a=torch.zeros(2, dtype=torch.bfloat16)), defaultdict(dict), Counter("ab")],
        "numpy": [np.float64(1.5), np.zeros(3), np.dtype("float32"), np.random.default_rng(0)],
        "torch": [torch.Size([1]), torch.float16, torch.device("cpu"), torch.zeros(2, 2).to_sparse()],
        "plain": [{1}, frozenset("a"), b"bytes", bytearray(b"x"), 1j, range(3), Path("a"), argparse.Namespace(a=1)],
        "callbacks": {ModelCheckpoint: ModelCheckpoint()},
        "state": torch.optim.SGD([torch.zeros(1)], 0.1).state_dict(),
    }
    written(tmp_path / "cat.pt", held, protocol, how)
    assert kind_of(tmp_path / "cat.pt") == EMBEDDING


def test_a_whole_file_of_the_wanted_kind_and_one_that_says_nothing_are_of_no_other_kind(tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, other)
    assert kind_of(other) is None and kind_of(tmp_path) is None and kind_of(tmp_path / "absent") is None
    assert "something else than a residual" in loaded_by(load_residual, other)


def test_a_pipe_and_a_large_header_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert kind_of(tmp_path / "pipe") is None
    (tmp_path / "large").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert kind_of(tmp_path / "large") is None


def test_names_are_read_without_the_tensors(tmp_path):
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file({"b": torch.zeros(2), "a": torch.zeros(2)}, path, {"format": "pt"})
    assert names_in(path) == Inside(("a", "b"), {"format": "pt"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])  # the names are whole, the tensors are not
    assert set(names_in(path).names) == {"a", "b"}
