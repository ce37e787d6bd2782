"""What a node shows: a line of text, progress with a preview, and what was kept after a failure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ...profusion.loop import TrainingError

if TYPE_CHECKING:
    from PIL import Image

Interrupted = comfy.model_management.InterruptProcessingException


def show(node: type[io.ComfyNode], text: str) -> dict:
    """Show text under the node that is being executed, and return it as what the node's `ui` keeps in the history.

    Both, because the frontend shows the history's text for some of its own nodes only. The node must ask for the hidden
    unique_id.
    """
    node_id = node.hidden.unique_id if node.hidden is not None else None
    # Where a server runs, its module is loaded; without one there is nobody to show anything to.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node_id is not None and server is not None:
        server.send_progress_text(text, node_id)
    return ui.PreviewText(text).as_dict()


@contextmanager
def keeping(node: type[io.ComfyNode], keep: Callable[[], str]) -> Iterator[None]:
    """Whatever stops a training, Cancel included: `keep` saves what has been learned and says where. The node shows it.

    Errors come out as TrainingError, with that text.
    """
    try:
        yield
    except BaseException as problem:
        where = keep()
        show(node, where)
        if isinstance(problem, Interrupted) or not isinstance(problem, Exception):
            raise
        raise TrainingError(f"{problem}\n{where}") from problem


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
