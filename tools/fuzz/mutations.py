"""How files are damaged and forged: (random numbers, the file, another one of its kind) -> the mutated file.

Accidents (bits, cuts, splices, edited headers) keep the old checksum, forgeries get one that fits.
"""

from __future__ import annotations

import copy
import json

import torch

from profusion import files

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

# What a person or a program may give as a text.
TEXTS = (
    "cup\ud800",
    "\udcff\udfff",
    "x\0y",
    "\x1b[2J",
    "\u202egnp.exe",
    "\u2028",
    "<script>1</script>",
    "&lt;b&gt;",
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "con",
    "%noun%/%year%/%x%",
    "(((S*:1e999)))",
    "S* S*",
    "embedding:x",
    "a" * 5000,
    "猫" * 300,
    "👩\u200d🚀",
    "\n\n\n",
    " ",
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


def forge(random, data: bytes) -> bytes:
    """The file with edited metadata and tensors, under a checksum that fits them."""
    contents, metadata = files.parse(data)
    metadata.pop(files.CHECKSUM)
    texts = [value for value in HOSTILE if isinstance(value, str)]
    for key in random.choice(list(metadata), int(random.integers(0, 3))):
        metadata[str(key)] = texts[random.integers(len(texts))]
    tensors = files.to_tensors(contents)
    for name in random.choice(sorted(tensors), int(random.integers(0, 3))):  # the library lists them in any order
        tensors[str(name)] = forged_tensor(random, tensors[str(name)])
    return rewritten(tensors, metadata)


def rewritten(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A file of ours with a checksum that fits: notes are not under it."""
    notes = {name: text for name, text in metadata.items() if name.startswith("notes.")}
    checked = {name: text for name, text in metadata.items() if name not in notes}
    return b"".join(files.tensor_pieces(tensors, checked, notes))


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
