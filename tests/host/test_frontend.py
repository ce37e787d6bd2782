"""The shipped workflows in real frontends: the prompt made of each is the file's own, and nodes stay apart after a run.

The host's own frontend is tested, and the newest where it has been put into .venv/frontend:
`pip install --no-deps --target .venv/frontend comfyui-frontend-package`.
"""

import json
import time

import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: the workflows are not opened in its frontend")
pytest.importorskip("selenium.webdriver", reason="selenium is not installed: the frontend is not tested")

from browsing import BROWSER, DRIVER, browsing, open_page

if not (BROWSER and DRIVER):
    pytest.skip("no Chromium with chromedriver: the frontend is not tested", allow_module_level=True)

from conftest import HOST
from live import REPOSITORY, running, to_prompt

from tools.graph import PICTURES

pytestmark = pytest.mark.xdist_group("frontend")  # one server and one browser for all

NEWEST = REPOSITORY / ".venv" / "frontend" / "comfyui_frontend_package" / "static"
FRONTENDS = {"own frontend": None, **({"newest frontend": NEWEST} if NEWEST.is_dir() else {})}
NODES_2 = "Comfy.VueNodes.Enabled"  # nodes as elements of the page, which the frontend calls Nodes 2.0
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
ON_TOYBOX = [path for path in WORKFLOWS if '"ProFusion_ToyboxLoader"' in path.read_text()]
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
  });
})().catch(error => done({error: String(error && error.stack || error)}));
"""
# The frontend draws only what is in view.
SHOW_ALL = """
const boxes = window.app.graph.nodes.map(node => [...node.pos, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]);
const [left, top] = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])));
const [right, bottom] = [2, 3].map(axis => Math.max(...boxes.map(box => box[axis])));
const view = window.app.canvas.ds;
view.scale = Math.min(1, (window.innerWidth - 200) / (right - left), (window.innerHeight - 200) / (bottom - top));
view.offset[0] = 100 / view.scale - left;
view.offset[1] = 100 / view.scale - top;
window.app.canvas.setDirty(true, true);
"""
# (id, x, y, width, height) in the graph's units, without the titles: as drawn on the canvas, or as elements of the
# page.
BOXES = """
const scale = window.app.canvas.ds.scale;
return window.app.graph.nodes.map(node => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  if (!element) return [Number(node.id), ...node.pos, ...node.size];
  const {x, y, width, height} = element.getBoundingClientRect();
  return [Number(node.id), x / scale, y / scale + 30, width / scale, height / scale - 30];
});
"""
SHOWN = """
return window.app.graph.nodes.map(node => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  return [node.type, element ? element.querySelectorAll('img').length : (node.imgs || []).length];
});
"""


@pytest.fixture(scope="module", params=FRONTENDS.values(), ids=FRONTENDS)
def server(request, tmp_path_factory):
    settings = {"Comfy.TutorialCompleted": True}
    with running(HOST, tmp_path_factory.mktemp("comfy"), frontend=request.param, settings=settings) as server:
        yield server


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        open_page(browser, server)
        yield browser


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_frontend_opens_it_and_makes_the_same_prompt(path, browser, server):
    workflow, object_info = json.loads(path.read_text()), server.get("/object_info")
    opened = browser.execute_async_script(LOAD, json.dumps(workflow))
    assert "error" not in opened, opened["error"]
    assert opened["missing"] == []
    made = {number: _known(node, object_info) for number, node in opened["prompt"].items()}
    assert made == {number: node["inputs"] for number, node in to_prompt(workflow, object_info).items()}
    boxes = browser.execute_script(BOXES)
    _no_two_overlap(boxes)
    _groups_hold_whole_nodes(workflow["groups"], boxes)


@pytest.mark.slow
@pytest.mark.parametrize("path", ON_TOYBOX, ids=lambda path: path.stem)
def test_after_a_run_its_nodes_stand_apart_and_show_what_they_say(path, browser, server):
    workflow, object_info = json.loads(path.read_text()), server.get("/object_info")
    for node in workflow["nodes"]:
        _shorten(node, object_info)
    speaking = {node["type"] for node in workflow["nodes"]} & set(PICTURES)
    types = sorted(node["type"] for node in workflow["nodes"])
    cached = {kind for kind in speaking if object_info[kind]["output_node"]}  # the host passes over others

    try:
        for nodes_2, run, expected in ((False, _run_anew, speaking), (True, _run, cached)):
            open_page(browser, server, **{NODES_2: nodes_2})
            browser.execute_async_script(LOAD, json.dumps(workflow))
            if nodes_2 and not _has_nodes_2(browser, workflow):
                continue
            run(browser, server)
            assert _types(browser) == types, "the page has put another graph in its place"
            _wait_until_shown(browser, expected)
            _no_two_overlap(_settled(browser))
    finally:
        open_page(browser, server, **{NODES_2: False})


def _known(node, object_info):
    """A node's inputs, without what the frontend adds for itself."""
    definition = object_info[node["class_type"]]["input"]
    known = {*definition.get("required", {}), *definition.get("optional", {})}
    return {name: value for name, value in node["inputs"].items() if name in known}


def _shorten(node, object_info):
    """Take three steps only: the layout is the same."""
    definition = object_info.get(node["type"], {"input": {}})["input"]
    widgets = to_prompt({"nodes": [{**node, "inputs": []}], "links": []}, object_info).get(str(node["id"]))
    names = list(widgets["inputs"]) if widgets else []
    if "steps" in names:
        before = names[: names.index("steps")]
        at = sum(1 + _has_control(name, definition) for name in before)
        node["widgets_values"][at] = 3


def _has_control(name, definition):
    """Whether the frontend puts another widget after it, which says what becomes of a seed."""
    entry = next(part[name] for part in definition.values() if name in part)
    return entry[0] == "INT" and entry[1].get("control_after_generate", name in ("seed", "noise_seed"))


def _has_nodes_2(browser, workflow, seconds=10):
    """Whether the frontend has Nodes 2.0. Older ones have none, or early ones that give nodes widths of their own."""
    deadline = time.monotonic() + seconds
    while not browser.execute_script("return !!document.querySelector('[data-node-id]')"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    wide = {node["id"]: node["size"][0] for node in workflow["nodes"]}
    kept = [abs(wide[number] - width) < 2 for number, _, _, width, _ in browser.execute_script(BOXES)]
    return sum(kept) > len(kept) / 2


def _run(browser, server, seconds=600):
    """Press Run, and wait for the end. Returns the ids of the nodes that the host took from its cache."""
    done = len(server.get("/history"))
    browser.execute_script("window.app.queuePrompt(0, 1)")
    deadline = time.monotonic() + seconds
    while len(server.get("/history")) == done:
        assert time.monotonic() < deadline, server.tail()
        time.sleep(0.5)
    *_, newest = server.get("/history").values()
    assert newest["status"]["status_str"] == "success", newest["status"]["messages"][-1]
    return {
        str(node) for kind, data in newest["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]
    }


def _run_anew(browser, server):
    """Run it with nothing left in the host's cache of what graphs before have made."""
    for _ in range(2):  # the host may take the prompt before it empties its cache
        server.post("/free", {"unload_models": True, "free_memory": True})
        cached = _run(browser, server)
        if not cached:
            return
    raise AssertionError(f"the host had kept {sorted(cached)}")


def _types(browser):
    return sorted(kind for kind, _ in browser.execute_script(SHOWN))


def _wait_until_shown(browser, kinds, seconds=180):
    """Pictures are fetched, and nodes grow around them."""
    deadline = time.monotonic() + seconds
    while missing := kinds - {kind for kind, pictures in browser.execute_script(SHOWN) if pictures}:
        assert time.monotonic() < deadline, f"nothing is shown by {sorted(missing)}"
        browser.execute_script(SHOW_ALL)
        time.sleep(1)


def _settled(browser, seconds=60):
    """The nodes' boxes, once they have stayed as they are for three seconds: pictures come one by one, and late."""
    deadline, boxes, since = time.monotonic() + seconds, None, time.monotonic()
    while time.monotonic() < min(deadline, since + 3):
        if (now := browser.execute_script(BOXES)) != boxes:
            boxes, since = now, time.monotonic()
        time.sleep(0.5)
    return boxes


def _no_two_overlap(boxes):
    """Nodes as the frontend lays them out, (id, x, y, width, height): a title is 30 above its node."""
    for index, (a, ax, ay, aw, ah) in enumerate(boxes):
        for b, bx, by, bw, bh in boxes[index + 1 :]:
            apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by - 30 or by + bh <= ay - 30
            assert apart, f"nodes {a} and {b} overlap: {[a, ax, ay, aw, ah]}, {[b, bx, by, bw, bh]}"


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
