"""Fusion Sampling: the paper's update restated in its own symbols, in float64, and what must hold for any sampler."""

import math

import pytest
import torch

from profusion.diffusion import (
    _alphas_cumprod,
    sample_euler,
    sampling_sigmas,
    variance_exploding,
    variance_preserving,
)
from profusion.fusion import (
    FusionOptions,
    Guidance,
    KeptDifferences,
    RunGuidance,
    fresh_noise,
    fusion_stage,
    guide,
    mean_prediction,
    sample_fusion,
    segments,
    swap_noise,
    swap_share,
)

ALPHA_BAR = _alphas_cumprod()


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class ToyModel:
    """eps(x, t, c) in float64 that depends on everything: x in the variance-preserving form, c a condition vector."""

    def __init__(self, generator):
        self.mix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        self.word, self.text = torch.randn(2, 4, generator=generator, dtype=torch.float64)

    def eps(self, x, t, condition):
        shift = condition.view(1, 4, 1, 1)
        return torch.tanh(torch.einsum("ij,bjhw->bihw", self.mix, x) + shift) * (1 + t / 1000)


def papers_fusion_stage(model, x, t, eta, m, weights, gamma, scale, noises):
    """Section 3.2 of arXiv 2305.13579, in its symbols."""
    a_t, a_p = ALPHA_BAR[t], ALPHA_BAR[t - 1]
    s = (eta**2 * (1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).sqrt()
    for _ in range(m):
        nothing = model.eps(x, t, torch.zeros(4, dtype=torch.float64))
        both = model.eps(x, t, gamma * model.word + model.text)
        text = model.eps(x, t, model.text)
        share = [weight / sum(weights) for weight in weights]
        eps = nothing + scale * share[0] * (both - nothing) + scale * share[1] * (text - nothing)
        x = x - s**2 * (1 - a_t).sqrt() / (1 - a_p) * eps
        x = x + s * ((1 - a_t) * (2 - 2 * a_p - s**2)).sqrt() / (1 - a_p) * noises.pop(0)
    return x


def test_the_fusion_stage_is_the_papers_at_every_timestep(generator):
    """float64, 1e-12, random eta, m, weights, gamma and guidance at each of t = 1..999."""
    model = ToyModel(generator)
    for t in range(1, 1000):
        eta, first, second, gamma, scale = (0.05 + 0.95 * torch.rand(5, generator=generator)).tolist()
        m = int(torch.randint(1, 4, (), generator=generator))
        noises = list(torch.randn(m, 2, 4, 3, 3, generator=generator, dtype=torch.float64))
        x = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
        expected = papers_fusion_stage(model, x, t, eta, m, (first, second), gamma, 5 * scale, list(noises))
        sigma, sigma_next = (((1 - a) / a).sqrt() for a in (ALPHA_BAR[t], ALPHA_BAR[t - 1]))
        to_signal = (sigma**2 + 1).sqrt()  # k-diffusion's x over the variance-preserving one

        def denoise(x, at, t=t, gamma=gamma, scale=scale, weights=(first, second), to_signal=to_signal):
            nothing, both, text = (
                x - at.view(-1, 1, 1, 1) * model.eps(x / to_signal, t, condition)
                for condition in (torch.zeros_like(model.text), gamma * model.word + model.text, model.text)
            )
            return guide(nothing, mean_prediction([both, text], weights), 5 * scale)

        options, rest = FusionOptions(repeats=m, eta=eta), iter(noises)
        actual = fusion_stage(denoise, x * to_signal, sigma, sigma_next, options, lambda x, rest=rest: next(rest))
        torch.testing.assert_close(actual / to_signal, expected, rtol=0, atol=1e-12)


def test_at_the_last_timestep_the_papers_limit_holds():
    """t = 0: a_p = 1, where the paper's fraction is 0 / 0; s^2 / (1 - a_p) goes to eta^2, so
    all noise may be swapped."""
    assert swap_share(0.0, 0.7) == pytest.approx(0.49)
    x, eps, fresh = torch.tensor([2.0]), torch.tensor([1.5]), torch.tensor([3.0])
    torch.testing.assert_close(swap_noise(x, eps, fresh, 0.5, swap_share(0.0, 1.0)), x - 0.5 * eps + 0.5 * fresh)
    assert FusionOptions().repeats_at(0.03, 0.0) == 0  # and yet no sampler is asked to take it out in one step


@pytest.mark.parametrize("flow", [False, True])
def test_a_right_prediction_swaps_noise_at_the_same_level(flow, generator, precise_device):
    """The noise becomes eps' = (1 - r) eps + sqrt(r (2 - r)) z, of unit variance, under the same alpha x0."""
    clean, eps, fresh = torch.randn(3, 1, 4, 5, 5, generator=generator, dtype=torch.float64).to(precise_device)
    sigma, sigma_next = torch.tensor([0.8, 0.7], dtype=torch.float64, device=precise_device)
    alpha = 1 - sigma if flow else torch.ones_like(sigma)
    ratio = (sigma_next / (1 - sigma_next)) / (sigma / (1 - sigma)) if flow else sigma_next / sigma
    share = swap_share(ratio, 0.9)
    assert 0 < share < 1
    result = fusion_stage(
        lambda x, at: clean,
        alpha * clean + sigma * eps,
        sigma,
        sigma_next,
        FusionOptions(eta=0.9),
        lambda x: fresh,
        flow,
    )
    mixed = (1 - share) * eps + (share * (2 - share)).sqrt() * fresh
    torch.testing.assert_close(result, alpha * clean + sigma * mixed)
    assert (1 - share) ** 2 + share * (2 - share) == pytest.approx(1)


def test_a_flow_model_may_start_from_pure_noise(generator):
    """sigma = 1: no signal, a noise-to-signal ratio without end; the stage stays finite and
    swaps eta^2 of the noise."""
    x, fresh = torch.randn(2, 1, 4, 2, 2, generator=generator)
    result = fusion_stage(
        lambda x, at: torch.zeros_like(x),
        x,
        torch.tensor(1.0),
        torch.tensor(0.9),
        FusionOptions(eta=0.5),
        lambda x: fresh,
        True,
    )
    torch.testing.assert_close(result, swap_noise(x, x, fresh, 1.0, 0.25))


def euler(denoise, x, sigmas):
    """`sample_euler` from a noisy start."""
    return sample_euler(denoise, variance_preserving(x, sigmas[0]), sigmas)


def test_without_fusion_steps_the_sampler_runs_alone_and_whole(generator):
    sigmas, x = sampling_sigmas(6), torch.randn(2, 4, 3, 3, generator=generator)
    calls = []

    def denoise(x, sigma):
        return x / (1 + sigma.view(-1, 1, 1, 1))

    def refine(x, first, last):
        calls.append((first, last))
        return euler(denoise, x, sigmas[first : last + 1])

    for options in (FusionOptions(repeats=0), FusionOptions(eta=0.0), FusionOptions(sigma_start=1e-6)):
        assert torch.equal(sample_fusion(never, refine, x, sigmas, options, never), euler(denoise, x, sigmas))
    assert calls == [(0, 6)] * 3


def never(*_):
    raise AssertionError("there is no fusion stage")


def test_the_run_is_the_papers_algorithm(generator):
    """Both stages at every level, against a straight loop in alpha-bar form, float64: DDIM
    (eta 0) as the refinement."""
    model, steps, m, eta, gamma = ToyModel(generator), 8, 2, 0.8, 0.6
    levels = list(range(999, 0, -999 // steps))[:steps] + [None]
    alpha_bar = [ALPHA_BAR[t] if t is not None else torch.tensor(1.0, dtype=torch.float64) for t in levels]
    sigmas = torch.stack([((1 - a) / a).sqrt() for a in alpha_bar])
    start = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)

    x, noises = start.clone(), torch.Generator().manual_seed(5)
    for i in range(steps):
        t, a_t, a_p = levels[i], alpha_bar[i], alpha_bar[i + 1]
        share = eta**2 * (1 - a_t / a_p) / (1 - a_t)  # s^2 / (1 - a_p)
        for _ in range(m if a_p < 1 else 0):
            eps = guided(model, x, t, gamma, 3.0)
            fresh = torch.randn(x.shape, generator=noises).to(x)
            x = x - share * (1 - a_t).sqrt() * eps + ((1 - a_t) * share * (2 - share)).sqrt() * fresh
        eps = guided(model, x, t, 1.0, 6.0)
        x = a_p.sqrt() * (x - (1 - a_t).sqrt() * eps) / a_t.sqrt() + (1 - a_p).sqrt() * eps

    def denoiser(gamma, scale):
        def denoise(x, sigma):
            t = levels[int((sigmas - sigma[0]).abs().argmin())]
            return x - sigma[0] * guided(model, variance_preserving(x, sigma[0]), t, gamma, scale)

        return denoise

    def refine(x, first, last):
        return euler(denoiser(1.0, 6.0), x, sigmas[first : last + 1])

    begun = variance_exploding(start, sigmas[0])
    result = sample_fusion(denoiser(gamma, 3.0), refine, begun, sigmas, FusionOptions(m, eta), fresh_noise(seeded(5)))
    torch.testing.assert_close(result, x, rtol=0, atol=1e-10)


def guided(model, x, t, gamma, scale):
    nothing = model.eps(x, t, torch.zeros_like(model.text))
    return nothing + scale * (model.eps(x, t, gamma * model.word + model.text) - nothing)


def test_the_fresh_noise_comes_from_the_generator(generator):
    sigmas, x = sampling_sigmas(3), torch.randn(1, 4, 3, 3, generator=generator)

    def halve(x, sigma):
        return 0.5 * x

    def run(seed):
        return sample_fusion(halve, refine, x, sigmas, FusionOptions(), fresh_noise(seeded(seed)))

    def refine(x, first, last):
        return euler(halve, x, sigmas[first : last + 1])

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_a_run_is_the_same_on_every_device(device, generator):
    """Sigmas may lie anywhere; fresh noise is drawn on the CPU, so that a seed means the same everywhere."""
    sigmas, x = sampling_sigmas(5), torch.randn(2, 4, 3, 3, generator=generator)
    word, text = torch.randn(2, 1, 4, 1, 1, generator=generator)
    guidance = Guidance((1.0, 0.5), refresh=2)

    def run(where, sigmas, flow):
        run_guidance, stages = RunGuidance(guidance), iter(["fusion", "refinement"] * 9)

        def denoise(x, sigma):
            def evaluate(everything):
                shifts = (word + text, torch.zeros_like(word), text) if everything else (word + text,)
                return [torch.tanh(x + shift.to(x)) for shift in shifts]

            return run_guidance.step(next(stages), evaluate, unit=float(sigma[0]))

        def refine(x, first, last):
            return denoise(x, sigmas[first].expand(len(x)).to(x.device)) * 0.9

        fresh = fresh_noise(seeded(1, 2))
        return sample_fusion(denoise, refine, x.to(where), sigmas, FusionOptions(2, eta=0.7), fresh, flow)

    for flow, levels in ((False, sigmas), (True, torch.tensor([1.0, 0.6, 0.3, 0.0]))):
        expected, there = run("cpu", levels, flow), run(device, levels, flow)
        assert there.device.type == device.type and expected.isfinite().all()
        torch.testing.assert_close(there.cpu(), expected)
        torch.testing.assert_close(run(device, levels.to(device), flow).cpu(), expected)


def test_each_row_of_fresh_noise_comes_from_its_own_generator():
    x = torch.zeros(3, 4, 8, 8)
    batch, second = fresh_noise(seeded(7, 8, 9)), fresh_noise(seeded(8))
    for _ in range(3):
        whole = batch(x)
        assert torch.equal(whole[1:2], second(x[:1])) and not torch.equal(whole[0], whole[1])
    assert abs(whole.std().item() - 1) < 0.1
    assert batch(x.half()).dtype == torch.float16
    with pytest.raises(ValueError, match="3 generators for 2 rows"):
        batch(x[:2])


def test_a_fused_picture_is_the_same_in_any_batch(generator):
    sigmas, x = sampling_sigmas(5), torch.randn(3, 4, 3, 3, generator=generator)

    def run(rows):
        def refine(x, first, last):
            return euler(lambda x, sigma: 0.5 * x, x, sigmas[first : last + 1])

        fresh = fresh_noise(seeded(*rows))
        return sample_fusion(lambda x, sigma: 0.3 * x, refine, x[rows], sigmas, FusionOptions(2), fresh)

    whole = run([0, 1, 2])
    for row in range(3):
        assert torch.equal(run([row]), whole[row : row + 1])
    assert torch.equal(run([2, 0]), whole[[2, 0]])


def test_a_stretch_begins_at_every_level_with_a_fusion_stage():
    sigmas = [10.0, 8.0, 6.0, 4.0, 2.0, 1.0, 0.0]
    options = FusionOptions(repeats=2, sigma_start=8.0, sigma_end=4.0)
    assert segments(sigmas, options) == [(0, 1, False), (1, 2, True), (2, 3, True), (3, 6, True)]
    assert segments(sigmas, FusionOptions(repeats=0)) == [(0, 6, False)]
    assert segments([1.0, 0.9, 0.5], FusionOptions(), flow=True) == [(0, 1, False), (1, 2, True)]  # 1 is noise alone
    assert segments([4.0, 4.0, 2.0], FusionOptions()) == [
        (0, 1, False),
        (1, 2, True),
    ]  # no level is left: nothing to swap


def test_a_single_term_comes_back_to_the_bit(generator):
    prediction = torch.randn(2, 4, 3, 3, generator=generator)
    assert torch.equal(mean_prediction([prediction], [0.3]), prediction)
    first, second = torch.randn(2, 2, 4, 3, 3, generator=generator)
    nothing = torch.randn(2, 4, 3, 3, generator=generator)
    expected = nothing + 6 * 0.75 * (first - nothing) + 6 * 0.25 * (second - nothing)
    torch.testing.assert_close(guide(nothing, mean_prediction([first, second], [3, 1]), 6.0), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": -1}, "repeats=-1"),
        ({"eta": 1.2}, "eta=1.2"),
        ({"eta": -0.1}, "eta=-0.1"),
        ({"eta": math.nan}, "eta=nan"),
        ({"sigma_start": 1.0, "sigma_end": 2.0}, "sigma_start=1.0 must not lie below sigma_end=2.0"),
        ({"sigma_start": math.nan}, "sigma_start=nan"),
        ({"sigma_end": math.nan}, "sigma_end=nan"),
        ({"repeats": math.nan}, "repeats=nan"),
        ({"repeats": math.inf}, "repeats=inf"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        FusionOptions(**options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["cfg", "fusion_cfg", "gamma", "refresh", "weights"])
def test_numbers_of_the_guidance_must_be_finite(field, value):
    given = {"weights": (1.0, 0.5), field: (1.0, value) if field == "weights" else value}
    with pytest.raises(ValueError, match=field):
        Guidance(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"weights": ()}, "no conditioning"), ({"mode": "both"}, "mode='both'"), ({"refresh": 0}, "refresh=0")],
)
def test_the_guidance_is_checked(given, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**{"weights": (1.0,), **given})


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0, -1.0], "sum to 0"), ([math.inf, 1.0], "finite"), ([1.0], "2 predictions and 1 weights")],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(ValueError, match=message):
        mean_prediction([torch.zeros(1), torch.zeros(1)], weights)


def test_differences_are_kept_between_refreshes(generator):
    predictions = [torch.randn(3, 2, 4, 6, 6, generator=generator) for _ in range(4)]
    kept, units = KeptDifferences(3), (4.0, 2.0, 1.0, 0.5)
    completed = []
    for batch, unit in zip(predictions, units, strict=True):
        completed.append((kept.due, kept.complete(list(batch) if kept.due else [batch[0]], unit)))
    assert [due for due, _ in completed] == [True, False, False, True]
    for call in (0, 3):
        assert all(map(torch.equal, completed[call][1], predictions[call]))
    for call in (1, 2):
        for index in range(3):
            scale = units[call] / units[0]
            expected = predictions[call][0] + scale * (predictions[0][index] - predictions[0][0])
            torch.testing.assert_close(completed[call][1][index], expected)


def test_a_refresh_of_one_keeps_nothing(generator):
    kept = KeptDifferences(1)
    for _ in range(3):
        assert kept.due
        batch = list(torch.randn(2, 1, 4, 6, 6, generator=generator))
        assert all(map(torch.equal, kept.complete(batch, 0.0), batch))


# Guidance over a run


def asked(predictions, calls):
    """An evaluation that gives all predictions, or the first alone, and notes which."""

    def evaluate(everything):
        calls.append(everything)
        return list(predictions if everything else predictions[:1])

    return evaluate


def test_a_step_is_the_papers_sum_over_conditions(generator):
    """e0 + s sum_i w_i (e_i - e0) / sum_i w_i, with the scale of its stage."""
    first, nothing, second = predictions = torch.randn(3, 2, 4, 3, 3, generator=generator)
    guidance = Guidance((1.0, 0.5), cfg=6.0, fusion_cfg=3.0, gamma=0.8)
    for stage, scale, gamma in (("fusion", 3.0, 0.8), ("refinement", 6.0, 1.0)):
        assert (guidance.scale(stage), guidance.word_scale(stage)) == (scale, gamma)
        result = RunGuidance(guidance).step(stage, asked(predictions, []))
        expected = nothing + scale * (1.0 * (first - nothing) + 0.5 * (second - nothing)) / 1.5
        torch.testing.assert_close(result, expected)


def test_one_condition_is_plain_guidance_to_the_bit_and_asks_for_all_every_time(generator):
    predictions, calls = torch.randn(2, 2, 4, 3, 3, generator=generator), []
    run = RunGuidance(Guidance((0.3, 0.0), refresh=4))
    assert run.used("refinement") == run.used("fusion") == (0,)
    for _ in range(3):
        result = run.step("refinement", asked(predictions, calls))
        assert torch.equal(result, guide(predictions[1], predictions[0], 6.0))
    assert calls == [True] * 3


def test_conditions_without_weight_are_not_asked(generator):
    predictions = torch.randn(3, 2, 4, 3, 3, generator=generator)
    run = RunGuidance(Guidance((0.0, 1.0, 3.0)))
    assert run.used("fusion") == (1, 2)
    mean = 0.25 * predictions[0] + 0.75 * predictions[2]
    torch.testing.assert_close(run.step("fusion", asked(predictions, [])), guide(predictions[1], mean, 3.0))


def test_between_refreshes_the_first_prediction_is_enough(generator):
    """Where all predictions differ by the same noise at every level, what is kept is exact, in whatever unit."""
    noise, offsets, calls = torch.randn(2, 4, 3, 3, generator=generator), torch.randn(3, 1, 4, 1, 1), []
    run, every = (RunGuidance(Guidance((1.0, 0.5), refresh=refresh)) for refresh in (3, 1))
    for sigma in (8.0, 4.0, 2.0, 1.0):
        predictions = [noise + sigma * offset for offset in offsets]
        result = run.step("refinement", asked(predictions, calls), sigma)
        torch.testing.assert_close(result, every.step("refinement", asked(predictions, []), sigma))
    assert calls == [True, False, False, True]


def test_hooks_stand_between_the_predictions_and_the_guidance(generator):
    """And see all predictions even where one alone was evaluated."""
    predictions, seen = torch.randn(3, 2, 4, 3, 3, generator=generator), []
    run = RunGuidance(Guidance((1.0, 1.0), cfg=2.0, refresh=2))

    def hook(predictions):
        seen.append(len(predictions))
        return [2 * prediction for prediction in predictions]

    def combine(nothing, mean, scale):
        return nothing + 100 * mean + scale

    for _ in range(2):
        result = run.step("refinement", asked(predictions, []), between=hook, combine=combine)
        torch.testing.assert_close(result, 2 * predictions[1] + 100 * (predictions[0] + predictions[2]) + 2.0)
    assert seen == [3, 3]


@pytest.mark.parametrize("refresh", [1, 2])
def test_nothing_is_needed_where_a_stage_has_a_scale(refresh):
    def needs(**scales):
        run = RunGuidance(Guidance((1.0, 1.0), refresh=refresh, **scales))
        return [run.needs_nothing(stage) for stage in ("fusion", "refinement")]

    assert needs(cfg=1.0, fusion_cfg=3.0) == [True, False]
    assert needs(cfg=6.0, fusion_cfg=1.0) == [False, True]
    assert needs(cfg=1.0, fusion_cfg=1.0) == [False, False]


def test_the_fusion_stage_has_weights_of_its_own(generator):
    """arXiv 2305.13579's code: S* in its prompt guides the fusion stage, S* and the plain text the refinement."""
    first, nothing, second = torch.randn(3, 2, 4, 3, 3, generator=generator)
    run = RunGuidance(Guidance((7.0, 5.0), cfg=12.0, fusion_cfg=7.0, fusion_weights=(1.0, 0.0)))
    assert (run.used("fusion"), run.used("refinement")) == ((0,), (0, 1))
    fused = run.step("fusion", asked((first, nothing), []))
    torch.testing.assert_close(fused, nothing + 7.0 * (first - nothing))
    refined = run.step("refinement", asked((first, nothing, second), []))
    torch.testing.assert_close(refined, nothing + 7.0 * (first - nothing) + 5.0 * (second - nothing))


def test_each_stage_keeps_its_own_differences(generator):
    """S* is scaled in the fusion stage alone, so that its prediction differs from the others by something else."""
    calls = []
    predictions = {"fusion": torch.randn(2, 1, 4, 3, 3), "refinement": torch.randn(3, 1, 4, 3, 3, generator=generator)}
    run, every = (RunGuidance(Guidance((1.0, 0.5), refresh=n, fusion_weights=(1.0, 0.0))) for n in (2, 1))
    for stage in ("fusion", "refinement") * 4:
        result = run.step(stage, asked(predictions[stage], calls))
        torch.testing.assert_close(result, every.step(stage, asked(predictions[stage], [])))
    assert calls == [True, True, False, False] * 2


def test_fusion_weights_go_with_the_weights():
    with pytest.raises(ValueError, match="2 fusion_weights for 1 conditionings"):
        Guidance((1.0,), fusion_weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="sum to 0"):
        Guidance((1.0, 1.0), fusion_weights=(0.0, 0.0))
