"""A line of text under a node."""

from __future__ import annotations

import sys

from comfy_api.latest import io, ui


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
