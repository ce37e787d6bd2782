"""*Dynamic VRAM*, the memory manager of newer hosts on NVIDIA cards, on the CPU.

The host's own patcher and casts run: ModelPatcherDynamic, cast_modules_with_vbar, resolve_cast_module_with_vbar. Only
what takes a card is replaced. The card is "cpu:0", which is not the device "cpu" though its tensors lie there; its
memory is ordinary memory, and a test may evict all of it or let nothing fit. Memory that a weight has left is filled
with NaN, as another tenant might fill it: whoever still looks there is found out.
"""

from __future__ import annotations

import contextlib
import ctypes

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import numpy
import pytest
import torch

CARD = torch.device("cpu:0")
NAN_BYTES = 0xFF
BUFFER_BYTES = 1 << 25


class Card:
    """The simulated card. `fits`: whether weights find room; where not, buffers that are
    used again take their place."""

    def __init__(self):
        self.fits, self._age, self._pages = True, 0, []

    def evict(self):
        """Take the card's memory away from every weight."""
        self._age += 1
        for pages in self._pages:
            pages.memory.fill(NAN_BYTES)

    def pages(self, size, device):
        self._pages.append(_Pages(size, self.evict))
        return self._pages[-1]

    def fault(self, place):
        """The age of these pages, by which the host knows whether they are as it left them; None where nothing fits."""
        return (ctypes.c_uint32 * 1)(self._age) if self.fits else None


class _Pages:
    """Stands for comfy_aimdo.model_vbar.ModelVBAR: address space of one model on the card."""

    def __init__(self, size, evict):
        self.memory, self._used, self._evict = numpy.full(int(size) // 8, NAN_BYTES, numpy.uint8), 0, evict

    def prioritize(self):
        pass

    def alloc(self, size):
        start = (self._used + 511) & ~511
        self._used = start + size
        assert self._used <= self.memory.size
        return self, start, size

    def loaded_size(self):
        return 0

    def free_memory(self, size):
        self._evict()
        return self._used


class _Buffer:
    """Stands for comfy_aimdo.vram_buffer.VRAMBuffer: where a stream's casts go, one after the other."""

    def __init__(self, size, device):
        self.memory = numpy.full(BUFFER_BYTES, NAN_BYTES, numpy.uint8)

    def size(self):
        return self.memory.size

    def get(self, size, offset=0):
        return self, offset, size


class _Stream:
    @staticmethod
    def as_context(stream):
        return contextlib.nullcontext()

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class _HostBuffer:
    """Stands for comfy_aimdo.host_buffer.HostBuffer; nothing is pinned here."""

    size = 0

    def __init__(self, *sizes):
        pass

    def truncate(self, *arguments, **options):
        pass


def _tensor_at(place, device):
    owner, start, size = place
    return torch.as_tensor(owner.memory[start : start + size])  # a new tensor each time, as the host makes it


@pytest.fixture
def dynamic_vram(monkeypatch):
    """The card of a host with dynamic VRAM. Networks built meanwhile get their weights from a state dict only."""
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    card, management, streams = Card(), comfy.model_management, [_Stream(), _Stream()]
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", card.pages)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", card.fault)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", lambda place: None)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbars_analyze", lambda *arguments: 0, raising=False)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", _tensor_at)
    monkeypatch.setattr(comfy_aimdo.vram_buffer, "VRAMBuffer", _Buffer)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", _HostBuffer)
    monkeypatch.setattr(management, "STREAM_AIMDO_CAST_BUFFERS", {})
    monkeypatch.setattr(management, "STREAMS", {CARD: streams})
    monkeypatch.setattr(management, "stream_counters", {})
    monkeypatch.setattr(management, "NUM_STREAMS", len(streams))
    monkeypatch.setattr(management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    monkeypatch.setattr(management.args, "disable_pinned_memory", True)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", _on_card(comfy.ops.cast_bias_weight))
    yield card
    management.current_loaded_models.clear()


def _on_card(cast_bias_weight):
    """The host's function, which tells a weight in main memory from its input on the card by the device of each."""

    def cast(module, input=None, dtype=None, device=None, **options):
        if hasattr(module, "_v"):
            device = CARD
        return cast_bias_weight(module, input, dtype, device, **options)

    return cast
