"""What a node shows: a line of text, progress with a preview, and what was kept after a failure."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ...profusion.loop import TrainingError
from ...profusion.pictures import caption, from_image
from ...profusion.problems import inert, known, printable

if TYPE_CHECKING:
    from PIL import Image

Interrupted = comfy.model_management.InterruptProcessingException


def show(node: type[io.ComfyNode], text: str, picture: Image.Image | None = None, previewed: bool = False) -> dict:
    """Show text on the node that is being executed, and return what its `ui` keeps in the history: text and a picture.

    picture: says the same; default: the text, drawn. Frontends keep a node's picture, also where its result comes from
    the cache; newer ones clear its text when the job ends. previewed: the node has shown previews, the last of which
    would hide the picture. The node must ask for the hidden unique_id.
    """
    text = printable(text)
    picture = caption(text) if picture is None else picture
    tell(node, text, picture if previewed else None)
    return {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(from_image(picture)[None]).as_dict()}


def tell(node: type[io.ComfyNode], text: str, preview: Image.Image | None = None) -> None:
    """Show text under the node that is being executed, for as long as the frontend keeps it, and a last preview."""
    _tell(node.hidden.unique_id if node.hidden is not None else None, text, preview)


def _tell(node_id: str | None, text: str, preview: Image.Image | None) -> None:
    """The same for any node, also one that has been executed."""
    # Where a server runs, its module is loaded; without one there is nobody to show anything to.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node_id is None or server is None:
        return
    server.send_progress_text(inert(text), node_id)  # which older frontends show as HTML
    if preview is not None:
        comfy.utils.ProgressBar(1, node_id).update_absolute(1, preview=("JPEG", preview, None))


def warn_under(node: type[io.ComfyNode]) -> Callable[[str], None]:
    """How to warn under a node once it is no longer being executed, and once in the log."""
    node_id = node.hidden.unique_id if node.hidden is not None else None
    logged: set[str] = set()

    def warn(text: str) -> None:
        if text not in logged:
            logged.add(text)
            logging.getLogger("ProFusion").warning(text)
        _tell(node_id, text, caption(text))

    return warn


class Remarks:
    """What is said under a node while it works, as `warn_under` does, and once more in its final text."""

    def __init__(self, node: type[io.ComfyNode]):
        self._warn, self.said = warn_under(node), []

    def __call__(self, text: str) -> None:
        self.said.append(text)
        self._warn(text)

    def after(self, text: str) -> str:
        """A final text with all of it, a line each."""
        return "\n".join([text, *dict.fromkeys(self.said)])


@contextmanager
def keeping(node: type[io.ComfyNode], keep: Callable[[], str]) -> Iterator[None]:
    """Whatever stops a training, Cancel included: `keep` saves what has been learned and says where. The node shows it.

    Errors come out as TrainingError, with that text. What fails in `keep`, or in showing it, hides nothing.
    """
    try:
        yield
    except BaseException as problem:
        try:
            where = keep()
        except Exception as second:
            where = f"What had been learned could not be kept: {type(second).__name__}: {second}"
        with contextlib.suppress(Exception):
            tell(node, where, caption(where))  # the host shows the `ui` of nodes that finish only
        if isinstance(problem, Interrupted) or not isinstance(problem, Exception):
            raise
        said = known(problem) or str(problem) or type(problem).__name__
        raise TrainingError(f"{said}\n{where}") from problem


class Progress:
    """The host's progress bar, with a preview. Whoever reports to it is stopped here by Cancel."""

    def __init__(self, total: int):
        self._bar, self._done = comfy.utils.ProgressBar(total), 0

    def advance(self, by: int = 1) -> None:
        """So much more has been done."""
        self.report(self._done + by)

    def report(self, done: int, preview: Image.Image | None = None) -> None:
        self._done = done
        self._bar.update_absolute(done, preview=preview and ("JPEG", preview, None))
        # Newer hosts throttle their bar's hook, which polled Cancel before.
        comfy.model_management.throw_exception_if_processing_interrupted()
