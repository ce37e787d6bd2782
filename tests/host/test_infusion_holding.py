"""A held background in the host: outside the region the picture is the plain one to the bit, whatever is sampled."""

import inspect
import sys
from dataclasses import replace

import pytest
import torch

samplers = pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

from infused import NEGATIVE, PROMPT, seen_by_both  # noqa: E402

from profusion.toybox.pipeline import CELLS  # noqa: E402


def regions_of(infused, model, latent):
    return infused.pack.nodes.host.streams.drawn_region(model, latent)


def draw(infused, background="held", region=None, more=None, change=lambda x: x, model=None, strength=1.0, **options):
    """The plain latent, C's and the region, (B, 1, H, W)."""
    inputs = {**(more or {}), "background": background, **({} if region is None else {"region": region})}
    model = infused.model if model is None else model
    plain = infused.run(model, change(infused.positive), **options)
    patched, positive = infused.patch(infused.residual(3.0 * strength), model, **inputs)
    customised = infused.run(patched, change(positive), **options)
    return plain, customised, regions_of(infused, patched, customised)[:, None]


def assert_held(plain, customised, region):
    """F's outside the region, and not inside."""
    outside = (region == 0).expand_as(plain)
    assert region.any() and outside.any() and ((region == 0) | (region == 1)).all()
    assert torch.equal(customised[outside], plain[outside])
    assert not torch.equal(customised, plain)


@pytest.fixture(autouse=True)
def narrow(infused, monkeypatch):
    """A random model's maps are all but even: the region is where they are largest."""
    monkeypatch.setattr(infused.pack.profusion.holding.region_of, "__defaults__", (0.97, 0))


@pytest.mark.parametrize("sampler", samplers.SAMPLER_NAMES)
def test_every_sampler_holds_to_the_bit(infused, sampler):
    assert_held(*draw(infused, sampler=sampler))


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 3},
        {"cfg": 1.0},
        {"batch": 2, "cfg": 1.0, "sampler": "dpmpp_2m_sde"},
        {"size": (13, 11)},
        {"steps": 1},
        {"denoise": 0.6, "latent": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))},
        {"mask": torch.ones(1, 1, 8, 8).triu()},
    ],
    ids=lambda options: " ".join(options),
)
def test_batches_guidance_and_sizes_are_held(infused, options):
    assert_held(*draw(infused, **options))


@pytest.mark.parametrize("background", ["held", "held softly"])
def test_nothing_to_add_is_the_plain_picture(infused, background):
    plain = infused.run(infused.model, infused.positive, batch=2)
    for zero, strength in ((0.0, 1.0), (3.0, 0.0)):
        patched, positive = infused.patch(infused.residual(zero), background=background, strength=strength)
        assert torch.equal(infused.run(patched, positive, batch=2), plain)


@pytest.mark.parametrize("background", ["held", "held softly"])
def test_the_foundation_is_the_plain_run(infused, background):
    """What is looked for in it changes no bit of it."""
    foundations = []
    patched, positive = infused.patch(infused.residual())
    streams = infused.pack.nodes.host.streams
    watched = streams.add_streams(patched, infused.layers, False, foundations.append, background=background)
    infused.run(watched, positive, sampler="dpmpp_2m_sde", batch=2)
    plain = infused.run(infused.model, infused.positive, sampler="dpmpp_2m_sde", batch=2)
    assert torch.equal(infused.model.model.process_latent_out(foundations[0].float()), plain)


def test_free_is_as_it_is_without_the_choice(infused):
    patched, positive = infused.patch(infused.residual())
    free, free_positive = infused.patch(infused.residual(), background="free")
    customised = infused.run(free, free_positive)
    assert torch.equal(customised, infused.run(patched, positive))
    assert regions_of(infused, free, customised) is None


def test_softly_moves_less_than_free_and_has_an_edge(infused):
    plain, customised, region = draw(infused, "held softly", strength=3.0)
    assert ((region > 0) & (region < 1)).any()
    free = infused.run(*infused.patch(infused.residual(9.0)))
    assert 0 < (customised - plain).abs().sum() < (free - plain).abs().sum()


@pytest.mark.parametrize("masks", [1, 2])
def test_a_connected_region_is_the_one_that_is_left_free(infused, masks):
    region = torch.zeros(masks, 64, 64)
    region[0, :20, 8:40], region[-1, 30:, 30:] = 1, 1
    plain, customised, found = draw(infused, region=region, batch=masks)
    assert_held(plain, customised, found)
    expected = torch.nn.functional.adaptive_max_pool2d(region[:, None], 8)
    assert torch.equal(found, expected)
    assert (customised != plain).any(dim=1, keepdim=True)[expected == 1].all()


def test_several_concepts_are_held_together(infused):
    regions = []
    for noun in ("ball", "grass"):
        patched, positive = infused.patch(infused.residual(noun=noun), background="held")
        customised = infused.run(patched, positive)
        regions.append(regions_of(infused, patched, customised))
    more = {"residual_2": infused.residual(noun="grass", seed=6)}
    plain, customised, both = draw(infused, more=more)
    assert_held(plain, customised, both)
    assert torch.equal(both[:, 0], torch.maximum(*regions))


def two_concepts(infused, change=lambda residual: residual):
    """Each on its side of the picture: inputs of the first alone, of the second alone, and of both."""
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    first = {"residual": change(infused.residual()), "region": left}
    second = {"residual": change(infused.residual(noun="grass", seed=6)), "region": left.flip(2)}
    both = {**first, **{f"{name}_2": value for name, value in second.items()}}
    return (first, left), (second, left.flip(2)), both


def draw_inputs(infused, inputs, background="held", concepts="each apart", model=None, change=lambda x: x, **options):
    """C's latent with these inputs of the node."""
    inputs = dict(inputs)
    model = infused.model if model is None else model
    patched, positive = infused.patch(inputs.pop("residual"), model, background=background, concepts=concepts, **inputs)
    return infused.run(patched, change(positive), **options)


@pytest.mark.parametrize(
    "options",
    [{"sampler": "euler"}, {"sampler": "dpmpp_2m_sde", "batch": 2}, {"sampler": "uni_pc", "size": (10, 8)}],
    ids=lambda options: options["sampler"],
)
def test_concepts_apart_are_to_the_bit_what_each_is_alone(infused, options):
    first, second, both = two_concepts(infused)
    apart = draw_inputs(infused, both, **options)
    together = draw_inputs(infused, both, concepts="together", **options)
    plain = infused.run(infused.model, infused.positive, **options)
    for inputs, mask in (first, second):
        alone = draw_inputs(infused, inputs, **options)
        own = torch.nn.functional.adaptive_avg_pool2d(mask[None], plain.shape[-2:]).expand_as(plain) == 1
        assert torch.equal(apart[own], alone[own]) and not torch.equal(apart[own], plain[own])
        assert not torch.equal(together[own], alone[own])


@pytest.mark.parametrize("background", ["held", "held softly"])
def test_one_concept_apart_is_as_it_is(infused, background):
    one = {"residual": infused.residual()}
    apart, together = (draw_inputs(infused, one, background, how, batch=2) for how in ("each apart", "together"))
    assert torch.equal(apart, together)


@pytest.mark.parametrize("background", ["held", "held softly"])
def test_concepts_apart_with_nothing_to_add_are_the_plain_picture(infused, background):
    *_, both = two_concepts(infused, lambda residual: replace(residual, delta=torch.zeros_like(residual.delta)))
    plain = infused.run(infused.model, infused.positive)
    assert torch.equal(draw_inputs(infused, both, background), plain)


def test_what_draws_random_numbers_draws_the_same_for_each_concept(infused):
    """And what counts its calls counts those of one stream."""
    model, calls = infused.model.clone(), []

    class Noisy:
        def __init__(self):
            self.scale = 1.0

        def __call__(self, apply, args):
            self.scale *= 0.5
            calls.append(self.scale)
            x = args["input"]
            return apply(x + 0.1 * self.scale * torch.randn_like(x[:1]), args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(Noisy())
    first, second, both = two_concepts(infused)
    apart = draw_inputs(infused, both, model=model)
    assert calls.count(0.5) == 3 and len(calls) == 3 * 3  # F, and C for each concept
    for inputs, mask in (first, second):
        model.set_model_unet_function_wrapper(Noisy())
        alone = draw_inputs(infused, inputs, model=model)
        own = torch.nn.functional.adaptive_avg_pool2d(mask[None], 8).expand_as(apart) == 1
        assert torch.equal(apart[own], alone[own])


def test_concepts_apart_and_found_are_held(infused):
    """Softly as well, with an area, and beside conditionings that carry no concept."""
    both = {"residual": infused.residual(), "residual_2": infused.residual(noun="grass", seed=6)}
    beside = lambda x: in_area(x) + infused.encode("snow")  # noqa: E731
    plain = infused.run(infused.model, beside(infused.positive))
    for background in ("held", "held softly"):
        found = [draw_inputs(infused, both, background, how, change=beside) for how in ("each apart", "together")]
        assert all(not torch.equal(one, plain) for one in found) and not torch.equal(*found)
        outside = torch.ones(8, 8, dtype=torch.bool)
        outside[2:7, 3:7] = False
        assert background != "held" or torch.equal(found[0][..., outside], plain[..., outside])


def test_concepts_cannot_be_kept_apart_on_a_free_background(infused):
    with pytest.raises(ValueError, match="set background to 'held'"):
        infused.patch(infused.residual(), concepts="each apart")


def in_area(conditioning):
    return [[context, {**extras, "area": (5, 4, 2, 3), "strength": 1.0}] for context, extras in conditioning]


@pytest.mark.parametrize("region", [None, torch.ones(1, 64, 64)], ids=["found", "given"])
def test_an_area_is_where_the_concept_may_be(infused, region):
    plain, customised, found = draw(infused, region=region, change=lambda x: in_area(x) + infused.encode("snow"))
    assert_held(plain, customised, found)
    inside = torch.zeros(1, 1, 8, 8)
    inside[..., 2:7, 3:7] = 1
    assert (found <= inside).all() and (region is None or torch.equal(found, inside))


def test_a_prompt_whose_rows_are_repeated(infused):
    long = infused.encode(", ".join(["grey"] * 90))
    plain = infused.run(infused.model, infused.positive, long)
    patched, positive = infused.patch(infused.residual(), background="held")
    customised = infused.run(patched, positive, long)
    assert_held(plain, customised, regions_of(infused, patched, customised)[:, None])


def test_other_patches_stay_and_the_rest_is_held(infused):
    model = infused.model.clone()
    model.set_model_attn2_patch(lambda n, context, value, extra: (n * 0.9, context, value))
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] - 0.1 * args["denoised"].mean())
    assert_held(*draw(infused, model=model))


@pytest.mark.parametrize("kind", ["LazyCacheNode", "EasyCacheNode"])
def test_beside_a_step_cache(infused, kind):
    caches = pytest.importorskip("comfy_extras.nodes_easycache", reason="this host has no step caches")
    cached = getattr(caches, kind).execute(infused.model, 0.5, 0.15, 0.95, False).args[0]
    assert_held(*draw(infused, model=cached, steps=8))


def test_context_windows_of_a_batch(infused):
    windows = pytest.importorskip("comfy_extras.nodes_context_windows", reason="this host has no context windows")
    import comfy.context_windows as context

    given = {
        "context_length": 2,
        "context_overlap": 1,
        "context_schedule": context.ContextSchedules.STATIC_STANDARD,
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": context.ContextFuseMethods.PYRAMID,
        "dim": 0,
        "freenoise": False,
    }
    execute = windows.ContextWindowsManualNode.execute
    known = {name: given[name] for name in given if name in inspect.signature(execute).parameters}
    assert_held(*draw(infused, model=execute(infused.model, **known).args[0], batch=4))


def test_tiles_are_refused_by_name(infused):
    def in_tiles(apply, args):
        tiles = args["input"].chunk(2, dim=-1)
        return torch.cat([apply(tile, args["timestep"], **args["c"]) for tile in tiles], dim=-1)

    model = infused.model.clone()
    model.set_model_unet_function_wrapper(in_tiles)
    patched, positive = infused.patch(infused.residual(), model, background="held")
    with pytest.raises(RuntimeError, match="set background to free, or remove test_tiles"):
        infused.run(patched, positive)


@pytest.mark.parametrize("background", ["held", "held softly"])
def test_a_shared_latent_has_no_picture_to_hold_to(infused, background):
    with pytest.raises(ValueError, match="the foundation's own trajectory"):
        infused.patch(infused.residual(), stream="shared latent", background=background)


def test_the_model_is_evaluated_no_more_often(infused):
    seen = seen_by_both()
    model = infused.model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: seen.calls.append(1) or apply(args["input"], args["timestep"], **args["c"])
    )
    infused.run(*infused.patch(infused.residual(), model, background="held"))
    assert len(seen.calls) == 2 * 3


def test_regions_are_found_by_what_was_drawn(infused):
    patched, positive = infused.patch(infused.residual(), background="held")
    one, other = (infused.run(patched, positive, seed=seed) for seed in (1, 2))
    first = regions_of(infused, patched, one)
    assert not torch.equal(first, regions_of(infused, patched, other))
    assert torch.equal(regions_of(infused, patched.clone(), one), first)
    assert regions_of(infused, patched, torch.zeros_like(one)) is None
    assert regions_of(infused, infused.model, one) is None


def test_the_region_is_shown_as_a_mask(infused):
    region = sys.modules[f"{infused.pack.__name__}.nodes.region"].InfusionRegion
    patched, positive = infused.patch(infused.residual(), background="held")
    latent = infused.run(patched, positive, batch=2, size=(8, 6))
    (mask,) = region.execute(patched, {"samples": latent}).args
    assert mask.shape == (2, 64, 48) and torch.equal(mask[:, ::8, ::8], regions_of(infused, patched, latent))
    with pytest.raises(ValueError, match="set background of Infusion Attention Patch to 'held'"):
        region.execute(patched, {"samples": latent + 1})


@pytest.mark.parametrize(
    ("background", "concepts", "capacity"),
    [
        ("held", "together", 1),
        ("held softly", "together", 1),
        ("held", "each apart", 1),
        ("held softly", "each apart", 3),
        ("held", "together", 3),
    ],
)
def test_the_kernel_draws_the_same(infused_toybox, monkeypatch, background, concepts, capacity):
    """One formula in both: the two streams, the regions, the concepts' shares of them, and what is held."""
    from profusion import holding
    from profusion.toybox.pipeline import Toybox, seeded

    for module in (holding, infused_toybox.pack.profusion.holding):
        monkeypatch.setattr(module.region_of, "__defaults__", (0.35, 1))
    residuals = [infused_toybox.residual(1.0, capacity=capacity)]
    if concepts == "each apart":
        residuals.append(infused_toybox.residual(1.0, noun="grass", seed=6))
    more = {} if concepts == "together" else {"residual_2": residuals[1]}
    patched, positive = infused_toybox.patch(residuals[0], background=background, concepts=concepts, **more)
    run = {"scheduler": "simple", "steps": 4, "cfg": 3.0, "size": (CELLS, CELLS)}
    theirs = infused_toybox.run(patched, positive, **run)
    toybox, given = Toybox.load(), {"negative": NEGATIVE, "background": background}
    plain, ours = toybox.generate_customised(PROMPT, residuals, seeded(7), 4, 3.0, concepts=concepts, **given)
    theirs = infused_toybox.model.model.process_latent_in(theirs)
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()
    if concepts == "together":
        assert (ours == plain).all(dim=1).any()
    else:
        _, together = toybox.generate_customised(PROMPT, residuals, seeded(7), 4, 3.0, **given)
        assert (ours - together).abs().max() > 1e-2 * ours.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def test_the_regions_schema_is_frozen(infused):
    schema = sys.modules[f"{infused.pack.__name__}.nodes.region"].InfusionRegion.define_schema()
    assert schema.node_id == "ProFusion_InfusionRegion"
    assert [entry.id for entry in schema.inputs] == ["model", "latent"]
    assert [output.io_type for output in schema.outputs] == ["MASK"]
