"""A thread that computes under another's modes."""

from threading import Thread

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from profusion.threads import state_of_this_thread


class Functions(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        return function(*args, **(kwargs or {}))


def elsewhere(state, work):
    """`work()` in a thread of its own, under the state."""
    results = []

    def run():
        with state():
            results.append(work())
        results.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.empty(0).device.type))

    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert results[1] == (False, True, "cpu")  # and left them
    return results[0]


def test_gradient_and_inference_mode_go_along():
    with torch.no_grad():
        state = state_of_this_thread()
    assert elsewhere(state, torch.is_grad_enabled) is False
    with torch.inference_mode():
        state = state_of_this_thread()
    assert elsewhere(state, torch.is_inference_mode_enabled) is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_goes_along(dtype):
    with torch.autocast("cpu", dtype):
        state = state_of_this_thread()
    assert elsewhere(state, lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == dtype
    assert elsewhere(state_of_this_thread(), lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == torch.float32


def test_a_default_device_goes_along_and_stays_the_other_threads():
    with torch.device("meta"):
        assert elsewhere(state_of_this_thread(), lambda: torch.empty(1).device.type) == "meta"
        assert torch.empty(1).device.type == "meta"
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("kind", [Functions, Operators])
def test_modes_that_watch_go_along_and_can_be_left_in_order(kind):
    with kind() as outer, kind() as inner:
        elsewhere(state_of_this_thread(), lambda: torch.ones(2) + 1)
        assert inner.seen and outer.seen
        before = inner.seen
        torch.ones(2)
        assert inner.seen == before + 1
    after = inner.seen
    torch.ones(2)
    assert inner.seen == after
