"""Fusion Sampling in the host: nothing changes where nothing is asked for, and any sampler can refine."""

import importlib
import inspect
from functools import partial

import pytest
import torch

comfy_samplers = pytest.importorskip("comfy.samplers", reason="ComfyUI was not found: set COMFYUI_PATH")

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import tiny  # noqa: E402

NEGATIVE, PROMPTS = "blurry", ("a photo of a ball on grass", "a star")


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def texts():
    clip = tiny.clip()
    return [tiny.encode(clip, text) for text in (*PROMPTS, NEGATIVE)]


@pytest.fixture(scope="module")
def node(pack):
    def run(model, positive, negative, whole=False, **inputs):
        defaults = {
            "seed": 7,
            "steps": 4,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "latent_image": {"samples": torch.zeros(1, 4, 8, 8)},
            "fusion_steps": 1,
            "eta": 1.0,
            "fusion_start": 0.0,
            "fusion_end": 1.0,
            "fusion_cfg": 3.0,
            "gamma": 0.8,
            "mode": "dependent",
            "refresh": 1,
        }
        with torch.inference_mode():
            output = pack.nodes.fusion.FusionKSampler.execute(
                model, positive=positive, negative=negative, **{**defaults, **inputs}
            )
        return output.args[0] if whole else output.args[0]["samples"]

    return run


class Counted:
    """A model that notes what each call of its network was given: rows, cond_or_uncond and stage."""

    def __init__(self, model, stage_key):
        self.model, self.calls = model.clone(), []

        def wrapper(apply_model, arguments):
            options = arguments["c"]["transformer_options"]
            self.calls.append((len(arguments["input"]), tuple(arguments["cond_or_uncond"]), options.get(stage_key)))
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        self.model.set_model_unet_function_wrapper(wrapper)


@pytest.fixture
def counted(model, pack):
    return Counted(model, pack.nodes.host.fusion.STAGE)


def test_the_kernel_knows_how_the_node_comes(pack):
    """Demo and benchmarks draw as the node does."""
    defaults = {
        entry.id: getattr(entry, "default", None) for entry in pack.nodes.fusion.FusionKSampler.GET_SCHEMA().inputs
    }
    kernel = importlib.import_module(f"{pack.__name__}.profusion.toybox.fused")
    guided, options = kernel.GUIDED, kernel.first_levels(kernel.FUSED_SHARE, 20)
    for name in ("fusion_cfg", "gamma", "mode", "refresh"):
        assert defaults[name] == getattr(guided, name)
    assert not defaults["text_in_fusion"] and guided.fusion_weights == (1.0, 0.0)
    assert guided.weights == (1.0, defaults["text_weight"])
    assert (defaults["fusion_steps"], defaults["eta"], defaults["fusion_start"]) == (options.repeats, options.eta, 0.0)
    assert defaults["fusion_end"] == kernel.FUSED_SHARE


def test_the_kernel_and_the_node_fuse_the_same_levels(node, counted, texts, pack):
    positive, text, negative = texts
    kernel = importlib.import_module(f"{pack.__name__}.profusion.toybox.fused")
    for steps in (5, 12, 20, 25):
        counted.calls.clear()
        node(counted.model, positive, negative, steps=steps, scheduler="simple", fusion_end=0.2)
        sigmas = comfy_samplers.KSampler(
            counted.model, steps, counted.model.load_device, "euler", "simple"
        ).sigmas.tolist()
        options = kernel.first_levels(0.2, steps)
        expected = sum(options.repeats_at(one, after) for one, after in zip(sigmas, sigmas[1:], strict=False))
        assert [stage for *_, stage in counted.calls].count("fusion") == expected > 0


def test_the_schemas_are_valid(pack):
    for node in pack.nodes.fusion.NODES:
        schema = node.GET_SCHEMA()
        assert schema.node_id in ("ProFusion_FusionGuider", "ProFusion_FusionSampler", "ProFusion_FusionKSampler")
        assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))


@pytest.mark.parametrize("sampler", comfy_samplers.KSampler.SAMPLERS)
def test_without_fusion_steps_and_further_terms_it_is_ksampler_bit_for_bit(node, model, texts, sampler):
    positive, _, negative = texts
    for inputs in ({"fusion_steps": 0}, {"eta": 0.0, "refresh": 2}):
        same = node(model, positive, negative, sampler_name=sampler, **inputs)
        assert torch.equal(same, tiny.sample(model, positive, negative, sampler, steps=4))


@pytest.mark.parametrize(
    "options", [{"cfg": 1.0}, {"denoise": 0.6, "latent": True}, {"mask": True, "latent": True}, {"batch": 3}]
)
def test_the_plain_run_is_ksamplers_in_every_mode_of_use(node, model, texts, options, generator):
    positive, _, negative = texts
    latent = torch.randn(options.pop("batch", 1), 4, 8, 8, generator=generator)
    latent = latent if options.pop("latent", False) else torch.zeros_like(latent)
    inputs = {"samples": latent}
    if options.pop("mask", False):
        options["mask"] = inputs["noise_mask"] = (torch.rand(1, 64, 64, generator=generator) > 0.5).float()
    expected = tiny.sample(model, positive, negative, steps=4, latent=latent, **options)
    options.pop("mask", None)
    assert torch.equal(node(model, positive, negative, latent_image=inputs, fusion_steps=0, **options), expected)


def test_what_the_host_notes_of_an_empty_latent_reaches_the_sampler_and_goes_no_further(node, model, texts, generator):
    positive, _, negative = texts
    latent = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8, "batch_index": [0]}
    if "downscale_ratio_spacial" not in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters:
        pytest.skip("this host notes nothing of an empty latent")
    whole = node(model, positive, negative, latent_image=latent, whole=True)
    assert set(whole) == {"samples", "batch_index"}
    twice = node(model, positive, negative, latent_image={**latent, "downscale_ratio_spacial": 16})
    assert twice.shape[-2:] == (16, 16)  # an empty latent of sixteen pixels a cell, for a model of eight


@pytest.mark.parametrize("stream", [None, "own trajectory"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_picture_of_a_batch_is_the_same_alone(node, model, texts, infused, steps, stream):
    """Picture 2 of 3 equals Latent From Batch -> sampler with the same seed."""
    positive, text, negative = texts
    if stream is not None:
        model, positive = infused.patch(infused.residual(size=2.0), model=model, stream=stream)
    inputs = {"text": text, "fusion_steps": steps, "fusion_end": 0.8, "refresh": 1}
    batch = node(model, positive, negative, latent_image={"samples": torch.zeros(3, 4, 8, 8)}, **inputs)
    one = {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [1]}
    alone = node(model, positive, negative, latent_image=one, **inputs)
    plain = node(model, positive, negative, latent_image=one, **{**inputs, "fusion_steps": 0})
    rounding = 1e-3  # a batch of another size rounds differently
    torch.testing.assert_close(batch[1:2], alone, rtol=rounding, atol=rounding)
    assert (batch[:1] - batch[1:2]).abs().max() > 0.1
    if steps:
        assert (plain - alone).abs().max() > 0.1


@pytest.mark.parametrize("sampler", comfy_samplers.KSampler.SAMPLERS)
def test_every_sampler_refines(node, model, texts, sampler):
    """Finite, the same twice, and not the plain run."""
    positive, text, negative = texts
    inputs = {"sampler_name": sampler, "text": text, "fusion_end": 0.8}
    one = node(model, positive, negative, **inputs)
    assert one.isfinite().all()
    assert torch.equal(one, node(model, positive, negative, **inputs))
    assert not torch.equal(one, node(model, positive, negative, **{**inputs, "fusion_steps": 0}))


def test_all_terms_of_a_step_are_one_batch_and_are_counted(node, counted, texts, pack, monkeypatch):
    positive, text, negative = texts
    shown = []
    monkeypatch.setattr(pack.nodes.fusion, "show", lambda cls, text: shown.append(text))
    node(counted.model, positive, negative, text=text, latent_image={"samples": torch.zeros(2, 4, 8, 8)})
    stages = [stage for _, _, stage in counted.calls]
    assert stages == ["fusion", None] * 3 + [None]  # none before the last step
    assert all((rows, sorted(which)) == (6, [0, 0, 1]) for rows, which, _ in counted.calls)  # packs know no 2
    assert shown == ["5.25 evaluations a step and picture (KSampler: 2)"]  # 7 calls of 3, in 4 steps


def test_refresh_saves_rows_where_there_are_several_terms(node, counted, texts):
    """In each stage by itself: F R F R F R, and a last R."""
    positive, text, negative = texts
    node(counted.model, positive, negative, text=text, refresh=2)
    assert [rows for rows, *_ in counted.calls] == [3, 3, 1, 1, 3, 3, 1]
    assert all(which == (0,) for rows, which, _ in counted.calls if rows == 1)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde"])
def test_what_refresh_keeps_is_the_difference_of_noise(node, model, texts, sampler, monkeypatch):
    """Where the terms do differ by the same noise at every level, keeping changes nothing: denoised pictures then
    differ by that times sigma, which the kept differences must follow."""
    offsets = dict(zip((0, 1, 2), torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5)), strict=True))

    def straight(inner_model, conds, x, sigma, model_options):
        return [x / (1 + sigma**2) - sigma * offsets[index] for index, _ in enumerate(conds)]

    monkeypatch.setattr(comfy_samplers, "calc_cond_batch", straight)
    positive, text, negative = texts
    every, second = (
        node(model, positive, negative, text=text, sampler_name=sampler, refresh=refresh) for refresh in (1, 2)
    )
    torch.testing.assert_close(second, every, rtol=1e-4, atol=1e-4 * every.abs().max().item())


def test_a_stage_without_guidance_leaves_the_negative_out(node, counted, texts):
    positive, text, negative = texts
    result = node(counted.model, positive, negative, text=text, refresh=2, fusion_cfg=1.0)
    assert result.isfinite().all() and [rows for rows, *_ in counted.calls] == [2, 3, 1, 1, 2, 3, 1]
    counted.calls.clear()
    node(counted.model, positive, negative, text=text, refresh=2, fusion_cfg=1.0, cfg=1.0)
    assert [rows for rows, *_ in counted.calls] == [2, 2, 1, 1, 2, 2, 1]


def test_the_stages_are_the_kernels(node, model, texts, pack):
    """The node's run against the kernel's `sample_fusion` on the same model, guidance and noise."""
    positive, text, negative = texts
    fusion, glue = pack.profusion.fusion, pack.nodes.host.fusion
    result = node(model, positive, negative, text=text, text_weight=0.5, fusion_steps=2, eta=0.7, fusion_end=0.6)

    guider = comfy_samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive, "negative": negative, "text": text})
    sigmas = comfy_samplers.KSampler(model, 4, model.load_device, "euler", "normal").sigmas

    class Straight(comfy_samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            network, sampling = model_wrap.inner_model, model_wrap.inner_model.model_sampling

            def denoise(x, sigma, stage):
                conds = [guider.conds[name] for name in ("positive", "negative", "text")]
                word, nothing, text = comfy_samplers.calc_cond_batch(
                    network, conds, x, sigma, {"transformer_options": {}}
                )
                mean = (1 / 1.5) * word + (
                    0.5 / 1.5
                ) * text  # another order of rounding grows to 1e-3 in a random model
                return nothing + (mean - nothing) * (3.0 if stage == "fusion" else 5.0)

            def refine(x, first, last):
                for sigma, after in zip(sigmas[first:last], sigmas[first + 1 : last + 1], strict=True):
                    denoised = denoise(x, sigma.expand(len(x)), "refinement")
                    x = denoised + (x - denoised) * (after / sigma)
                return x

            start = sampling.noise_scaling(
                sigmas[0], noise, torch.zeros_like(noise), self.max_denoise(model_wrap, sigmas)
            )
            options = fusion.FusionOptions(2, 0.7, sigma_end=float(sampling.percent_to_sigma(0.6)))
            fresh = fusion.fresh_noise(glue.row_generators(7, noise))
            fuse = partial(denoise, stage="fusion")
            return fusion.sample_fusion(fuse, refine, start, sigmas, options, fresh)

    zeros = torch.zeros(1, 4, 8, 8)
    with torch.inference_mode():
        expected = guider.sample(
            comfy.sample.prepare_noise(zeros, 7), zeros, Straight(), sigmas, disable_pbar=True, seed=7
        )
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_window_limits_the_cost(node, counted, texts):
    positive, _, negative = texts
    node(counted.model, positive, negative, steps=10, fusion_start=0.2, fusion_end=0.5)
    stages = [stage for _, _, stage in counted.calls]
    assert 2 <= stages.count("fusion") <= 4 and stages.count(None) == 10
    assert stages[0] is None and stages[-1] is None


def test_progress_goes_on_over_the_stretches(node, model, texts, pack, monkeypatch):
    positive, _, negative = texts
    seen = []
    monkeypatch.setattr(
        pack.nodes.host.fusion.latent_preview,
        "prepare_callback",
        lambda model, steps, *_: lambda step, denoised, x, total: seen.append((step, total, steps)),
    )
    node(model, positive, negative, sampler_name="dpmpp_2m")
    assert seen == [(0, 4, 4), (1, 4, 4), (2, 4, 4), (3, 4, 4)]


def test_stochastic_samplers_draw_new_noise_in_every_stretch(model, texts, pack):
    """From one seed each stretch would begin the same stream again."""
    seeds = []

    def inner(model, x, sigmas, extra_args=None, callback=None, disable=None):
        seeds.append(extra_args["seed"])
        return x

    sampling = pack.nodes.host.fusion.FusionSampling(
        comfy_samplers.KSAMPLER(inner), pack.profusion.fusion.FusionOptions()
    )
    guider = comfy_samplers.CFGGuider(model)
    guider.set_conds(texts[0], texts[2])
    sigmas, zeros = torch.tensor([9.0, 5.0, 2.0, 0.0]), torch.zeros(1, 4, 8, 8)
    with torch.inference_mode():
        guider.sample(zeros + 1, zeros, sampling, sigmas, disable_pbar=True, seed=7)
    assert len(seeds) == 2 and seeds[0] == 7 and len(set(seeds)) == 2


def test_cancel_acts_within_the_fusion_stage(node, model, texts, monkeypatch):
    positive, _, negative = texts
    asked = []

    def cancel():
        asked.append(1)
        if len(asked) == 3:
            raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        node(model, positive, negative, fusion_steps=5)
    monkeypatch.undo()
    plain = node(model, positive, negative, fusion_steps=0)
    assert torch.equal(plain, tiny.sample(model, positive, negative, steps=4))  # nothing is left behind


def test_a_flow_model_works_unchanged(node, texts):
    """Random weights; x = (1 - sigma) x0 + sigma eps."""
    import comfy.model_sampling

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flow = tiny.model().clone()
    flow.add_object_patch("model_sampling", Flow(flow.model.model_config))
    positive, text, negative = texts
    plain = tiny.sample(flow, positive, negative, steps=4, scheduler="simple")
    assert torch.equal(node(flow, positive, negative, fusion_steps=0, scheduler="simple"), plain)
    fused = node(flow, positive, negative, text=text, scheduler="simple")
    assert fused.isfinite().all() and not torch.equal(fused, plain)
    assert 0.3 < fused.std() / plain.std() < 3  # the noise level is kept: nothing explodes


def test_the_guider_and_the_sampler_compose_with_the_hosts_own(pack, model, texts):
    positive, text, negative = texts
    inner = comfy_samplers.sampler_object("euler")
    sampler = pack.nodes.fusion.FusionSamplerNode.execute(inner, 1, 1.0, 0.0, 1.0).args[0]
    guider = pack.nodes.fusion.FusionGuiderNode.execute(
        model, positive, 1.0, negative, 5.0, 3.0, 0.8, "dependent", conditioning_2=text, weight_2=0.5
    ).args[0]
    plain_guider = comfy_samplers.CFGGuider(model)
    plain_guider.set_conds(positive, negative)
    plain_guider.set_cfg(5.0)
    sigmas, zeros = torch.tensor([9.0, 5.0, 2.0, 0.0]), torch.zeros(1, 4, 8, 8)
    noise, results = comfy.sample.prepare_noise(zeros, 7), []
    for one, other in ((guider, inner), (guider, sampler), (plain_guider, sampler)):
        with torch.inference_mode():
            results.append(one.sample(noise, zeros, other, sigmas, disable_pbar=True, seed=7))
    assert all(result.isfinite().all() for result in results)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"eta": 1.5}, "eta=1.5"),
        ({"text_weight": -1.0}, "sum to 0"),
        ({"fusion_start": 0.6, "fusion_end": 0.3}, "never act"),
        ({"refresh": 0}, "refresh=0"),
    ],
)
def test_bad_inputs_are_explained(node, model, texts, inputs, message):
    positive, text, negative = texts
    with pytest.raises(ValueError, match=message):
        node(model, positive, negative, text=text, **inputs)


def test_a_term_of_weight_zero_costs_nothing(node, counted, texts):
    positive, text, negative = texts
    node(counted.model, positive, negative, text=text, text_weight=0.0, fusion_steps=0)
    assert all(rows == 2 for rows, _, _ in counted.calls)


@pytest.mark.parametrize("count", [2, 3])
def test_a_term_of_weight_zero_leaves_its_areas_to_itself(pack, model, texts, count):
    """The host copies a conditioning's area into the conditionings that have none there."""
    positive, text, negative = texts

    def within(conditioning, left):
        return [[context, {**extras, "area": (8, 5, 0, left)}] for context, extras in conditioning]

    others = {f"conditioning_{index}": within(text, 3 * (index % 2)) for index in range(2, count + 1)}
    weights = {f"weight_{index}": 0.0 for index in range(2, count + 1)}
    given = (1.0, negative, 5.0, 3.0, 0.8, "dependent")
    sampler, sigmas = comfy_samplers.sampler_object("euler"), torch.tensor([9.0, 5.0, 2.0, 0.0])
    zeros = torch.zeros(1, 4, 8, 8)
    noise, results = comfy.sample.prepare_noise(zeros, 7), []
    for more in ({}, {**others, **weights}, others | dict.fromkeys(weights, 0.5)):
        guider = pack.nodes.fusion.FusionGuiderNode.execute(model, within(positive, 0), *given, **more).args[0]
        with torch.inference_mode():
            results.append(guider.sample(noise, zeros, sampler, sigmas, disable_pbar=True, seed=7))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
