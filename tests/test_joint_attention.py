"""Infusion on attention that text takes part in, against softmax written out; whatever shapes a host gives it in."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from profusion.attending import JointAttention
from profusion.holding import NounMaps
from profusion.infusion import Placement, on_conditional, with_patches
from profusion.joint_attention import COLUMN, WHOLE, customised_patches, foundation_patches, map_patches
from profusion.text_attention import TEXT, Layout, TextCall, UnknownAttentionError, check_layers, check_layout

B, HEADS, KEY_HEADS, D, LINES, COLUMNS, WORDS = 2, 4, 2, 8, 2, 3, 5
PICTURE, ROWS = LINES * COLUMNS, (1, 3)
NAME = {True: "joint.0", False: "cross.0"}


def attention(query, key, value, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **_):
    """As the host's: its keys and values may have fewer heads, and SD3's are in heads already."""
    if not skip_reshape:
        query, key, value = (x.flatten(2).unflatten(2, (-1, D)).transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def tensors(joint, shape, seed=0, key_heads=HEADS):
    """q, k, v (B, L, H, d) in a host's shape."""
    generator = torch.Generator().manual_seed(seed)
    text = PICTURE + WORDS if joint else WORDS
    query = torch.randn(B, PICTURE + WORDS if joint else PICTURE, HEADS, D, generator=generator)
    key, value = (torch.randn(B, text, key_heads, D, generator=generator) for _ in range(2))
    if shape == "split":
        return [x.transpose(1, 2) for x in (query, key, value)], {"skip_reshape": True, "skip_output_reshape": True}
    return [query.flatten(2), *((key, value) if shape == "sd3" else (key.flatten(2), value.flatten(2)))], {}


def placement(joint, **given):
    delta = torch.randn(1, 1, KEY_HEADS * D, generator=torch.Generator().manual_seed(7))
    return Placement(delta, (NAME[joint],), ROWS, **given)


def evaluated(layout, given, patches, call=None, theirs=None):
    """(B, L, H, d): one attention of a network call with these patches."""
    (query, key, value), named = given
    call = call or TextCall(WORDS, (2 * LINES, 2 * COLUMNS))
    options = {"cond_or_uncond": [0, 1], TEXT: call}
    if theirs is not None:
        options["optimized_attention_override"] = theirs
    options = with_patches({"transformer_options": options}, patches)["transformer_options"]
    override = options["optimized_attention_override"]
    out = override(attention, query, key, value, HEADS, transformer_options=options, **named)
    return out.transpose(1, 2) if named else out.unflatten(2, (HEADS, D))


def streams(layout, lock, placed, first, second):
    """F's output of one given attention, and C's of another."""
    store = {}
    plain = evaluated(layout, first, foundation_patches(layout, lock, store, on_conditional(placed)))
    return plain, evaluated(layout, second, customised_patches(layout, lock, store, on_conditional(placed)))


def written_out(given):
    """Map (B, H, Lq, Lk) and values (B, H, Lk, d) of an attention, in heads."""
    (query, key, value), named = given
    if not named:
        query, key, value = (x.flatten(2).unflatten(2, (-1, D)).transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (key, value))
    return (query @ key.transpose(-1, -2) / D**0.5).softmax(-1), value


def residual(placement):
    """(H, d)."""
    return placement.strength * placement.delta[0, 0].view(KEY_HEADS, D).repeat_interleave(HEADS // KEY_HEADS, 0)


@pytest.mark.parametrize("shape", ["split", "flat", "sd3"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS])
def test_both_locks_are_their_formulas(joint, shape, key_heads):
    layout, placed = Layout(joint, 1), placement(joint, strength=0.5)
    first, second = (tensors(joint, shape, seed, key_heads) for seed in (0, 1))
    (f_map, f_values), (c_map, c_values) = written_out(first), written_out(second)
    text = WORDS if joint else 0
    column = f_map[:1, :, text:, list(ROWS)].sum(-1)  # of the first row alone: the second is the negative prompt's
    added = torch.einsum("nhp,hd->nphd", column, residual(placed))
    plain, column_lock = streams(layout, COLUMN, [placed], first, second)
    torch.testing.assert_close(plain, (f_map @ f_values).transpose(1, 2))
    expected = (c_map @ c_values).transpose(1, 2).clone()
    expected[:1, text:] += added
    expected[:, :text] = plain[:, :text]  # the prompt never learns of the concept
    torch.testing.assert_close(column_lock, expected)
    _, whole = streams(layout, WHOLE, [placed], first, second)
    key = f_map if joint else written_out(((first[0][0], second[0][1], second[0][2]), first[1]))[0]
    moved = c_values.clone()
    moved[:1, :, list(ROWS)] += residual(placed)[:, None]
    expected = (key @ moved).transpose(1, 2).clone()
    expected[:, :text] = plain[:, :text]
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("lock", [COLUMN, WHOLE])
@pytest.mark.parametrize("joint", [True, False])
def test_where_streams_are_alike_nothing_to_add_is_plain_to_the_bit(joint, lock):
    layout, given = Layout(joint, 1), tensors(joint, "split")
    for placed in ([], [placement(joint, strength=0.0)], [replace(placement(joint), layers=("joint.7",))]):
        plain, customised = streams(layout, lock, placed, given, given)
        assert torch.equal(plain, attention(*given[0], HEADS, **given[1]).transpose(1, 2))
        assert torch.equal(customised, plain)


@pytest.mark.parametrize("lock", [COLUMN, WHOLE])
def test_a_region_confines_a_concept_and_two_concepts_add_up(lock):
    layout, given = Layout(True, 1), tensors(True, "flat")
    left = torch.zeros(2 * LINES, 2 * COLUMNS)
    left[:, :2] = 1
    one, two = placement(True, region=left), replace(placement(True), rows=(4,), delta=placement(True).delta.flip(-1))
    plain, alone = streams(layout, lock, [one], given, given)
    moved = (alone != plain).any(-1).any(-1)[0, WORDS:].view(LINES, COLUMNS)
    assert moved.tolist() == [[True, False, False]] * LINES
    _, other = streams(layout, lock, [two], given, given)
    _, both = streams(layout, lock, [one, two], given, given)
    torch.testing.assert_close(both - plain, (alone - plain) + (other - plain))


@pytest.mark.parametrize("lock", [COLUMN, WHOLE])
@pytest.mark.parametrize("joint", [True, False])
def test_the_room_that_is_asked_for_is_what_a_concept_needs(joint, lock):
    layout, store = Layout(joint, 1), {}
    evaluated(
        layout, tensors(joint, "split"), foundation_patches(layout, lock, store, on_conditional([placement(joint)] * 2))
    )
    of_positive = sum(left[0].numel() for (_, owner), left in store.items() if owner == 0)
    cells = 4 * PICTURE
    (told,) = JointAttention(layout, lock, HEADS, HEADS * D).numbers_left(None, cells, WORDS)
    assert told * cells == pytest.approx(of_positive)


def test_a_residual_of_several_tokens_has_one_for_each_row():
    layout, given = Layout(True, 1), tensors(True, "split")
    delta = torch.randn(1, 2, KEY_HEADS * D, generator=torch.Generator().manual_seed(3))
    apart = [Placement(delta[:, index : index + 1], ("joint.0",), (row,)) for index, row in enumerate(ROWS)]
    for lock in (COLUMN, WHOLE):
        together = streams(layout, lock, [Placement(delta, ("joint.0",), ROWS)], given, given)[1]
        torch.testing.assert_close(together, streams(layout, lock, apart, given, given)[1])


def test_maps_are_the_nouns_column_on_the_pictures_grid():
    layout, given, maps = Layout(True, 1), tensors(True, "split"), NounMaps(1, (2 * LINES, 2 * COLUMNS))
    evaluated(layout, given, map_patches(layout, maps, on_conditional([placement(True)])))
    column = written_out(given)[0][:1, :, WORDS:, list(ROWS)].sum(-1).mean(1).view(1, LINES, COLUMNS)
    expected = F.interpolate(column[:, None], scale_factor=2, mode="bilinear", antialias=True)[:, 0]
    torch.testing.assert_close(maps.maps((0, 0)), expected)


def test_the_gradient_is_that_of_the_formula():
    layout, first, second = Layout(True, 1), tensors(True, "flat"), tensors(True, "flat", 1)
    weights = torch.randn(B, PICTURE + WORDS, HEADS, D, generator=torch.Generator().manual_seed(4))
    for lock in (COLUMN, WHOLE):

        def loss(delta, lock=lock):
            placed = replace(placement(True), delta=delta)
            return (streams(layout, lock, [placed], first, second)[1] * weights).square().sum()

        delta = placement(True).delta.double().float().requires_grad_()
        loss(delta).backward()
        way = torch.randn(delta.shape, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            slope = (loss(delta + 0.1 * way) - loss(delta - 0.1 * way)) / 0.2
        torch.testing.assert_close((delta.grad * way).sum(), slope, rtol=1e-3, atol=1e-3)


def test_attentions_without_text_and_other_packs_are_left_alone():
    layout, seen = Layout(True, 1), []

    def theirs(function, *args, **named):
        seen.append(args[0].shape[2])
        return function(*args, **named)

    given = tensors(True, "split")
    patches = foundation_patches(layout, WHOLE, {}, on_conditional([]))
    of_picture = [x[:, :, WORDS:] for x in given[0]], given[1]
    call = TextCall(WORDS, (2 * LINES, 2 * COLUMNS))
    evaluated(layout, of_picture, patches, call, theirs)
    assert call.layers == 0
    evaluated(layout, given, patches, call, theirs)
    assert call.layers == 1 and seen == [PICTURE, PICTURE + WORDS]
    with pytest.raises(UnknownAttentionError, match="1 attentions with text, and here are more"):
        evaluated(layout, given, patches, call)


def test_a_layout_tells_text_from_picture():
    call = TextCall(5, (1, 4, 6))
    padded = Layout(True, 9, multiple=4, references=False)
    span = padded.span(call, 16, 16)
    assert (span.text, span.picture) == ((0, 8), (8, 14))
    assert padded.span(call, 8, 8) is None  # a refiner's
    with pytest.raises(UnknownAttentionError, match="leave out the reference pictures"):
        padded.span(call, 20, 20)
    assert Layout(True, 9).span(call, 40, 40).picture == (5, 11)  # reference pictures come after
    cross = Layout(False, 9)
    assert cross.span(call, 6, 257) is None and cross.span(call, 6, 6) is None
    assert cross.span(call, 6, 5).picture == (0, 6)
    alike = TextCall(6, (4, 6))
    assert [cross.span(alike, 6, 6) is not None for _ in range(4)] == [False, True] * 2


def fake_host(layout, order=lambda rows: rows, layers=1):
    """An evaluation of a network whose values are its context's rows, in some order, and zeros for the picture."""

    def evaluate(context, patches):
        call = TextCall(WORDS, (2 * LINES, 2 * COLUMNS))
        text = order(context.expand(B, -1, -1).unflatten(2, (HEADS, D)))
        value = torch.cat([text, torch.zeros(B, PICTURE, HEADS, D)], dim=1).transpose(1, 2)
        for _ in range(layers):
            evaluated(
                layout, ([value, value, value], {"skip_reshape": True, "skip_output_reshape": True}), patches, call
            )
        return call

    return evaluate


def test_a_host_is_proved_to_have_text_where_the_layout_says():
    context = torch.randn(1, WORDS, HEADS * D, generator=torch.Generator().manual_seed(1))
    for name, order, fails in (
        ("as told", lambda rows: rows, False),
        ("other", lambda rows: rows.roll(1, dims=1), True),
    ):
        layout = Layout(True, 1, name=name)
        patches = foundation_patches(layout, COLUMN, {}, on_conditional([]))
        expected = pytest.raises(UnknownAttentionError, match="other's text is not where") if fails else nullcontext()
        with expected:
            check_layout(patches, context, fake_host(layout, order))
    again = Layout(True, 1, name="as told")
    check_layout(foundation_patches(again, COLUMN, {}, on_conditional([])), context, None)  # once for each


def test_a_network_that_leaves_out_layers_is_refused():
    layout = Layout(True, 2, name="Two")
    patches = foundation_patches(layout, COLUMN, {}, on_conditional([]))
    context = torch.zeros(1, WORDS, HEADS * D)
    for layers in (0, 2):
        check_layers(patches, fake_host(layout, layers=layers)(context, patches))
    with pytest.raises(UnknownAttentionError, match="Two is known to have 2 attentions with text, and 1 were seen"):
        check_layers(patches, fake_host(layout, layers=1)(context, patches))
