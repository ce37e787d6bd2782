"""Real servers that die in the middle of a training, and two of them on one folder.

KILLS: how many servers each kind of training loses before it may end; 3 altogether by default, as `make kills` 20.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: no server is killed")

import often
from conftest import HOST
from live import Server

from profusion.promptnet.file import load_promptnet, load_training
from profusion.residual import load_residual

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("survival")]

KILLS = int(os.environ.get("KILLS", "3"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
PATIENCE = 4.0  # seconds that a step and a saving may take beyond the interval, on a machine that does other work too

ENDLESS = 100_000  # steps, while servers are killed
MORE = 3  # steps in which the last server finishes what the others left

TOYBOX = {"class_type": "ProFusion_ToyboxLoader", "inputs": {"toy": "gold and navy cup", "count": 3, "seed": 0}}


def residual_graph(steps, resume=None):
    inputs = {name: ["1", slot] for slot, name in ((0, "model"), (1, "clip"), (2, "vae"), (4, "images"), (5, "masks"))}
    values = {"noun": "cup", "steps": steps, "learning_rate": 0.01, "batch_size": 2, "seed": 5, "flip": True}
    samples = {"sample_every": 25, "sample_prompt": "a photo of a %noun%", "sample_steps": 2, "sample_cfg": 4.0}
    graph = {
        "1": TOYBOX,
        "2": {
            "class_type": "ProFusion_ResidualTrainer",
            "inputs": {**inputs, **values, **samples, "preserve": 1.0},
        },
    }
    if resume is not None:
        graph["3"] = {"class_type": "ProFusion_ResidualLoader", "inputs": {"residual": resume}}
        graph["2"]["inputs"]["resume"] = ["3", 0]
    return graph


def finetune_graph(steps):
    slots = ((0, "model"), (1, "clip"), (2, "vae"), (3, "clip_vision"), (4, "images"), (5, "masks"))
    values = {"learning_rate": 1e-4, "train_attention": True, "attention_learning_rate": 1e-3, "rank": 4, "seed": 5}
    return {
        "1": TOYBOX,
        "3": {"class_type": "ProFusion_PromptNetLoader", "inputs": {"promptnet": "Toybox"}},
        "2": {
            "class_type": "ProFusion_PromptNetFinetune",
            "inputs": {
                **{name: ["1", slot] for slot, name in slots},
                **values,
                "promptnet": ["3", 0],
                "steps": steps,
                "batch_size": 2,
                "filename_prefix": "survival",
                "save_promptnet": True,
            },
        },
    }


def pretrain_graph(steps):
    slots = ((0, "model"), (1, "clip"), (2, "vae"), (3, "clip_vision"), (4, "images"))
    values = {"folder": "none", "learning_rate": 1e-3, "batch_size": 2, "seed": 5, "filename_prefix": "survival"}
    return {
        "1": TOYBOX,
        "2": {
            "class_type": "ProFusion_PromptNetTrainer",
            "inputs": {**{name: ["1", slot] for slot, name in slots}, **values, "steps": steps, "sample_every": 0},
        },
    }


class Lives:
    """One folder of models, and the servers that work on it one after the other."""

    def __init__(self, base: Path):
        self.base, self.models, self.count, self.server = base, base / "models", 0, None
        self.models.mkdir()

    def start(self) -> Server:
        self.count += 1
        home = self.base / str(self.count)
        (home / "custom_nodes" / "often").mkdir(parents=True)
        shutil.copy(often.__file__, home / "custom_nodes" / "often" / "__init__.py")
        (home / "models").symlink_to(self.models)
        self.notes = home / "custom_nodes" / "often" / "steps.txt"
        self.server = Server(HOST, home)
        self.server.wait()
        return self.server

    def steps(self) -> list[tuple[int, float, float]]:
        """What this life has finished: (step, when it began, when it ended)."""
        lines = [line.split() for line in self.notes.read_text().splitlines()] if self.notes.exists() else []
        return [(int(line[1]), float(line[2]), float(line[3])) for line in lines if len(line) == 4]

    def wait_for_a_step(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not self.steps():
            assert time.monotonic() < deadline and self.server.process.poll() is None, self.server.tail()
            time.sleep(0.1)

    def kill(self, number: int) -> None:
        self.server.process.send_signal(number)
        self.server.process.wait(60)

    def lost(self, kept: int) -> float:
        """Seconds of work that are gone, if `kept` steps are on the disk."""
        steps = self.steps()
        return steps[-1][2] - max([steps[0][1], *(end for step, _, end in steps if step <= kept)])

    def partials(self, folder: str, pattern: str) -> list[Path]:
        return sorted((self.models / folder / "training").glob(pattern), key=lambda path: path.stat().st_mtime)


@pytest.fixture
def lives(tmp_path):
    lives = Lives(tmp_path)
    yield lives
    if lives.server is not None:
        lives.server.stop()


def run_through_kills(lives, kills, graph, newest, steps_in, report):
    """Kill servers at random moments, go on from what each left, and let the last one finish.

    graph(newest file, steps) is queued, newest() finds the file, steps_in(file) are those that it holds. Returns the
    history of the last, and its steps.
    """
    rng, kept = random.Random(kills), 0
    for kill in range(kills):
        server = lives.start()
        server.post("/prompt", {"prompt": graph(newest(), ENDLESS)})
        lives.wait_for_a_step()
        assert lives.steps()[0][0] == kept + 1, "it went on where the one before was saved"
        time.sleep(rng.uniform(0, 4))
        number = SIGNALS[kill % 2]
        lives.kill(number)
        path = newest()
        found = steps_in(path) if path is not None else 0
        lost = lives.lost(found)
        assert found >= kept and lost <= often.SECONDS + PATIENCE, (kill, found, kept, lost)
        last = lives.steps()[-1][0]
        report(f"{number.name} after step {last}: {found} steps on the disk, {last - found} steps or {lost:.2f} s lost")
        kept = found
    return lives.start().run(graph(newest(), kept + MORE)), kept + MORE


def whole_files(models):
    """Every file under a name is whole, whatever was being written at the time."""
    for path in models.rglob("*.safetensors"):
        (load_residual if "profusion_residuals" in path.parts else lambda path: path.read_bytes())(path)
        if "profusion_promptnets" in path.parts:
            load_promptnet(path)
    return True


def test_a_residual_outlives_its_servers_bit_for_bit(lives, capsys):
    kills = (KILLS + 1) // 2
    folder = lives.models / "profusion_residuals"

    def newest():
        found = lives.partials("profusion_residuals", "cup_partial_*")
        assert len(found) <= 1 + kills
        return found[-1] if found else None

    def graph(path, steps):
        return residual_graph(steps, None if path is None else str(path.relative_to(folder)))

    with capsys.disabled():
        _, steps = run_through_kills(lives, kills, graph, newest, lambda path: load_residual(path).steps, print)
    assert whole_files(lives.models)
    (ended,) = folder.rglob(f"cup_{steps}_steps_*")
    lives.server.run(residual_graph(steps))
    whole = load_residual(next(path for path in folder.rglob(f"cup_{steps}_steps_*") if path != ended))
    one = load_residual(ended)
    assert torch.equal(one.delta, whole.delta) and one.training_state.keys() == whole.training_state.keys()
    assert all(torch.equal(value, whole.training_state[name]) for name, value in one.training_state.items())


@pytest.mark.parametrize(
    ("kind", "make", "saved_in"),
    [
        ("finetune", finetune_graph, ("profusion_promptnets", "loras")),
        ("pretrain", pretrain_graph, ("profusion_promptnets",)),
    ],
)
def test_a_promptnets_training_outlives_its_servers_bit_for_bit(lives, capsys, kind, make, saved_in):
    kills = KILLS - (KILLS + 1) // 2

    def newest():
        found = lives.partials("profusion_promptnets", f"{kind}_*")
        assert len(found) <= 1, "one training has one file"
        return found[-1] if found else None

    def steps_in(path):
        return int(load_training(path)[1]["step"])

    with capsys.disabled():
        entry, steps = run_through_kills(lives, kills, lambda _, steps: make(steps), newest, steps_in, print)
    assert "Gone on from step" in entry["outputs"]["2"]["text"][0] and newest() is None and whole_files(lives.models)
    graph = make(steps)
    graph["2"]["inputs"]["filename_prefix"] = "whole"
    lives.server.run(graph)
    for folder in saved_in:
        one, whole = (next((lives.models / folder).glob(f"{name}_*")).read_bytes() for name in ("survival", "whole"))
        assert one == whole


def test_two_servers_that_share_a_folder_never_get_the_same_name(tmp_path):
    """200 files, with previews: each has its own number and its own picture."""
    first, second = Lives(tmp_path), None
    loaded = {"class_type": "ProFusion_ResidualLoader", "inputs": {"residual": "seed.safetensors"}}
    try:
        first.start()
        one = first.server
        entry = one.run(residual_graph(1))
        assert entry["status"]["completed"]
        folder = first.models / "profusion_residuals"
        next((folder / "training").glob("cup_1_steps*")).rename(folder / "seed.safetensors")
        second = first.start()
        numbers = []
        for batch in range(5):
            for server in (one, second):
                graph = {"1": loaded, "2": TOYBOX}
                for saver in range(batch * 20, batch * 20 + 20):
                    inputs = {"residual": ["1", 0], "filename_prefix": "shared", "precision": "float32"}
                    inputs |= {"preview": ["2", 4], "told_apart_by": saver}  # or the host would take one from its cache
                    graph[f"{saver + 10}"] = {"class_type": "ProFusion_ResidualSaver", "inputs": inputs}
                numbers.append((server, server.post("/prompt", {"prompt": graph})["prompt_id"]))
        paths = [text for server, number in numbers for text in _texts(server, number)]
    finally:
        for server in (one, second):
            if server is not None:
                server.stop()
    assert len(paths) == len(set(paths)) == 200
    assert len(list(folder.glob("shared_*.safetensors"))) == len(list(folder.glob("shared_*.png"))) == 200
    assert all(load_residual(path).noun == "cup" for path in paths)


def _texts(server, number, seconds=300):
    """The paths that a prompt's savers have shown."""
    deadline = time.monotonic() + seconds
    while number not in (history := server.get(f"/history/{number}")):
        assert time.monotonic() < deadline, server.tail()
        time.sleep(0.3)
    outputs = history[number]["outputs"].values()
    return [
        output["text"][0].splitlines()[0] for output in outputs if "text" in output and "shared" in output["text"][0]
    ]
