"""What a small file may ask for: no file under 1 MB makes a loader take more than 200 MB or 2 seconds.

Each file is loaded in a process of its own, whose highest memory is the system's own count.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image, features

from profusion import files

ROOT = Path(__file__).parents[1]
MOST_MB, MOST_SECONDS, MOST_BYTES = 200, 2.0, 1_000_000
FIELDS = ("format", "format_version", "architecture", "config", "precision")

MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from PIL import Image
from profusion.pictures import read_picture
from profusion.promptnet.file import load_promptnet, load_training
from profusion.promptnet.released import check_archive, check_stored
from profusion.references import Shown, framed
from profusion.residual import load_residual
loaders = {
    "residual": load_residual, "promptnet": load_promptnet, "training": load_training,
    "bin": lambda path: (check_archive(path), check_stored(torch.load(path, weights_only=True))),
    "whole": read_picture, "square": lambda path: framed([Shown(*read_picture(path))], 96),
}
torch.set_num_threads(1)
torch.isfinite(torch.ones(3)).all()
Image.init()
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
for line in sys.stdin:
    loader, path = json.loads(line)
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory counts from here
    before, started, said = peak(), time.process_time(), ""
    try:
        loaders[loader](Path(path))
    except ValueError as problem:
        said = str(problem)
    print(json.dumps([said, time.process_time() - started, peak() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def measured():
    """`measured(loader, path)`: what the loader said, after its memory and its time were found to be within bounds."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the highest memory of a process is read as Linux has it")
    command = [sys.executable, "-W", "ignore", "-c", MEASURE]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def measure(loader: str, path: Path) -> str:
        assert path.stat().st_size < MOST_BYTES
        process.stdin.write(json.dumps([loader, str(path)]) + "\n")
        process.stdin.flush()
        said, seconds, megabytes = json.loads(process.stdout.readline())
        assert seconds < MOST_SECONDS and megabytes < MOST_MB, f"{seconds:.1f} s, {megabytes:.0f} MB: {said:.300}"
        return said

    yield measure
    process.kill()
    process.wait()


def unet(**changes) -> dict:
    sizes = {
        "model_channels": 64,
        "channel_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "transformer_depth": [1, 1, 1],
        "middle_depth": 1,
        "context_dim": 128,
        "num_heads": 4,
    }
    return sizes | changes


def forged(path: Path, changes: dict, more: dict) -> Path:
    """A PromptNet's file with any configuration, and a right checksum."""
    config = {"unet": unet(**changes), "image_width": 128, "text_widths": [128], "tokens": 4, "grid": 3} | more
    metadata = dict(zip(FIELDS, ("profusion.promptnet", "1", "x", json.dumps(config), "float16"), strict=True))
    path.write_bytes(files.tensors_to_bytes({"start": torch.zeros(1)}, metadata))
    return path


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"num_res_blocks": 10**9}, {}),
        ({"middle_depth": 10**6}, {}),
        ({"middle_depth": 64, "transformer_depth": [64] * 3, "num_res_blocks": 64}, {}),
        ({"channel_mult": [1] * 8, "transformer_depth": [64] * 8, "num_res_blocks": 8}, {}),
        ({"channel_mult": [1] * 10**5, "transformer_depth": [0] * 10**5}, {}),
        ({"model_channels": 32 * 10**9}, {}),
        ({"model_channels": 65536, "channel_mult": [64, 64, 64]}, {}),
        ({"context_dim": 10**12}, {}),
        ({"num_heads": 10**9}, {}),
        ({}, {"text_widths": [65536] * 10**4}),
        ({}, {"tokens": 10**9}),
        ({}, {"grid": 10**6, "projection": 10**6}),
    ],
    ids=lambda value: f"{value!s:.60}",
)
def test_a_configuration_is_checked_against_the_file_before_anything_is_built(measured, tmp_path, changes, more):
    said = measured("promptnet", forged(tmp_path / "bomb.safetensors", changes, more))
    assert "cannot be loaded" in said and len(said) < 1500


def header_only(path: Path, shapes: dict[str, list[int]], data: dict[str, list[int]]) -> Path:
    """A safetensors file of tensors without a byte, and of some with their bytes (float32)."""
    header, end = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}, 0
    for name, shape in data.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


def official(text_width: int, levels: int = 1) -> dict[str, list[int]]:
    return {
        "region_prompt_output.weight": [text_width, 0, 8, 8],
        "conv_in.weight": [320, 4, 0, 3],
        "mid_block.attentions.0.proj_in.weight": [320, 0],
        "first_prompt_projection.weight": [1280, 0],
        **{f"down_blocks.{level}.resnets.0.conv1.weight": [320, 0] for level in range(levels)},
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": [0],
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": [0],
    }


@pytest.mark.parametrize(
    "shapes",
    [official(500_000_000), official(2_000_000_000), official(65536), official(1, 200), official(1, 3000)],
    ids=["half a billion", "two billion", "65536", "200 levels", "3000 levels"],
)
def test_shapes_without_a_byte_are_not_believed(measured, tmp_path, shapes):
    path = header_only(tmp_path / "official.safetensors", shapes, {"vision_embedding.weight": [64, 64]})
    said = measured("promptnet", path)
    assert "cannot be loaded" in said and len(said) < 1500


def test_many_layers_are_no_work(measured, tmp_path):
    layers = [f"input.{i // 100}.{i % 100}" for i in range(60_000)]
    metadata = {
        "format": "profusion.residual",
        "format_version": "1",
        "architecture": "x",
        "layers": " ".join(layers),
        "width": "1",
        "noun": "cat",
        "steps": "1",
        "seed": "1",
        "precision": "float16",
    }
    path = tmp_path / "many.safetensors"
    path.write_bytes(files.tensors_to_bytes({"delta": torch.zeros(len(layers), 1, 1).half()}, metadata))
    assert "at most 1024" in measured("residual", path)


@pytest.mark.parametrize("loader", ["whole", "square"])
@pytest.mark.parametrize(
    ("mode", "size", "suffix", "progressive"),
    [
        ("L", (13300, 13400), "png", False),
        ("1", (20000, 20000), "png", False),
        ("RGBA", (8000, 6000), "png", False),
        ("RGB", (5600, 5600), "png", False),
        ("RGB", (9000, 9000), "jpg", False),
        ("RGB", (7000, 7000), "jpg", False),
        ("RGB", (6000, 6000), "jpg", True),
        ("RGB", (4800, 4800), "jpg", True),
        ("RGBA", (4300, 4300), "png", False),
        ("RGB", (3000, 3000), "webp", False),
        ("RGB", (6000, 6000), "webp", False),
        ("RGB", (4096, 4096), "webp", False),
        ("P", (9000, 9000), "png", False),
        ("I;16", (3000, 3000), "png", False),
        ("I;16", (9000, 9000), "png", False),
        ("F", (3000, 3000), "tiff", False),
        ("F", (12000, 12000), "tiff", False),
        ("I;16", (3000, 3000), "tiff", False),
        ("RGB", (3000, 3000), "tiff", False),
        ("RGB", (9000, 9000), "tiff", False),
        ("RGBA", (3000, 3000), "tiff", False),
        ("RGB", (3000, 3000), "avif", False),
        ("RGBA", (2900, 2900), "avif", False),
        ("RGB", (9000, 9000), "avif", False),
        ("P", (9000, 9000), "gif", False),
    ],
)
def test_a_large_picture_is_refused_or_reduced(measured, tmp_path, loader, mode, size, suffix, progressive):
    path = tmp_path / f"large.{suffix}"
    options = {"jpg": {"quality": 5, "progressive": progressive}, "tiff": {"compression": "tiff_adobe_deflate"}}
    options["avif"] = {"quality": 5, "speed": 10}
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow has no AVIF here")
    Image.new(mode, size, (9, 9, 9, 255) if mode == "RGBA" else 9).save(path, **options.get(suffix, {}))
    if path.stat().st_size >= MOST_BYTES:
        pytest.skip("not a small file")
    said = measured(loader, path)
    assert not said or "megapixels" in said


def archive(path: Path, pickled: bytes, records: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in records.items():
            file.writestr(f"archive/data/{name}", data)
    return path


def test_a_released_checkpoint_that_packs_a_bomb_is_refused(measured, tmp_path):
    path = archive(tmp_path / "deflated.bin", b"\x80\x02}.", {"0": bytes(900 << 20)}, zipfile.ZIP_DEFLATED)
    assert "compressed" in measured("bin", path)
    allocates = b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + (10**10).to_bytes(8, "little") + b"\x85R."
    assert "bytearray" in measured("bin", archive(tmp_path / "large.bin", allocates, {}))
    assert "torch's old format" in measured("bin", old(tmp_path))
    assert measured("bin", tensors(tmp_path, {"a": torch.zeros(5), "b": torch.zeros(2, 3).half()})) == ""
    wide = torch.zeros(1).as_strided((2**20, 2**20), (0, 0))
    assert "more numbers than" in measured("bin", tensors(tmp_path, {"a": wide}))
    assert "more numbers than" in measured("bin", tensors(tmp_path, dict.fromkeys(map(str, range(50)), torch.ones(9))))


def tensors(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, folder / "state.bin")
    return folder / "state.bin"


def old(folder: Path) -> Path:
    torch.save({"a": torch.zeros(3)}, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin"
