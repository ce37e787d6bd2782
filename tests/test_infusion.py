"""The formulas against their definitions, and the patches in the kernel's own UNet."""

import math
from dataclasses import replace

import pytest
import torch

from profusion import infusion
from profusion.infusion import Placement, add_residual, customised_patches, foundation_patches, on_conditional
from profusion.models.configs import SD15, SD21, SDXL, UNetConfig
from profusion.models.unet import CrossAttention, UNet
from profusion.toybox.configs import TOYBOX

SMALL = UNetConfig(32, (1, 2), 1, (1, 1), 1, 24, num_heads=2)
NAMES = ("input.1.0", "input.3.0", "middle.0.0", "output.0.0", "output.1.0", "output.2.0", "output.3.0")


@pytest.fixture(scope="module")
def unet(device):
    torch.manual_seed(3)
    return UNet(SMALL).eval().to(device)


@pytest.fixture
def randn(device, generator):
    """Normal numbers on the device, the same on all of them."""
    return lambda *size: torch.randn(*size, generator=generator).to(device)


def inputs(randn, rows=2, length=11):
    x = randn(rows, 4, 6, 8)
    return x, torch.full((rows,), 400, device=x.device), randn(rows, length, SMALL.context_dim)


def random_delta(randn, size=1.0):
    return size * randn(len(NAMES), 1, SMALL.context_dim)


def options(patches, chunks=(0,)):
    return {"patches": patches, "cond_or_uncond": list(chunks)}


def predict(unet, inputs, placements, chunks=(0,), foundation=None):
    """(F's prediction, C's); F may look at another latent."""
    store = {}
    with torch.no_grad():
        plain = unet(*(foundation or inputs), transformer_options=options(foundation_patches(store), chunks))
    patches = customised_patches(store, on_conditional(placements))
    return plain, unet(*inputs, transformer_options=options(patches, chunks))


@pytest.mark.parametrize(
    ("config", "count", "width", "name"),
    [(SD15, 16, 768, "SD 1.x"), (SD21, 16, 1024, "SD 2.x"), (SDXL, 70, 2048, "SDXL"), (TOYBOX, 10, 128, "Toybox")],
)
def test_layers_are_found_by_parameter_names(config, count, width, name):
    with torch.device("meta"):
        layers = infusion.cross_attention_layers(dict(UNet(config).named_parameters()))
    assert len(layers) == count and {layer.context_dim for layer in layers} == {width}
    assert infusion.architecture_name(layers) == name


def test_layers_are_in_forward_order_and_named_as_they_run(unet, randn):
    found = [layer.name for layer in infusion.cross_attention_layers(unet.state_dict())]
    ran = []

    def note(n, context, value, extra_options):
        ran.append(infusion.layer_name(extra_options))
        return n, context, value

    unet(*inputs(randn), transformer_options=options({"attn2_patch": [note]}))
    assert found == ran == list(NAMES)


def test_a_full_checkpoints_prefix_is_no_matter(unet):
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    assert [layer.name for layer in infusion.cross_attention_layers(state)] == list(NAMES)


def test_a_model_without_cross_attention_is_refused():
    with pytest.raises(infusion.UnsupportedModelError, match="none of a UNet's cross-attentions"):
        infusion.cross_attention_layers({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(3, 1)})


def test_other_architectures_have_a_description():
    assert infusion.architecture_name([infusion.Layer("middle.0.0", 7)]) == "UNet with 1 cross-attentions of 7"


def test_residuals_are_added_at_the_noun(randn):
    value, residual = randn(2, 5, 3), randn(1, 3)
    moved = add_residual(value, residual, [1, 4])
    assert torch.equal(moved[:, [1, 4]], value[:, [1, 4]] + residual)
    assert torch.equal(moved[:, [0, 2, 3]], value[:, [0, 2, 3]])


def test_a_residual_of_several_tokens_goes_token_by_token(randn):
    residual = randn(2, 3)
    moved = add_residual(residual.new_zeros(1, 6, 3), residual, [1, 2, 4, 5])
    assert torch.equal(moved[0, [1, 2, 4, 5]], torch.cat([residual, residual]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_residuals_take_the_dtype_of_the_values(dtype):
    assert add_residual(torch.zeros(1, 4, 3, dtype=dtype), torch.ones(1, 3), [0]).dtype == dtype


def test_a_repeated_prompt_has_its_noun_repeated():
    # The host repeats a context until it is as long as the longest of its batch.
    placement = Placement(torch.ones(1, 1, 3), ("middle.0.0",), rows=(1,), context_length=4)
    moved = placement.add_to(torch.zeros(1, 12, 3), "middle.0.0")
    assert moved[0, :, 0].nonzero().flatten().tolist() == [1, 5, 9]
    assert torch.equal(placement.add_to(torch.zeros(1, 12, 3), "input.1.0"), torch.zeros(1, 12, 3))


def test_rows_that_are_no_repeats_of_the_prompt_are_refused():
    placement = Placement(torch.ones(1, 1, 3), ("middle.0.0",), rows=(1,), context_length=4)
    with pytest.raises(infusion.UnsupportedModelError, match="sees 10 rows of text and the prompt has 4"):
        placement.add_to(torch.zeros(1, 10, 3), "middle.0.0")


def test_what_a_run_adds_is_made_once(unet, randn, monkeypatch):
    """No layer waits for the device a second time: neither for the noun's rows nor for a region's weights."""
    made = []
    for name in ("residual_rows", "region_weights"):
        original = getattr(infusion, name)
        monkeypatch.setattr(
            infusion, name, lambda *given, name=name, original=original: made.append(name) or original(*given)
        )
    region = torch.zeros(5, 9)
    region[:, 3:] = 1
    placements = [
        Placement(random_delta(randn), NAMES, (3,)),
        Placement(random_delta(randn), NAMES, (5,), region=region),
    ]
    batches = [inputs(randn) for _ in range(3)]
    moved = [predict(unet, batch, placements)[1] for batch in batches]
    assert made.count("residual_rows") == 2 * len(NAMES) and 1 <= made.count("region_weights") <= len(NAMES)
    for batch, expected in zip(batches, moved, strict=True):
        afresh = [replace(placement) for placement in placements]
        assert torch.equal(predict(unet, batch, afresh)[1], expected)


def test_what_is_learning_is_never_kept(randn):
    delta = torch.zeros(1, 1, 3, requires_grad=True)
    placement, value = Placement(delta, ("middle.0.0",), (1,)), randn(2, 4, 3)
    for count in (1, 2):
        placement.add_to(value, "middle.0.0").sum().backward()
        assert delta.grad.tolist() == [[[2.0 * count] * 3]]
    with torch.no_grad():
        delta.fill_(1.0)
    assert torch.equal(placement.add_to(value, "middle.0.0")[:, 1], value[:, 1] + 1)


def test_the_foundations_queries_are_constants(unet, randn):
    """Even where F is evaluated under autograd, no gradient comes back to it from C."""
    x, t, context = inputs(randn)
    store, x = {}, x.requires_grad_()
    unet(x, t, context, transformer_options=options(foundation_patches(store)))
    assert store and not any(n.requires_grad for n in store.values())


def test_repeating_the_prompt_changes_nothing(device, randn):
    attention = CrossAttention(32, 24, heads=2).to(device)
    n, context = randn(1, 48, 32), randn(1, 5, 24)
    placement = Placement(randn(1, 1, 24), ("middle.0.0",), (3,), context_length=5)
    once = attention(n, context, placement.add_to(context, "middle.0.0"))
    twice = context.repeat(1, 2, 1)
    torch.testing.assert_close(attention(n, twice, placement.add_to(twice, "middle.0.0")), once)


def test_the_cross_attention_is_the_papers(device, randn):
    """Eq. 5-6 written out with the map held, against the patches around the fused layer."""
    attention = CrossAttention(32, SMALL.context_dim, heads=2).to(device)
    n_f, n_c = randn(2, 2, 48, 32)
    context, delta = randn(2, 11, 24), randn(1, 1, 24)
    extra = {"block": ("middle", 0), "block_index": 0, "cond_or_uncond": [0]}
    store = {}
    placement = Placement(delta, ("middle.0.0",), rows=(3,), strength=0.5)
    foundation_patches(store)["attn2_patch"][0](n_f, context, context, extra)
    patched = n_c, context, context
    for patch in customised_patches(store, on_conditional([placement]))["attn2_patch"]:
        patched = patch(*patched, extra)

    def heads(x):
        return x.unflatten(-1, (2, 16)).transpose(1, 2)

    q, k = heads(attention.to_q(n_f)), heads(attention.to_k(context))
    onehot = torch.zeros(11, 1).index_fill(0, torch.tensor([3]), 1.0).to(device)
    v_bar = heads(attention.to_v(context + onehot * 0.5 * delta[0]))
    out = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(16), -1) @ v_bar
    torch.testing.assert_close(attention(*patched), attention.to_out(out.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_with_nothing_to_add_both_streams_are_the_plain_run(unet, randn):
    batch = inputs(randn)
    plain = unet(*batch)
    zero = Placement(torch.zeros(len(NAMES), 1, 24), NAMES, rows=(3,))
    for placements in ([], [zero], [Placement(random_delta(randn), NAMES, rows=(3,), strength=0.0)]):
        foundation, customised = predict(unet, batch, placements)
        assert torch.equal(foundation, plain) and torch.equal(customised, plain)


@torch.no_grad()
def test_only_the_customised_stream_changes(unet, randn):
    batch = inputs(randn)
    foundation, customised = predict(unet, batch, [Placement(random_delta(randn), NAMES, rows=(3,))])
    assert torch.equal(foundation, unet(*batch))
    assert not torch.allclose(customised, foundation, atol=1e-3)


def test_queries_are_the_foundations_whatever_the_latent(unet, randn):
    batch, other = inputs(randn), inputs(randn)
    seen = []

    def watch(n, context, value, extra_options):
        seen.append(n)
        return n, context, value

    store = {}
    unet(*other, transformer_options=options(foundation_patches(store)))
    patches = customised_patches(store, on_conditional([]))
    patches["attn2_patch"].append(watch)
    unet(*batch, transformer_options=options(patches))
    assert all(torch.equal(n, store[name, 0]) for n, name in zip(seen, NAMES, strict=True))


def test_concepts_at_two_nouns_are_one_concept_with_two_rows(unet, randn):
    """Eq. 9: several concepts are added each at its own token."""
    batch = inputs(randn)
    one, two = random_delta(randn), random_delta(randn)
    _, together = predict(unet, batch, [Placement(one, NAMES, (3,)), Placement(two, NAMES, (5,))])
    _, joined = predict(unet, batch, [Placement(torch.cat([one, two], dim=1), NAMES, (3, 5))])
    torch.testing.assert_close(together, joined)


def test_the_cost_does_not_grow_with_the_concepts(unet, randn):
    rows = []

    def watch(n, context, value, extra_options):
        rows.append(len(n))
        return n, context, value

    for count in (1, 4):
        store, batch = {}, inputs(randn)
        unet(*batch, transformer_options=options(foundation_patches(store)))
        placements = [Placement(random_delta(randn), NAMES, (row,)) for row in range(count)]
        patches = customised_patches(store, on_conditional(placements))
        unet(*batch, transformer_options=options({**patches, "attn2_patch": [*patches["attn2_patch"], watch]}))
    assert set(rows) == {2}


def test_chunks_without_placements_stay_plain(unet, randn):
    batch = inputs(randn, rows=4)
    foundation, customised = predict(unet, batch, [Placement(random_delta(randn), NAMES, (3,))], chunks=(1, 0))
    torch.testing.assert_close(customised[:2], foundation[:2])
    assert not torch.allclose(customised[2:], foundation[2:], atol=1e-3)


def test_a_region_of_everything_is_no_region(unet, randn):
    batch, delta = inputs(randn, rows=4), random_delta(randn)
    _, anywhere = predict(unet, batch, [Placement(delta, NAMES, (3,))], chunks=(1, 0))
    _, whole = predict(unet, batch, [Placement(delta, NAMES, (3,), region=torch.ones(5, 9))], chunks=(1, 0))
    torch.testing.assert_close(whole, anywhere, rtol=1e-4, atol=1e-4)
    _, nowhere = predict(unet, batch, [Placement(delta, NAMES, (3,), region=torch.zeros(5, 9))], chunks=(1, 0))
    torch.testing.assert_close(nowhere, unet(*batch), rtol=1e-4, atol=1e-4)


def test_regions_confine_what_their_concept_changes(device, randn):
    """In one layer the output moves inside the region by exactly what it moves without one, and not outside."""
    attention = CrossAttention(32, SMALL.context_dim, heads=2).to(device)
    n, context = randn(2, 48, 32), randn(2, 11, 24)
    extra = {"block": ("middle", 0), "block_index": 0, "cond_or_uncond": [1, 0], "activations_shape": [2, 32, 6, 8]}
    left = torch.zeros(6, 8)
    left[:, :4] = 1
    one, two = randn(2, 1, 1, 24)

    def out(*placements):
        store = {}
        foundation_patches(store)["attn2_patch"][0](n, context, context, extra)
        patches, patched = customised_patches(store, on_conditional(placements)), (n, context, context)
        for patch in patches["attn2_patch"]:
            patched = patch(*patched, extra)
        folded = attention(*patched)
        for patch in patches["attn2_output_patch"]:
            folded = patch(folded, extra)
        return folded.unflatten(1, (6, 8))

    names = ("middle.0.0",)
    plain = out()
    both = out(Placement(one, names, (3,), region=left), Placement(two, names, (5,), region=1 - left))
    only_one, only_two = out(Placement(one, names, (3,))), out(Placement(two, names, (5,)))
    torch.testing.assert_close(both[0], plain[0])
    torch.testing.assert_close(both[1, :, :4], only_one[1, :, :4])
    torch.testing.assert_close(both[1, :, 4:], only_two[1, :, 4:])


def test_regions_of_several_pictures(randn):
    masks = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    weights = infusion.region_weights(masks, 3, (2, 2))
    assert weights.shape == (3, 4, 1) and weights[:, 0, 0].tolist() == [0, 1, 0]


def test_a_region_is_cropped_to_an_area():
    region = torch.zeros(16, 16)
    region[:, 8:] = 1
    cropped = infusion.crop_region(region, (8, 8), (4, 4, 2, 4))
    assert cropped.shape == (1, 4, 4) and cropped.min() > 0.8
    assert infusion.crop_region(region, (8, 8), (4, 8, 6, 6)).shape == (1, 2, 2)


def test_the_gradient_reaches_the_residual_only(unet, randn):
    batch = inputs(randn)
    delta = torch.zeros(len(NAMES), 1, SMALL.context_dim, device=batch[0].device, requires_grad=True)
    _, customised = predict(unet, batch, [Placement(delta, NAMES, (3,))])
    gradient = torch.autograd.grad(customised.square().mean(), delta)[0]
    assert (gradient.abs().sum(dim=(1, 2)) > 0).all()
    # Against a central difference along the gradient.
    step, direction = 1e-2, gradient / gradient.norm()
    losses = [
        predict(unet, batch, [Placement(sign * step * direction, NAMES, (3,))])[1].square().mean() for sign in (1, -1)
    ]
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), gradient.norm(), rtol=2e-2, atol=1e-6)


def test_patches_write_to_nothing(unet, randn):
    x, t, context = inputs(randn)
    before = context.clone()
    predict(unet, (x, t, context), [Placement(random_delta(randn), NAMES, (3,))])
    assert torch.equal(context, before)


def test_customising_before_the_foundation_is_an_error(unet, randn):
    patches = customised_patches({}, on_conditional([]))
    with pytest.raises(RuntimeError, match=r"left no queries for layer input\.1\.0"):
        unet(*inputs(randn), transformer_options=options(patches))


def test_a_foundation_of_another_shape_is_an_error(unet, randn):
    store = {}
    unet(*inputs(randn, rows=1), transformer_options=options(foundation_patches(store)))
    with pytest.raises(RuntimeError, match=r"shape \(2, 48, 32\) in this stream and \(1, 48, 32\)"):
        unet(*inputs(randn), transformer_options=options(customised_patches(store, on_conditional([]))))


def test_the_window_of_noise_levels():
    placement = Placement(torch.zeros(1, 1, 3), ("middle.0.0",), (0,), sigma_start=5.0, sigma_end=1.0)
    assert [placement.is_active(sigma) for sigma in (6.0, 5.0, 1.0, 0.5)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": torch.zeros(2, 1, 3)}, "for 1 layers"),
        ({"delta": torch.zeros(1, 3)}, r"give \(layers, tokens, width\)"),
        ({"rows": ()}, "at least one row"),
        ({"rows": (-1,)}, "at least one row"),
        ({"delta": torch.zeros(1, 2, 3), "rows": (1, 2, 3)}, "2 tokens for 3 rows"),
        ({"strength": math.nan}, "strength=nan"),
        ({"sigma_start": math.nan}, "sigma_start=nan"),
        ({"sigma_end": math.nan}, "sigma_end=nan"),
        ({"region": torch.zeros(3)}, r"give \(H, W\)"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(wrong, message):
    right = {"delta": torch.zeros(1, 1, 3), "layers": ("middle.0.0",), "rows": (0,)}
    Placement(**right)
    with pytest.raises(ValueError, match=message):
        Placement(**{**right, **wrong})


def test_regions_are_not_folded_from_other_rows(unet, randn):
    """Another patch has merged rows behind ours: which are a region's, nobody can say."""
    store, batch = {}, inputs(randn)
    with torch.no_grad():
        unet(*batch, transformer_options=options(foundation_patches(store)))
        placement = Placement(random_delta(randn), NAMES, (3,), region=torch.ones(4, 4))
        patches = customised_patches(store, on_conditional([placement]))
        merge = [lambda n, extra_options: n[: len(n) // 2]]
        patches = {**patches, "attn2_output_patch": [*merge, *patches["attn2_output_patch"]]}
        with pytest.raises(RuntimeError, match=r"layer input\.1\.0 has 2 rows where 4 went in"):
            unet(*batch, transformer_options=options(patches))


def test_owners_say_whose_the_rows_are(unet, randn):
    """Rows of two owners in turns: the queries are found by owner, and the residual is in one's alone."""
    x, t, context = inputs(randn, rows=4)
    store, placement = {}, Placement(random_delta(randn), NAMES, (3,))

    def whose(order):
        return lambda extra_options, rows: order

    with torch.no_grad():
        plain = unet(x, t, context, transformer_options=options(foundation_patches(store, whose("abcd"))))
        patches = customised_patches(store, lambda _, owner: [placement] if owner in "ac" else [], whose("dcba"))
        moved = unet(x.flip(0), t, context.flip(0), transformer_options=options(patches)).flip(0)
    for row, is_moved in enumerate((True, False, True, False)):
        assert torch.allclose(moved[row], plain[row], atol=1e-4) is not is_moved
