"""`python -m tools.fuzz --files 20000 [--seed 7]`: mutate files of every kind and see that each is refused or whole.

Half of them come from a fixed seed and half from a random one, which is printed. A file that breaks the contract is
kept in fuzz-failures/.
"""

from __future__ import annotations

import argparse
import faulthandler
import secrets
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from .kinds import Kind, kinds

FIXED_SEED = 12
MOST_SECONDS, MOST_MB = 2.0, 200.0  # of one file
MOST_LETTERS = 1500  # of a refusal
HANGS_AFTER = 60
FAILURES = Path("fuzz-failures")


@dataclass
class Found:
    """What became of the files of one kind."""

    outcomes: Counter
    slowest: float = 0.0
    largest: float = 0.0


def peak_mb() -> float:
    """The highest memory of this process since `forget_peak`; 0 where the system does not say."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else 0.0


def forget_peak() -> float:
    """Count the highest memory from here on; returns what is taken now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak_mb()


def outcome(kind: Kind, path: Path, forged: bool, original: object) -> str:
    """Load a file: "refused" in our words, "equal" to the original, "another" that is whole, or AssertionError."""
    try:
        loaded = kind.load(path)
    except kind.refusals as problem:
        assert len(str(problem)) < MOST_LETTERS, f"a refusal of {len(str(problem))} characters"
        str(problem).encode()
        return "refused"
    kind.check(loaded)
    if kind.equal is not None and kind.equal(loaded, original):
        return "equal"
    assert forged or kind.equal is None, "an accident changed what the file holds, and nobody noticed"
    return "another"


def fuzz(kind: Kind, count: int, seed: int, folder: Path) -> Found:
    """Mutate and load so many files of a kind. Raises AssertionError, with the file's place, at the first bad one."""
    random = numpy.random.default_rng([seed, *kind.name.encode()])
    path, found = folder / f"mutated{kind.suffix}", Found(Counter())
    path.write_bytes(kind.examples[0])
    original = kind.load(path)
    for _ in range(count):
        forged = bool(kind.forgeries) and random.random() < 0.3
        mutations = kind.forgeries if forged else kind.accidents
        mutation = mutations[int(random.integers(len(mutations)))]
        data = mutation(random, *kind.examples)
        path.write_bytes(data)
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        before, started = forget_peak(), time.process_time()
        try:
            found.outcomes[outcome(kind, path, forged, original)] += 1
            seconds, megabytes = time.process_time() - started, peak_mb() - before
            assert seconds < MOST_SECONDS and megabytes < MOST_MB, f"{seconds:.1f} s, {megabytes:.0f} MB"
        except Exception as problem:
            raise AssertionError(f"{kind.name}, seed {seed}: {_kept(kind, data)}") from problem
        finally:
            faulthandler.cancel_dump_traceback_later()
        found.slowest, found.largest = max(found.slowest, seconds), max(found.largest, megabytes)
    return found


def _kept(kind: Kind, data: bytes) -> Path:
    FAILURES.mkdir(exist_ok=True)
    path = FAILURES / f"{kind.name.replace(' ', '_')}_{secrets.token_hex(4)}{kind.suffix}"
    path.write_bytes(data)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="in place of the random one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Pillow's, about sizes
    seeds = (FIXED_SEED, secrets.randbelow(2**32) if given.seed is None else given.seed)
    print(f"{given.files} files, seeds {seeds[0]} and {seeds[1]}", flush=True)
    total, failed, started = Counter(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        every = kinds(Path(name))
        each = -(-given.files // (len(every) * len(seeds)))
        for kind in every:
            for seed in seeds:
                try:
                    found = fuzz(kind, each, seed, Path(name))
                except AssertionError as problem:
                    failed += 1
                    print(
                        f"FAILED {problem}: {type(problem.__cause__).__name__}: {problem.__cause__!s:.300}", flush=True
                    )
                    continue
                total += found.outcomes
                print(
                    f"{kind.name:22} {dict(found.outcomes)}, slowest {1000 * found.slowest:.0f} ms, "
                    f"+{found.largest:.0f} MB",
                    flush=True,
                )
    print(f"{sum(total.values())} files in {time.monotonic() - started:.0f} s: {dict(total)}, {failed} kinds failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
