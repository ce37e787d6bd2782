"""Details: the formulas against their definitions, and what they are in the kernel's own UNet."""

import math
from dataclasses import replace

import pytest
import torch

from profusion import details, infusion
from profusion.details import Details
from profusion.infusion import Placement, cross_attention_layers, customised_patches, foundation_patches, on_conditional
from profusion.models.unet import UNet
from tests.test_infusion import NAMES, SMALL, inputs, options, predict, random_delta

WIDTHS = (32, 64, 64, 64, 64, 32, 32)


@pytest.fixture(scope="module")
def unet(device):
    torch.manual_seed(3)
    return UNet(SMALL).eval().to(device)


@pytest.fixture
def randn(device, generator):
    """Normal numbers on the device, the same on all of them."""
    return lambda *size: torch.randn(*size, generator=generator).to(device)


def some_details(randn, count=2, size=1.0):
    values = size * randn(len(NAMES), count, SMALL.context_dim)
    return Details(values, 2 * randn(count, sum(WIDTHS)), WIDTHS)


def placement(randn, rows=(3,), **changes):
    return Placement(**{"delta": random_delta(randn), "layers": NAMES, "rows": rows, **changes})


def test_the_widths_of_layers_are_found(unet):
    assert tuple(layer.width for layer in cross_attention_layers(dict(unet.named_parameters()))) == WIDTHS


def test_openings_are_the_formula(generator):
    gates, n = torch.randn(3, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    found = details.openings(gates, n)
    for row in range(2):
        for place in range(5):
            for r in range(3):
                expected = math.tanh(float(gates[r] @ n[row, place]) / 4)
                assert float(found[row, place, r]) == pytest.approx(expected, abs=1e-6)
    assert details.openings(gates, n.bfloat16()).dtype == torch.bfloat16


def test_the_longest_is_that_of_all_places(generator):
    delta, values = torch.randn(4, 1, 12, generator=generator), torch.randn(4, 3, 12, generator=generator)
    found = details.longest(delta, values)
    opened = 2 * torch.rand(20_000, 3, generator=generator) - 1
    opened[:8] = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
    lengths = (delta + opened @ values).norm(dim=-1).amax(dim=1)
    torch.testing.assert_close(found[:, 0, 0], lengths)


def test_a_generator_decides_where_details_begin():
    first, again, other = (
        details.beginning(4, 7, 24, WIDTHS, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.gates, again.gates) and not torch.equal(first.gates, other.gates)
    assert not first.values.any() and first.values.shape == (7, 3, 24) and first.count == 3
    assert torch.equal(torch.cat([first.gates_of(layer) for layer in range(7)], dim=1), first.gates)


@pytest.mark.parametrize(
    ("values", "gates", "message"),
    [
        (torch.zeros(2, 1, 3), torch.zeros(1, 8), "for 1 layers"),
        (torch.zeros(1, 8, 3), torch.zeros(8, 8), "1 to 7 details"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 8), r"gates has the shape \(1, 8\); give \(2, 8\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(values, gates, message):
    with pytest.raises(ValueError, match=message):
        Details(values, gates, (8,))


def test_each_place_has_its_own_value(unet, randn):
    """A layer's output against the equation: F's map on a V_bar for each place, from C's own n."""
    of_concept, batch = some_details(randn), inputs(randn)
    placed, layer = placement(randn, details=of_concept, strength=0.7), 0
    module = dict(unet.named_modules())["input_blocks.1.1.transformer_blocks.0"]
    seen = {}

    def keep(name):
        def patch(n, *more):
            seen[name] = (n, *more[:2])
            return n if name == "out" else (n, *more[:2])

        return patch

    store = {}
    with torch.no_grad():
        other, t, context = inputs(randn)
        unet(other, t, batch[2], transformer_options=options(foundation_patches(store)))
        patches = customised_patches(store, on_conditional([placed]))
        first = {
            "attn2_patch": [keep("own"), *patches["attn2_patch"]],
            "attn2_output_patch": [*patches["attn2_output_patch"], keep("out")],
        }

        def once(name, patch):
            return lambda *given: patch(*given) if given[-1]["block"] == ("input", 1) else _untouched(given)

        first = {name: [once(name, patch) for patch in group] for name, group in first.items()}
        unet(*batch, transformer_options=options(first))
        own, context, value = seen["own"]
        attention = module.attn2
        n_f = store["input.1.0", 0]
        heads = attention.heads
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (attention.to_q(n_f), attention.to_k(context)))
        map_f = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, heads, T, L)
        opened = details.openings(of_concept.gates_of(layer), own)
        expected = []
        for place in range(own.shape[1]):
            moved = value.clone()
            weights = opened[:, place, :, None]
            moved[:, 3] += 0.7 * (placed.delta[layer, 0] + (weights * of_concept.values[layer]).sum(1))
            v = attention.to_v(moved).unflatten(-1, (heads, -1)).transpose(1, 2)
            expected.append((map_f[:, :, place : place + 1] @ v).transpose(1, 2).flatten(-2))
        expected = attention.to_out(torch.cat(expected, dim=1))
    torch.testing.assert_close(seen["out"][0], expected, atol=2e-5, rtol=1e-4)


def _untouched(given):
    return given[0] if len(given) == 2 else given[:3]


def test_details_of_nothing_are_the_plain_run_to_the_bit(unet, randn):
    batch, nothing = inputs(randn), some_details(randn, size=0.0)
    alone = placement(randn)
    with torch.no_grad():
        assert torch.equal(predict(unet, batch, [replace(alone, details=nothing)])[1], predict(unet, batch, [alone])[1])
        for zero in (
            replace(alone, delta=torch.zeros_like(alone.delta), details=nothing),
            replace(alone, strength=0.0, details=some_details(randn)),
        ):
            plain, moved = predict(unet, batch, [zero])
            assert torch.equal(plain, moved) and not zero.adds()


def test_details_alone_are_something_to_add(unet, randn):
    one = placement(randn, delta=torch.zeros_like(random_delta(randn)), details=some_details(randn))
    plain, moved = predict(unet, inputs(randn), [one])
    assert one.adds() and not torch.allclose(plain, moved, atol=1e-3)


def test_open_details_are_a_longer_residual(unet, randn, monkeypatch):
    """With gates that are open everywhere, details are what delta is."""
    batch, one = inputs(randn), placement(randn)
    constant = replace(one, delta=one.delta + 0.5)

    half = torch.full((len(NAMES), 1, SMALL.context_dim), 0.5, device=batch[0].device)
    of_all = Details(half, torch.zeros(1, sum(WIDTHS), device=half.device), WIDTHS)
    monkeypatch.setattr(infusion, "openings", lambda gates, n: n.new_ones(*n.shape[:2], len(gates)))
    moved = predict(unet, batch, [replace(one, details=of_all)])[1]
    torch.testing.assert_close(moved, predict(unet, batch, [constant])[1], atol=2e-4, rtol=1e-3)


def test_a_region_confines_details_too(unet, randn):
    batch, region = inputs(randn), torch.zeros(6, 8)
    one = placement(randn, details=some_details(randn))
    store, outs = {}, {}
    region[:, :4] = 1
    with torch.no_grad():
        unet(*batch, transformer_options=options(foundation_patches(store)))
        for name, placements in {"plain": [], "whole": [one], "part": [replace(one, region=region)]}.items():
            patches = customised_patches(store, on_conditional(placements))

            def keep(out, extra_options, name=name):
                outs.setdefault(name, out)
                return out

            patches["attn2_output_patch"] = [*patches["attn2_output_patch"], keep]
            unet(*batch, transformer_options=options(patches))
    inside = region.flatten().bool()
    torch.testing.assert_close(outs["part"][:, inside], outs["whole"][:, inside], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(outs["part"][:, ~inside], outs["plain"][:, ~inside], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outs["whole"], outs["plain"], atol=1e-2)


def test_concepts_with_and_without_details_go_together(unet, randn):
    """Beside others, and in other rows of the batch, each is what it is alone."""
    x, t, context = inputs(randn, rows=4)
    one, other = (
        placement(randn, details=some_details(randn, 3)),
        placement(randn, (5,), details=some_details(randn, 1)),
    )
    region = torch.zeros(6, 8)
    region[:3] = 1
    third = placement(randn, (7,), region=region)
    store, of_each = {}, [[one], [other, third], [], [third]]
    with torch.no_grad():
        unet(x, t, context, transformer_options=options(foundation_patches(store), (0, 0, 0, 0)))

        def moved(placements_for, rows, chunks, queries):
            patches = customised_patches(queries, placements_for)
            return unet(x[rows], t[rows], context[rows], transformer_options=options(patches, chunks))

        together = moved(lambda options, owner: of_each[owner], slice(None), (0, 0, 0, 0), store)
        for row, placements in enumerate(of_each):
            own = {(layer, 0): n for (layer, owner), n in store.items() if owner == row}
            alone = moved(lambda options, owner, p=placements: p, slice(row, row + 1), (0,), own)
            torch.testing.assert_close(together[row : row + 1], alone, atol=2e-4, rtol=1e-3)


def test_gradients_reach_details_and_then_their_gates(unet, randn):
    batch = inputs(randn)
    begun = details.beginning(3, len(NAMES), SMALL.context_dim, WIDTHS, torch.Generator().manual_seed(1))
    begun = begun.to(batch[0].device)
    delta = torch.zeros(len(NAMES), 1, SMALL.context_dim, device=batch[0].device)
    learned = [delta, begun.values, begun.gates]
    for tensor in learned:
        tensor.requires_grad_(True)
    one = Placement(delta, NAMES, (3,), details=begun)
    predict(unet, batch, [one])[1].square().sum().backward()
    assert delta.grad.any() and begun.values.grad.any(dim=-1).all() and not begun.gates.grad.any()
    with torch.no_grad():
        begun.values.sub_(0.1 * begun.values.grad.sign())
    begun.gates.grad = None
    predict(unet, batch, [one])[1].square().sum().backward()
    assert begun.gates.grad.any(dim=-1).all()


def test_where_tokens_are_merged_nothing_is_guessed(unet, randn):
    store, batch = {}, inputs(randn)
    with torch.no_grad():
        unet(*batch, transformer_options=options(foundation_patches(store)))
        patches = customised_patches(store, on_conditional([placement(randn, details=some_details(randn))]))
        merge = [lambda n, extra_options: n[:, ::2]]
        patches = {**patches, "attn2_output_patch": [*merge, *patches["attn2_output_patch"]]}
        with pytest.raises(RuntimeError, match=r"layer input\.1\.0 has 24 places where 48 went in"):
            unet(*batch, transformer_options=options(patches))


def test_a_prompt_without_the_noun_is_left_alone_to_the_bit(unet, randn):
    """Whatever has been learned: the Fisher divergence there is 0."""
    one, batch, store = placement(randn, details=some_details(randn)), inputs(randn, rows=4), {}
    with torch.no_grad():
        plain = unet(*batch, transformer_options=options(foundation_patches(store), (1, 1)))
        patches = customised_patches(store, on_conditional([one]))
        assert torch.equal(unet(*batch, transformer_options=options(patches, (1, 1))), plain)
        patches = customised_patches(store, on_conditional([one]))
        moved = unet(*batch, transformer_options=options(patches, (0, 1)))
    torch.testing.assert_close(moved[2:], plain[2:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(moved[:2], plain[:2], atol=1e-3)
