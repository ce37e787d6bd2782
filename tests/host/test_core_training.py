"""The host's own Train LoRA takes Toybox's MODEL, as the loader's page promises: through the host's executor."""

import asyncio
import uuid

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")


def defaults_of(node):
    """The values that the frontend gives a node's widgets, whatever this host's has."""
    values = {}
    for name, definition in node.INPUT_TYPES()["required"].items():
        kind, options = definition[0], definition[1] if len(definition) > 1 else {}
        if "default" in options:
            values[name] = options["default"]
        elif isinstance(kind, list):
            values[name] = kind[0]
    return values


def test_the_hosts_train_lora_learns_on_toyboxs_model(pack, monkeypatch):
    import execution
    from comfy_api.latest import io
    from comfy_extras.nodes_train import TrainLoraNode
    from executor import prompt_executor

    import nodes

    kept = {}

    class Keep(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            inputs = [io.Custom("LORA_MODEL").Input("lora"), io.Custom("LOSS_MAP").Input("losses")]
            return io.Schema(node_id="Keep", inputs=inputs, outputs=[], is_output_node=True)

        @classmethod
        def execute(cls, lora, losses):
            kept.update(lora=lora, losses=losses["loss"])
            return io.NodeOutput()

    for name, node in {"Train": TrainLoraNode, "Keep": Keep, "Toybox": pack.nodes.toybox.ToyboxLoader}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    training = {"steps": 3, "rank": 2, "training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": False}
    links = {"model": ["1", 0], "latents": ["2", 0], "positive": ["3", 0]}
    outputs = getattr(TrainLoraNode, "RETURN_TYPES", None) or TrainLoraNode.GET_SCHEMA().outputs
    lora = len(outputs) - 3  # LoRA, losses and steps are the last three
    graph = {
        "1": {"class_type": "Toybox", "inputs": defaults_of(pack.nodes.toybox.ToyboxLoader)},
        "2": {"class_type": "VAEEncode", "inputs": {"pixels": ["1", 4], "vae": ["1", 2]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a photo of a sks mushroom", "clip": ["1", 1]}},
        "4": {"class_type": "Train", "inputs": {**defaults_of(TrainLoraNode), **training, **links}},
        "5": {"class_type": "Keep", "inputs": {"lora": ["4", lora], "losses": ["4", lora + 1]}},
    }
    valid, error, ends, node_errors = asyncio.run(execution.validate_prompt("test", graph, None))
    assert valid, (error, node_errors)
    executor = prompt_executor()
    executor.execute(graph, str(uuid.uuid4()), execute_outputs=ends)
    events = dict(executor.status_messages)
    assert "execution_success" in events, events.get("execution_error", {}).get("exception_message")
    assert len(kept["losses"]) == 3 and torch.tensor(kept["losses"]).isfinite().all()
    moved = [name for name, value in kept["lora"].items() if "attn2.to_v" in name and "up" in name and value.any()]
    assert moved, list(kept["lora"])[:5]
