"""Whose the rows are: labels go where the rows go, and where they are lost and nothing tells, it is said by name."""

import inspect

import pytest
import torch

samplers = pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

from infused import seen_by_both  # noqa: E402


def wrapped(model, wrapper):
    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def regroup(order):
    """A pack that gives the UNet other rows: `order(rows) -> indices of rows`, then puts them back."""

    def regrouped(apply, args, keep=lambda name: True):
        x, t = args["input"], args["timestep"]
        indices = torch.as_tensor(order(len(x)))
        given = {
            name: value[indices] if isinstance(value, torch.Tensor) else value
            for name, value in args["c"].items()
            if keep(name)
        }
        out = apply(x[indices], t[indices], **given)
        back = torch.zeros(len(x), *out.shape[1:])
        back[indices] = out
        return back

    return regrouped


ORDERS = {
    "reversed": lambda rows: list(range(rows))[::-1],
    "interleaved": lambda rows: torch.arange(rows).view(2, -1).T.flatten().tolist(),
    "twice": lambda rows: [*range(rows), *range(rows)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rows_in_another_order_are_known(infused, order, batch):
    """What is drawn is what is drawn in the usual order, but for the rounding of other batches."""
    model = wrapped(infused.model, regroup(ORDERS[order]))
    infused.assert_node_exact(model, batch=batch)
    usual = infused.run(*infused.patch(infused.residual()), batch=batch)
    other = infused.run(*infused.patch(infused.residual(), model), batch=batch)
    torch.testing.assert_close(other, usual, rtol=1e-3, atol=1e-3 * usual.std().item())


def test_labels_may_be_lost_where_the_rows_are_as_the_host_has_them(infused):
    """A pack that hands on what it knows alone."""

    def known_alone(apply, args):
        known = {name: args["c"][name] for name in ("c_crossattn", "transformer_options")}
        return apply(args["input"], args["timestep"], **known)

    infused.assert_node_exact(wrapped(infused.model, known_alone), batch=2)


class Mosaic:
    """A pack that puts rows twice into a batch and hands on what it knows alone."""

    def __call__(self, apply, args):
        return regroup(ORDERS["twice"])(apply, args, lambda name: name in ("c_crossattn", "transformer_options"))


def test_rows_that_nobody_knows_are_refused_by_name(infused):
    model, positive = infused.patch(infused.residual(), wrapped(infused.model, Mosaic()))
    with pytest.raises(RuntimeError, match=r"4 rows for 2 conditionings of 1 pictures.* remove Mosaic from"):
        infused.run(model, positive)
    assert infused.run(model, infused.positive).isfinite().all()  # plain runs are nobody's business


@pytest.mark.parametrize(("which", "words"), [("F", "2 times for .* and 1"), ("C", "1 times for .* and at least 2")])
def test_streams_that_call_the_unet_a_different_number_of_times_are_refused(infused, which, words):
    seen = seen_by_both()

    def now_and_then(apply, args):
        seen.calls.append(1)
        for _ in range(1 + (len(seen.calls) == "FC".index(which) + 1)):
            out = apply(args["input"], args["timestep"], **args["c"])
        return out

    model, positive = infused.patch(infused.residual(), wrapped(infused.model, now_and_then))
    with pytest.raises(
        RuntimeError, match=rf"{words} times in the customised .* remove test_streams\w+ from the model"
    ):
        infused.run(model, positive)


def one_by_one(apply, args):
    """A pack that gives the UNet one row at a time, as in windows of one frame."""
    outs = []
    for row in range(len(args["input"])):
        given = {name: v[row : row + 1] if isinstance(v, torch.Tensor) else v for name, v in args["c"].items()}
        outs.append(apply(args["input"][row : row + 1], args["timestep"][row : row + 1], **given))
    return torch.cat(outs)


def halves(batch):
    """A region with a mask for each picture: the right half for the first half of them, the left for the rest."""
    region = torch.zeros(batch, 64, 64)
    region[: batch // 2, :, 32:] = region[batch // 2 :, :, :32] = 1
    return region


@pytest.mark.parametrize("wrapper", [one_by_one, *map(regroup, ORDERS.values())], ids=["one by one", *ORDERS])
def test_a_regions_masks_stay_with_their_pictures(infused, wrapper):
    region = halves(2)
    usual = infused.run(*infused.patch(infused.residual(), region=region), batch=2)
    other = infused.run(*infused.patch(infused.residual(), wrapped(infused.model, wrapper), region=region), batch=2)
    torch.testing.assert_close(other, usual, rtol=1e-3, atol=1e-3 * usual.std().item())


def test_a_regions_masks_stay_with_their_pictures_in_context_windows(infused):
    windows = pytest.importorskip("comfy_extras.nodes_context_windows", reason="this host has no context windows")
    import comfy.context_windows as context

    given = {
        "context_length": 2,
        "context_overlap": 0,
        "context_schedule": context.ContextSchedules.STATIC_STANDARD,
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": context.ContextFuseMethods.FLAT,
        "dim": 0,
        "freenoise": False,
    }
    execute = windows.ContextWindowsManualNode.execute
    made = execute(
        infused.model, **{name: given[name] for name in given if name in inspect.signature(execute).parameters}
    )
    usual = infused.run(*infused.patch(infused.residual(), region=halves(4)), batch=4)
    other = infused.run(*infused.patch(infused.residual(), made.args[0], region=halves(4)), batch=4)
    torch.testing.assert_close(other, usual, rtol=1e-3, atol=1e-3 * usual.std().item())


def test_a_region_is_not_guessed_for_parts_of_a_picture(infused):
    def halves(apply, args):
        parts = []
        for part in args["input"].chunk(2, dim=3):
            parts.append(apply(part, args["timestep"], **args["c"]))
        return torch.cat(parts, dim=3)

    model = wrapped(infused.model, halves)
    infused.assert_node_exact(model)
    patched, positive = infused.patch(infused.residual(), model, region=torch.ones(1, 8, 8))
    with pytest.raises(RuntimeError, match=r"leave region unconnected, or remove test_a_region\w+ from"):
        infused.run(patched, positive)


@pytest.mark.parametrize("memory", ["enough", "for F alone", "for C alone"])
def test_batches_may_differ_between_the_streams(infused, monkeypatch, memory):
    """F's queries take memory, so that the host may evaluate C in smaller batches than F, or the other way."""
    seen = seen_by_both()
    usual = infused.run(*infused.patch(infused.residual()), batch=2)

    def needed(*args, **kwargs):
        now = seen.calls[-1] if seen.calls else "before"
        return 1e30 if memory != "enough" and now not in ("before", memory.split()[1]) else 1.0

    streams = infused.pack.nodes.host.streams
    original = streams._Streams._foundation

    def foundation(self, *args):
        seen.calls.append("F")
        try:
            return original(self, *args)
        finally:
            seen.calls.append("C")

    monkeypatch.setattr(streams._Streams, "_foundation", foundation)
    monkeypatch.setattr(infused.model.model, "memory_required", needed)
    found = infused.run(*infused.patch(infused.residual()), batch=2)
    torch.testing.assert_close(found, usual, rtol=1e-3, atol=1e-3 * usual.std().item())
