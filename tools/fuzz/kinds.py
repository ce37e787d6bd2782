"""The kinds of files: small examples of each, how they are mutated, and what must be true of one that loads."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, features

from profusion import files
from profusion.details import beginning
from profusion.models.configs import UNetConfig
from profusion.pictures import PictureError, read_picture
from profusion.promptnet.file import (
    diffusers_name,
    load_promptnet,
    load_training,
    official_promptnet,
    save_promptnet,
)
from profusion.promptnet.network import PromptNet, PromptNetConfig, PromptNetError
from profusion.promptnet.released import check_archive
from profusion.references import Shown, framed
from profusion.residual import PRECISIONS, Residual, ResidualError, load_residual, save_residual

from .mutations import (
    ACCIDENTS,
    cut_short,
    flip_bits,
    forge,
    insert_or_remove,
    lengthen,
    mutate,
    noise,
    overwrite,
    rewritten,
    splice,
)

LAYERS = ("input.1.0", "input.4.0", "middle.0.0", "output.3.0")
UNET = UNetConfig(32, (1,), 1, (1,), 1, 8, num_heads=8)
OURS = PromptNetConfig(UNET, 6, (8,), 2, 1, 4)
THEIRS = PromptNetConfig(UNET, 6, (8,), 1, 1, 4, "noisy", holds_position=True, normalise=False)
BYTES = (flip_bits, overwrite, cut_short, lengthen, insert_or_remove, splice, noise)

Mutation = Callable[[Any, bytes, bytes], bytes]


@dataclass(frozen=True)
class Kind:
    """examples: two whole files, bytes. load: the file's path -> what it holds. refusals: the errors of ours that it
    may raise. accidents keep the meaning: what loads must equal the first example; of what `forgeries` make, `check`
    must hold."""

    name: str
    suffix: str
    examples: tuple[bytes, bytes]
    load: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...]
    check: Callable[[Any], None]
    equal: Callable[[Any, Any], bool] | None
    accidents: Sequence[Mutation] = ACCIDENTS
    forgeries: Sequence[Mutation] = field(default=())


def kinds(folder: Path) -> list[Kind]:
    """All of them. folder: for making the examples in."""
    folder.mkdir(parents=True, exist_ok=True)
    return [*_residuals(folder), *_promptnets(folder), *_pictures()]


def _whole(value: torch.Tensor) -> None:
    assert torch.isfinite(value).all(), "values that are not finite"


# Residuals


def _residual(seed: int, capacity: int = 1) -> Residual:
    generator = torch.Generator().manual_seed(seed)
    delta, moment = torch.randn(2, 4, 1, 96, generator=generator)
    state = {"exp_avg": moment, "step": torch.tensor(3), "rng": generator.get_state()}
    details = None
    if capacity > 1:
        details = beginning(capacity, 4, 96, (32, 64, 64, 32), generator)
        details.values.normal_(generator=generator)
    return Residual(delta, f"cat {seed}", LAYERS, "SD 1.x", 10 + seed, seed, state, details=details)


def _residuals(folder: Path) -> list[Kind]:
    def example(seed: int, precision: str, capacity: int) -> bytes:
        path = folder / "example.safetensors"
        return save_residual(_residual(seed, capacity), path, precision).path.read_bytes()

    def equal(a: Residual, b: Residual) -> bool:
        fields = [(one.noun, one.layers, one.architecture, one.steps, one.seed) for one in (a, b)]
        alike = a.capacity == b.capacity and all(map(torch.equal, a.numbers(), b.numbers()))
        return fields[0] == fields[1] and alike and _same(a.training_state, b.training_state)

    def check(residual: Residual) -> None:
        for numbers in residual.numbers():
            _whole(numbers)
        assert residual.delta.shape[:2] == (len(residual.layers), 1)
        assert not {"<", ">"} & set(residual.noun + residual.architecture)
        assert equal(load_residual(save_residual(residual, folder / "again.safetensors", "float32").path), residual)

    return [
        Kind(
            f"residual {precision}" + f" of {capacity}" * (capacity > 1),
            ".safetensors",
            (example(0, precision, capacity), example(1, precision, capacity)),
            load_residual,
            (ResidualError,),
            check,
            equal,
            forgeries=(lambda random, data, _: forge(random, data),),
        )
        for capacity in (1, 3)
        for precision in PRECISIONS
    ]


def _same(a: dict[str, torch.Tensor] | None, b: dict[str, torch.Tensor] | None) -> bool:
    a, b = a or {}, b or {}
    return a.keys() == b.keys() and all(
        value.dtype == b[name].dtype and torch.equal(value, b[name]) for name, value in a.items()
    )


# PromptNets


def _network(config: PromptNetConfig, seed: int) -> PromptNet:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = PromptNet(config)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return network


def _promptnets(folder: Path) -> list[Kind]:
    path = folder / "example.safetensors"

    def ours(seed: int, training: dict[str, torch.Tensor] | None = None) -> bytes:
        save_promptnet(_network(OURS, seed), path, "float16", {"seed": "1"}, training)
        return path.read_bytes()

    def check(network: PromptNet) -> None:
        for value in network.state_dict().values():
            _whole(value)

    def equal(a: PromptNet, b: PromptNet) -> bool:
        return a.config == b.config and _same(dict(a.state_dict()), dict(b.state_dict()))

    def resumed(file: Path) -> tuple[PromptNet, dict[str, torch.Tensor]]:
        return load_training(file)[:2]

    state = {"exp_avg.output.bias": torch.randn(16), "step": torch.tensor([3.0])}
    plain = {"refusals": (PromptNetError,), "check": check}
    promptnet = Kind(
        "promptnet", ".safetensors", (ours(0), ours(1)), load_promptnet, equal=equal, forgeries=(_forged,), **plain
    )
    training = Kind(
        "promptnet training",
        ".safetensors",
        (ours(0, state), ours(1, state)),
        resumed,
        (PromptNetError,),
        lambda loaded: check(loaded[0]),
        lambda a, b: equal(a[0], b[0]) and _same(a[1], b[1]),
        forgeries=(_forged,),
    )
    # Theirs have no checksum, so that a bit more or less is another network, but a whole one.
    released = _theirs(0), _theirs(1)
    safe = Kind(
        "released safetensors",
        ".safetensors",
        tuple(files.tensors_to_bytes(one, {}) for one in released),
        load_promptnet,
        equal=None,
        **plain,
    )
    packed = Kind(
        "released bin",
        ".bin",
        tuple(_saved(one) for one in released),
        _load_bin,
        (PromptNetError, files.FileFormatError),
        check,
        None,
        (*BYTES, _other_program),
    )
    return [promptnet, training, safe, packed]


def _theirs(seed: int) -> dict[str, torch.Tensor]:
    state = _network(THEIRS, seed).state_dict()
    return {diffusers_name(name, UNET): value for name, value in state.items() if name not in ("start", "spread")}


def _saved(state: dict[str, torch.Tensor]) -> bytes:
    data = io.BytesIO()
    torch.save(state, data)
    return data.getvalue()


def _load_bin(path: Path) -> PromptNet:
    """As nodes/host/words.py reads it, by way of the host's loader."""
    check_archive(path)
    try:
        state = torch.load(path, weights_only=True)
    except Exception as problem:  # torch's own reader raises whatever it meets; the host ring words it
        raise PromptNetError("torch cannot read it") from problem
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise PromptNetError("it is no dict of tensors")
    return official_promptnet(state)


def _other_program(random: Any, data: bytes, _: bytes) -> bytes:
    """The archive with another list of tensors, whole in itself."""
    mutated = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(mutated, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("data.pkl"):
                content = BYTES[int(random.integers(len(BYTES)))](random, content, content)
            new.writestr(record.filename, content)
    return mutated.getvalue()


def _forged(random: Any, data: bytes, other: bytes) -> bytes:
    """Edited metadata and tensors, or an edited configuration, under a checksum that fits."""
    if random.random() < 0.5:
        return forge(random, data)
    contents, metadata = files.parse(data)
    metadata.pop(files.CHECKSUM)
    config = json.loads(metadata["config"])
    metadata["config"] = json.dumps(_other_sizes(random, config) if random.random() < 0.7 else mutate(random, config))
    return rewritten(files.to_tensors(contents), metadata)


def _other_sizes(random: Any, tree: Any) -> Any:
    """The configuration with every fifth number another one."""
    if isinstance(tree, dict):
        return {name: _other_sizes(random, value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_other_sizes(random, value) for value in tree] * int(random.choice([1, 1, 1, 2, 9]))
    if isinstance(tree, int) and not isinstance(tree, bool) and random.random() < 0.2:
        return int(random.choice([0, 1, 2, 32, 64, 8192, 65536, 10**9, -1]))
    return tree


# Pictures


def _pictures() -> list[Kind]:
    def check(loaded: tuple[torch.Tensor, torch.Tensor]) -> None:
        colours, mask = loaded
        assert colours.shape == (*mask.shape, 3) and mask.ndim == 2 and mask.any()
        for values in loaded:
            _whole(values)
            assert values.min() >= 0 and values.max() <= 1

    def kind(suffix: str, mode: str, side: int | None, **options: Any) -> Kind:
        def example(seed: int) -> bytes:
            torch.manual_seed(seed)
            values = torch.randint(0, 256, (24, 32, 4), dtype=torch.uint8).numpy()
            exif = Image.Exif()
            exif[0x0112] = 6
            data = io.BytesIO()
            more = {} if suffix in ("bmp", "gif", "tiff") else {"exif": exif}
            Image.fromarray(values).convert(mode).save(data, {"jpg": "JPEG"}.get(suffix, suffix), **options, **more)
            return data.getvalue()

        accidents = (*BYTES, _other_size) if suffix == "png" else (*BYTES, _any_number)
        name = f"picture {suffix} {mode} {'whole' if side is None else 'square'}"
        examples = example(0), example(1)

        def load(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
            if side is None:
                return read_picture(path)
            pictures, masks, _ = framed([Shown(*read_picture(path))], side)
            return pictures[0], masks[0]

        return Kind(name, f".{suffix}", examples, load, (PictureError,), check, None, accidents)

    return [
        kind("png", "RGBA", None),
        kind("png", "P", 16),
        kind("jpg", "RGB", 16, quality=80),
        kind("jpg", "CMYK", None, progressive=True),
        kind("webp", "RGBA", None, lossless=True),
        kind("webp", "RGB", 16, quality=70),
        kind("bmp", "RGB", None),
        kind("gif", "P", 16),
        kind("tiff", "RGB", None),
        kind("tiff", "F", 16),
        kind("tiff", "RGBA", None, compression="tiff_adobe_deflate"),
        *([kind("avif", "RGBA", None, speed=10)] if features.check("avif") else []),
    ]


def _other_size(random: Any, data: bytes, _: bytes) -> bytes:
    """A PNG with another header, whose own checksum fits."""
    sides = [int(random.choice([0, 1, 24, 4096, 13_300, 65_535, 2**31 - 1])) for _ in range(2)]
    depth, kind = int(random.choice([1, 2, 4, 8, 16])), int(random.choice([0, 2, 3, 4, 6]))
    header = b"IHDR" + struct.pack(">II5B", *sides, depth, kind, 0, 0, int(random.integers(2)))
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _any_number(random: Any, data: bytes, _: bytes) -> bytes:
    """Two or four of the first bytes with a number that something may count by."""
    number = int(random.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]))
    width, order = (2, "H") if random.random() < 0.5 else (4, "I")
    at = int(random.integers(0, min(len(data), 80) - width))
    packed = struct.pack(random.choice(["<", ">"]) + order, number & (2 ** (8 * width) - 1))
    return data[:at] + packed + data[at + width :]
