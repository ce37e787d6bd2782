"""What a picture costs: C at every n-th step, and F's run kept for the next picture, to the bit of an unkept one."""

import sys

import pytest
import torch

samplers = pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_base  # noqa: E402
import comfy.samplers  # noqa: E402
import tiny  # noqa: E402
from infused import NEGATIVE, PROMPT  # noqa: E402

from profusion.toybox.pipeline import CELLS  # noqa: E402


@pytest.fixture
def rows(monkeypatch):
    """How many rows each call of the UNet has, seen from below all that the host's users can put on a model."""
    seen, apply = [], comfy.model_base.BaseModel._apply_model

    def counted(self, x, *args, **kwargs):
        seen.append(len(x))
        return apply(self, x, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "_apply_model", counted)
    return seen


@pytest.fixture(autouse=True)
def foundations(infused):
    """Nothing is kept of other tests."""
    kept = infused.pack.nodes.host.streams.FOUNDATIONS
    kept.clear()
    yield kept
    kept.clear()


def drawn(infused, kept=None, change=lambda x: x, residual=None, run=None, **inputs):
    """C's latent and the rows of each call; `kept` cleared before, where given."""
    if kept is not None:
        kept.clear()
    patched, positive = infused.patch(infused.residual() if residual is None else residual, **inputs)
    return infused.run(patched, change(positive), **(run or {}))


def assert_kept(infused, foundations, rows, cost=1.0, first={}, **second):  # noqa: B006
    """The second picture is that of an unkept run, for `cost` plain runs."""
    run = second.get("run") or {}
    rows.clear()
    infused.run(infused.model, infused.positive, **run)
    plain = sum(rows)
    expected = drawn(infused, foundations, **second)
    drawn(infused, foundations, **{**second, **first})
    rows.clear()
    assert torch.equal(drawn(infused, **second), expected)
    assert cost is None or sum(rows) == cost * plain
    return expected


@pytest.mark.parametrize("sampler", samplers.SAMPLER_NAMES)
def test_another_strength_with_every_sampler(infused, foundations, rows, sampler):
    """F's whole run is kept, noise and all: C alone is evaluated."""
    cost = None if sampler == "dpm_adaptive" else 1.0  # there C's steps are more than F's, or fewer
    assert_kept(infused, foundations, rows, cost, first={"strength": 0.5}, run={"sampler": sampler})


@pytest.mark.parametrize("background", ["free", "held", "held softly"])
def test_another_concept_and_several(infused, foundations, rows, background):
    other = {"residual": infused.residual(seed=8)}
    one = assert_kept(infused, foundations, rows, first=other, background=background, run={"batch": 2})
    more = {"residual_2": infused.residual(noun="grass", seed=6)}
    fewer = {"residual_2": None}
    if background == "free":
        both = assert_kept(infused, foundations, rows, first=fewer, **more)
        assert not torch.equal(one[:1], both)


def test_another_noun_is_looked_for_anew(infused, foundations, rows):
    """Where the background is held; and from then on both are known."""
    held = {"background": "held"}
    grass = {"residual": infused.residual(noun="grass", seed=6)}
    assert_kept(infused, foundations, rows, 2.0, first={"residual": infused.residual()}, **grass, **held)
    rows.clear()
    drawn(infused, **held)
    drawn(infused, **grass, **held)
    assert rows == 2 * 3 * [2]


def test_a_connected_region_needs_no_map(infused, foundations, rows):
    region = torch.zeros(1, 64, 64)
    region[:, :20, 8:40] = 1
    other = {"region": region.flip(-1)}
    assert_kept(infused, foundations, rows, first=other, region=region, background="held")


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"cfg": 4.0},
        {"steps": 4},
        {"scheduler": "karras"},
        {"sampler": "dpmpp_2m"},
        {"batch": 2},
        {"size": (8, 6)},
        {"latent": torch.ones(1, 4, 8, 8), "denoise": 0.5},
    ],
    ids=lambda other: " ".join(other),
)
def test_another_run_is_never_taken_for_it(infused, foundations, other):
    expected = drawn(infused, foundations, run=other)
    drawn(infused, foundations)
    assert torch.equal(drawn(infused, run=other), expected)


def test_another_prompt_or_negative_is_never_taken_for_it(infused, foundations):
    for text, negative in (("a ball on grass", None), (PROMPT, infused.encode("snow"))):
        given = {"text": text, "run": {"negative": negative}}
        expected = drawn(infused, foundations, **given)
        drawn(infused, foundations)
        assert torch.equal(drawn(infused, **given), expected)


def weights_moved(model):
    moved = model.clone()
    name = next(name for name in model.model.state_dict() if name.endswith("attn2.to_v.weight"))
    moved.add_patches({name: ("diff", (torch.ones_like(model.model.state_dict()[name]),))})
    return moved


def shifted(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]


@pytest.mark.parametrize("change", [weights_moved, shifted])
def test_another_model_is_never_taken_for_it(infused, foundations, rows, change):
    """Also where it has the same network; and it has its own."""
    drawn(infused)
    changed = change(infused.model)
    expected = drawn(infused, foundations, model=changed)
    drawn(infused, foundations)
    assert torch.equal(drawn(infused, model=changed), expected)
    rows.clear()
    assert torch.equal(drawn(infused, model=changed), expected)
    assert rows == 3 * [2]


def remembering(model):
    """A patch that remembers how often it was called."""
    calls = []

    def patch(n, context, value, extra):
        calls.append(1)
        return n * (1 + 0.01 * len(calls)), context, value

    patched = model.clone()
    patched.set_model_attn2_patch(patch)
    return patched


def wrapped(model):
    patched = model.clone()
    patched.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    return patched


@pytest.mark.parametrize("change", [remembering, wrapped])
def test_what_nobody_can_tell_is_evaluated_anew(infused, foundations, rows, change):
    for _ in range(2):
        rows.clear()
        drawn(infused, model=change(infused.model))
        assert rows == 6 * [2] and len(foundations) == 0


def test_guidance_of_other_packs_may_be_on_the_model(infused, foundations, rows):
    """It is around the evaluations, and has its own memory of each run."""
    model = infused.model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)
    given = {"model": model}
    assert_kept(infused, foundations, rows, first={"strength": 0.5}, **given)
    plainly = drawn(infused, foundations)
    drawn(infused, foundations, **given)
    assert torch.equal(drawn(infused), plainly)


def test_what_is_kept_is_bounded(infused, foundations, monkeypatch, rows):
    """First the queries go, which C can have again, then no more is kept; the picture is the same."""
    expected = drawn(infused, foundations)
    whole = foundations.size
    for limit, cost in ((whole, 3), (whole // 2, 4), (3 * 2 * 4 * 64 * 4, 6), (0, 6)):
        foundations.clear()
        monkeypatch.setattr(foundations, "_limit", limit)
        drawn(infused, strength=0.5)
        assert foundations.size <= limit
        rows.clear()
        assert torch.equal(drawn(infused), expected)
        assert cost <= len(rows) <= cost + 1 and foundations.size <= limit


def test_it_is_freed_with_the_model(infused, foundations):
    import gc

    import comfy.model_management

    patched, positive = infused.patch(infused.residual())  # held: the host unloads in its stead what it was cloned from
    infused.run(patched, positive)
    assert len(foundations) == 3 and foundations.size > 0
    comfy.model_management.unload_all_models()
    assert len(foundations) == 0
    model = tiny.model()
    drawn(infused, model=model)
    assert len(foundations) == 3
    comfy.model_management.unload_all_models()
    drawn(infused, model=model)
    foundations.begin(model.model)
    del model
    gc.collect()
    comfy.model_management.cleanup_models()
    drawn(infused)
    assert len(foundations) == 3


def test_before_it_begins_c_is_f_and_costs_nothing(infused, foundations, rows):
    given = {"start_percent": 0.5, "run": {"steps": 4}}
    drawn(infused, foundations, **given)
    assert rows == [2, 2, 2, 2, 2, 2]
    rows.clear()
    drawn(infused, foundations, strength=0.0, run={"steps": 4})
    assert rows == 4 * [2]


@pytest.mark.parametrize("background", ["free", "held", "held softly"])
def test_what_costs_nothing_changes_nothing(infused, foundations, monkeypatch, background):
    """As where nobody can tell, and all is evaluated."""
    given = {"start_percent": 0.5, "background": background, "run": {"steps": 5, "batch": 2}}
    spared = drawn(infused, foundations, **given)
    monkeypatch.setattr(infused.pack.nodes.host.streams, "_state_of", lambda patcher: None)
    assert torch.equal(drawn(infused, foundations, **given), spared)


@pytest.mark.parametrize("sampler", samplers.SAMPLER_NAMES)
def test_every_sampler_with_c_at_every_third_step(infused, foundations, rows, sampler):
    """Nothing to add is the plain picture; something is near the whole scheme's and costs less."""
    run = {"sampler": sampler, "steps": 7}
    plain = infused.run(infused.model, infused.positive, **run)
    cost = sum(rows)
    assert torch.equal(drawn(infused, every=3, strength=0.0, run=run), plain)
    rows.clear()
    cheap = drawn(infused, foundations, residual=infused.residual(0.3), every=3, run=run)
    assert cheap.isfinite().all() and not torch.equal(cheap, plain)
    if sampler == "dpm_adaptive":
        return
    # dpm_fast has noise levels of its own, several of them in one of the run's steps.
    most = 0.75 if sampler == "dpm_fast" else 0.6
    assert cost < sum(rows) <= (1 + most) * cost
    rows.clear()
    assert torch.equal(drawn(infused, residual=infused.residual(0.3), every=3, run=run), cheap)
    assert sum(rows) <= most * cost


@pytest.mark.parametrize("options", [{}, {"background": "held"}, {"background": "held softly"}, {"every": 2}], ids=str)
def test_a_stride_beside_what_nobody_can_tell(infused, foundations, options):
    """F leaves its queries at each step then: pictures are the same."""
    given = {"every": 3, "run": {"steps": 7, "batch": 2}, **options}
    known = drawn(infused, foundations, **given)
    assert torch.equal(drawn(infused, foundations, model=wrapped(infused.model), **given), known)


def test_regions_and_several_concepts_with_a_stride(infused, foundations):
    region = torch.zeros(1, 64, 64)
    region[:, :20, 8:40] = 1
    more = {"residual_2": infused.residual(noun="grass", seed=6), "region_2": region, "background": "held"}
    cheap = drawn(infused, foundations, every=2, run={"steps": 5}, **more)
    whole = drawn(infused, foundations, every=1, run={"steps": 5}, **more)
    plain = infused.run(infused.model, infused.positive, steps=5)
    assert not torch.equal(cheap, whole) and not torch.equal(cheap, plain)
    assert torch.equal(drawn(infused, every=2, run={"steps": 5}, **more), cheap)


@pytest.mark.parametrize("change", [lambda model: model, wrapped])
def test_a_window_is_seen_at_once(infused, change):
    """At the step at which concepts begin or end to act, whatever the stride."""
    model, steps = change(infused.model), {"steps": 12, "scheduler": "simple"}

    def previews(model, positive):
        seen = []
        infused.run(model, positive, callback=lambda step, x0, x, total: seen.append(x0), **steps)
        return seen

    def first_difference(one, other):
        return [torch.equal(x, y) for x, y in zip(one, other, strict=True)].index(False)

    plain = previews(model, infused.positive)
    window = {"start_percent": 0.25, "end_percent": 0.6}
    cheap, whole = (previews(*infused.patch(infused.residual(), model, every=every, **window)) for every in (8, 1))
    begun = first_difference(whole, plain)
    assert begun == first_difference(cheap, plain) == 3 and first_difference(cheap, whole) == begun + 1


@pytest.mark.parametrize("kind", ["LazyCacheNode", "EasyCacheNode"])
def test_a_stride_beside_a_step_cache(infused, kind):
    caches = pytest.importorskip("comfy_extras.nodes_easycache", reason="this host has no step caches")
    cached = getattr(caches, kind).execute(infused.model, 0.5, 0.15, 0.95, False).args[0]
    plain = infused.run(cached, infused.positive, steps=8)
    assert torch.equal(drawn(infused, model=cached, strength=0.0, every=3, run={"steps": 8}), plain)
    assert drawn(infused, model=cached, every=3, run={"steps": 8}).isfinite().all()


def test_a_shared_latent_with_a_stride(infused, foundations, rows):
    given = {"stream": "shared latent", "run": {"steps": 7}}
    drawn(infused, every=3, **given)
    assert rows == [2, 1, 2, 2, 1, 2, 2, 2, 1, 2]
    rows.clear()
    drawn(infused, start_percent=0.2, end_percent=0.6, **given)
    plain = infused.run(infused.model, infused.positive, steps=7)
    assert sum(rows) < 7 * 3 + 14 and rows[:2] == [2, 2] and rows[-2:] == [2, 2]
    assert torch.equal(drawn(infused, every=3, strength=0.0, **given), plain)


@pytest.mark.parametrize("every, steps", [(2, 4), (3, 5)])  # of more, rounding adds up
@pytest.mark.parametrize("background", ["free", "held"])
def test_the_kernel_draws_the_same(infused_toybox, every, steps, background):
    from profusion.toybox.pipeline import Toybox, seeded

    residual = infused_toybox.residual(1.0)
    patched, positive = infused_toybox.patch(residual, background=background, every=every)
    run = {"scheduler": "simple", "steps": steps, "cfg": 3.0, "size": (CELLS, CELLS)}
    theirs = infused_toybox.run(patched, positive, **run)
    plain, ours = Toybox.load().generate_customised(
        PROMPT, [residual], seeded(7), steps, 3.0, negative=NEGATIVE, background=background, every=every
    )
    theirs = infused_toybox.model.model.process_latent_in(theirs)
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def test_saved_graphs_without_the_choice_draw_as_before(infused, foundations):
    """A graph of the API names what it has; a new node has the default."""
    (entry,) = [entry for entry in infused.node.define_schema().inputs if entry.id == "every"]
    assert entry.optional and entry.default == sys.modules[f"{infused.pack.__name__}.profusion.stride"].EVERY
    assert torch.equal(drawn(infused, foundations), drawn(infused, foundations, every=1))


def two_apart(infused, regions="none", **more):
    """Inputs of two concepts that are kept apart. regions: of none, of both, where they meet, or of one."""
    left = torch.zeros(1, 64, 64)
    left[..., :40] = 1
    given = {"region": left} if regions != "none" else {}
    given |= {"region_2": left.flip(2)} if regions == "both" else {}
    other = infused.residual(noun="grass", seed=6)
    return {"concepts": "each apart", "background": "held", "residual_2": other, **given, **more}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("background", ["held", "held softly"])
@pytest.mark.parametrize("regions", ["none", "both", "one"])
def test_a_kept_run_with_concepts_apart(infused, foundations, rows, every, background, regions):
    """C alone is evaluated, once for each concept at its steps; the picture is an unkept one's to the bit."""
    run = {"steps": 6, "batch": 2}
    given = two_apart(infused, regions, background=background, every=every, run=run)
    first = {"strength": 0.5, "residual_2": infused.residual(noun="grass", seed=9)}
    apart = assert_kept(infused, foundations, rows, 2 / every, first=first, **given)
    together = drawn(infused, foundations, **{**given, "concepts": "together"})
    assert not torch.equal(apart, together)
    assert torch.equal(drawn(infused, **given), apart)  # what was kept for them together serves as well


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "euler_ancestral", "uni_pc"])
def test_a_kept_run_with_concepts_apart_with_other_samplers(infused, foundations, rows, sampler):
    given = two_apart(infused, every=2, run={"sampler": sampler, "steps": 5})
    assert_kept(infused, foundations, rows, None, first={"strength": 0.5}, **given)


def test_concepts_apart_need_the_map_of_a_noun_whose_region_is_given(infused, foundations, rows):
    """The share of each is found by it; where the run that was kept did not look for the noun, F is evaluated."""
    left = torch.zeros(1, 64, 64)
    left[..., :40] = 1
    given = two_apart(infused, "both", run={"steps": 3})
    assert_kept(infused, foundations, rows, 3.0, first={"residual_2": None, "region_2": None}, **given)
    rows.clear()
    drawn(infused, **{**given, "region_2": left})
    assert sum(rows) == 2 * 3 * 2  # from then on it is known


def test_a_concept_at_strength_0_beside_those_that_are_apart(infused, foundations, rows):
    """It has no evaluation of its own, nor does it change which of the others is which."""
    given = two_apart(infused, residual_3=infused.residual(noun="photo", seed=8), strength=0.0)
    assert_kept(infused, foundations, rows, 2.0, first={"strength_2": 0.5}, **given)


def test_two_concepts_of_one_noun_are_the_same_of_a_kept_run(infused, foundations, rows):
    """Their maps are alike, so that the first one counts: which that is must not depend on what was kept.

    In two prompts, whose rows the host evaluates in an order of its own.
    """

    def twice(positive):
        other = infused.patch(infused.residual(seed=8), concepts="each apart", background="held")[1]
        return positive + other

    given = {"concepts": "each apart", "background": "held", "change": twice, "run": {"steps": 3}}
    one = assert_kept(infused, foundations, rows, None, first={"strength": 0.5}, **given)
    assert not torch.equal(one, drawn(infused, **{**given, "change": lambda x: x}))


def test_with_a_stride_each_concept_is_what_it_is_alone(infused, foundations, rows):
    """What each differs by is carried on by itself, and at the steps that are C's alone anything is evaluated."""
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    first = {"residual": infused.residual(), "region": left}
    second = {"residual": infused.residual(noun="grass", seed=6), "region": left.flip(2)}
    both = {**first, **{f"{name}_2": value for name, value in second.items()}}
    given = {"concepts": "each apart", "background": "held", "every": 3, "run": {"steps": 7}}
    apart = drawn(infused, foundations, **both, **given)
    assert rows == [2, 2, 2, 2, 2] + [2, 2, 2, 2, 2] + [2, 2, 2]
    plain = infused.run(infused.model, infused.positive, steps=7)
    for inputs in (first, second):
        alone = drawn(infused, foundations, **inputs, **given)
        own = torch.nn.functional.adaptive_avg_pool2d(inputs["region"][None], 8).expand_as(plain) == 1
        assert torch.equal(apart[own], alone[own]) and not torch.equal(apart[own], plain[own])


@pytest.mark.parametrize("background", ["held", "held softly"])
def test_a_stride_with_concepts_apart_beside_what_nobody_can_tell(infused, foundations, background):
    """And where concepts begin and end to act."""
    window = {"start_percent": 0.2, "end_percent": 0.7}
    given = two_apart(infused, background=background, every=3, run={"steps": 7, "batch": 2}, **window)
    known = drawn(infused, foundations, **given)
    assert torch.equal(drawn(infused, foundations, model=wrapped(infused.model), **given), known)


def test_the_kernel_draws_concepts_apart_the_same_with_a_stride(infused_toybox):
    from profusion.toybox.pipeline import Toybox, seeded

    residuals = [infused_toybox.residual(1.0), infused_toybox.residual(1.0, noun="grass", seed=6)]
    given = {"background": "held", "concepts": "each apart", "every": 2}
    patched, positive = infused_toybox.patch(residuals[0], residual_2=residuals[1], **given)
    run = {"scheduler": "simple", "steps": 6, "cfg": 3.0, "size": (CELLS, CELLS)}
    theirs = infused_toybox.model.model.process_latent_in(infused_toybox.run(patched, positive, **run))
    draw = lambda **changed: Toybox.load().generate_customised(  # noqa: E731
        PROMPT, residuals, seeded(7), 6, 3.0, negative=NEGATIVE, **{**given, **changed}
    )
    plain, ours = draw()
    for other in (plain, draw(every=1)[1], draw(concepts="together")[1]):
        assert (ours - other).abs().max() > 1e-3 * plain.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
