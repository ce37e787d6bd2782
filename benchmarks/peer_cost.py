"""What each peer costs: seconds a sampling step and a training step, UNet rows of both, and
the most memory that it takes.

`python -m benchmarks.peer_cost`. All is timed in one process, interleaved, one thread; medians, and the medians of the
ratios to the plain sampler of the same round. Where a ComfyUI is found, its KSampler and its LoRA trainer take part.
Memory is the peak resident size of a process that loads Toybox, trains two steps and draws one picture.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.host_cost import Studio, find_host, load_pack
from benchmarks.peers import PEERS, PLAIN, Peer
from benchmarks.results import table, write
from benchmarks.timing import interleaved
from profusion.metrics.cost import measured
from profusion.residual.training import TrainingOptions
from profusion.toybox.concepts import drawn_concept
from profusion.toybox.pipeline import Toybox

HOST_PLAIN = "ComfyUI's KSampler"
TEXT = "a photo of a {} on grass"


class Measured:
    """A peer that trains and draws a step at a time."""

    def __init__(self, kind: type[Peer], toybox: Toybox, steps: int):
        concept = drawn_concept()
        self.kind, self.peer, self.steps = kind, kind(toybox, concept.noun), steps
        self.training = self.peer.steps(concept, TrainingOptions(10**6, kind.rates[0])) if kind.rates else None

    def train(self) -> None:
        next(self.training)

    def draw(self) -> None:
        self.peer.generate(TEXT.format(self.peer.phrase), [1], self.steps, 2.0)

    def rows(self) -> dict[str, float | None]:
        """UNet rows of a sampling step and of a training step, those of class pictures
        included; None of the host's own."""
        with measured(self.peer.unet) as drawn:
            self.draw()
        found = {"rows_a_sampling_step": drawn.rows / self.steps, "rows_a_training_step": None}
        if self.training is not None:
            self.train()  # the first one makes class pictures
            with measured(self.peer.unet) as trained:
                self.train()
            found["rows_a_training_step"] = trained.rows or None
        return found


def peak_bytes(kind: type[Peer]) -> int | None:
    """The most that a process of its own takes; None where there is no /proc to ask."""
    if not Path("/proc/self/status").is_file():
        return None
    command = [sys.executable, "-m", "benchmarks.peer_cost", "--alone", kind.name]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def alone(name: str) -> int:
    """The peak resident size of this process, in bytes, once it has trained two steps and drawn a picture."""
    kind = next(kind for kind in (*PEERS, PLAIN) if kind.name == name)
    one = Measured(kind, Toybox.load(), 2)
    if one.training is not None:
        one.train()
        one.train()
    one.draw()
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def measure(rounds: int, steps: int) -> dict[str, dict[str, float | None]]:
    toybox, host = Toybox.load(), find_host()
    kinds = [kind for kind in (PLAIN, *PEERS) if not kind.why_unavailable()]
    peers = {kind.name: Measured(kind, toybox, steps) for kind in kinds}
    draw = {name: one.draw for name, one in peers.items()}
    if host is not None:
        studio = Studio(load_pack(host), steps, 1)
        runs = {HOST_PLAIN: lambda: studio.ksampler(studio.model, studio.positive)}
        runs |= {
            f"Infusion in ComfyUI, {mode}": studio.infusion(1, stream=mode, every=1)
            for mode in ("own trajectory", "shared latent")
        }
        draw |= {name: torch.inference_mode()(run) for name, run in runs.items()}
    train = {name: one.train for name, one in peers.items() if one.training is not None}
    counted = {name: one.rows() for name, one in peers.items()}
    tasks = {("draw", name): task for name, task in draw.items()} | {
        ("train", name): task for name, task in train.items()
    }
    times = interleaved(tasks, rounds)
    found: dict[str, dict[str, float | None]] = {}
    for name in draw:
        base = times["draw", HOST_PLAIN if name not in peers else PLAIN.name]
        drawn, trained = times["draw", name], times.get(("train", name))
        found[name] = {
            "seconds_a_sampling_step": round(statistics.median(drawn) / steps, 5),
            "times_plain": round(statistics.median(one / other for one, other in zip(drawn, base, strict=True)), 3),
            "seconds_a_training_step": round(statistics.median(trained), 4) if trained else None,
            **counted.get(name, {}),
            "peak_bytes": peak_bytes(peers[name].kind) if name in peers else None,
        }
    for one in peers.values():
        if one.training is not None:
            one.training.close()
    return found


def markdown(found: dict[str, dict[str, float | None]]) -> str:
    rows = []
    for name, one in found.items():
        cells = [
            one["seconds_a_sampling_step"],
            one["times_plain"],
            one.get("rows_a_sampling_step"),
            one["seconds_a_training_step"],
            one.get("rows_a_training_step"),
            one["peak_bytes"] and round(one["peak_bytes"] / 1e6),
        ]
        rows.append([name, *("" if cell is None else f"{cell:g}" for cell in cells)])
    heads = (
        "",
        "s a sampling step",
        "times plain",
        "UNet rows of it",
        "s a training step",
        "UNet rows of it",
        "peak memory, MB",
    )
    return table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="sampling steps of a picture")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, and a table beside them")
    parser.add_argument("--alone", metavar="PEER", help="print the peak memory of one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.alone:
        print(alone(given.alone))
        return
    found = measure(given.rounds, given.steps)
    write(
        given.json,
        {"rounds": given.rounds, "steps": given.steps, "threads": torch.get_num_threads()},
        found,
        markdown(found),
    )


if __name__ == "__main__":
    main()
