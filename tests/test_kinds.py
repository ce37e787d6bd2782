"""Wrong files are named: what a file is, and where it belongs, whichever loader it was given to."""

import os
import pickle
import re

import pytest
import safetensors.torch
import torch

from profusion.kinds import Inside, kind_of, names_in
from profusion.promptnet.file import load_promptnet
from profusion.promptnet.network import PromptNetError
from profusion.residual import Residual, ResidualError, load_residual, save_residual

KINDS = {
    "lora of kohya's": (["lora_unet_input_blocks_1_1_proj_in.lora_up.weight"], "it is a LoRA.*models/loras"),
    "lora of diffusers'": (["unet.down_blocks.0.attn1.to_q.lora_A.weight"], "it is a LoRA"),
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


class Harmful:
    def __reduce__(self):
        return os.system, ("touch /tmp/harm",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_that_would_run_code_is_named_and_not_run(tmp_path, protocol, wrapped, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    path = tmp_path / "cat.safetensors"
    if wrapped:
        torch.save({"cat": Harmful()}, path, pickle_protocol=max(protocol, 2))
    else:
        path.write_bytes(pickle.dumps(Harmful(), protocol))
    message = loaded_by(load_residual, path)
    if protocol or wrapped:  # protocol 0 is text, and begins like nothing
        assert "it is a file that would run code if it were opened" in message
    assert not ran


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
