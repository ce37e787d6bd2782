"""Residuals and their files: what is valid, what is stored, how it is written, and what each bad file is told."""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

from profusion import files
from profusion.details import Details
from profusion.infusion import Layer
from profusion.residual import PRECISIONS, Residual, ResidualError, check_architecture, load_residual, save_residual

SD15_BLOCKS = [f"input.{i}" for i in (1, 2, 4, 5, 7, 8)] + ["middle.0"] + [f"output.{i}" for i in range(3, 12)]
SD15 = tuple(f"{block}.0" for block in SD15_BLOCKS)
SAVED_FIELDS = ("noun", "layers", "architecture", "steps", "seed")


def make_residual(layers=SD15, width=768, **changes) -> Residual:
    delta = torch.randn(len(layers), 1, width, generator=torch.Generator().manual_seed(0))
    fields = {"delta": delta, "noun": "cat", "layers": layers, "architecture": "SD 1.x", "steps": 300, "seed": 7}
    return Residual(**(fields | changes))


def training_state() -> dict[str, torch.Tensor]:
    return {
        "exp_avg": torch.randn(16, 1, 768, generator=torch.Generator().manual_seed(1)),
        "step": torch.tensor(300.0),
        "generator": torch.Generator().manual_seed(2).get_state(),
        "order": torch.arange(5),
        "scale": torch.tensor([0.1], dtype=torch.float64),
    }


def assert_same(a: Residual, b: Residual) -> None:
    assert torch.equal(a.delta, b.delta)
    assert all(getattr(a, field) == getattr(b, field) for field in SAVED_FIELDS)
    assert (a.training_state is None) == (b.training_state is None)
    for name, tensor in (a.training_state or {}).items():
        assert b.training_state[name].dtype == tensor.dtype
        assert torch.equal(b.training_state[name], tensor)


SD15_WIDTHS = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320)


def make_details(capacity=4, widths=SD15_WIDTHS, width=768) -> Details:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(len(widths), capacity - 1, width, generator=generator)
    return Details(values, torch.randn(capacity - 1, sum(widths), generator=generator), widths)


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(header, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


# What a residual is


def test_a_residual_keeps_a_copy_in_float32():
    delta = torch.ones(16, 1, 768, dtype=torch.float16)
    residual = make_residual(delta=delta)
    delta.zero_()
    assert residual.delta.dtype == torch.float32
    assert (residual.delta == 1).all()
    assert residual.context_dim == 768


def test_a_residual_made_or_loaded_in_inference_mode_may_be_trained_on(tmp_path):
    with torch.inference_mode():
        path = save_residual(make_residual(training_state=training_state()), tmp_path / "a.safetensors", "float32").path
        loaded = load_residual(path)
    assert not any(tensor.is_inference() for tensor in (loaded.delta, *loaded.training_state.values()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"delta": torch.zeros(16, 768)}, r"delta must have the shape \(16, 1, context_dim\)"),
        ({"delta": torch.zeros(16, 2, 768)}, "delta must have the shape"),
        ({"delta": torch.zeros(15, 1, 768)}, "delta must have the shape"),
        ({"delta": torch.zeros(16, 1, 0)}, "delta must have the shape"),
        ({"delta": torch.zeros(16, 1, 768, dtype=torch.int64)}, "floating-point"),
        ({"delta": None}, "floating-point"),
        ({"delta": torch.full((16, 1, 768), float("nan"))}, "finite.*input.1.0, input.2.0, input.4.0 and 13 more"),
        ({"delta": torch.full((16, 1, 768), float("inf"))}, "finite"),
        ({"layers": ()}, "at least one"),
        ({"layers": ("input.1.0",) * 16}, "found twice: input.1.0"),
        ({"layers": ("input_blocks.1.1",) * 16}, "such as 'input.1.0'"),
        ({"noun": ""}, "noun must be"),
        ({"noun": " cat"}, "noun must be"),
        ({"noun": "cat\n"}, "noun must be"),
        ({"noun": "c" * 65}, "noun must be"),
        ({"noun": "\ud800"}, "noun must be"),
        ({"noun": None}, "noun must be"),
        ({"noun": "<img src=x onerror=document.title='PWNED'>"}, "noun must be .* without < or >"),
        ({"noun": "a>b"}, "noun must be"),
        ({"architecture": "<b>SD 1.x</b>"}, "architecture must be .* without < or >"),
        ({"layers": tuple(f"input.{i}.0" for i in range(1025))}, "at most 1024"),
        ({"delta": torch.zeros(16, 1, 65537)}, "context_dim must be at most 65536"),
        ({"architecture": ""}, "architecture must be"),
        ({"network": "Flux 1"}, "network must be a name such as 'flux', or empty for a UNet; found 'Flux 1'"),
        ({"network": "n" * 41}, "network must be"),
        ({"adds_to": "key"}, "adds_to must be 'context' or 'value'; found 'key'"),
        ({"steps": -1}, "steps must be"),
        ({"steps": 1.5}, "whole number"),
        ({"seed": 2**64}, "seed must be"),
        ({"training_state": {"a b": torch.zeros(1)}}, "training_state must have names"),
        ({"training_state": {"a": torch.zeros(1, dtype=torch.complex64)}}, "training_state"),
        ({"training_state": {"a": torch.zeros(0)}}, "training_state"),
        ({"training_state": {"a": torch.tensor([float("nan")])}}, "training_state.*finite"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes, message):
    with pytest.raises(ResidualError, match=message):
        make_residual(**changes)


def test_architectures_that_fit_pass():
    check_architecture(make_residual(), [Layer(name, 768) for name in SD15])


@pytest.mark.parametrize(
    "layers, found",
    [
        ([Layer(name, 1024) for name in SD15], r"SD 2\.x, 16 of 1024"),
        ([Layer(f"input.4.{i}", 2048) for i in range(70)], "SDXL, 70 of 2048"),
        ([Layer(name, 128) for name in SD15[:10]], "Toybox, 10 of 128"),
        ([Layer(name.replace("input.1", "input.3"), 768) for name in SD15], "input.1.0 there is input.3.0 here"),
        ([], "one without any"),
    ],
)
def test_another_architecture_is_refused_and_both_are_named(layers, found):
    with pytest.raises(ResidualError, match=rf"'cat' was trained on SD 1\.x, 16 cross-attention .* of 768.*{found}"):
        check_architecture(make_residual(), layers)


# What the file holds


def test_an_sd15_residual_takes_at_most_11000_bytes(tmp_path):
    saved = save_residual(make_residual(), tmp_path / "cat.safetensors")
    assert saved.size == saved.path.stat().st_size
    assert saved.size <= 11_000


def test_the_longest_texts_and_numbers_still_fit_in_11000_bytes(tmp_path):
    longest = {"noun": "猫" * 64, "architecture": "a" * 64, "steps": 2**63 - 1, "seed": 2**64 - 1}
    saved = save_residual(make_residual(**longest), tmp_path / "cat.safetensors")
    assert saved.path.stat().st_size <= 11_000
    assert load_residual(saved.path).noun == longest["noun"]


@pytest.mark.parametrize("precision, most", [("int6", 0.019), ("float16", 3e-4), ("float32", 0)])
def test_a_file_gives_back_what_was_saved(tmp_path, precision, most):
    original = make_residual(noun='Großes "Tier" \\ 猫')
    loaded = load_residual(save_residual(original, tmp_path / "cat.safetensors", precision).path)
    assert all(getattr(loaded, field) == getattr(original, field) for field in SAVED_FIELDS)
    assert (loaded.delta - original.delta).norm() <= most * original.delta.norm()
    # Storing what was loaded loses nothing more.
    assert_same(load_residual(save_residual(loaded, tmp_path / "again.safetensors", precision).path), loaded)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_residual_stays_none(tmp_path, precision):
    nothing = make_residual(delta=torch.zeros(16, 1, 768))
    loaded = load_residual(save_residual(nothing, tmp_path / "cat.safetensors", precision).path)
    assert not loaded.delta.any()
    assert not torch.signbit(loaded.delta).any()


@pytest.mark.parametrize("layers, width", [(SD15[:1], 1), (SD15[:10], 128), (SD15, 1024), (SD15[:3], 77)])
def test_other_shapes_are_kept(tmp_path, layers, width):
    loaded = load_residual(save_residual(make_residual(layers, width), tmp_path / "cat.safetensors").path)
    assert loaded.delta.shape == (len(layers), 1, width)


def test_the_training_state_is_kept_bit_for_bit_in_float32_and_nowhere_else(tmp_path):
    original = make_residual(training_state=training_state())
    path = tmp_path / "cat.safetensors"
    assert_same(load_residual(save_residual(original, path, "float32").path), original)
    for arguments in ({"precision": "float32", "keep_training_state": False}, {"precision": "float16"}, {}):
        assert load_residual(save_residual(original, path, **arguments).path).training_state is None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_residual_gives_the_same_bytes(tmp_path, precision):
    a = save_residual(make_residual(training_state=training_state()), tmp_path / "a.safetensors", precision).path
    b = save_residual(make_residual(training_state=training_state()), tmp_path / "b.safetensors", precision).path
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_safetensors_library_reads_the_file_and_may_rewrite_it(tmp_path, precision):
    original = make_residual(training_state=training_state())
    path = save_residual(original, tmp_path / "cat.safetensors", precision).path
    expected = load_residual(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["format"] == "profusion.residual"
    assert metadata["layers"].split() == list(SD15)
    assert (metadata["width"], metadata["noun"], metadata["steps"], metadata["seed"]) == ("768", "cat", "300", "7")
    safetensors.torch.save_file(tensors, path, metadata | {"modelspec.title": "added by another tool"})
    assert_same(load_residual(path), expected)


def test_the_order_of_a_file_is_that_of_the_data_not_of_the_names():
    data = files.tensors_to_bytes({"a": torch.zeros(1, dtype=torch.uint8), "b": torch.zeros(2)}, {})
    assert header_of(data)["b"]["data_offsets"] == [0, 8]
    assert int.from_bytes(data[:8], "little") % 8 == 0


# How it is written


def test_without_details_the_bytes_are_those_of_older_versions(tmp_path):
    residual = make_residual(training_state=training_state())
    data = save_residual(residual, tmp_path / "cat.safetensors", "float32").path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == "c5c9e93b149e1df4c074b2efa953fd4169518b29d84f0bc03a31c10d24d6f0fd"
    metadata = header_of(good())["__metadata__"]  # of int6, whose codes another processor may round otherwise
    assert metadata["format_version"] == "1" and metadata.keys().isdisjoint({"parts", "capacity", "gate_widths"})


@pytest.mark.parametrize(
    "precision, most", [("int6", (0.02, 0.18, 0.09)), ("float16", (5e-4,) * 3), ("float32", (0,) * 3)]
)
def test_a_file_gives_back_details(tmp_path, precision, most):
    original = make_residual(details=make_details(capacity=3))
    path = save_residual(original, tmp_path / "cat.safetensors", precision).path
    metadata, loaded = header_of(path.read_bytes())["__metadata__"], load_residual(path)
    assert (metadata["format_version"], metadata["parts"]) == ("2", "details")  # an older ProFusion refuses 2 by name
    assert_same(dataclasses.replace(original, delta=loaded.delta), loaded)
    assert loaded.capacity == 3 and loaded.details.widths == SD15_WIDTHS
    for found, expected, share in zip(loaded.numbers(), original.numbers(), most, strict=True):
        assert (found - expected).norm() <= share * expected.norm()
    again = load_residual(save_residual(loaded, tmp_path / "again.safetensors", precision).path)
    assert all(map(torch.equal, again.numbers(), loaded.numbers()))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("details", [False, True])
def test_a_file_says_of_which_network_it_is(tmp_path, precision, details):
    changes = {"network": "flux", "adds_to": "value", "details": make_details() if details else None}
    path = save_residual(make_residual(**changes), tmp_path / "cat.safetensors", precision).path
    metadata, loaded = header_of(path.read_bytes())["__metadata__"], load_residual(path)
    assert (metadata["format_version"], metadata["parts"]) == ("2", "details network" if details else "network")
    assert (loaded.network, loaded.adds_to, loaded.capacity) == ("flux", "value", 4 if details else 1)


def test_a_residual_of_another_network_of_the_same_sizes_is_refused():
    """Flux.1 and Chroma have as many layers as each other, of the same widths."""
    layers = [Layer(name, 768, network="chroma", adds_to="value") for name in SD15]
    check_architecture(make_residual(network="chroma", adds_to="value"), layers)
    with pytest.raises(ResidualError, match="trained on the network 'flux', and the model is the network 'chroma' of"):
        check_architecture(make_residual(network="flux", adds_to="value"), layers)
    with pytest.raises(ResidualError, match="trained on a UNet, and the model is the network 'chroma' of the same"):
        check_architecture(make_residual(), layers)
    with pytest.raises(ResidualError, match="is added to the context, and on this model Infusion adds to the value"):
        check_architecture(make_residual(network="chroma"), layers)
    with pytest.raises(ResidualError, match=r"trained on SD 1\.x, 16 layers of 768, but the model is .*, 15 of 768"):
        check_architecture(make_residual(network="chroma", adds_to="value"), layers[1:])


def test_a_capacity_of_four_takes_at_most_50000_bytes_on_sd15(tmp_path):
    texts = {"noun": "n" * 64, "architecture": "a" * 64, "steps": 2**63 - 1, "seed": 2**64 - 1}
    residual = make_residual(details=make_details(), **texts)
    assert save_residual(residual, tmp_path / "cat.safetensors").size <= 50_000


def test_details_of_another_model_are_refused():
    layers = [Layer(name, 768, width) for name, width in zip(SD15, SD15_WIDTHS, strict=True)]
    residual = make_residual(details=make_details())
    check_architecture(residual, layers)
    with pytest.raises(ResidualError, match="details for layers of 320, 320, 640.*the model's are of 8, 8, 8"):
        check_architecture(residual, [Layer(name, 768, 8) for name in SD15])


def fail_at_fsync(monkeypatch, problem: BaseException) -> None:
    def fsync(_):
        raise problem

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "problem, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cat.safetensors'.*the disk is full. Make room"),
        (OSError(errno.EROFS, "Read-only file system"), "cat.safetensors'.*read-only"),
        (PermissionError(errno.EACCES, "Permission denied"), "cat.safetensors'.*read-only, or not yours"),
        (OSError(errno.EIO, "Input/output error"), "cat.safetensors'.*Input/output error"),
    ],
)
@pytest.mark.parametrize("old", [None, b"what was there"])
def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch, problem, message, old):
    path = tmp_path / "cat.safetensors"
    if old is not None:
        path.write_bytes(old)
    fail_at_fsync(monkeypatch, problem)
    with pytest.raises(ResidualError, match=message):
        save_residual(make_residual(), path, preview=Image.new("RGB", (8, 8)))
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert left == ({} if old is None else {path.name: old})


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch, problem):
    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"what was there")
    fail_at_fsync(monkeypatch, problem)
    with pytest.raises(type(problem)):
        save_residual(make_residual(), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"what was there"


@pytest.mark.skipif(sys.platform == "win32", reason="limits on a process are a POSIX thing")
def test_a_real_limit_on_the_size_of_files_leaves_the_folder_as_it_was(tmp_path):
    import resource

    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"what was there")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ResidualError, match="the disk is full"):
            save_residual(make_residual(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"what was there"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to any folder")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResidualError, match=r"cat\.safetensors'.*read-only"):
        save_residual(make_residual(), tmp_path / "cat.safetensors")
    tmp_path.chmod(0o700)


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / "file" / "cat.safetensors", tmp_path / "folder.safetensors"):
        with pytest.raises(ResidualError, match=f"could not be saved as '{path}'"):
            save_residual(make_residual(), path)


def test_folders_are_made_and_other_names_and_precisions_are_not(tmp_path):
    assert save_residual(make_residual(), str(tmp_path / "new" / "er" / "cat.safetensors")).path.is_file()
    with pytest.raises(ResidualError, match=r"ends in \.safetensors"):
        save_residual(make_residual(), tmp_path / "cat.bin")
    with pytest.raises(ResidualError, match="int6, float16, float32"):
        save_residual(make_residual(), tmp_path / "cat.safetensors", "int4")


def test_values_that_half_precision_cannot_hold_are_not_stored_as_infinity(tmp_path):
    residual = make_residual(delta=torch.full((16, 1, 768), 1e5))
    with pytest.raises(ResidualError, match=r"1e\+05, too large for float16: save it as int6 or float32"):
        save_residual(residual, tmp_path / "cat.safetensors", "float16")
    assert not list(tmp_path.iterdir())
    loaded = load_residual(save_residual(residual, tmp_path / "cat.safetensors").path)
    assert loaded.delta.mean() == pytest.approx(1e5, rel=0.01)


def test_a_delta_spoilt_after_the_residual_was_made_is_not_saved(tmp_path):
    residual = make_residual()
    residual.delta[3, 0, 5] = float("nan")
    with pytest.raises(ResidualError, match=r"finite.*input\.5\.0"):
        save_residual(residual, tmp_path / "cat.safetensors")


@pytest.mark.parametrize("mode, size", [("RGB", (512, 300)), ("RGBA", (96, 96)), ("L", (1, 1)), ("P", (40, 40))])
def test_the_preview_lies_beside_it_under_the_same_stem(tmp_path, mode, size):
    saved = save_residual(make_residual(), tmp_path / "my.cat.safetensors", preview=Image.new(mode, size))
    assert saved.preview == tmp_path / "my.cat.png"
    assert saved.warning is None
    with Image.open(saved.preview) as picture:
        assert picture.mode == "RGB"
        assert picture.size == (min(size[0], 256), 150 if size[0] == 512 else size[1])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_preview_that_fails_costs_a_warning_and_not_the_residual(tmp_path):
    (tmp_path / "cat.png").mkdir()
    saved = save_residual(make_residual(), tmp_path / "cat.safetensors", preview=Image.new("RGB", (8, 8)))
    assert saved.preview is None
    assert saved.warning.startswith("No preview picture could be saved")
    assert load_residual(saved.path).noun == "cat"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cat.png", "cat.safetensors"]


# What each bad file is told


def a_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return stream.getvalue()


@functools.cache
def good(stored_as: str = "int6", capacity: int = 1) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        details = make_details(capacity) if capacity > 1 else None
        original = make_residual(training_state=training_state(), details=details)
        return save_residual(original, Path(folder) / "good.safetensors", stored_as).path.read_bytes()


def edited(stored_as: str = "int6", tensors=None, capacity_is=1, **metadata) -> bytes:
    """A residual's file with other tensors or metadata (None removes one), under a checksum that fits them."""
    contents, fields = files.parse(good(stored_as, capacity_is))
    tensors = files.to_tensors(contents) | (tensors or {})
    fields = {key: value for key, value in (fields | metadata).items() if value is not None and key != files.CHECKSUM}
    return files.tensors_to_bytes({name: tensor for name, tensor in tensors.items() if tensor is not None}, fields)


def one_tensor(dtype="U8", shape=(2,), offsets=(0, 2), payload=b"12", **more) -> bytes:
    return with_header({"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **more}, payload)


def nan_delta() -> dict[str, torch.Tensor]:
    return {"delta": torch.full((16, 1, 768), float("nan"))}


BAD_FILES = {
    "empty": (lambda: b"", "is empty"),
    "three bytes": (lambda: b"abc", "not a safetensors file"),
    "text": (lambda: b"hello, I am not a model\n" * 10, "not a safetensors file"),
    "zip": (a_zip, "zip archive, perhaps a PyTorch"),
    "pickle": (lambda: b"\x80\x04\x95" + bytes(100), "PyTorch checkpoint.*never opened"),
    "old pickle": (lambda: b"cposix\nsystem\n(S'touch pwned'\ntR.", "not a safetensors file"),
    "LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "web page": (lambda: b"\n<!DOCTYPE html><html>", "web page"),
    "web page with a mark": (lambda: b"\xef\xbb\xbf<!DOCTYPE html><html>", "web page"),
    "XML": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied", "an error message of a server"),
    "JSON": (lambda: b'{"error":"Repository not found"}', "an error message of a server"),
    "header longer than the file": (lambda: (5000).to_bytes(8, "little") + b"{}", "cut short"),
    "giant header": (lambda: (2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "cut in the header": (lambda: good()[:200], "cut short"),
    "cut in the data": (lambda: good()[:-1], "cut short"),
    "a byte too many": (lambda: good() + b"x", "cut short, damaged"),
    "deep JSON": (lambda: with_header(b'{"a":' * 20000 + b"1" + b"}" * 20000), "not a safetensors file at all"),
    "not JSON": (lambda: with_header(b"not json at all!"), "not a safetensors file at all"),
    "not UTF-8": (lambda: with_header(b'{"\xff\xfe":1}'), "not a safetensors file at all"),
    "huge shape": (lambda: one_tensor("F32", (2**62, 8)), "not a safetensors file at all"),
    "negative shape": (lambda: one_tensor("U8", (-1,)), "not a safetensors file at all"),
    "offsets beyond the end": (lambda: one_tensor(offsets=(0, 1000), shape=(1000,)), "not a safetensors file at all"),
    "overlapping offsets": (
        lambda: one_tensor(payload=b"123", b={"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}),
        "not a safetensors file at all",
    ),
    "duplicate keys": (lambda: good().replace(b'"steps":"300"', b'"noun" :"dog"'), "a key appears twice"),
    "metadata that is no text": (lambda: with_header({"__metadata__": {"a": [1]}}), "not a safetensors file at all"),
    "no tensors": (lambda: with_header({}), "something else than a residual .its tensors: none"),
    "a LoRA": (lambda: one_tensor(), "something else than a residual .its tensors: a"),
    "newer format": (lambda: edited(format_version="3"), "format version 3.*ProFusion needs an update"),
    "version 2 without parts": (lambda: edited(format_version="2"), "the part '', which.*does not know"),
    "unknown part": (
        lambda: edited(capacity_is=2, parts="details wings"),
        "the part 'wings', which this ProFusion does not know: either ProFusion needs an update",
    ),
    "details in version 1": (lambda: edited(capacity_is=2, format_version="1"), "do not fit|checksum"),
    "another capacity": (lambda: edited(capacity_is=2, capacity="3"), "do not fit"),
    "a capacity that is too large": (lambda: edited(capacity_is=2, capacity="9"), "capacity must be from 2 to 8"),
    "no capacity": (lambda: edited(capacity_is=2, capacity=None), "lacks the metadata capacity"),
    "other widths": (lambda: edited(capacity_is=2, gate_widths=" ".join(["320"] * 16)), "do not fit"),
    "a width too few": (lambda: edited(capacity_is=2, gate_widths="320"), "gate_widths must be 16 whole numbers"),
    "a width that is none": (
        lambda: edited(capacity_is=2, gate_widths=" ".join(["x", *["320"] * 15])),
        "gate_widths must be 16 whole numbers",
    ),
    "lost gates": (lambda: edited(capacity_is=2, tensors={"gate_codes": None}), "do not fit"),
    "NaN in details": (
        lambda: edited("float32", capacity_is=2, tensors={"details": torch.full((16, 1, 768), float("nan"))}),
        "details must be finite",
    ),
    "flipped bit": (lambda: good()[:-100] + bytes([good()[-100] ^ 1]) + good()[-99:], "checksum"),
    "another noun": (lambda: good().replace(b'"noun":"cat"', b'"noun":"dog"'), "checksum"),
    "no checksum": (lambda: good().replace(b'"checksum"', b'"chicksum"'), "checksum"),
    "lost metadata": (lambda: edited(noun=None, seed=None), "lacks the metadata noun, seed"),
    "NaN": (lambda: edited("float32", tensors=nan_delta()), "finite"),
    "NaN scale": (lambda: edited(tensors={"scales": torch.full((16, 24), float("nan")).bfloat16()}), "finite"),
    "infinite scale": (lambda: edited(tensors={"scales": torch.full((16, 24), float("inf")).bfloat16()}), "finite"),
    "unknown dtype": (lambda: edited(tensors={"codes": torch.zeros(16, 576, dtype=torch.int32)}), "do not fit"),
    "missing tensor": (lambda: edited(tensors={"scales": None}), "do not fit"),
    "fewer layers": (lambda: edited(layers="input.1.0"), "do not fit 1 layers"),
    "another width": (lambda: edited(width="800"), "do not fit 16 layers of 800"),
    "no width": (lambda: edited(width="0"), "do not fit|must have the shape"),
    "astronomic width": (lambda: edited(width="9" * 20), "do not fit"),
    "width that is no number": (lambda: edited(width="1e3"), "width must be a whole number"),
    "endless number": (lambda: edited(seed="9" * 100_000), "seed must be a whole number"),
    "no layers": (lambda: edited(layers=""), "layers must be names|do not fit"),
    "empty noun": (lambda: edited(noun=""), "noun must be"),
    "long noun": (lambda: edited(noun="cat " * 1000), "noun must be"),
    "unknown precision": (lambda: edited(precision="int2"), "do not fit.*as 'int2'"),
    "NaN in the training state": (
        lambda: edited("float32", tensors={"training.exp_avg": torch.tensor([float("nan")])}),
        "training_state",
    ),
    "odd name in the training state": (
        lambda: edited("float32", tensors={"training.a b": torch.ones(1)}),
        "training_state must have names",
    ),
    "an extra tensor": (lambda: edited(tensors={"more": torch.ones(1)}), "do not fit"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_the_reason_and_the_fix(tmp_path, name):
    make, message = BAD_FILES[name]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(make())
    pattern = f"(?s)'{path}' cannot be loaded: .*(?:{message}).*train the residual again"
    with pytest.raises(ResidualError, match=pattern) as error:
        load_residual(path)
    assert len(str(error.value)) < 700
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ResidualError, match="is a folder or a device"):
        load_residual(tmp_path)
    with pytest.raises(ResidualError, match=r"nothing\.safetensors' cannot be read: No such file.*Check the name"):
        load_residual(tmp_path / "nothing.safetensors")
    with pytest.raises(ResidualError):
        load_residual("nul\0byte")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")  # reading it would wait for ever
        with pytest.raises(ResidualError, match="is a folder or a device"):
            load_residual(tmp_path / "pipe.safetensors")


def test_a_file_too_large_for_a_residual_is_not_read(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with path.open("wb") as file:
        file.truncate(100 << 30)  # sparse: takes no room
    with pytest.raises(ResidualError, match="larger than 64 MiB, so it must be another kind of model"):
        load_residual(path)


def test_a_residual_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_residual().noun = "dog"


def test_the_kernel_of_residuals_opens_nothing_that_runs_code():
    sources = [Path(files.__file__), *Path(files.__file__).parent.joinpath("residual").glob("*.py")]
    for source in sources:
        text = source.read_text()
        assert not [word for word in ("import pickle", "torch.load", "eval(", "exec(") if word in text], source
