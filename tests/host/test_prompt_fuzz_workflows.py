"""The shipped workflows, mutated, in a real server: each ends in pictures, in the host's refusal or in our own error.

As files of the frontend, which makes prompts of them, and as prompts that any program may send. FUZZ says how many
prompts are mutated (`make fuzz` asks for 2,000 and gets an eighth of them here), SEED where they begin.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter

import numpy
import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: no workflows are mutated")

from conftest import HOST
from live import REPOSITORY, running, to_prompt

from profusion.problems import printable
from tools.fuzz import workflows

pytestmark = pytest.mark.xdist_group("workflows")

COUNT, SEED = int(os.environ.get("FUZZ", "100")) // 8, int(os.environ.get("SEED", "12"))
NAMES = ("infusion_train_and_generate", "profusion_one_image")  # the quickest: the others where there is time for them
MANY = 100
SHORT = {"steps": 1, "draws": 1, "sample_steps": 1, "count": 1, "variants": 1}
SECONDS = 60  # a prompt may take this long, and is cancelled then
NONE_OF_OURS = ("TypeError", "AttributeError", "KeyError", "IndexError", "AssertionError", "RuntimeError", "NameError")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(HOST, tmp_path_factory.mktemp("mutated")) as server:
        yield server


def shortened(prompt):
    for node in prompt.values():
        node["inputs"].update({name: value for name, value in SHORT.items() if name in node["inputs"]})
    return prompt


def mutated(random, workflow, info):
    """A mutated workflow as a prompt; None where there is no prompt in it, which a frontend says itself."""
    types = sorted(name for name in info if name.startswith("ProFusion_"))
    if random.random() < 0.6:
        return workflows.PROMPTS[random.integers(len(workflows.PROMPTS))](
            random, shortened(to_prompt(workflow, info)), types
        )
    try:
        return shortened(
            to_prompt(workflows.FILES[random.integers(len(workflows.FILES))](random, workflow, info), info)
        )
    except Exception:
        return None


def stops_the_host(prompt):
    """Whether the host's own worker would end, before any node is asked: it lets nodes pass that lack a dict of inputs,
    where another one needs them."""
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    return any(isinstance(node, dict) and not isinstance(node.get("inputs"), dict) for node in nodes)


def answer(server, prompt):
    """What the server says to a prompt: (status, body). Half a surrogate pair is sent as JSON has it."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/prompt",
        json.dumps({"prompt": prompt}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def ended(server, number):
    """The entry of a prompt in the history, once it has ended."""
    started, cancelled = time.monotonic(), False
    while number not in (history := server.get(f"/history/{number}")):
        taken = time.monotonic() - started
        assert server.process.poll() is None and taken < 2 * SECONDS, f"it hangs\n{server.tail()}"
        if taken > SECONDS and not cancelled:
            cancelled = True
            server.post("/interrupt", {})
        time.sleep(0.02)
    return history[number]


def outcome(server, prompt):
    """What became of it; AssertionError where it is none of what may."""
    status, body = answer(server, prompt)
    if status != 200:
        return "refused"
    entry = ended(server, body["prompt_id"])
    errors = [told for event, told in entry["status"]["messages"] if event == "execution_error"]
    for told in errors:
        text, kind = told["exception_message"], told["exception_type"].rpartition(".")[2]
        assert printable(text) == text and len(text) < 20_000, ascii(text[:2000])
        ours = told["node_type"].startswith("ProFusion_")
        assert not (ours and (kind in NONE_OF_OURS or "torch" in kind)), (told["node_type"], kind, text[:2000])
    if errors:
        return "failed"
    return "partly refused" if body["node_errors"] else entry["status"]["status_str"]


def test_a_server_runs_on_whatever_became_of_a_workflow(server):
    random, info, outcomes = numpy.random.default_rng([SEED, 3]), server.get("/object_info"), Counter()
    paths = [path for path in sorted((REPOSITORY / "workflows").glob("*.json")) if COUNT > MANY or path.stem in NAMES]
    for path in paths:
        workflow = json.loads(path.read_text())
        for _ in range(-(-COUNT // len(paths))):  # one after the other: the host keeps what has not changed
            prompt = mutated(random, workflow, info)
            if prompt is None or stops_the_host(prompt):
                outcomes["no prompt"] += 1
                continue
            try:
                outcomes[outcome(server, prompt)] += 1
            except AssertionError as problem:
                pytest.fail(f"{path.stem}, seed {SEED}: {problem}\n{ascii(prompt):.4000}")
        if any(node["type"] == "ProFusion_ToyboxLoader" for node in workflow["nodes"]):
            assert outcome(server, shortened(to_prompt(workflow, info))) == "success"
    print(dict(outcomes))
    assert outcomes.total() >= COUNT and outcomes["success"]
    assert outcomes["failed"] + outcomes["refused"] + outcomes["partly refused"] > COUNT / 10
