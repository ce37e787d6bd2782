"""`make soak`: a real ComfyUI works through many prompts, some of them interrupted, and is watched meanwhile.

It draws with Infusion and Fusion, trains and fine-tunes on Toybox, frees its memory now and then, and draws one plain
picture again and again. A line a round says what the server holds: memory, threads, open files, files left in models.
It fails where a plain picture differs by a bit, a prompt fails, or the server holds more and more.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from profusion.toybox.drawing import SIZE
from tools.hosts import find_host

ROOT = Path(__file__).resolve().parents[1]
MORE_MEMORY = 200  # MB that a server may hold at the end beyond a third of the way: caches are full by then
MORE_THREADS, MORE_FILES = 4, 8

TOYBOX = {"class_type": "ProFusion_ToyboxLoader", "inputs": {"toy": "gold and navy cup", "count": 3, "seed": 0}}
SAMPLING = {"steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def text(prompt: str) -> dict:
    return {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": prompt}}


def base() -> dict:
    """Toybox, an empty latent, an empty prompt, and the picture of node 9."""
    return {
        "1": TOYBOX,
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": SIZE, "height": SIZE, "batch_size": 1}},
        "3": text(""),
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["8", 0], "vae": ["1", 2]}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "soak"}},
    }


def sampler(model: list, positive: list, seed: int) -> dict:
    links = {"model": model, "positive": positive, "negative": ["3", 0], "latent_image": ["2", 0]}
    return {"class_type": "KSampler", "inputs": {**links, **SAMPLING, "seed": seed}}


def plain(seed: int) -> dict:
    """What must stay bit-identical, whatever ran before; seed: that of all of them."""
    return base() | {"4": text("a photo of a cup on grass"), "8": sampler(["1", 0], ["4", 0], seed)}


def training(seed: int) -> dict:
    links = {name: ["1", slot] for slot, name in ((0, "model"), (1, "clip"), (2, "vae"), (4, "images"), (5, "masks"))}
    values = {"noun": "cup", "steps": 6, "learning_rate": 0.01, "batch_size": 2, "seed": seed, "flip": True}
    samples = {"sample_every": 3, "sample_prompt": "a photo of a %noun%", "sample_steps": 2, "sample_cfg": 4.0}
    node = {"class_type": "ProFusion_ResidualTrainer", "inputs": {**links, **values, **samples, "preserve": 1.0}}
    return {"1": TOYBOX, "5": node}


def infusion(seed: int) -> dict:
    """A residual of one step that is put into a prompt."""
    graph = base() | training(0)
    graph["5"]["inputs"] |= {"steps": 1, "sample_every": 0}
    links = {"model": ["1", 0], "clip": ["1", 1], "residual": ["5", 0]}
    values = {"text": "a photo of a cup on grass", "strength": 1.0}
    graph["6"] = {"class_type": "ProFusion_InfusionAttentionPatch", "inputs": {**links, **values}}
    return graph | {"8": sampler(["6", 0], ["6", 1], seed)}


def finetuning(seed: int) -> dict:
    slots = ((0, "model"), (1, "clip"), (2, "vae"), (3, "clip_vision"), (4, "images"), (5, "masks"))
    rates = {"learning_rate": 1e-4, "train_attention": True, "attention_learning_rate": 1e-3, "rank": 4}
    values = {"steps": 3, "batch_size": 1, "seed": seed, "filename_prefix": "soak", "save_promptnet": False}
    inputs = {**{name: ["1", slot] for slot, name in slots}, **rates, **values, "promptnet": ["7", 0]}
    loader = {"class_type": "ProFusion_PromptNetLoader", "inputs": {"promptnet": "Toybox"}}
    return {"1": TOYBOX, "7": loader, "5": {"class_type": "ProFusion_PromptNetFinetune", "inputs": inputs}}


def fusion(seed: int) -> dict:
    slots = ((1, "clip"), (2, "vae"), (3, "clip_vision"), (4, "images"))
    loader = {"class_type": "ProFusion_PromptNetLoader", "inputs": {"promptnet": "Toybox"}}
    inputs = {**{name: ["1", slot] for slot, name in slots}, "promptnet": ["7", 0], "noun": "cup"}
    inputs["text"] = "a photo of S* on grass"
    graph = base() | {"7": loader, "6": {"class_type": "ProFusion_PromptNetEncode", "inputs": inputs}}
    return graph | {"8": sampler(["1", 0], ["6", 0], seed) | {"class_type": "ProFusion_FusionKSampler"}}


KINDS = {"infusion": infusion, "fusion": fusion, "training": training, "finetuning": finetuning}


def complete(graph: dict, definitions: dict) -> dict:
    """The graph with the defaults of what it leaves out, by the server's own definitions."""
    for node in graph.values():
        for name, entry in definitions[node["class_type"]]["input"].get("required", {}).items():
            kind, options = entry[0], (entry[1] if len(entry) > 1 else {})
            choices = kind if isinstance(kind, list) else options.get("options")
            if name not in node["inputs"] and ("default" in options or choices):
                node["inputs"][name] = options["default"] if "default" in options else choices[0]
    return graph


@dataclass
class Held:
    """What a server's process holds; memory in MB."""

    memory: int
    threads: int
    files: int


def held(process: int) -> Held:
    """Of a process, from Linux's /proc."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":\t" in line
    )
    files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    return Held(int(status["VmRSS"].split()[0]) >> 10, int(status["Threads"]), files)


class Soak:
    """The prompts, one after the other, and what is seen of the server."""

    def __init__(self, server, seed: int, interrupts: float):
        self.server, self._random, self._interrupts = server, random.Random(seed), interrupts
        self._definitions = server.get("/object_info")
        self.prompts = self.interrupted = 0
        self.failures: list[str] = []
        self.pictures: set[str] = set()
        self.seen: list[Held] = []

    def queue(self, name: str, graph: dict, interrupt: bool = False) -> dict:
        """Run a prompt to its end, or interrupt it after a random moment: its entry in the history."""
        number = self.server.post("/prompt", {"prompt": complete(graph, self._definitions)})["prompt_id"]
        stop = time.monotonic() + self._random.uniform(0, 1.5) if interrupt else None
        deadline = time.monotonic() + 600
        while number not in (history := self.server.get(f"/history/{number}")):
            if stop is not None and time.monotonic() > stop:
                self.server.post("/interrupt", {})
                stop = None
            if time.monotonic() > deadline or self.server.process.poll() is not None:
                raise RuntimeError(f"{name} did not end\n{self.server.tail()}")
            time.sleep(0.05)
        self.prompts += 1
        entry, events = history[number], [event for event, _ in history[number]["status"]["messages"]]
        self.interrupted += "execution_interrupted" in events
        if entry["status"]["status_str"] != "success" and "execution_interrupted" not in events:
            said = [told.get("exception_message", "") for _, told in entry["status"]["messages"]]
            self.failures.append(f"{name}: {' '.join(said).strip()[:500]}")
        return entry

    def round(self) -> None:
        """One prompt of each kind in any order, some of them interrupted, and the plain picture."""
        kinds = list(KINDS)
        self._random.shuffle(kinds)
        for name in kinds:
            graph = KINDS[name](self._random.randrange(2**31))
            self.queue(name, graph, self._random.random() < self._interrupts)
        if self._random.random() < 0.1:
            self.server.post("/free", {"unload_models": True, "free_memory": True})
        graph = plain(7)
        graph["10"]["inputs"]["filename_prefix"] = f"plain_{self.prompts}"  # or the host would take it from its cache
        graph["8"]["inputs"]["told_apart_by"] = self.prompts
        (picture,) = self.queue("plain", graph)["outputs"]["10"]["images"]
        data = self.server.fetch(f"/view?filename={picture['filename']}&type=output&subfolder={picture['subfolder']}")
        self.pictures.add(hashlib.sha256(_pixels(data)).hexdigest()[:16])
        self.seen.append(held(self.server.process.pid))

    def verdict(self) -> list[str]:
        """What went wrong."""
        wrong = list(self.failures)
        if len(self.pictures) != 1:
            wrong.append(f"{len(self.pictures)} different plain pictures")
        first, last = self.seen[len(self.seen) // 3], self.seen[-1]
        for what, more in (("memory", MORE_MEMORY), ("threads", MORE_THREADS), ("files", MORE_FILES)):
            if getattr(last, what) - getattr(first, what) > more:
                wrong.append(f"{what}: {getattr(first, what)} after a third, {getattr(last, what)} at the end")
        left = [path for path in Path(self.server.base, "models").rglob("*.tmp")]
        return [*wrong, *(f"left behind: {path}" for path in left)]


def _pixels(data: bytes) -> bytes:
    """Of a PNG, whose metadata holds the prompt."""
    return Image.open(io.BytesIO(data)).tobytes()


def run(host: Path, prompts: int, seed: int, interrupts: float, every: int) -> list[str]:
    """Print what is seen, and return what went wrong. every: rounds of five prompts between two lines."""
    sys.path.insert(0, str(ROOT / "tests" / "host"))
    from live import Server

    with tempfile.TemporaryDirectory() as folder:
        server = Server(host, Path(folder))
        try:
            server.wait()
            soak, started = Soak(server, seed, interrupts), time.monotonic()
            print("prompts  interrupted  memory MB  threads  open files  plain pictures  s a prompt", flush=True)
            while soak.prompts < prompts:
                soak.round()
                if len(soak.seen) % every == 1 % every or soak.prompts >= prompts:
                    now, pace = soak.seen[-1], (time.monotonic() - started) / soak.prompts
                    print(
                        f"{soak.prompts:7}  {soak.interrupted:11}  {now.memory:9}  {now.threads:7}  {now.files:10}  "
                        f"{len(soak.pictures):14}  {pace:10.2f}",
                        flush=True,
                    )
            wrong = soak.verdict()
        finally:
            server.stop()
    print(
        "\n".join(wrong) or f"{soak.prompts} prompts: nothing failed, nothing grew, the plain picture stayed the same"
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of what is interrupted, and when")
    parser.add_argument("--interrupts", type=float, default=0.3, help="share of the prompts that are interrupted")
    parser.add_argument("--every", type=int, default=10, help="rounds of five prompts between two lines")
    given = parser.parse_args()
    host = find_host()
    if host is None:
        parser.error("no ComfyUI found: set COMFYUI_PATH to a checkout")
    return 1 if run(host, given.prompts, given.seed, given.interrupts, given.every) else 0


if __name__ == "__main__":
    sys.exit(main())
