"""The two streams in the host's own samplers: F is the plain run bit for bit, and so is C with nothing to add."""

import threading

import pytest
import torch

samplers = pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management  # noqa: E402
import tiny  # noqa: E402
from infused import PROMPT, seen_by_both  # noqa: E402

from profusion.toybox.pipeline import CELLS  # noqa: E402


@pytest.mark.parametrize("sampler", samplers.SAMPLER_NAMES)
def test_every_sampler_is_exact(infused, sampler):
    infused.assert_node_exact(sampler=sampler)


@pytest.mark.parametrize("scheduler", samplers.SCHEDULER_NAMES)
def test_every_scheduler_is_exact(infused, scheduler):
    infused.assert_node_exact(scheduler=scheduler)


@pytest.mark.parametrize("sampler", samplers.SAMPLER_NAMES)
def test_every_sampler_is_exact_on_toybox(infused_toybox, sampler):
    infused_toybox.assert_node_exact(sampler=sampler, size=(CELLS, CELLS))


@pytest.mark.parametrize("scheduler", samplers.SCHEDULER_NAMES)
def test_every_scheduler_is_exact_on_toybox(infused_toybox, scheduler):
    infused_toybox.assert_node_exact(scheduler=scheduler, size=(CELLS, CELLS))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "euler_ancestral"])
@pytest.mark.parametrize(
    "options", [{"batch": 3}, {"cfg": 1.0}, {"batch": 2, "cfg": 1.0}, {"size": (13, 11)}, {"steps": 1}], ids=str
)
def test_batches_guidance_and_sizes_are_exact(infused, sampler, options):
    infused.assert_node_exact(sampler=sampler, **options)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m_sde"])
@pytest.mark.parametrize("masks", [0, 1, 2])
def test_image_to_image_and_inpainting_are_exact(infused, sampler, masks):
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(masks, 1, 64, 64) if masks else None
    if masks:
        mask[0, :, 32:], mask[-1, :, :, :40] = 1, 1
    infused.assert_node_exact(sampler=sampler, latent=latent, denoise=0.6, mask=mask)


def test_inpainting_keeps_what_is_masked_out(infused):
    latent, mask = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    customised = infused.run(*infused.patch(infused.residual()), latent=latent, mask=mask)
    torch.testing.assert_close(customised[..., :4], latent[..., :4])


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_shared_latent(infused, sampler):
    plain = infused.run(infused.model, infused.positive, sampler=sampler)
    zero, positive = infused.patch(infused.residual(0.0), stream="shared latent")
    assert torch.equal(infused.run(zero, positive, sampler=sampler), plain)
    shared, positive = infused.patch(infused.residual(), stream="shared latent")
    customised = infused.run(shared, positive, sampler=sampler)
    assert torch.equal(infused.run(shared, positive, sampler=sampler), customised)
    own, positive = infused.patch(infused.residual())
    assert not torch.equal(customised, plain)
    assert not torch.equal(customised, infused.run(own, positive, sampler=sampler))


def rows_of_a_run(infused, model, positive, **options):
    """How many rows each call of the UNet had."""
    seen = seen_by_both()
    watched = model.clone()
    watched.set_model_unet_function_wrapper(
        lambda apply, args: seen.calls.append(len(args["input"])) or apply(args["input"], args["timestep"], **args["c"])
    )
    return infused.run(watched, positive, **options), seen.calls


def test_on_a_shared_latent_the_negative_is_evaluated_once(infused, monkeypatch):
    """It is the same row in both streams: three rows a step, not four; and without anything to add, the plain run's."""
    shared, positive = infused.patch(infused.residual(), stream="shared latent")
    customised, rows = rows_of_a_run(infused, shared, positive)
    assert rows == 3 * [2, 1]
    zero, zero_positive = infused.patch(infused.residual(0.0), stream="shared latent")
    assert rows_of_a_run(infused, zero, zero_positive)[1] == 3 * [2]
    streams = infused.pack.nodes.host.streams
    monkeypatch.setattr(streams._Streams, "_moves", lambda self, *_: True)
    both, rows = rows_of_a_run(infused, shared, positive)
    assert rows == 3 * [2, 2]
    torch.testing.assert_close(customised, both, rtol=1e-4, atol=1e-4 * both.std().item())


def test_noise_from_the_global_generator_is_the_same_for_both(infused):
    """Some samplers of other packs draw so; here the host's euler with churn does."""
    import comfy.k_diffusion.sampling
    import comfy.sample

    sampler = samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_euler, {"s_churn": 2.0, "s_tmax": 1e9})
    sigmas = samplers.calculate_sigmas(infused.model.get_model_object("model_sampling"), "normal", 4)

    def run(model, positive):
        latent = torch.zeros(1, 4, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 3)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model, noise, 5.0, sampler, sigmas, positive, infused.negative, latent, disable_pbar=True, seed=3
            )

    plain, after = run(infused.model, infused.positive), torch.get_rng_state()
    assert torch.equal(run(*infused.patch(infused.residual(0.0))), plain)
    run(*infused.patch(infused.residual()))
    assert torch.equal(torch.get_rng_state(), after)


def test_strength_scales_the_effect(infused):
    plain = infused.run(infused.model, infused.positive)
    moved = [
        (infused.run(*infused.patch(infused.residual(), strength=strength)) - plain).norm()
        for strength in (0.0, 0.01, 0.1, 1.0)
    ]
    assert moved[0] == 0 and moved[0] < moved[1] < moved[2] < moved[3]


def test_the_window_of_sampling(infused):
    """Until a concept becomes active the customised latent is the plain one; a window that no step falls in is none."""
    latents = {}

    def steps(name, model, positive):
        seen = []
        infused.run(model, positive, steps=4, callback=lambda step, x0, x, total: seen.append(x.clone()))
        latents[name] = seen

    steps("plain", infused.model, infused.positive)
    steps("late", *infused.patch(infused.residual(), start_percent=0.5))
    same = [torch.equal(x, y) for x, y in zip(latents["plain"], latents["late"], strict=True)]
    assert same[0] and same[1] and not same[-1]
    steps("early", *infused.patch(infused.residual(), end_percent=0.3))
    steps("whole", *infused.patch(infused.residual()))
    assert torch.equal(latents["early"][1], latents["whole"][1])
    assert not torch.equal(latents["early"][-1], latents["whole"][-1])
    steps("never", *infused.patch(infused.residual(), start_percent=0.40, end_percent=0.41))
    assert all(torch.equal(x, y) for x, y in zip(latents["plain"], latents["never"], strict=True))


def test_previews_show_the_customised_picture(infused):
    calls = []
    model, positive = infused.patch(infused.residual())
    final = infused.run(
        model, positive, batch=2, callback=lambda step, x0, x, total: calls.append((step, x0, x, total))
    )
    assert [(step, total) for step, _, _, total in calls] == [(0, 3), (1, 3), (2, 3)]
    assert {x0.shape for _, x0, _, _ in calls} == {x.shape for _, _, x, _ in calls} == {final.shape}
    torch.testing.assert_close(model.model.process_latent_out(calls[-1][1].float()), final)


def test_nothing_is_left_on_the_model(infused):
    model = tiny.model()
    plain = infused.run(model, infused.positive)
    before = repr(model.model_options), repr(model.wrappers), dict(model.object_patches)
    patched, positive = infused.patch(infused.residual(), model)
    infused.run(patched, positive)
    assert (repr(model.model_options), repr(model.wrappers), dict(model.object_patches)) == before
    assert torch.equal(infused.run(model, infused.positive), plain)
    infused.run(patched, positive)
    assert torch.equal(infused.run(model, infused.positive), plain)


def test_a_conditioning_without_concepts_makes_a_plain_run_and_says_so(infused, caplog):
    """At the plain run's cost, too."""
    seen = seen_by_both()
    model, positive = infused.patch(infused.residual())
    model.set_model_unet_function_wrapper(
        lambda apply, args: seen.calls.append(1) or apply(args["input"], args["timestep"], **args["c"])
    )
    assert torch.equal(infused.run(model, infused.positive), infused.run(infused.model, infused.positive))
    assert len(seen.calls) == 3
    infused.run(model, infused.positive)
    seen.calls[3:] = []
    (record,) = [record for record in caplog.records if record.name == "ProFusion"]
    assert "without a concept" in record.getMessage()
    caplog.clear()
    infused.run(model, positive)
    assert len(seen.calls) == 3 + 2 * 3
    assert not [record for record in caplog.records if record.name == "ProFusion"]


def test_a_conditioning_with_concepts_breaks_nothing_on_a_plain_model(infused):
    """The MODEL output was forgotten. Nothing of ours runs then, so nobody can say so."""
    _, positive = infused.patch(infused.residual())
    before = repr(infused.model.model_options)
    assert infused.run(infused.model, positive).isfinite().all()
    assert repr(infused.model.model_options) == before


def test_a_second_node_on_the_model_takes_the_first_ones_place(infused):
    first, positive = infused.patch(infused.residual(), stream="shared latent")
    second, second_positive = infused.patch(infused.residual(seed=6), first, text="the ball")
    assert [len(callables) for group in second.wrappers.values() for callables in group.values()] == [1, 1, 1]
    alone, _ = infused.patch(infused.residual())
    assert torch.equal(infused.run(second, positive), infused.run(alone, positive))
    alone, alone_positive = infused.patch(infused.residual(seed=6), text="the ball")
    assert torch.equal(infused.run(second, second_positive), infused.run(alone, alone_positive))


@pytest.mark.parametrize("stream", ["own trajectory", "shared latent"])
def test_an_interrupt_at_any_step_leaves_nothing_behind(infused, stream):
    import comfy.model_management

    model, positive = infused.patch(infused.residual(), stream=stream)
    whole, threads = infused.run(model, positive), threading.active_count()
    for last in range(3):

        def interrupt(step, *_, last=last):
            if step == last:
                raise comfy.model_management.InterruptProcessingException

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            infused.run(model, positive, callback=interrupt)
        assert threading.active_count() == threads
    assert torch.equal(infused.run(model, positive), whole)


@pytest.mark.parametrize("failing", range(6))
def test_an_error_in_either_stream_is_the_callers(infused, failing):
    """The model is called for F and C in turn; each call fails once."""
    model, positive = infused.patch(infused.residual())
    seen, threads = seen_by_both(), threading.active_count()

    def fail(apply, args):
        seen.calls.append(1)
        if len(seen.calls) == failing + 1:
            raise RuntimeError("out of memory, say")
        return apply(args["input"], args["timestep"], **args["c"])

    broken = model.clone()
    broken.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        infused.run(broken, positive)
    assert len(seen.calls) == failing + 1 and threading.active_count() == threads


def test_the_model_is_always_called_in_the_callers_thread(infused):
    """Compiled models and device streams belong to a thread."""
    seen = seen_by_both()
    model, positive = infused.patch(infused.residual())

    def note(apply, args):
        seen.calls.append(threading.get_ident())
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(note)
    infused.run(model, positive)
    assert seen.calls == 6 * [threading.get_ident()]


def test_the_prompt_is_the_hosts(infused):
    _, positive = infused.patch(infused.residual())
    assert torch.equal(positive[0][0], infused.encode(PROMPT)[0][0])
    assert torch.equal(positive[0][1]["pooled_output"], infused.encode(PROMPT)[0][1]["pooled_output"])


def test_both_streams_compute_under_the_callers_modes(infused, monkeypatch):
    """A sampler that computes with matrices, under autocast: F is the plain run still."""
    seen = []

    @torch.no_grad()
    def mixing(model, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones(len(x))
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            seen.append(torch.is_autocast_enabled("cpu"))
            slope = (x - model(x, sigma * ones, **extra_args)) / sigma
            mixed = slope.flatten(2) @ torch.eye(x[0, 0].numel(), device=x.device)  # rounded under autocast
            x = x + mixed.view_as(x).float() * (after - sigma)
        return x

    monkeypatch.setattr("comfy.samplers.ksampler", lambda *_, **__: samplers.KSAMPLER(mixing))
    patched, positive = infused.patch(infused.residual())
    plain = infused.run(infused.model, infused.positive)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = infused.run(infused.model, infused.positive)
        _, foundation = infused.run_both(patched, positive)
    assert torch.equal(foundation, rounded) and not torch.equal(rounded, plain)
    assert set(seen) == {False, True}


@pytest.mark.parametrize("apart", [True, False])
def test_the_host_is_told_of_what_f_leaves(infused, monkeypatch, apart):
    """Where it makes room: at least that much more than for the plain run, and not several times as much."""
    queries = infused.pack.profusion.queries
    if apart:
        monkeypatch.setattr(queries, "OWN_MEMORY", ("cpu",))
        monkeypatch.setattr(infused.pack.nodes.host.streams, "OWN_MEMORY", ("cpu",))
    asked, load = [], comfy.model_management.load_models_gpu

    def watched(models, memory_required=0, **options):
        asked.append((memory_required, options["minimum_memory_required"]))
        return load(models, memory_required=memory_required, **options)

    patched, positive = infused.patch(infused.residual())
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched)
    stores, made = [], infused.pack.nodes.host.streams.WaitingQueries

    def watched_store():
        stores.append(made())
        return stores[-1]

    monkeypatch.setattr(infused.pack.nodes.host.streams, "WaitingQueries", watched_store)
    infused.run(infused.model, infused.positive, batch=2, size=(32, 32))
    infused.run(patched, positive, batch=2, size=(32, 32))
    (store,) = stores
    left = sum(value.numel() * 4 for value in store.values())
    assert left == 2 * 2 * 4 * 32 * 32 * sum(query_numbers(infused))
    assert store.on_device == (left if apart else 0)
    (plain, plain_least), (more, least) = asked[0], asked[-1]
    line = infused.model.model.memory_required([2, 4, 1, 32])  # the smallest step
    assert left <= least - plain_least <= 2 * left + line and left <= more - plain


def query_numbers(infused):
    network = infused.model.model.diffusion_model
    return infused.pack.profusion.queries.query_numbers(dict(network.named_parameters()))


def looks(infused, monkeypatch, model, **options):
    """For each of C's evaluations its noise level, and that at which F's queries were made."""
    streams, found = infused.pack.nodes.host.streams, []
    original = streams._Streams._customised

    def customised(self, evaluate, model, conds, x, sigma, options):
        found.append((sigma, self._seen_at))
        return original(self, evaluate, model, conds, x, sigma, options)

    monkeypatch.setattr(streams._Streams, "_customised", customised)
    infused.run(*infused.patch(infused.residual(10.0), model), **options)
    return found


@pytest.mark.parametrize("kind", ["LazyCacheNode", "EasyCacheNode"])
def test_with_a_step_cache_c_looks_where_f_last_did_and_never_ahead(infused, monkeypatch, caplog, kind):
    """Each stream leaves out steps by what it draws itself, so that they are not the same ones."""
    caches = pytest.importorskip("comfy_extras.nodes_easycache", reason="this host has no step caches")
    model = getattr(caches, kind).execute(infused.model, 0.05, 0.1, 0.95, False).args[0]
    found = looks(infused, monkeypatch, model, steps=20)
    assert len(found) >= 5 and all(seen >= sigma * (1 - 1e-6) for sigma, seen in found)
    elsewhere = sum(seen > sigma * (1 + 1e-4) for sigma, seen in found)
    assert elsewhere < len(found) / 2
    assert bool(elsewhere) == ("a step cache is on the model" in caplog.text)


def test_without_one_c_always_looks_at_its_own_level_and_nothing_is_said(infused, monkeypatch, caplog):
    found = looks(infused, monkeypatch, infused.model, steps=6, sampler="dpmpp_2s_ancestral")
    assert len(found) > 6 and all(seen == sigma for sigma, seen in found)
    assert "noise level" not in caplog.text


def test_a_sampler_that_chooses_its_own_steps_says_that_levels_differ(infused, monkeypatch, caplog):
    found = looks(infused, monkeypatch, infused.model, steps=10, sampler="dpm_adaptive")
    assert any(seen != sigma for sigma, seen in found)
    assert caplog.text.count("chooses its own steps, as dpm_adaptive does") == 1 and "'shared latent'" in caplog.text
