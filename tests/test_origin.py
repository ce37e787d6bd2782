"""What a residual's file says of its training: to people, to model managers, and to nobody who would believe it."""

import json

import pytest
import torch

from profusion.residual import Origin, Residual, load_residual, save_residual
from profusion.residual.origin import distance, sample_of

ORIGIN = Origin(
    base="v1-5-pruned-emaonly-fp16.safetensors",
    base_hash="6ce0161689",
    sample=sample_of([torch.randn(320, 768, generator=torch.Generator().manual_seed(1))]),
    learning_rate=0.02,
    prompts=("a photo of a {}", "a picture of a {}", "a {}"),
    version="0.1.0",
    day="2026-11-27",
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


def test_weights_are_known_again_in_any_precision_and_others_are_not():
    generator = torch.Generator().manual_seed(3)
    weights = [0.03 * torch.randn(width, 768, generator=generator) for width in (320, 640, 1280)]
    sample = sample_of(weights)
    assert len(sample) == 44
    for dtype, most in ((torch.float16, 0.01), (torch.bfloat16, 0.01), (torch.float8_e4m3fn, 0.04)):
        assert distance(sample, sample_of([weight.to(dtype) for weight in weights])) <= most
    tuned = [weight + 0.1 * 0.03 * torch.randn(weight.shape, generator=generator) for weight in weights]
    assert 0.04 < distance(sample, sample_of(tuned)) < 0.2
    other = [0.03 * torch.randn(weight.shape, generator=generator) for weight in weights]
    assert distance(sample, sample_of(other)) > 0.5
    assert distance(sample, "") is None and sample_of([]) == ""
