"""A residual's training that finds its own steps, masks and end: its rules, and that it resumes as any other does."""

import pytest
import torch

from profusion.diffusion import noise_predictor
from profusion.loop import TrainingError
from profusion.residual import automatic, load_residual, save_residual
from profusion.residual.training import Reference, TrainingOptions, relative_residual_loss
from tests.residual.trainings import ROWS, SMALL, device_of, predictor, references, same, training

AUTOMATIC = {"learning_rate": 0.0, "batch_size": 2}


def options(steps=4, **changes):
    return TrainingOptions(**{"steps": steps, **AUTOMATIC, **changes})


# The rules


def test_steps_get_smaller_whatever_their_number_is_to_be():
    rates = [automatic.rate(step) for step in range(400)]
    assert rates[0] == automatic.RATE and all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[3 * automatic.SLOWING] == pytest.approx(automatic.RATE / 2)


def test_a_residual_grows_to_its_bound_and_no_further():
    delta = torch.randn(3, 1, 24)
    delta *= torch.tensor([0.5, 3.0, 0.0])[:, None, None] / delta.norm(dim=-1, keepdim=True)
    longest = automatic.BOUND * 0.3 * 24**0.5
    found = automatic.bounded(delta, 0.3)
    assert torch.equal(found[0], delta[0]) and torch.equal(found[2], delta[2])
    assert found[1].norm() == pytest.approx(longest) and torch.cosine_similarity(found[1], delta[1]) > 0.9999


def test_of_strange_pictures_less_is_learned():
    delta = torch.ones(1, 1, 16)
    usual = automatic.bounded(delta, 0.1)
    for strangeness in (0.0, 1.0, automatic.STRANGE):
        assert torch.equal(automatic.bounded(delta, 0.1, strangeness), usual)
    torch.testing.assert_close(automatic.bounded(delta, 0.1, 2 * automatic.STRANGE), usual / 2)


def test_it_ends_where_the_loss_falls_no_more_and_says_where_that_is():
    falling = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert not automatic.why_ended(falling) and not automatic.why_ended([])
    still = [*falling, *[0.499] * automatic.PATIENCE]
    said = automatic.why_ended(still)
    assert f"step {len(still) * automatic.CHECK_EVERY}" in said and "50%" in said
    assert not automatic.why_ended(still[:-1])


def test_a_rise_ends_it_and_one_bad_check_does_not():
    falling = [0.9, 0.8, 0.7]
    assert "75%" in automatic.why_ended([*falling, *[0.75] * automatic.PATIENCE])  # what is kept, not the best
    assert "120%" in automatic.why_ended([1.5, 1.4, 1.3, 1.2])
    assert not automatic.why_ended([*falling, 0.75, 0.65])


def test_the_loss_is_a_share_of_the_plain_model_s_row_by_row(generator):
    noise, plain, predicted = torch.randn(3, 2, 4, 5, 5, generator=generator).unbind(0)
    mask = torch.zeros(2, 5, 5)
    mask[0, :2], mask[1, 3:] = 1.0, 0.5
    assert relative_residual_loss(plain, noise, plain, mask, 1.0) == pytest.approx(1.0)
    assert relative_residual_loss(noise, noise, plain, mask, 0.0) == 0.0
    rows = []
    for row in range(2):
        inside = mask[row][None].expand(4, -1, -1)
        unit = ((plain - noise)[row] ** 2 * inside).sum() / inside.sum()
        part = ((predicted - noise)[row] ** 2 * inside).sum() / inside.sum()
        rest = ((predicted - plain)[row] ** 2 * (1 - inside)).sum() / (1 - inside).sum()
        rows.append((part + 2 * rest) / unit)
    found = relative_residual_loss(predicted, noise, plain, mask, 2.0)
    torch.testing.assert_close(found, torch.stack(rows).mean())


# The training


def test_a_step_is_in_units_of_the_noun_s_own_row(unet):
    def scaled(times):
        contexts = times * torch.randn(2, 11, SMALL.context_dim, generator=torch.Generator().manual_seed(1))
        contexts = contexts.to(device_of(unet))

        def predict(x, sigma, prompt, patches):
            context = contexts[prompt].expand(len(x), -1, -1)
            settings = {"patches": patches, "cond_or_uncond": [0]}
            return noise_predictor(lambda x, t: unet(x, t, context, transformer_options=settings))(x, sigma)

        run = training(unet, options(1), predict)
        list(run.steps())
        return run.delta.detach().abs().amax().item()

    row = torch.randn(2, 11, SMALL.context_dim, generator=torch.Generator().manual_seed(1))[0, list(ROWS[0])]
    assert scaled(1.0) == pytest.approx(automatic.RATE * row.square().mean().sqrt().item(), rel=1e-3)
    assert scaled(10.0) == pytest.approx(10 * scaled(1.0), rel=1e-2)


def test_it_never_outgrows_its_bound(unet, monkeypatch):
    monkeypatch.setattr(automatic, "BOUND", 0.05)
    run = training(unet, options(6))
    for _ in run.steps():
        longest = 0.05 * run.seen.row_size * SMALL.context_dim**0.5
        assert run.delta.norm(dim=-1).amax() <= longest * 1.0001
    assert run.delta.norm(dim=-1).amin() > 0


@pytest.mark.parametrize("stop", [1, 2])
def test_it_goes_on_bit_for_bit_through_a_file(unet, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(automatic, "CHECK_EVERY", 2)
    whole = training(unet, options(4))
    list(whole.steps())
    first = training(unet, options(4))
    steps = first.steps()
    for _ in range(stop):
        next(steps)
    path = save_residual(first.residual(), tmp_path / "half.safetensors", "float32").path
    second = training(unet, options(4), resume=load_residual(path))
    list(second.steps())
    same(second.residual(), whole.residual())
    assert second.checks == whole.checks and len(whole.checks) == 2


def test_it_ends_early_and_again_when_it_is_resumed(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(automatic, "CHECK_EVERY", 1)
    monkeypatch.setattr(automatic, "WORTHWHILE", 1.0)
    run = training(unet, options(50))
    assert len(list(run.steps())) == automatic.PATIENCE + 1 == run.step and run.why_ended()
    path = save_residual(run.residual(), tmp_path / "ended.safetensors", "float32").path
    again = training(unet, options(50), resume=load_residual(path))
    assert not list(again.steps()) and again.why_ended() == run.why_ended()
    on = training(unet, options(5, stop_early=False))
    assert len(list(on.steps())) == 5


def test_it_says_at_which_step_it_ended_whatever_it_went_on_from(unet, monkeypatch):
    """One that was trained at a fixed rate has no checks of its steps."""
    monkeypatch.setattr(automatic, "CHECK_EVERY", 2)
    monkeypatch.setattr(automatic, "WORTHWHILE", 1.0)
    fixed = training(unet, TrainingOptions(steps=5, batch_size=2))
    list(fixed.steps())
    run = training(unet, options(50), resume=fixed.residual())
    list(run.steps())
    assert len(run.checks) == automatic.PATIENCE + 1 and run.step == 12
    assert run.why_ended().startswith("ended at step 12:")


@pytest.mark.parametrize("stop", [1, 2])
def test_a_check_that_failed_is_made_again_when_it_is_resumed(unet, monkeypatch, stop):
    """The step before it counts: what is kept goes on as if nothing had happened."""
    monkeypatch.setattr(automatic, "CHECK_EVERY", 1)
    whole = training(unet, options(3))
    list(whole.steps())
    first = training(unet, options(3))
    check = first._checked

    def out_of_memory():
        if first.step == stop:
            raise MemoryError
        return check()

    first._checked = out_of_memory
    with pytest.raises(MemoryError):
        list(first.steps())
    assert first.step == stop and len(first.checks) == stop - 1
    second = training(unet, options(3), resume=first.residual())
    list(second.steps())
    same(second.residual(), whole.residual())


def test_a_check_that_is_not_finite_ends_it_and_what_was_learned_can_be_kept(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(automatic, "CHECK_EVERY", 2)
    run = training(unet, options(4))
    run._checked = lambda: float("nan")
    with pytest.raises(TrainingError, match="the loss is nan after step 2: use a model in float32 or bfloat16"):
        list(run.steps())
    assert save_residual(run.residual(), tmp_path / "kept.safetensors", "float32").path.is_file() and run.step == 2


def test_an_automatic_training_is_not_told_to_lower_its_rate(unet):
    run = training(unet, options(4), lambda *inputs: predictor(unet)(*inputs) * torch.nan)
    with pytest.raises(TrainingError, match="the loss is nan at step 0: use a model in float32 or bfloat16"):
        next(run.steps())


def test_masks_are_found_where_there_are_none_and_given_ones_stay(unet):
    run = training(unet, options(1))
    list(run.steps())
    assert not (run.masks == 1).all() and run.masks.amin() >= 0 and run.masks.amax() <= 1
    assert run._masks.shape[0] == 2 and not torch.equal(run._masks[0], run._masks[1])  # the mirrored ones' own
    mask = torch.zeros(8, 8)
    mask[2:5, 2:5] = 1
    given = [Reference(item.latent, mask) for item in references()]
    run = training(unet, options(1), references=given, flipped=given)
    list(run.steps())
    assert torch.equal(run.masks.cpu(), mask.expand(2, -1, -1))
    whole = training(unet, options(1, find_object=False))
    list(whole.steps())
    assert (whole.masks == 1).all()


def test_a_fixed_rate_may_have_found_masks_and_an_end_and_has_neither_by_itself(unet, monkeypatch):
    evaluated = []
    run = training(unet, TrainingOptions(steps=2, batch_size=2), predictor(unet, lambda *_: evaluated.append(1)))
    list(run.steps())
    assert len(evaluated) == 4 and run.seen is None and not run.checks
    monkeypatch.setattr(automatic, "CHECK_EVERY", 1)
    run = training(unet, TrainingOptions(steps=2, batch_size=2, stop_early=True, find_object=True))
    list(run.steps())
    assert len(run.checks) == 2 and not (run.masks == 1).all()


def test_pictures_unlike_the_model_s_own_are_measured_and_said(unet):
    evaluated = predictor(unet)

    def knows_nothing_else(x, sigma, prompt, patches):
        """Takes every picture for its own, which are nearly grey: what it misses of a latent is its size."""
        return 0 * evaluated(x, sigma, prompt, patches) + x / sigma.view(-1, 1, 1, 1)

    latents = torch.stack([item.latent for item in references()])
    for times, said in ((1.0, 0), (0.5, 1)):
        run = training(unet, options(), knows_nothing_else)
        run.own = times * latents
        run.prepare()
        assert run.strangeness == pytest.approx(times**-2, rel=1e-3)
        assert sum("4.0 times as much" in remark for remark in run.remarks()) == said


def test_what_is_checked_is_always_the_same_and_begins_at_the_plain_model_s(unet):
    run = training(unet, options(1))
    run.prepare()
    assert run._checked() == pytest.approx(1.0)
    assert sum(len(batch.sigma) for batch in run._check_batches) == automatic.CHECK_ROWS
    assert all(len(batch.sigma) <= 2 for batch in run._check_batches)
    list(run.steps())
    assert run._checked() == run._checked() != 1.0


def test_a_picture_in_which_nothing_stands_out_is_named(unet):
    """Random weights look at all words alike."""
    run = training(unet, options(1))
    list(run.steps())
    (said,) = run.remarks()
    assert run.seen.found == (False, False) and "no 'ball' that stands out in picture 1, 2" in said
