"""What a residual's file says of its training: to people, to model managers, and to nobody who would believe it."""

import json
from dataclasses import replace

import pytest
import torch

from profusion.residual import Origin, Residual, load_residual, save_residual
from profusion.residual.origin import Sample, beyond_rounding, distance, sample_of

ORIGIN = Origin(
    base="v1-5-pruned-emaonly-fp16.safetensors",
    base_hash="6ce0161689",
    sample=sample_of([torch.randn(320, 768, generator=torch.Generator().manual_seed(1))]),
    learning_rate=0.02,
    prompts=("a photo of a {}", "a picture of a {}", "a {}"),
    version="0.1.0",
    day="2026-11-27",
    patched=96,
)


def make_residual(**changes):
    """The size of SD 1.5's."""
    layers = tuple(
        f"{part}.{index}.0" for part, index in zip(["input"] * 6 + ["output"] * 10, range(1, 17), strict=True)
    )
    delta = torch.randn(16, 1, 768, generator=torch.Generator().manual_seed(0))
    return Residual(delta, "cat", layers, "SD 1.x", 300, 7, **changes)


def header(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("precision", ["int6", "float16", "float32"])
def test_a_file_says_what_it_was_trained_on(tmp_path, precision):
    saved = save_residual(make_residual(origin=ORIGIN), tmp_path / "cat.safetensors", precision)
    assert load_residual(saved.path).origin == ORIGIN
    assert saved.size <= 11_000 or precision != "int6"


def test_model_managers_find_the_names_of_their_standard(tmp_path):
    """Stability AI model metadata standard 1.0.1: the required keys, and the word to write."""
    save_residual(make_residual(origin=ORIGIN), tmp_path / "cat.safetensors")
    spec = {name: text for name, text in header(tmp_path / "cat.safetensors").items() if name.startswith("modelspec.")}
    assert spec == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/infusion",
        "modelspec.implementation": "profusion",
        "modelspec.title": "cat",
        "modelspec.trigger_phrase": "cat",
        "modelspec.date": "2026-11-27",
    }


def test_files_without_it_load_and_are_what_they_were(tmp_path):
    """What was written before this, and what some tool has taken the metadata out of."""
    plain = save_residual(make_residual(), tmp_path / "plain.safetensors")
    assert load_residual(plain.path).origin == Origin()
    told = save_residual(make_residual(origin=ORIGIN), tmp_path / "told.safetensors")
    checked = {"format", "format_version", "architecture", "layers", "width", "noun", "steps", "seed", "precision"}
    assert set(header(plain.path)) == checked | {"checksum"}
    assert header(told.path)["checksum"] == header(plain.path)["checksum"]  # older readers find it intact


@pytest.mark.parametrize(
    "name, text",
    [
        ("base", "<img src=x onerror=alert(1)>"),
        ("base", "a\u202eb"),
        ("base", "x" * 5000),
        ("base_hash", "no hash"),
        ("base_sample", "AAAA"),
        ("learning_rate", "1e999"),
        ("learning_rate", "nan"),
        ("prompts", "a\nb"),
        ("profusion", "<b>"),
        ("modelspec.date", "yesterday"),
    ],
)
def test_nonsense_is_left_out(name, text):
    found = Origin.of_metadata({**ORIGIN.as_metadata("cat", "SD 1.x"), name: text})
    changed = [field for field in vars(ORIGIN) if getattr(found, field) != getattr(ORIGIN, field)]
    assert len(changed) == 1
    value = getattr(found, changed[0])
    assert not value or distance(value, value) is None


PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def network(seed, scale=0.03):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(20, 64, generator=generator) for _ in range(16)]


@pytest.mark.parametrize("scale", [0.1, 0.03, 0.008])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_weights_are_known_again_in_any_precision(dtype, scale):
    """Also where the residual was trained on the rounded ones. A network's own rounding is expected, and no more."""
    far, whole_far = [], []
    for seed in range(200):
        weights = network(seed, scale)
        whole, rounded = sample_of(weights), sample_of([weight.to(dtype) for weight in weights])
        assert beyond_rounding(whole, rounded) is None and beyond_rounding(rounded, whole) is None, seed
        assert len(rounded.numbers) == 44 and whole.rounding == 0
        far.append(distance(whole, rounded))
        whole_far.append(rounded.rounding)
    if dtype.itemsize > 1:
        assert max(far) < 0.01 and not any(whole_far)
    else:
        root = lambda shares: (sum(share**2 for share in shares) / len(shares)) ** 0.5  # noqa: E731
        assert 0.8 < root(far) / root(whole_far) < 1.25


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_other_weights_are_told(dtype):
    for seed in range(50):
        sample = sample_of([weight.to(dtype) for weight in network(seed)])
        assert beyond_rounding(sample, sample_of(network(seed + 1000))) > 0.5
    generator = torch.Generator().manual_seed(3)
    weights = network(3)
    tuned = [weight + 0.1 * 0.03 * torch.randn(weight.shape, generator=generator) for weight in weights]
    assert 0.04 < beyond_rounding(sample_of(weights), sample_of(tuned)) < 0.2


class Packed(torch.Tensor):
    """As quantised forms of other libraries are."""


@pytest.mark.parametrize(
    "weight",
    [torch.randint(0, 256, (320, 432), dtype=torch.uint8), torch.ones(64, 64, dtype=torch.int8)]
    + [torch.ones(64, 64).as_subclass(Packed)],
    ids=["4 bits in bytes", "int8", "a kind of its own"],
)
def test_what_is_stored_as_something_else_has_no_sample(weight):
    assert sample_of([weight] * 16) == Sample() == sample_of([]) == sample_of([torch.ones(9, 9)] * 15 + [weight])
    assert (
        distance(sample_of(network(1)), Sample()) is None and beyond_rounding(sample_of(network(1)), Sample()) is None
    )


def test_what_rounding_did_is_in_the_file(tmp_path):
    sample = sample_of([weight.to(torch.float8_e5m2) for weight in network(1)])
    assert 0.03 < sample.rounding < 0.1
    saved = save_residual(make_residual(origin=replace(ORIGIN, sample=sample)), tmp_path / "cat.safetensors")
    assert load_residual(saved.path).origin.sample == sample and saved.size <= 11_000
    said = replace(ORIGIN, sample=sample).as_metadata("cat", "SD 1.x")
    for nonsense in ("1e9", "nan", "5.0", "-0.1", "0.5555"):
        assert Origin.of_metadata({**said, "base_rounding": nonsense}).sample == sample._replace(rounding=0)
