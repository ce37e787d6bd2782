"""Residuals of a larger capacity in a real ComfyUI: details beside everything that a concept goes with."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

from infused import seen_by_both  # noqa: E402

CAPACITY = 3
LEFT = torch.zeros(1, 64, 64)
LEFT[..., :32] = 1


def without_details(residual):
    return replace(residual, details=None)


@pytest.mark.parametrize(
    "options",
    [{}, {"sampler": "dpmpp_2m_sde", "batch": 2, "cfg": 4.0}, {"sampler": "heun", "cfg": 1.0, "size": (10, 8)}],
    ids=lambda options: options.get("sampler", "euler"),
)
@pytest.mark.parametrize("inputs", [{}, {"region": LEFT}, {"stream": "shared latent"}, {"every": 2}], ids=" ".join)
def test_nothing_to_add_is_the_plain_run_and_details_are_something(infused, options, inputs):
    plain, one = infused.run(infused.model, infused.positive, **options), infused.residual(capacity=CAPACITY)
    for residual, strength in ((infused.residual(0.0, capacity=CAPACITY), 1.0), (one, 0.0)):
        assert torch.equal(infused.run(*infused.patch(residual, strength=strength, **inputs), **options), plain)
    drawn = infused.run(*infused.patch(one, **inputs), **options)
    assert torch.equal(infused.run(*infused.patch(one, **inputs), **options), drawn)
    constant = infused.run(*infused.patch(without_details(one), **inputs), **options)
    alone = infused.run(*infused.patch(replace(one, delta=torch.zeros_like(one.delta)), **inputs), **options)
    assert drawn.isfinite().all() and len({hash(x.numpy().tobytes()) for x in (plain, drawn, constant, alone)}) == 4


def test_the_foundation_stays_the_plain_run(infused):
    customised, foundation = infused.run_both(*infused.patch(infused.residual(capacity=CAPACITY)), batch=2)
    plain = infused.run(infused.model, infused.positive, batch=2)
    assert torch.equal(foundation, plain) and not torch.equal(customised, plain)


def test_a_region_of_everything_is_no_region(infused):
    one = infused.residual(capacity=CAPACITY)
    everywhere = infused.run(*infused.patch(one))
    ones = infused.run(*infused.patch(one, region=torch.ones(1, 16, 16)))
    torch.testing.assert_close(ones, everywhere, rtol=1e-3, atol=1e-3 * everywhere.std().item())
    left = infused.run(*infused.patch(one, region=LEFT))
    assert not torch.allclose(left, everywhere, atol=1e-2 * everywhere.std().item())


@pytest.mark.parametrize("background", ["held", "held softly"])
def test_concepts_apart_are_what_each_is_alone_and_the_rest_is_held(infused, background):
    """One with details and one without, which have rows of their own in one batch when they are together."""
    first = {"residual": infused.residual(capacity=CAPACITY), "region": LEFT}
    second = {"residual": infused.residual(noun="grass", seed=6), "region": LEFT.flip(2)}

    def draw(inputs, concepts="each apart"):
        inputs = dict(inputs)
        return infused.run(
            *infused.patch(inputs.pop("residual"), background=background, concepts=concepts, **inputs), batch=2
        )

    both = {**first, **{f"{name}_2": value for name, value in second.items()}}
    apart, together = draw(both), draw(both, "together")
    assert not torch.equal(apart, together)
    if background == "held":
        for inputs in (first, second):
            own = torch.nn.functional.adaptive_avg_pool2d(inputs["region"][None], apart.shape[-2:]) == 1
            own, alone = own.expand_as(apart), draw(inputs)
            assert torch.equal(apart[own], alone[own])


def test_a_window_of_sampling_begins_with_the_plain_run(infused):
    def steps(model, positive):
        seen = []
        infused.run(model, positive, steps=4, callback=lambda step, x0, x, total: seen.append(x.clone()))
        return seen

    late = steps(*infused.patch(infused.residual(capacity=CAPACITY), start_percent=0.5))
    same = [torch.equal(x, y) for x, y in zip(steps(infused.model, infused.positive), late, strict=True)]
    assert same[0] and same[1] and not same[-1]


def test_a_pack_that_looks_at_attention_sees_equal_chunks(infused):
    """Each conditioning has as many rows as any other, whichever has details."""
    seen = seen_by_both()

    def look(n, context, value, extra_options):
        seen.calls.append((len(n), len(context), len(value), len(extra_options["cond_or_uncond"])))
        return n, context, value

    model = infused.model.clone()
    model.set_model_attn2_patch(look)
    infused.run(*infused.patch(infused.residual(capacity=CAPACITY), model), batch=2)
    assert all(n == context == value and n % chunks == 0 for n, context, value, chunks in seen.calls)
    assert max(n // chunks for n, *_, chunks in seen.calls) == 2 * CAPACITY


def test_another_model_s_details_are_refused(infused):
    one = infused.residual(capacity=2)
    widths = tuple(width + 1 for width in one.details.widths)
    details = infused.pack.profusion.details.Details(one.details.values, torch.zeros(1, sum(widths)), widths)
    with pytest.raises(ValueError, match="has details for layers of"):
        infused.patch(replace(one, details=details))
