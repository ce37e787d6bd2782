"""The loop that every training stage is: it resumes bit for bit, stops when it is told to, and never keeps nonsense."""

import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training.muon import orthogonalise
from training.norm import GroupNorm, with_quick_norms
from training.recipe import STAGES, Recipe
from training.session import Session, Stopped
from training.stages import TrainingStage


class Sliced(Session):
    """A session that is over each time a number of steps was made."""

    queries = 0

    @property
    def over(self):
        self.queries += 1
        return self.queries % 4 == 0


def session(folder, kind=Session, **options):
    return kind(folder, Recipe(text_steps=10, **options))


def stage(at, watch=None, warmup=30):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(32, 64), nn.SiLU(), nn.Conv2d(64, 3, 1))
    modules = nn.ModuleDict({"network": with_quick_norms(network).to(memory_format=torch.channels_last)})
    return TrainingStage("text", modules, at, seed=3, watch=watch, warmup=warmup)


def loss_of(trained):
    def loss(step, generator):
        x = torch.randn(2, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
        return F.mse_loss(trained.modules["network"](x).float(), x.roll(1, 1)), {"step": torch.tensor(float(step))}

    return loss


def weights(trained):
    return {name: value.clone() for name, value in trained.modules.state_dict().items()}


def test_a_training_in_slices_is_the_same_bit_for_bit(tmp_path):
    whole = stage(session(tmp_path / "whole"))
    assert whole.run(loss_of(whole))
    sittings = 0
    while True:
        sliced = stage(session(tmp_path / "slices", Sliced))
        try:
            assert sliced.run(loss_of(sliced))
            break
        except Stopped as stopped:
            sittings += 1
            assert f"step {3 * sittings} of 10" in str(stopped)
    assert sittings == 3
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(sliced)[name]), name
    again = stage(session(tmp_path / "slices"))
    assert not again.run(lambda *_: pytest.fail("it was finished"))
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_training_moves_the_weights_and_lowers_the_loss(tmp_path):
    trained, losses = stage(session(tmp_path), warmup=1), []
    before, loss = weights(trained), loss_of(trained)

    def watched(step, generator):
        value, parts = loss(0, torch.Generator().manual_seed(0))
        losses.append(value.item())
        return value, parts

    trained.run(watched)
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(value, before[name]) for name, value in weights(trained).items() if "weight" in name)


def test_no_time_means_no_step_but_a_checkpoint(tmp_path):
    late = Session(tmp_path, Recipe(text_steps=10), minutes=0)
    time.sleep(0.01)
    trained = stage(late)
    with pytest.raises(Stopped, match="step 0 of 10"):
        trained.run(loss_of(trained))
    assert torch.load(tmp_path / "text.pt", weights_only=True)["step"] == 0
    assert not list(tmp_path.glob("*.partial"))


def test_a_signal_asks_for_a_stop_and_the_old_handlers_come_back(tmp_path):
    before, at = signal.getsignal(signal.SIGTERM), session(tmp_path)
    with at.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert at.over
        trained = stage(at)
        with pytest.raises(Stopped):
            trained.run(loss_of(trained))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(tmp_path):
    trained = stage(session(tmp_path))
    with pytest.raises(RuntimeError, match="no number"):
        trained.run(lambda step, generator: (next(trained.modules.parameters()).sum() * float("nan"), {}))
    assert not (tmp_path / "text.pt").exists()


def test_what_is_watched_is_the_average_and_does_not_change_the_training(tmp_path):
    seen = {}
    quiet, watched = stage(session(tmp_path / "a", sheet_every=4)), stage(session(tmp_path / "b", sheet_every=4))
    quiet.run(loss_of(quiet))
    watched.watch = lambda step: seen.update({step: (weights(watched), dict(watched.ema))})
    watched.run(loss_of(watched))
    assert list(seen) == [4, 8]
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(quiet).items())
    assert not all(torch.equal(seen[4][0][name], seen[8][0][name]) for name in seen[4][0])


def test_the_time_left_counts_the_later_stages(tmp_path):
    at = session(tmp_path)
    left = [at.minutes_left(name, at.recipe.steps(name), None) for name in STAGES]
    assert left == sorted(left, reverse=True) and left[-1] == 0
    assert at.minutes_left("unet", 0, 2.0) > 3 * at.minutes_left("unet", 0, 0.5)


def test_a_folder_keeps_its_recipe(tmp_path):
    Recipe().keep(tmp_path)
    Recipe().keep(tmp_path)
    with pytest.raises(ValueError, match=r"was begun with unet_steps=\d+, not 7"):
        Recipe(unet_steps=7).keep(tmp_path)
    with pytest.raises(ValueError, match="batch is 0"):
        Recipe(batch=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_quick_norm_is_torchs(generator, dtype, tolerance):
    ours, torchs = GroupNorm(4, 16), nn.GroupNorm(4, 16)
    with torch.no_grad():
        ours.weight.copy_(1 + 0.3 * torch.randn(16, generator=generator))
        ours.bias.copy_(torch.randn(16, generator=generator))
    torchs.load_state_dict(ours.state_dict())
    x = (0.7 + 1.5 * torch.randn(2, 16, 8, 4, generator=generator)).to(dtype)
    upstream = torch.randn(x.shape, generator=generator)
    found = []
    for norm in (ours, torchs):
        given = x.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        norm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = norm(given)
        y.backward(upstream.to(y))
        found.append([t.float() for t in (y, given.grad, norm.weight.grad, norm.bias.grad)])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_orthogonalised_matrices_have_singular_values_about_one(generator, shape):
    matrices = torch.randn(shape, generator=generator)
    found = orthogonalise(matrices)
    values = torch.linalg.svdvals(found)
    assert found.shape == matrices.shape and values.min() > 0.6 and values.max() < 1.3
    assert torch.allclose(found[0], orthogonalise(matrices[:1])[0], atol=0.02)  # one by one or together
