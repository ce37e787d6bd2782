"""Mutated residual files: each is refused, or gives exactly what was saved. Never a crash, never something else.

Two kinds of damage. Accidents (bits, cuts, splices, edited headers) keep the old checksum: what loads must be equal to
what was saved. Forgeries are given a checksum that fits: what loads must be a valid residual, which saves and loads.
"""

import copy
import json
from pathlib import Path

import numpy
import pytest
import torch

from profusion import files
from profusion.residual import PRECISIONS, Residual, ResidualError, load_residual, save_residual

LAYERS = ("input.1.0", "input.4.0", "middle.0.0", "output.3.0")
ROUNDS = 120  # of each mutation, in each precision

HOSTILE = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    2**64 + 1,
    1e308,
    "",
    "0",
    "-1",
    "NaN",
    "999999999999999999999",
    "F32",
    "F64",
    "U8",
    "BF16",
    "F8_E4M3",
    "C64",
    "x" * 5000,
    "\u0000",
    "猫\u202e",
    "input.1.0",
    "input.1.0 input.1.0",
    [],
    {},
    [0, 0],
    [2**40, 2**40],
    [-1, 5],
    [[[[]]]],
    {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
)


def make_residual(seed: int) -> Residual:
    generator = torch.Generator().manual_seed(seed)
    delta, moment = torch.randn(2, 4, 1, 96, generator=generator)
    state = {"exp_avg": moment, "step": torch.tensor(3), "rng": generator.get_state()}
    return Residual(delta, f"cat {seed}", LAYERS, "SD 1.x", steps=10 + seed, seed=seed, training_state=state)


def same(a: Residual, b: Residual) -> bool:
    def fields(residual: Residual):
        return residual.noun, residual.layers, residual.architecture, residual.steps, residual.seed

    states = [residual.training_state or {} for residual in (a, b)]
    return (
        fields(a) == fields(b)
        and torch.equal(a.delta, b.delta)
        and states[0].keys() == states[1].keys()
        and all(t.dtype == states[1][n].dtype and torch.equal(t, states[1][n]) for n, t in states[0].items())
    )


def header_of(data: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


# Accidents: (random numbers, the file, another residual's file) -> the mutated file


def flip_bits(random, data, _):
    mutated = bytearray(data)
    for position in random.integers(0, len(data), random.integers(1, 9)):
        mutated[position] ^= 1 << int(random.integers(8))
    return bytes(mutated)


def flip_bits_of_the_header(random, data, other):
    end = 8 + int.from_bytes(data[:8], "little")
    return flip_bits(random, data[:end], other) + data[end:]


def overwrite(random, data, _):
    start, length = int(random.integers(len(data))), int(random.integers(1, 64))
    return data[:start] + random.bytes(length) + data[start + length :]


def cut_short(random, data, _):
    return data[: int(random.integers(len(data)))]


def lengthen(random, data, _):
    return data + random.bytes(int(random.integers(1, 200)))


def insert_or_remove(random, data, _):
    start, length = int(random.integers(len(data))), int(random.integers(1, 64))
    return data[:start] + (random.bytes(length) + data[start:] if random.random() < 0.5 else data[start + length :])


def splice(random, data, other):
    first, second = sorted(int(position) for position in random.integers(0, min(len(data), len(other)), 2))
    return data[:first] + other[first:second] + data[second:]


def other_header(random, data, other):
    (header, _), (_, payload) = header_of(other), header_of(data)
    return with_header(header, payload)


def another_length(random, data, _):
    length = int(random.choice([0, 1, 7, len(data), len(data) - 8, len(data) - 7, 2**20, 2**31, 2**62]))
    return length.to_bytes(8, "little") + data[8:]


def edit_header(random, data, _):
    header, payload = header_of(data)
    return with_header(mutate(random, header), payload)


def repeat_a_key(random, data, _):
    header, payload = header_of(data)
    key = str(random.choice(list(header)))
    again = json.dumps({key: mutate(random, header[key])}).encode()
    return with_header(json.dumps(header).encode()[:-1] + b"," + again[1:], payload)


def nest(random, data, _):
    header, payload = header_of(data)
    depth = int(random.integers(1, 5000))
    return with_header(json.dumps(header).encode()[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}", payload)


def spoil_utf8(random, data, _):
    end = 8 + int.from_bytes(data[:8], "little")
    position = int(random.integers(8, end))
    return data[:position] + bytes([int(random.integers(128, 256))]) + data[position + 1 :]


def noise(random, data, _):
    return random.bytes(int(random.integers(0, 2000)))


ACCIDENTS = (
    flip_bits,
    flip_bits_of_the_header,
    overwrite,
    cut_short,
    lengthen,
    insert_or_remove,
    splice,
    other_header,
    another_length,
    edit_header,
    repeat_a_key,
    nest,
    spoil_utf8,
    noise,
)


def mutate(random, tree):
    """A copy of nested dicts and lists with one to three places replaced, removed or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(int(random.integers(1, 4))):
        node, parent, key = tree, None, None
        while isinstance(node, (dict, list)) and node and (parent is None or random.random() < 0.8):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            parent, key = node, keys[random.integers(len(keys))]
            node = node[key]
        if parent is None:
            return HOSTILE[random.integers(len(HOSTILE))]
        if random.random() < 0.2:
            del parent[key]
        elif isinstance(parent, dict) and random.random() < 0.1:
            parent[key + "x"] = parent.pop(key)
        else:
            parent[key] = HOSTILE[random.integers(len(HOSTILE))]
    return tree


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mutation", ACCIDENTS, ids=lambda mutation: mutation.__name__)
def test_a_damaged_file_is_refused_or_loads_as_it_was_saved(tmp_path, mutation, precision):
    original = save_residual(make_residual(0), tmp_path / "a.safetensors", precision).path
    data, saved = original.read_bytes(), load_residual(original)
    other = save_residual(make_residual(1), tmp_path / "b.safetensors", precision).path.read_bytes()
    path = tmp_path / "mutated.safetensors"
    random = numpy.random.default_rng(ACCIDENTS.index(mutation))
    refused = 0
    for _ in range(ROUNDS):
        path.write_bytes(mutation(random, data, other))
        try:
            assert same(load_residual(path), saved)
        except ResidualError as problem:
            assert str(path) in str(problem)
            refused += 1
    assert refused > ROUNDS / 4  # the mutations do bite


def forge(random, data: bytes) -> bytes:
    """The file with edited metadata and tensors, under a checksum that fits them."""
    contents, metadata = files.parse(data)
    metadata.pop(files.CHECKSUM)
    texts = [value for value in HOSTILE if isinstance(value, str)]
    for key in random.choice(list(metadata), int(random.integers(0, 3))):
        metadata[str(key)] = texts[random.integers(len(texts))]
    tensors = files.to_tensors(contents)
    for name in random.choice(list(tensors), int(random.integers(0, 3))):
        tensors[str(name)] = forged_tensor(random, tensors[str(name)])
    return files.tensors_to_bytes(tensors, metadata)


def forged_tensor(random, tensor: torch.Tensor) -> torch.Tensor:
    kind = random.integers(5)
    if kind == 0:  # any bits at all: NaN, infinities, negative scales
        return torch.frombuffer(bytearray(random.bytes(tensor.nbytes)), dtype=tensor.dtype).reshape(tensor.shape)
    if kind == 1:
        return tensor.to(list(files.DTYPES.values())[random.integers(len(files.DTYPES))])
    if kind == 2:
        return tensor.reshape(-1)
    if kind == 3:
        return torch.cat([tensor.reshape(-1)] * 2)
    return tensor.reshape((1,) * int(random.integers(1, 12)) + tuple(tensor.shape))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_forged_file_is_refused_or_is_a_residual_like_any_other(tmp_path, precision):
    data = save_residual(make_residual(0), tmp_path / "a.safetensors", precision).path.read_bytes()
    path, again = tmp_path / "forged.safetensors", tmp_path / "again.safetensors"
    random = numpy.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(3 * ROUNDS):
        path.write_bytes(forge(random, data))
        loaded = load_or_none(path)
        outcomes[loaded is not None] += 1
        if loaded is not None:
            assert torch.isfinite(loaded.delta).all()
            assert loaded.delta.shape[:2] == (len(loaded.layers), 1)
            assert same(load_residual(save_residual(loaded, again, "float32").path), loaded)
    assert min(outcomes.values()) > 0


def load_or_none(path: Path) -> Residual | None:
    try:
        return load_residual(path)
    except ResidualError as problem:
        assert str(path) in str(problem)
        assert len(str(problem)) < 1000
        return None
