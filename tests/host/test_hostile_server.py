"""A real server given what nobody should give it: each prompt ends in an error of ours, and the next one runs.

And its page, in a browser: no text from a file or a path becomes part of it.
"""

import json
import time

import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: no server is given hostile prompts")

from browsing import BROWSER, DRIVER, browsing, open_page
from conftest import HOST
from live import Server

from profusion import files
from profusion.residual import Residual, save_residual

LOADER, SAVER = "ProFusion_ResidualLoader", "ProFusion_ResidualSaver"
MARKUP = "<img src=x onerror=window.PWNED=true>"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose folder's own name is markup, which is shown wherever a path is."""
    base = tmp_path_factory.mktemp("hostile") / f"models {MARKUP}"
    server = Server(HOST, base, settings={"Comfy.TutorialCompleted": True})
    try:
        put_residuals(base / "models" / "profusion_residuals")
        server.wait()
        yield server
    finally:
        server.stop()


def put_residuals(folder):
    import torch

    names = [f"input.{index}.0" for index in (1, 3, 5)] + ["middle.0.0"]
    residual = Residual(torch.zeros(4, 1, 128), "cat", tuple(names), "Toybox", 300)
    path = save_residual(residual, folder / "cat.safetensors").path
    contents, metadata = files.parse(path.read_bytes())
    metadata |= {"noun": MARKUP, "architecture": "<b>SD 1.x</b>"}
    metadata.pop(files.CHECKSUM)
    (folder / "shared_cat.safetensors").write_bytes(files.tensors_to_bytes(files.to_tensors(contents), metadata))
    (folder / f"{MARKUP}.safetensors").write_bytes(path.read_bytes())


def load_and_save(prefix="cat", name="cat.safetensors", precision="int6"):
    return {
        "1": {"class_type": LOADER, "inputs": {"residual": name}},
        "2": {
            "class_type": SAVER,
            "inputs": {"residual": ["1", 0], "filename_prefix": prefix, "precision": precision},
        },
    }


def outcome(server, prompt, seconds=120):
    """What became of a prompt: "success", or what its error or the refusal says."""
    try:
        number = server.post("/prompt", {"prompt": prompt})["prompt_id"]
    except AssertionError as refused:
        return str(refused)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        history = server.get(f"/history/{number}")
        if number in history:
            status = history[number]["status"]
            return "success" if status["status_str"] == "success" else json.dumps(status["messages"][-1])
        assert server.process.poll() is None, server.tail()
        time.sleep(0.2)
    raise AssertionError(f"the prompt hangs\n{server.tail()}")


def still_works(server):
    assert outcome(server, load_and_save(f"again {time.monotonic_ns()}")) == "success"


PREFIXES = [
    "cup\ud800",
    "\udfff",
    "x\0y",
    "a/\ud800/b",
    "con/x",
    "a:b",
    "../x",
    "/x",
    "x" * 5000,
    "\u202ex",
    "",
    "<b>",
]


@pytest.mark.parametrize("prefix", PREFIXES, ids=ascii)
def test_no_prefix_stops_the_server(server, prefix):
    said = outcome(server, load_and_save(prefix))
    assert "filename_prefix" in said or "could not be saved" in said
    assert "Traceback" not in said.split('"traceback"')[0]
    still_works(server)


@pytest.mark.parametrize("prefix", ["猫", "Ünï©ode 👩\u200d🚀", "pets\\cat", "100%", "%noun%", "a&b"], ids=ascii)
def test_any_other_prefix_is_saved(server, prefix):
    assert outcome(server, load_and_save(prefix)) == "success"


@pytest.mark.parametrize(
    "name", [None, 5, True, {}, {"__value__": [1]}, "cup\ud800", "a\0b", "", "/etc/passwd", "../x", MARKUP], ids=ascii
)
def test_no_name_stops_the_server(server, name):
    for node, field in ((LOADER, "residual"), ("ProFusion_PromptNetLoader", "promptnet")):
        prompt = {
            "1": {"class_type": node, "inputs": {field: name}},
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        }
        said = outcome(server, prompt)
        assert "There can be no" in said or "There is no" in said or "give a text" in said, said[:2000]
    still_works(server)


def test_a_shared_file_with_markup_is_refused_by_name(server):
    assert "without < or >" in outcome(server, load_and_save(name="shared_cat.safetensors"))
    listed = server.get(f"/object_info/{LOADER}")[LOADER]["input"]["required"]["residual"]
    assert "cat.safetensors" in json.dumps(listed) and MARKUP not in json.dumps(listed)


@pytest.mark.parametrize("value", ["int6\ud800", None, "int7", "\0"], ids=ascii)
def test_no_choice_stops_the_server(server, value):
    """The host refuses these itself; where it cannot even log them, its answer says only that it failed."""
    assert outcome(server, load_and_save(f"chosen {time.monotonic_ns()}", precision=value)) != "success"
    still_works(server)


def test_a_very_deep_path_is_saved_and_shown_at_once(server):
    started = time.monotonic()
    assert outcome(server, load_and_save("deep/" * 300 + f"cat {time.monotonic_ns()}")) == "success"
    assert time.monotonic() - started < 30
    still_works(server)


def toybox(**inputs):
    values = {"toy": "bear", "count": 1, "seed": 0} | inputs
    return {"1": {"class_type": "ProFusion_ToyboxLoader", "inputs": values}}


TEXTS = ["a photo of a cat\ud800", "\0", "\x1b]0;x\x07", "x" * 200_000, "<S*>&\u2028", "a" * 5000]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:30])
def test_no_text_stops_the_server(server, text):
    info = server.get("/object_info/ProFusion_ToyboxLoader")["ProFusion_ToyboxLoader"]["input"]["required"]["toy"]
    toy = info[1]["default"]
    prompt = toybox(toy=toy) | {
        "2": {"class_type": LOADER, "inputs": {"residual": "cat.safetensors"}},
        "3": {
            "class_type": "ProFusion_InfusionAttentionPatch",
            "inputs": {
                "model": ["1", 0],
                "clip": ["1", 1],
                "text": text,
                "residual": ["2", 0],
                "strength": 1.0,
                "start_percent": 0.0,
                "end_percent": 1.0,
                "occurrence": "auto",
                "stream": "own trajectory",
            },
        },
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
    }
    assert outcome(server, prompt) != "success"
    prompt["3"]["inputs"] |= {"text": "a cat", "strength": float("nan")}
    assert "strength is nan: give a number" in outcome(server, prompt)
    still_works(server)


# The page

pytest.importorskip("selenium.webdriver", reason="selenium is not installed: the page is not looked at")
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with chromedriver: no page is opened")

WATCH = """
window.watched = {texts: [], images: 0, tags: 0};
new MutationObserver(changes => {
  for (const change of changes) {
    const place = change.target.nodeType === 3 ? change.target.parentElement : change.target;
    if (place && place.textContent.includes(arguments[0])) window.watched.texts.push(place.textContent.slice(-3000));
  }
  window.watched.images += document.querySelectorAll('img[src="x"]').length;
  window.watched.tags += [...document.querySelectorAll('b')].filter(one => one.textContent === 'SD 1.x').length;
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""
QUEUE = """
const done = arguments[arguments.length - 1];
(async () => {
  await window.app.loadApiJson(JSON.parse(arguments[0]), 'test');
  await window.app.queuePrompt(0, 1);
  done('');
})().catch(error => done(String(error && error.stack || error)));
"""


@pytest.fixture(scope="module", params=[False, True], ids=["nodes", "nodes 2.0"])
def page(request, server, tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        open_page(browser, server, **{"Comfy.VueNodes.Enabled": request.param})
        yield browser
        server.post("/settings/Comfy.VueNodes.Enabled", False)


def has_elements(browser):
    """Whether nodes are elements of the page."""
    return browser.execute_script("return !!document.querySelector('[data-node-id]')")


def shown_in_page(browser, server, prompt, word):
    """Queue a prompt in the page, as its button does. Every text with this word that the page showed meanwhile."""
    done = len(server.get("/history"))
    browser.execute_script(WATCH, word)
    problem = browser.execute_async_script(QUEUE, json.dumps(prompt))
    assert not problem, problem
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and len(server.get("/history")) == done:
        time.sleep(0.3)
    time.sleep(4)  # for the page to show it, and for a picture of a wrong address to fail
    watched = browser.execute_script("return window.watched")
    assert not browser.execute_script("return window.PWNED"), "a script ran"
    assert watched["images"] == 0 and watched["tags"] == 0, watched
    return "\n".join(watched["texts"]).replace("\u2060", "")


@needs_browser
def test_a_path_with_markup_is_shown_as_text(page, server):
    name = f"shown {time.monotonic_ns()}"  # a node that has run already says nothing
    seen = shown_in_page(page, server, load_and_save(name), f"{name}_0000")
    if not seen and has_elements(page):
        pytest.skip("nodes 2.0 of this frontend do not show the text")
    assert MARKUP in seen, "the page did not show the path: nothing was tested"


@needs_browser
@pytest.mark.parametrize(
    "prompt", [load_and_save(name="shared_cat.safetensors"), load_and_save(f"a/{MARKUP}")], ids=["file", "prefix"]
)
def test_an_error_that_quotes_markup_runs_no_script(page, server, prompt):
    """Newer pages show only that there was one, until it is asked for."""
    assert MARKUP[:20] in outcome(server, prompt)
    shown_in_page(page, server, prompt, "rror")
    page.execute_script(
        "[...document.querySelectorAll('button')].filter(one => /error|details|report/i.test(one.innerText))"
        ".forEach(one => one.click())"
    )
    time.sleep(2)
    seen = page.execute_script("return [document.body.innerText, !!window.PWNED, window.watched.images]")
    assert "rror" in seen[0] and seen[1:] == [False, 0]
