"""The shipped workflows in the host's real frontend: no missing node, and the prompt it makes is the file's own."""

import json
import shutil

import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: the workflows are not opened in its frontend")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: the frontend is not tested")
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("no Chromium with chromedriver: the frontend is not tested", allow_module_level=True)

from conftest import HOST
from live import REPOSITORY, Server, to_prompt
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.xdist_group("frontend")  # one server and one browser for all

WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
LOAD = """
const done = arguments[arguments.length - 1];
const workflow = JSON.parse(arguments[0]);
(async () => {
  await window.app.loadGraphData(workflow);
  const prompt = await window.app.graphToPrompt();
  const known = new Set(Object.keys(window.LiteGraph.registered_node_types));
  done({
    missing: window.app.graph.nodes.map(node => node.type).filter(type => !known.has(type)),
    prompt: prompt.output,
    boxes: window.app.graph.nodes.map(node => [node.id, ...node.pos, ...node.size]),
  });
})().catch(error => done({error: String(error && error.stack || error)}));
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(HOST, tmp_path_factory.mktemp("comfy"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1900,1100",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, Service(DRIVER))
    browser.set_script_timeout(120)
    try:
        browser.get(f"http://127.0.0.1:{server.port}/")
        ready = "return !!(window.app && window.app.graph && window.LiteGraph && window.LiteGraph.registered_node_types['ProFusion_ToyboxLoader'])"
        WebDriverWait(browser, 180).until(lambda b: b.execute_script(ready))
        yield browser
    finally:
        browser.quit()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_frontend_opens_it_and_makes_the_same_prompt(path, browser, server):
    workflow = json.loads(path.read_text())
    opened = browser.execute_async_script(LOAD, json.dumps(workflow))
    assert "error" not in opened, opened["error"]
    assert opened["missing"] == []
    expected = to_prompt(workflow, server.get("/object_info"))
    made = {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for number, node in opened["prompt"].items()
    }
    assert {k: v["inputs"] for k, v in made.items()} == {k: v["inputs"] for k, v in expected.items()}
    _no_two_overlap(opened["boxes"])
    _groups_hold_whole_nodes(workflow["groups"], opened["boxes"])


def _no_two_overlap(boxes):
    """Nodes as the frontend lays them out, (id, x, y, width, height): a title is 30 above its node."""
    for index, (a, ax, ay, aw, ah) in enumerate(boxes):
        for b, bx, by, bw, bh in boxes[index + 1 :]:
            apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by - 30 or by + bh <= ay - 30
            assert apart, f"nodes {a} and {b} overlap"


def _groups_hold_whole_nodes(groups, boxes):
    """A node and its title are in a group or out of it, and in one group at most."""
    taken = {}
    for group in groups:
        left, top, width, height = group["bounding"]
        for node, x, y, wide, high in boxes:
            out = x + wide <= left or left + width <= x or y + high <= top or top + height <= y - 30
            inside = left <= x and x + wide <= left + width and top <= y - 30 and y + high <= top + height
            assert out or inside, f"the group {group['title']!r} cuts node {node}"
            if inside:
                assert node not in taken, f"node {node} is in {taken.get(node)!r} and in {group['title']!r}"
                taken[node] = group["title"]
        assert group["title"] in taken.values(), f"the group {group['title']!r} is empty"
