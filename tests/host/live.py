"""A real ComfyUI server with the pack in its custom_nodes, for tests: start it, ask it, run a workflow file in it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class Server:
    """ComfyUI on loopback, with a base folder of its own: nothing of the user's installation is read or written."""

    def __init__(
        self,
        host: Path,
        base: Path,
        with_pack: bool = True,
        frontend: Path | None = None,
        settings: dict | None = None,
    ):
        """frontend: a folder of the web frontend's files, in place of the host's own; settings: the user's in it."""
        self.base = base
        user = base / "user" / "default"
        user.mkdir(parents=True, exist_ok=True)
        (user / "comfy.settings.json").write_text(json.dumps(settings or {}))
        for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        if with_pack:
            (base / "custom_nodes" / "profusion").symlink_to(REPOSITORY)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = base / "server.log"
        command = [
            sys.executable,
            str(host / "main.py"),
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-auto-launch",
            *([] if frontend is None else ["--front-end-root", str(frontend)]),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=host, env=dict(os.environ)
            )

    def wait(self, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not start; the end of its log:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-40:])

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None
        return json.loads(text) if text else None

    def run(self, prompt: dict, seconds: float = 900) -> dict:
        """Queue a prompt in the API's format and wait for it: its entry in the history. AssertionError if it failed."""
        number = self.post("/prompt", {"prompt": prompt})["prompt_id"]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{number}")
            if number in history:
                entry = history[number]
                assert entry["status"]["status_str"] == "success", json.dumps(
                    entry["status"]["messages"][-1], indent=1
                )[:3000]
                return entry
            assert self.process.poll() is None, self.tail()
            time.sleep(0.5)
        raise AssertionError(f"not finished in {seconds} seconds\n{self.tail()}")


@contextmanager
def running(*args, **given):
    """A `Server` that answers, until it is no longer needed."""
    server = Server(*args, **given)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """A flat workflow file as a prompt for the API, as the frontend makes it from the same definitions."""
    sources = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in object_info:
            assert node["type"] in ("Note", "MarkdownNote"), f"missing node {node['type']}"
            continue
        linked = {
            socket["name"]: sources[socket["link"]] for socket in node["inputs"] if socket.get("link") is not None
        }
        values = iter(node["widgets_values"])
        inputs = {}
        definition = object_info[node["type"]]["input"]
        for name, kind, options in (
            (n, *_kind(d)) for part in ("required", "optional") for n, d in definition.get(part, {}).items()
        ):
            if kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and not options.get("forceInput"):
                inputs[name] = next(
                    values, options.get("default")
                )  # a graph that was saved before there was this widget
                if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
                    assert next(values) in ("fixed", "randomize", "increment", "decrement")
                if options.get("image_upload"):
                    next(values)
            if name in linked:
                inputs[name] = list(linked[name])
        assert next(values, None) is None, f"{node['type']} has more widget values than widgets"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _kind(definition: list) -> tuple[str, dict]:
    kind, options = definition[0], (definition[1] if len(definition) > 1 else {})
    return ("COMBO" if isinstance(kind, list) else kind), options
