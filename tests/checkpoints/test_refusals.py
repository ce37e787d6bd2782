"""Files that are no checkpoint to load: each is named as what it is, and nothing of it is read but its header."""

import json
import math
import random
import struct
import time

import pytest
import torch

from profusion.checkpoints import CheckpointError, load_checkpoint, plan
from tests import shrunken

UNET = "model.diffusion_model."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def sd1():
    return shrunken.checkpoint("SD 1.x")


@pytest.fixture(scope="module")
def sdxl():
    return shrunken.checkpoint("SDXL")


def said(path, tensors=None):
    """What is said of a file, by the header alone and by loading it, which is the same."""
    if tensors is not None:
        shrunken.written(path, tensors)
    messages = []
    for read in (plan, load_checkpoint):
        with pytest.raises(CheckpointError) as raised:
            read(path)
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and messages[0].startswith(f"'{path.name}' cannot be loaded: ")
    assert messages[0].endswith(".") and not messages[0].endswith("..") and len(messages[0]) < 500
    return messages[0]


def without(tensors, *prefixes):
    return {name: x for name, x in tensors.items() if not name.startswith(prefixes)}


def renamed(tensors, **shapes):
    return tensors | {UNET + name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>" + b" " * 100, "it is a web page"),
        (b"<html><body>404</body></html>" + b" " * 100, "it is a web page"),
        (b"PK\x03\x04" + b"\0" * 100, "it is a zip archive"),
        (b"\x80\x02" + b"\xff" * 100, "a PyTorch checkpoint under another name"),
        (b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 50, "Git LFS pointer"),
        (b"\xff" * 100, "not a safetensors file"),
        (struct.pack("<Q", 500) + b"{}", "it is cut short"),
        (struct.pack("<Q", 8) + b"not json", "invalid header"),
        (struct.pack("<Q", 2) + b"[]", "invalid header"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "invalid header"),
        (struct.pack("<Q", 2) + b"{}", "it holds nothing"),
    ],
)
def test_files_of_other_formats(path, contents, words):
    path.write_bytes(contents)
    assert words in said(path)


def test_what_is_no_file(path):
    assert "there is no such file" in said(path)
    path.mkdir()
    assert "no file, but a folder" in said(path)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_download_that_did_not_end(path, sd1, kept):
    shrunken.written(path, sd1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert "it is cut short" in said(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1] * 20, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        [],
    ],
)
def test_headers_that_make_no_sense(path, entry):
    text = json.dumps({"input_blocks.0.0.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    said(path)


@pytest.mark.parametrize("family", shrunken.FAMILIES)
def test_what_a_pruned_checkpoint_lacks(path, family):
    tensors = shrunken.checkpoint(family)
    text = said(path, without(tensors, "cond_stage_model.", "conditioner."))
    assert f"{family} checkpoint pruned of its text encoder" in text
    assert f"{family} checkpoint pruned of its VAE." in said(path, without(tensors, "first_stage_model."))
    assert "pruned of its VAE's encoder" in said(path, without(tensors, "first_stage_model.encoder."))


def test_sdxl_with_one_of_its_text_encoders(path, sdxl):
    assert "text encoders (1 of 2)" in said(path, without(sdxl, "conditioner.embedders.0."))
    assert "text encoders (1 of 2)" in said(path, without(sdxl, "conditioner.embedders.1."))


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (9, "an inpainting checkpoint"),
        (8, "an instruct-pix2pix checkpoint"),
        (7, "an upscaling checkpoint"),
        (5, "a depth-to-image checkpoint"),
        (6, "takes 6 channels"),
    ],
)
def test_variants_that_take_more_than_noise(path, sd1, sdxl, channels, words):
    for tensors, width in ((sd1, 32), (sdxl, 64)):
        assert words in said(path, renamed(tensors, input_blocks__0__0__weight=(width, channels, 3, 3)))


def test_sdxls_refiner(path, sdxl):
    refiner = without(sdxl, "conditioner.embedders.0.")
    refiner = {name.replace("embedders.1.", "embedders.0."): x for name, x in refiner.items()}
    assert "SDXL's refiner" in said(path, refiner)
    pruned = without(renamed(sdxl, label_emb__0__0__weight=(256, 2560)), "conditioner.")
    assert "SDXL's refiner" in said(path, pruned)


def test_unclip_video_and_other_schedules(path, sdxl):
    assert "unCLIP" in said(path, renamed(sdxl, label_emb__0__0__weight=(256, 2048)))
    assert "unCLIP" in said(path, sdxl | {"embedder.model.visual.proj": torch.zeros(2, 2)})
    assert "Stable Video Diffusion" in said(path, renamed(sdxl, input_blocks__1__1__time_stack__0__norm1__bias=(4,)))
    assert "Playground 2.5" in said(path, sdxl | {"edm_mean": torch.zeros(1), "edm_std": torch.ones(1)})
    assert "CosXL" in said(path, sdxl | {"edm_vpred.sigma_max": torch.ones(1)})
    assert "zero terminal SNR" in said(path, sdxl | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)})


def test_distilled_models_whose_levels_are_not_alike(path):
    distilled = shrunken.checkpoint("SD 2.x")
    distilled = without(distilled, f"{UNET}input_blocks.2.1.")
    assert "SSD-1B" in said(path, distilled)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("joint_blocks.0.context_block.attn.qkv.weight", "SD 3"),
        ("double_layers.0.attn.w1q.weight", "AuraFlow"),
        ("clip_txt_mapper.weight", "Stable Cascade"),
        ("mlp_t5.0.weight", "Hunyuan-DiT"),
        ("blocks.0.attn.weight", "a transformer"),
    ],
)
def test_checkpoints_of_other_models(path, name, words):
    first = said(path, {UNET + name: torch.zeros(2, 2), "first_stage_model.decoder.conv_in.weight": torch.zeros(2)})
    assert f"it is a checkpoint of {words}" in first
    assert f"it is a diffusion model of {words}" in said(path, {name: torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.lora_down.weight"], "it is a LoRA"),
        (["emb_params"], "textual-inversion embedding"),
        (["clip_l", "clip_g"], "textual-inversion embedding"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "it is a VAE"),
        (["first_stage_model.decoder.conv_in.weight"], "it is a VAE"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "it is a text encoder"),
        (["vision_model.pre_layrnorm.weight"], "it is an image encoder"),
        (["control_model.zero_convs.0.0.weight"], "it is a ControlNet"),
        (["ip_adapter.1.to_k_ip.weight"], "it is an IP-Adapter"),
        (["time_embed.0.weight", "input_blocks.0.0.weight"], "it is a diffusion model alone"),
        (["region_prompt_output.weight"], "it is a PromptNet"),
        (["something.else"], "it holds 'something.else'"),
    ],
)
def test_files_of_other_kinds(path, names, words):
    assert words in said(path, {name: torch.zeros(4, 4) for name in names})


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_quantised_weights(path, sd1, dtype):
    shapes = {name: tuple(x.shape) for name, x in sd1.items() if x.is_floating_point()}
    shrunken.sparse(path, shapes, dtype)
    text = said(path)
    assert f"stored as {dtype}" in text and "not a quantised copy" in text


def headers(tensors, number, generator):
    """Headers with a name taken out, a side changed, or a side taken off or put on, somewhere."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if x.is_floating_point()}
    names = sorted(shapes)
    for _ in range(number):
        changed = dict(shapes)
        for _ in range(generator.choice([1, 1, 2, 5])):
            name = generator.choice(names)
            sides = list(changed.pop(name, (1,)))
            place = generator.randrange(len(sides) + 1)
            change = generator.choice(["out", "side", "off", "on", "renamed"])
            if change == "side" and sides:
                sides[place % len(sides)] = generator.choice([0, 1, 3, 63, 64, 128, 10**7])
            elif change == "off":
                del sides[place:]
            elif change == "on":
                sides.insert(place, generator.choice([1, 3]))
            if change != "out":
                parts = name.split(".")
                parts[generator.randrange(len(parts))] = generator.choice(["0", "1", "2", "weight", "x"])
                changed[".".join(parts) if change == "renamed" else name] = tuple(sides)
        yield changed


@pytest.mark.parametrize("family", shrunken.FAMILIES)
def test_no_damage_to_a_header_gets_past_the_checks(path, family):
    generator, refused = random.Random(family), 0
    for shapes in headers(shrunken.checkpoint(family), 60, generator):
        if max(math.prod(shape) for shape in shapes.values()) > 10**9:
            continue  # a hole that no disk here can have
        shrunken.sparse(path, shapes)
        try:
            load_checkpoint(path)
        except CheckpointError as problem:
            refused += 1
            assert len(str(problem)) < 500
    assert refused > 30


def test_names_without_number_take_no_time(path, sd1):
    shapes = {name: tuple(x.shape) for name, x in sd1.items() if x.is_floating_point()}
    shapes |= {f"{UNET}input_blocks.{index}.0.op.weight": () for index in range(50_000)}
    shrunken.sparse(path, shapes)
    started = time.process_time()
    assert "input blocks" in said(path)
    assert time.process_time() - started < 5
