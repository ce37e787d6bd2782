"""What a node shows: its text, a picture that stays, and after a failure where the work was saved."""

import sys
import types

import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: what nodes show is not tested")

import comfy.utils
import folder_paths
from PIL import Image

PATH = "/models/profusion_residuals/cat_00001_.safetensors"


@pytest.fixture
def display(pack):
    return sys.modules[f"{pack.__name__}.nodes.host.display"]


@pytest.fixture
def node():
    return types.SimpleNamespace(hidden=types.SimpleNamespace(unique_id="12"))


@pytest.fixture
def frontend(monkeypatch):
    """What a running server is told for its frontend: (node, text) and previews."""
    told = types.SimpleNamespace(texts=[], previews=[])
    server = types.SimpleNamespace(send_progress_text=lambda text, number: told.texts.append((number, text)))
    stand_in = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", stand_in)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *arguments, **_: told.previews.append(arguments[2]))
    return told


def shown(ui):
    """The picture that the frontend finds for a node's `ui`."""
    (entry,) = ui["images"]
    assert entry["type"] == "temp"
    return Image.open(f"{folder_paths.get_temp_directory()}/{entry['subfolder']}/{entry['filename']}").convert("RGB")


def test_text_is_shown_at_once_and_stays_as_a_picture(display, node, frontend):
    ui = display.show(node, PATH)
    assert frontend.texts == [("12", PATH)] and frontend.previews == []
    assert ui["text"] == (PATH,)
    assert shown(ui).tobytes() == display.caption(PATH).tobytes()


def test_a_picture_of_its_own_takes_the_last_previews_place(display, node, frontend):
    picture = Image.new("RGB", (30, 20), "red")
    ui = display.show(node, PATH, picture, previewed=True)
    assert frontend.previews == [("JPEG", picture, None)]
    assert shown(ui).tobytes() == picture.tobytes()


def test_without_a_frontend_the_history_has_it(display, node):
    assert shown(display.show(types.SimpleNamespace(hidden=None), PATH)).size[0] > 100


def test_what_a_failure_left_is_readable_on_the_node(display, node, frontend):
    with (
        pytest.raises(display.TrainingError, match="the disk is full\nsaved as cat"),
        display.keeping(node, lambda: "saved as cat"),
    ):
        raise OSError("the disk is full")
    assert frontend.texts == [("12", "saved as cat")]
    ((_, picture, _),) = frontend.previews
    assert picture.tobytes() == display.caption("saved as cat").tobytes()


@pytest.mark.parametrize("problem", [RuntimeError("no memory"), MemoryError(), KeyError("odd")])
def test_what_fails_while_it_is_kept_hides_nothing(display, node, frontend, problem):
    def keep():
        raise problem

    failed = pytest.raises(display.TrainingError, match="(?s)a kernel failed.*could not be kept")
    with failed as caught, display.keeping(node, keep):
        raise ValueError("a kernel failed")
    assert type(problem).__name__ in str(caught.value)
    with pytest.raises(display.Interrupted), display.keeping(node, keep):
        raise display.Interrupted


def test_a_frontend_that_cannot_be_told_hides_nothing(display, node, monkeypatch):
    def broken(*_):
        raise OSError("gone")

    monkeypatch.setattr(display, "tell", broken)
    failed = pytest.raises(display.TrainingError, match="a kernel failed\nsaved as cat")
    with failed, display.keeping(node, lambda: "saved as cat"):
        raise ValueError("a kernel failed")
