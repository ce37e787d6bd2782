"""What a residual was trained on, as its file says it to people and to model managers.

None of it is needed to draw, and none of it is believed: a file with nonsense here loads as one without it. The names
that begin with modelspec. are those of the Stability AI model metadata standard, 1.0.1, which model managers read.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

MAX_NAME = 64
MAX_PROMPTS = 120

SAMPLED = "attn2.to_v.weight"  # of a UNet's tensors, those of which a sample is taken
_SAMPLES = 16
_WINDOW = 64
_SAME = 0.04  # samples of one network in 16 or 32 bits lie apart by a tenth of it at most
_BEYOND_ROUNDING = 2.5  # times what rounding is expected to do: with 16 numbers it does not do more by chance
_MODELSPEC = "modelspec."
_ARCHITECTURES = {
    "SD 1.x": "stable-diffusion-v1",
    "SD 2.x": "stable-diffusion-v2",
    "SDXL": "stable-diffusion-xl-v1-base",
}


class Sample(NamedTuple):
    """What a network is known again by, see `sample_of`.

    numbers: 16 of them, in 44 characters; empty where they are unknown. rounding: how far apart from themselves the
    weights' own precision is expected to have moved them, as a share of their size; 0 for 16 and 32 bits.
    """

    numbers: str = ""
    rounding: float = 0.0


@dataclass(frozen=True)
class Origin:
    """What a residual was trained on, as far as it is known; empty where it is not.

    base: the file name of the base model, base_hash: the first ten hexadecimal digits of the file's SHA-256, as model
    sites have it, sample: see `sample_of`. learning_rate: 0 where unknown. prompts: with {} for the noun. version: of
    this package. day: ISO 8601. patched: how many of the base's weights had others laid over them, as LoRAs and merges
    do.
    """

    base: str = ""
    base_hash: str = ""
    sample: Sample = Sample()
    learning_rate: float = 0.0
    prompts: tuple[str, ...] = ()
    version: str = ""
    day: str = ""
    patched: int = 0

    def as_metadata(self, noun: str, architecture: str) -> dict[str, str]:
        """Metadata of a file, without what is unknown."""
        own = {
            "base": self.base[-MAX_NAME:],
            "base_hash": self.base_hash,
            "base_sample": self.sample.numbers,
            "base_rounding": f"{self.sample.rounding:g}" if self.sample.rounding else "",
            "learning_rate": f"{self.learning_rate:g}" if self.learning_rate else "",
            "prompts": "|".join(self.prompts)[:MAX_PROMPTS],
            "profusion": self.version,
            "base_patched": str(self.patched or ""),
        }
        known = _ARCHITECTURES.get(architecture, re.sub(r"[^a-z0-9.]+", "-", architecture.lower()).strip("-"))
        spec = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{known}/infusion",
            "implementation": "profusion",
            "title": noun,
            "trigger_phrase": noun,
            "date": self.day,
        }
        entries = {**own, **{_MODELSPEC + name: text for name, text in spec.items()}}
        return {name: text for name, text in entries.items() if text}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> Origin:
        """What a file says; what makes no sense is left out."""

        def text(name: str, pattern: str) -> str:
            found = metadata.get(name, "")
            return found if re.fullmatch(pattern, found) else ""

        rate = text("learning_rate", r"[0-9.e+-]{1,20}")
        prompts = text("prompts", rf"[^<>\x00-\x1f]{{1,{MAX_PROMPTS}}}")
        return cls(
            base=text("base", rf"[^<>\x00-\x1f]{{1,{MAX_NAME}}}") if metadata.get("base", "").isprintable() else "",
            base_hash=text("base_hash", r"[0-9a-f]{10}"),
            sample=Sample(
                text("base_sample", r"[A-Za-z0-9+/=]{1,64}"), _number(text("base_rounding", r"0\.[0-9]{1,2}"))
            ),
            learning_rate=_number(rate),
            prompts=tuple(prompts.split("|")) if prompts.isprintable() and prompts else (),
            version=text("profusion", r"[0-9A-Za-z.+-]{1,20}"),
            patched=int(text("base_patched", r"[0-9]{1,6}") or 0),
            day=_day(metadata.get(f"{_MODELSPEC}date", "")),
        )


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        return ""


def sample_of(weights: Sequence[Tensor]) -> Sample:
    """A sample of a network's weights, by which it is known again in any precision.

    weights: its tensors in a fixed order, such as every cross-attention's W_V. Each number is the mean of 64 in a row,
    which rounding moves by as small a share as it moves each of them. Of weights that are stored as something else than
    their values there is none.
    """
    chosen = [weights[index * len(weights) // _SAMPLES] for index in range(_SAMPLES * bool(weights))]
    if not chosen or not all(type(one) in (Tensor, Parameter) and one.is_floating_point() for one in chosen):
        return Sample()
    numbers, variances = [], []
    for index, weight in enumerate(chosen):
        values = weight.detach().reshape(-1)
        start = (len(values) - _WINDOW) * (index + 1) // (_SAMPLES + 1) if len(values) > _WINDOW else 0
        window = values[start : start + _WINDOW].to("cpu", torch.float32)
        numbers.append(window.mean())
        variances.append((_steps(window, weight.dtype) ** 2 / 12).sum() / len(window) ** 2)
    sample = torch.stack(numbers)
    rounding = torch.stack(variances).sum().sqrt() / sample.norm().clamp_min(1e-12)
    stored = base64.b64encode(sample.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()).decode()
    return Sample(stored, min(0.99, round(float(rounding), 2)))


def _steps(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each value lies from the next one that this type has."""
    limits = torch.finfo(dtype)
    return limits.eps * torch.exp2(values.abs().clamp_min(limits.smallest_normal).log2().floor())


def distance(one: Sample, other: Sample) -> float | None:
    """How far two samples lie apart, as a share of the first's size; None where one of them cannot be read."""
    first, second = _numbers(one.numbers), _numbers(other.numbers)
    if first is None or second is None:
        return None
    return float((first - second).norm() / first.norm().clamp_min(1e-12))


def beyond_rounding(one: Sample, other: Sample) -> float | None:
    """The distance of two samples of different networks; None where they may be one's, in two precisions."""
    found, rounding = distance(one, other), math.hypot(one.rounding, other.rounding)
    return None if found is None or found <= max(_SAME, _BEYOND_ROUNDING * rounding) else found


def other_base(noun: str, origin: Origin | None, sample: Sample) -> str | None:
    """A warning where a residual of this noun was trained on other weights than those of a sample; None where it was
    on these, or where nobody can tell."""
    share = None if origin is None else beyond_rounding(origin.sample, sample)
    if share is None:
        return None
    base = f"{origin.base} ({origin.base_hash})" if origin.base_hash else origin.base or "another model"
    return (
        f"The residual of '{noun}' was trained on {base}. This model has the same architecture and other "
        f"weights ({share:.0%} apart where it reads the prompt), so the concept may look less like itself: load that "
        "model, or train the residual on this one."
    )


def _numbers(sample: str) -> Tensor | None:
    try:
        data = base64.b64decode(sample, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) != 2 * _SAMPLES:
        return None
    numbers = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float()
    return numbers if torch.isfinite(numbers).all() else None
