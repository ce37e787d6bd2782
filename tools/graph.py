"""A graph of ComfyUI nodes, written down in Python and saved as the frontend's workflow JSON (version 0.4, flat)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST_VERSION = "0.3.64"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
ROW, WIDGET, HEADER, TEXT_BOX = 22, 26, 40, 110
TITLE, GROUP_TITLE, MARGIN = 30, 34, 16
# What the frontend adds to a node that has run, for the picture under it: at least SHOWN, and more for it to be large.
# FRAME has room for a square picture, PLOT for a path of several lines under a plot.
SHOWN, FRAME, PLOT = 250, 440, 640
PICTURES = {
    "ProFusion_ConceptAugment": PLOT,
    "ProFusion_ConceptScores": SHOWN,
    "ProFusion_FusionKSampler": SHOWN,
    "ProFusion_OverfitReport": PLOT,
    "ProFusion_PromptNetEncode": FRAME,
    "ProFusion_PromptNetFinetune": PLOT,
    "ProFusion_PromptNetLoader": SHOWN,
    "ProFusion_PromptNetTrainer": PLOT,
    "ProFusion_ResidualFromPromptNet": FRAME,
    "ProFusion_ResidualLoader": SHOWN,
    "ProFusion_ResidualSaver": SHOWN,
    "ProFusion_ResidualTrainer": PLOT,
}


@dataclass
class Node:
    id: int
    type: str
    definition: Any
    position: tuple[int, int]
    values: dict[str, Any]
    title: str | None
    size: tuple[int, int]
    properties: dict[str, Any]

    def __getitem__(self, output: str | int) -> tuple[Node, int]:
        """An output by name (or place), to be connected."""
        names = list(getattr(self.definition, "RETURN_NAMES", None) or self.definition.RETURN_TYPES)
        return self, names.index(output) if isinstance(output, str) else output

    @property
    def below(self) -> tuple[int, int]:
        """Where the next node of a column goes. Nodes 2.0 make nodes a little taller, ours by a badge and text."""
        x, y = self.position
        taller = 2 * WIDGET if self.type.startswith("ProFusion_") else WIDGET
        return x, y + self.size[1] + taller + TITLE + MARGIN


@dataclass
class Graph:
    """`definitions` is the host's NODE_CLASS_MAPPINGS: it says which inputs are widgets, and in which order."""

    definitions: dict[str, Any]
    version: str
    nodes: list[Node] = field(default_factory=list)
    notes: list[dict] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)

    def add(
        self,
        type: str,
        at: tuple[int, int],
        title: str | None = None,
        wide: int = 300,
        tall: int | None = None,
        properties: dict | None = None,
        **values: Any,
    ) -> Node:
        """Place a node. A value is a widget's value, or `node["OUTPUT"]` to connect it.

        tall: room below the widgets for what is shown there; default: what our own nodes need once they have run.
        """
        definition = self.definitions[type]
        known = {name for name, *_ in inputs_of(definition)}
        if set(values) - known:
            raise ValueError(f"{type} has no input {sorted(set(values) - known)}; it has {sorted(known)}")
        height = HEADER + ROW * max(len(_linked(definition, values)), len(definition.RETURN_TYPES))
        height += PICTURES.get(type, 0) if tall is None else tall
        for name, kind, options in inputs_of(definition):
            if is_widget(kind, options) and not isinstance(values.get(name), tuple):
                height += TEXT_BOX if options.get("multiline") else WIDGET
        ours = type.startswith("ProFusion_")
        origin = {"cnr_id": "profusion", "ver": self.version} if ours else {"cnr_id": "comfy-core", "ver": HOST_VERSION}
        properties = {"Node name for S&R": type, **origin, **(properties or {})}
        node = Node(len(self.nodes) + 1, type, definition, at, values, title, (wide, height), properties)
        self.nodes.append(node)
        return node

    def text(self, at: tuple[int, int], title: str, source: tuple[Node, int], wide: int = 340) -> Node:
        """A node that shows text which can be selected and copied."""
        return self.add("PreviewAny", at, title, wide=wide, tall=160, source=source)

    def note(self, text: str, at: tuple[int, int], size: tuple[int, int]) -> None:
        self.notes.append({"text": text, "at": at, "size": size})

    @contextmanager
    def group(self, title: str, color: str = "#3f789e") -> Iterator[None]:
        """A titled frame around the nodes that are placed meanwhile."""
        first = len(self.nodes)
        yield
        nodes = self.nodes[first:]
        left, top = (min(node.position[axis] for node in nodes) - MARGIN for axis in (0, 1))
        right, bottom = (max(node.position[axis] + node.size[axis] for node in nodes) + MARGIN for axis in (0, 1))
        top -= TITLE + GROUP_TITLE
        bounds = [left, top, right - left, bottom - top]
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": bounds,
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )

    def to_workflow(self) -> dict:
        links, outgoing = [], {}
        for node in self.nodes:
            for slot, (name, _, _) in enumerate(_linked(node.definition, node.values)):
                value = node.values.get(name)
                if isinstance(value, tuple):
                    source, output = value
                    link = len(links) + 1
                    links.append([link, source.id, output, node.id, slot, str(source.definition.RETURN_TYPES[output])])
                    outgoing.setdefault((source.id, output), []).append(link)
        incoming = {(link[3], link[4]): link[0] for link in links}
        nodes = [self._node(node, order, incoming, outgoing) for order, node in enumerate(self.nodes)]
        for number, note in enumerate(self.notes):
            nodes.append(self._note(note, len(self.nodes) + 1 + number))
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([links, self.groups, self.notes], default=str))),
            "revision": 0,
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.8, "offset": [40, 60]}},
            "version": 0.4,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_workflow(), indent=1) + "\n")

    def to_prompt(self) -> dict:
        """The same graph in the API's format."""
        prompt = {}
        for node in self.nodes:
            values = {}
            for name, kind, options in inputs_of(node.definition):
                value = node.values.get(name, _default(kind, options) if is_widget(kind, options) else None)
                if isinstance(value, tuple):
                    value = [str(value[0].id), value[1]]
                if value is not None:
                    values[name] = value
            prompt[str(node.id)] = {"class_type": node.type, "inputs": values}
        return prompt

    def _node(self, node: Node, order: int, incoming: dict, outgoing: dict) -> dict:
        sockets = []
        for slot, (name, kind, options) in enumerate(_linked(node.definition, node.values)):
            socket = {"name": name, "type": kind, "link": incoming.get((node.id, slot))}
            if is_widget(kind, options):
                socket["widget"] = {"name": name}
            elif name in node.definition.INPUT_TYPES().get("optional", {}):
                socket["shape"] = 7
            sockets.append(socket)
        names = list(getattr(node.definition, "RETURN_NAMES", None) or node.definition.RETURN_TYPES)
        outputs = [
            {"name": names[slot], "type": str(kind), "links": outgoing.get((node.id, slot))}
            for slot, kind in enumerate(node.definition.RETURN_TYPES)
        ]
        made = {
            "id": node.id,
            "type": node.type,
            "pos": list(node.position),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": sockets,
            "outputs": outputs,
            "properties": node.properties,
            "widgets_values": self._widget_values(node),
        }
        if node.title:
            made["title"] = node.title
        return made

    @staticmethod
    def _widget_values(node: Node) -> list:
        values = []
        for name, kind, options in inputs_of(node.definition):
            if not is_widget(kind, options):
                continue
            value = node.values.get(name, _default(kind, options))
            values.append(_default(kind, options) if isinstance(value, tuple) else value)
            if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
                values.append("fixed")
            if options.get("image_upload"):
                values.append("image")
        return values

    @staticmethod
    def _note(note: dict, id: int) -> dict:
        return {
            "id": id,
            "type": "MarkdownNote",
            "pos": list(note["at"]),
            "size": list(note["size"]),
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [note["text"]],
            "color": "#432",
            "bgcolor": "#653",
        }


def inputs_of(definition: Any) -> list[tuple[str, str, dict]]:
    """(name, type, options) of every input, in the node's order."""
    found = []
    for part in ("required", "optional"):
        for name, (kind, *rest) in definition.INPUT_TYPES().get(part, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):
                options, kind = {"options": kind, **options}, "COMBO"
            found.append((name, str(kind), options))
    return found


def is_widget(kind: str, options: dict) -> bool:
    return kind in WIDGET_TYPES and not options.get("forceInput")


def _linked(definition: Any, values: dict[str, Any]) -> list[tuple[str, str, dict]]:
    """The inputs that are sockets: those of no widget, and widgets that something is connected to."""
    return [
        (name, kind, options)
        for name, kind, options in inputs_of(definition)
        if not is_widget(kind, options) or isinstance(values.get(name), tuple)
    ]


def _default(kind: str, options: dict) -> Any:
    if "default" in options:
        return options["default"]
    if kind == "COMBO":
        return (options.get("options") or [""])[0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(kind)
