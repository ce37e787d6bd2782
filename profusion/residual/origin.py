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

import torch
from torch import Tensor

MAX_NAME = 64
MAX_PROMPTS = 120

_SAMPLES = 16
_WINDOW = 64
_MODELSPEC = "modelspec."
_ARCHITECTURES = {
    "SD 1.x": "stable-diffusion-v1",
    "SD 2.x": "stable-diffusion-v2",
    "SDXL": "stable-diffusion-xl-v1-base",
}


@dataclass(frozen=True)
class Origin:
    """What a residual was trained on, as far as it is known; empty where it is not.

    base: the file name of the base model, base_hash: the first ten hexadecimal digits of the file's SHA-256, as model
    sites have it, sample: see `sample_of`. learning_rate: 0 where unknown. prompts: with {} for the noun. version: of
    this package. day: ISO 8601.
    """

    base: str = ""
    base_hash: str = ""
    sample: str = ""
    learning_rate: float = 0.0
    prompts: tuple[str, ...] = ()
    version: str = ""
    day: str = ""

    def as_metadata(self, noun: str, architecture: str) -> dict[str, str]:
        """Metadata of a file, without what is unknown."""
        own = {
            "base": self.base[-MAX_NAME:],
            "base_hash": self.base_hash,
            "base_sample": self.sample,
            "learning_rate": f"{self.learning_rate:g}" if self.learning_rate else "",
            "prompts": "|".join(self.prompts)[:MAX_PROMPTS],
            "profusion": self.version,
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
            sample=text("base_sample", r"[A-Za-z0-9+/=]{1,64}"),
            learning_rate=_number(rate),
            prompts=tuple(prompts.split("|")) if prompts.isprintable() and prompts else (),
            version=text("profusion", r"[0-9A-Za-z.+-]{1,20}"),
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


def sample_of(weights: Sequence[Tensor]) -> str:
    """A sample of a network's weights, by which it is known again in any precision: 16 numbers, in 44 characters.

    weights: its tensors in a fixed order, such as every cross-attention's W_V. Each number is the mean of 64 in a row,
    which rounding moves by as small a share as it moves each of them.
    """
    if not weights:
        return ""
    numbers = []
    for index in range(_SAMPLES):
        weight = weights[index * len(weights) // _SAMPLES].detach().reshape(-1)
        start = (len(weight) - _WINDOW) * (index + 1) // (_SAMPLES + 1) if len(weight) > _WINDOW else 0
        numbers.append(weight[start : start + _WINDOW].to("cpu", torch.float32).mean())
    stored = torch.stack(numbers).to(torch.bfloat16).view(torch.uint8)
    return base64.b64encode(stored.numpy().tobytes()).decode()


def distance(one: str, other: str) -> float | None:
    """How far two samples lie apart, as a share of the first's size; None where one of them cannot be read."""
    first, second = _numbers(one), _numbers(other)
    if first is None or second is None:
        return None
    return float((first - second).norm() / first.norm().clamp_min(1e-12))


def _numbers(sample: str) -> Tensor | None:
    try:
        data = base64.b64decode(sample, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) != 2 * _SAMPLES:
        return None
    numbers = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float()
    return numbers if torch.isfinite(numbers).all() else None
