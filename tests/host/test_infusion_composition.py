"""What people put on the same model and conditioning keeps working, and both streams stay exact with it."""

import pytest
import torch

samplers = pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import tiny  # noqa: E402
from infused import PROMPT, seen_by_both  # noqa: E402


def with_values(conditioning, values):
    return [[context, {**extras, **values}] for context, extras in conditioning]


@pytest.fixture
def additions(infused, monkeypatch):
    """Every value that a residual was added to, and at which rows."""
    calls, placement = [], infused.pack.profusion.infusion.Placement
    add_to = placement.add_to

    def note(self, value, layer):
        moved = add_to(self, value, layer)
        calls.append((value, (moved != value).any(dim=(0, 2)).nonzero().flatten().tolist()))
        return moved

    monkeypatch.setattr(placement, "add_to", note)
    return calls


LEFT, RIGHT = {"area": (8, 4, 0, 0)}, {"area": (8, 5, 0, 3)}
MASK = torch.zeros(1, 8, 8).index_fill(2, torch.arange(4), 1.0)


@pytest.mark.parametrize(
    "values",
    [
        LEFT,
        {"area": ("percentage", 0.5, 1.0, 0.5, 0.0)},
        {"mask": MASK, "mask_strength": 0.7},
        {"mask": MASK, "set_area_to_bounds": True},
        {"start_percent": 0.0, "end_percent": 0.5},
        {"strength": 0.5},
    ],
    ids=str,
)
def test_areas_masks_and_ranges_are_exact(infused, values):
    other = infused.encode("a hat")

    def several(conditioning):
        return with_values(conditioning, values) + with_values(other, RIGHT) + other

    infused.assert_node_exact(change=several, batch=2)


def test_an_area_does_not_put_the_concept_in_the_negative(infused, additions):
    """The host copies a conditioning with an area into the negative, id and all but with the negative's text."""
    model, positive = infused.patch(infused.residual())
    infused.run(model, with_values(positive, LEFT) + infused.encode("a hat"))
    assert additions and all(torch.equal(value[0], positive[0][0][0]) for value, _ in additions)


def test_conditionings_of_two_nodes(infused, additions):
    _, one = infused.patch(infused.residual(), text="a ball")
    model, two = infused.patch(infused.residual(seed=6), text="the red ball")
    infused.run(model, with_values(one, LEFT) + with_values(two, RIGHT))
    assert {tuple(rows) for _, rows in additions} == {(2,), (3,)}


def test_a_zeroed_out_conditioning_has_no_concept(infused, additions):
    """ConditioningZeroOut makes a negative of the positive, with all that it carries."""
    model, positive = infused.patch(infused.residual())
    negative = [[torch.zeros_like(positive[0][0]), dict(positive[0][1])]]
    infused.run(model, positive, negative)
    assert additions and all(value.any() for value, _ in additions)
    additions.clear()
    infused.run(model, negative, negative)
    assert not additions


def test_concatenated_and_averaged_conditionings_keep_the_concept(infused, additions):
    other = infused.encode("a hat")[0][0]
    model, positive = infused.patch(infused.residual())
    infused.run(model, [[torch.cat([positive[0][0], other], dim=1), positive[0][1]]], cfg=1.0)
    assert {tuple(rows) for _, rows in additions} == {(5,)}
    additions.clear()
    infused.run(model, [[0.5 * positive[0][0] + 0.5 * other, positive[0][1]]], cfg=1.0)
    assert {tuple(rows) for _, rows in additions} == {(5,)}


LONG = "a quiet meadow with many flowers of every colour under a wide evening sky, " * 6 + "and a ball"


def test_a_prompt_longer_than_a_chunk(infused, additions):
    infused.assert_node_exact(text=LONG)
    rows = {row for _, rows in additions for row in rows}
    assert len(rows) == 1 and 77 < min(rows) < 154


def test_a_negative_longer_than_the_prompt(infused, additions, monkeypatch):
    """The host then repeats the prompt's context, and the noun with it."""
    model, positive = infused.patch(infused.residual())
    negative = infused.encode(LONG)
    customised = infused.run(model, positive, negative)
    assert {tuple(rows) for _, rows in additions} == {(5, 5 + 77)}
    # Where memory is short the host evaluates them apart, and nothing is repeated.
    additions.clear()
    monkeypatch.setattr(infused.model.model, "memory_required", lambda *args, **kwargs: 1e30)
    apart = infused.run(model, positive, negative)
    assert {tuple(rows) for _, rows in additions} == {(5,)}
    torch.testing.assert_close(apart, customised, rtol=1e-3, atol=1e-2 * customised.std().item())


def test_regions(infused):
    plain = infused.run(infused.model, infused.positive)
    right = torch.zeros(1, 64, 64)
    right[..., 32:] = 1
    zero, positive = infused.patch(infused.residual(0.0), region=right)
    assert torch.equal(infused.run(zero, positive), plain)
    customised, foundation = infused.run_both(*infused.patch(infused.residual(), region=right))
    assert torch.equal(foundation, plain)
    everywhere = infused.run(*infused.patch(infused.residual()))
    ones = infused.run(*infused.patch(infused.residual(), region=torch.ones(1, 16, 16)))
    scale = plain.std().item()
    torch.testing.assert_close(ones, everywhere, rtol=1e-3, atol=1e-3 * scale)
    assert not torch.allclose(customised, everywhere, atol=1e-2 * scale)


def test_a_region_within_an_area_is_cropped_to_it(infused):
    right = torch.zeros(1, 8, 8)
    right[..., 4:] = 1
    outside = with_values(infused.patch(infused.residual(), region=right)[1], LEFT)
    model, inside = infused.patch(infused.residual(), region=1 - right)
    other = infused.encode("a hat")
    plain = infused.run(infused.model, with_values(infused.positive, LEFT) + other)
    torch.testing.assert_close(infused.run(model, outside + other), plain, rtol=1e-3, atol=1e-3 * plain.std().item())
    assert not torch.allclose(infused.run(model, with_values(inside, LEFT) + other), plain, atol=0.1)


def test_a_lora_is_exact(infused):
    import comfy.sd

    generator = torch.Generator().manual_seed(4)
    lora = {}
    for name, weight in infused.model.model.diffusion_model.named_parameters():
        if name.endswith(("to_q.weight", "to_v.weight")):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            lora[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
            lora[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) / 20
    model, _ = comfy.sd.load_lora_for_models(infused.model, None, lora, 1.0, 0)
    assert not torch.equal(infused.run(model, infused.positive), infused.run(infused.model, infused.positive))
    infused.assert_node_exact(model)


@pytest.mark.parametrize("to_negative", [False, True])
def test_a_controlnet_is_exact(infused, to_negative):
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    control = tiny.controlnet().set_cond_hint(hint, 0.8, (0.0, 0.7))
    values = {"control": control, "control_apply_to_uncond": to_negative}

    def controlled(conditioning):
        return with_values(conditioning, values)

    plain = infused.run(infused.model, infused.positive)
    assert not torch.equal(infused.run(infused.model, controlled(infused.positive)), plain)
    infused.assert_node_exact(change=controlled, batch=2)


def test_a_pack_that_replaces_attn2_is_exact(infused):
    """As image-prompt adapters do: attention to the text, plus attention to tokens of a picture."""
    from comfy.ldm.modules.attention import optimized_attention

    noted = seen_by_both()

    def replace(q, k, v, extra_options):
        chunks = extra_options["cond_or_uncond"]
        assert len(q) == len(k) == len(v) and len(q) % len(chunks) == 0
        noted.calls.append(len(q))
        heads = extra_options["n_heads"]
        tokens = torch.ones(len(q), 4, q.shape[-1]).cumsum(1).sin()
        seen = optimized_attention(q, tokens, tokens, heads)
        weight = torch.tensor([1.0 - index for index in chunks]).repeat_interleave(len(q) // len(chunks))
        return optimized_attention(q, k, v, heads) + weight[:, None, None] * seen

    model = infused.model.clone()
    for block in (("input", 1), ("middle", 0), ("output", 2)):
        model.set_model_attn2_replace(replace, *block)
    assert not torch.equal(infused.run(model, infused.positive), infused.run(infused.model, infused.positive))
    infused.assert_node_exact(model)
    patched, positive = infused.patch(infused.residual(), model)
    assert patched.model_options["transformer_options"]["patches_replace"]["attn2"].keys() == {
        ("input", 1),
        ("middle", 0),
        ("output", 2),
    }
    noted.calls.clear()
    infused.run(*infused.patch(infused.residual(), model, region=MASK), batch=2)
    assert set(noted.calls) == {4, 8}


def test_other_attention_patches_are_exact(infused):
    model = infused.model.clone()
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (q * 1.1, k, v))
    model.set_model_attn2_patch(lambda n, context, value, extra_options: (n * 0.9, context, value * 1.1))
    model.set_model_attn2_output_patch(lambda n, extra_options: n * 0.8)
    model.set_model_output_block_patch(lambda h, skip, transformer_options: (h, skip * 0.5))
    infused.assert_node_exact(model)


def test_guidance_that_evaluates_the_model_again_is_exact(infused):
    """As perturbed attention guidance does: the model is called once more in each step, with its attention changed."""
    import comfy.model_patcher

    def perturb(args):
        options = comfy.model_patcher.create_model_options_clone(args["model_options"])
        options = comfy.model_patcher.set_model_options_patch_replace(
            options, lambda q, k, v, extra_options: v, "attn1", "middle", 0
        )
        (perturbed,) = samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - perturbed) * 2.0

    model = infused.model.clone()
    model.set_model_sampler_post_cfg_function(perturb)
    infused.assert_node_exact(model)


@pytest.mark.parametrize("cache", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("cache_first", [False, True])
def test_step_caches_are_exact(infused, cache, cache_first):
    """The host's own caches of whole steps: each stream has one of its own."""
    from comfy_extras import nodes_easycache

    def cached(model):
        return getattr(nodes_easycache, cache).execute(model, 0.4, 0.1, 0.95, False).args[0]

    calls = []

    def count(apply, args):
        calls.append(1)
        return apply(args["input"], args["timestep"], **args["c"])

    model = infused.model.clone()
    model.set_model_unet_function_wrapper(count)
    plain = infused.run(cached(model), infused.positive, steps=12)
    if cache == "LazyCacheNode":
        assert len(calls) < 12

    def patch(size):
        if cache_first:
            return infused.patch(infused.residual(size), cached(model))
        patched, positive = infused.patch(infused.residual(size), model)
        return cached(patched), positive

    assert torch.equal(infused.run(*patch(0.0), steps=12), plain)
    model, positive = patch(3.0)
    customised = infused.run(model, positive, steps=12)
    assert not torch.equal(customised, plain)
    assert torch.equal(infused.run(model, positive, steps=12), customised)


def test_guiders_with_other_conditionings_are_exact(infused):
    """Dual guidance evaluates three conditionings, in an order of its own."""
    import comfy.sample
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    sigmas = samplers.calculate_sigmas(infused.model.get_model_object("model_sampling"), "normal", 3)
    middle = infused.encode("a hat")

    def run(model, positive):
        guider = Guider_DualCFG(model)
        guider.set_conds(positive, middle, infused.negative)
        guider.set_cfg(4.0, 2.0)
        noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 3)
        with torch.inference_mode():
            return guider.sample(
                noise, torch.zeros(1, 4, 8, 8), samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=3
            )

    plain = run(infused.model, infused.positive)
    assert torch.equal(run(*infused.patch(infused.residual(0.0))), plain)
    assert not torch.equal(run(*infused.patch(infused.residual())), plain)


def test_several_concepts(infused, additions):
    text = "a ball and a cat beside a hat"
    names = {"ball": 2, "cat": 5, "hat": 8}
    residuals = [infused.residual(noun=noun, seed=seed) for seed, noun in enumerate(names)]
    model, positive = infused.patch(residuals[0], text=text, residual_2=residuals[1], residual_4=residuals[2])
    plain = infused.run(infused.model, infused.encode(text))
    customised, foundation = infused.run_both(model, positive)
    assert torch.equal(foundation, plain) and not torch.equal(customised, plain)
    assert {tuple(rows) for _, rows in additions} == {(row,) for row in names.values()}
    additions.clear()
    infused.run(*infused.patch(residuals[0], text=text, residual_2=residuals[1], strength_2=0.0, region_2=MASK))
    assert {tuple(rows) for _, rows in additions} == {(2,)}


def test_the_context_is_the_plain_prompts(infused):
    assert torch.equal(infused.patch(infused.residual(), text=PROMPT)[1][0][0], infused.positive[0][0])
