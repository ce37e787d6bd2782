"""The training loop by itself: one number that learns, through a backward pass of limited range."""

import math
from types import SimpleNamespace

import pytest
import torch

from profusion.loop import (
    GROWTH_INTERVAL,
    Group,
    LoopOptions,
    TrainingError,
    TrainingLoop,
    generator_of,
    grown_scale,
    pauses,
)

NUMBERS = 2**13  # the scale begins at batch_size times this, 2^14


class Narrow(torch.autograd.Function):
    """Passes on its input; on the way back `gain` times the gradient, rounded to float16 as
    a half-precision model does.

    scales: what the loss was multiplied by, each time.
    """

    @staticmethod
    def forward(context, value, gain, scales):
        context.gain, context.scales = gain, scales
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        context.scales.append(gradient[0].item())
        return (gradient * context.gain).half().float(), None, None


class Line(TrainingLoop):
    """Two weights in groups of their own; `gains(step)` is the slope of the loss at a step, of each."""

    def __init__(self, gains, steps=4, clip=math.inf, **options):
        self.weights = [torch.zeros(3), torch.zeros(2)]
        self.gains, self.tried, self.drawn = gains, [], []
        groups = [
            Group(f"part {index}", {f"weight{index}": weight}, "it is a test")
            for index, weight in enumerate(self.weights)
        ]
        super().__init__(
            LoopOptions(**{"steps": steps, "learning_rate": 0.1, "batch_size": 2, "seed": 0} | options),
            groups,
            NUMBERS,
            clip,
        )

    def draw(self, generator):
        self.drawn.append(torch.rand((), generator=generator).item())
        return self.gains(self.step)

    def loss(self, batch):
        notes = self.tried, []
        terms = [Narrow.apply(*each).sum() for each in zip(self.weights, batch, notes, strict=True)]
        return 1.0 + sum(terms)


def gradients(run):
    return [weight.grad[0].item() for weight in run.weights]


# The loss scale


def test_the_scale_grows_back_after_one_spike():
    run = Line(lambda step: (3e4, 3e4) if step == 0 else (1e-3, 1e-3), steps=4 * GROWTH_INTERVAL + 2)
    steps = run.steps()
    next(steps)
    assert run.loss_scale == 2.0**14 / 16**4 and gradients(run) == [3e4, 3e4]
    list(steps)
    assert run.loss_scale == 2.0**14


def test_a_scale_that_stays_too_large_costs_one_evaluation_in_an_interval():
    run = Line(lambda step: (10.0, 10.0), steps=3 * GROWTH_INTERVAL)
    list(run.steps())
    assert len(run.tried) == run.step + 3  # the first step's, and one more at each try to grow


@pytest.mark.parametrize("part", [0, 1])
def test_a_gradient_that_vanished_is_tried_with_a_larger_scale_before_anybody_is_blamed(part):
    """The spike leaves a scale at which an ordinary small gradient rounds to zero, in both parts or in one."""
    quiet = [1e-7, 1e-7] if part == 0 else [1.0, 1e-7]
    run = Line(lambda step: (3e4, 3e4) if step == 0 else quiet)
    list(run.steps())
    assert gradients(run) == pytest.approx(quiet, rel=1e-3) and run.step == 4


def test_a_gradient_below_the_first_scale_is_found_too():
    run = Line(lambda step: (1e-13, 1e-13), steps=1)
    list(run.steps())
    assert gradients(run) == pytest.approx([1e-13, 1e-13], rel=1e-3)
    assert run.tried == [2.0**14, 2.0**18, 2.0**22]


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_without_a_gradient_is_named_after_a_few_tries(part):
    gains = [1.0, 1.0]
    gains[part] = 0.0
    run = Line(lambda step: gains)
    with pytest.raises(TrainingError, match=f"no gradient reaches part {part}: it is a test"):
        next(run.steps())
    assert 1 < len(run.tried) < 8 and run.step == 0 and not any(weight.any() for weight in run.weights)
    assert run.loss_scale == 2.0**14, "a step that failed leaves nothing behind"


def test_a_loss_that_nothing_reaches_is_not_tried_twice():
    run = Line(lambda step: (1.0, 1.0))
    run.loss = lambda batch: run.tried.append(0) or torch.ones(())
    with pytest.raises(TrainingError, match="no gradient reaches part 0"):
        next(run.steps())
    assert len(run.tried) == 1


def test_what_overflows_at_every_scale_ends_at_a_bound():
    run = Line(lambda step: (math.inf, 1.0))
    with pytest.raises(TrainingError, match="the gradient overflowed at step 0: use a model in float32 or bfloat16"):
        next(run.steps())
    assert len(run.tried) == 8 and run.tried[-1] == 2.0**-14 and run.step == 0


def test_what_overflows_and_vanishes_at_once_ends_too():
    run = Line(lambda step: (1e5, 1e-13))
    with pytest.raises(TrainingError, match="the gradient overflowed at step 0"):
        next(run.steps())
    assert len(run.tried) < 20


def test_a_run_resumed_while_its_scale_is_down_goes_on_bit_for_bit():
    def gains(step):
        return (3e4, 7.0) if step == 3 else (0.3 + step, 1e-5)

    count = GROWTH_INTERVAL + 5
    whole = Line(gains, steps=count)
    losses = list(whole.steps())
    for stop in (3, 4, GROWTH_INTERVAL, GROWTH_INTERVAL + 1):
        first = Line(gains, steps=count)
        steps = first.steps()
        begun = [next(steps) for _ in range(stop)]
        again = Line(gains, steps=count)
        for mine, theirs in zip(again.weights, first.weights, strict=True):
            mine.data.copy_(theirs)
        again.restore(first.state())
        assert begun + list(again.steps()) == losses and again.losses == losses
        assert all(torch.equal(one, other) for one, other in zip(again.weights, whole.weights, strict=True))
        assert again.state().keys() == whole.state().keys()
        assert all(torch.equal(value, whole.state()[name]) for name, value in again.state().items())


def test_a_state_without_a_scale_or_losses_is_read():
    run = Line(lambda step: (1.0, 1.0))
    run.restore({"step": torch.tensor([2])})
    assert (run.step, run.losses, run.loss_scale) == (2, [], 2.0**14)


def test_the_scale_never_grows_beyond_its_start_by_itself():
    assert grown_scale(4.0, GROWTH_INTERVAL, 16.0) == 16.0 and grown_scale(4.0, GROWTH_INTERVAL + 1, 16.0) == 4.0
    assert grown_scale(64.0, GROWTH_INTERVAL, 16.0) == 64.0 and grown_scale(0.25, 0, 2.0**14) == 4.0


def test_the_file_of_an_unfinished_run_has_every_step_that_was_reported():
    """It is written before a step is handed out: whoever stops there has lost nothing."""
    run, written = Line(lambda step: (1.0, 1.0)), []
    partial = SimpleNamespace(after_step=lambda: written.append(run.step))
    for _ in run.steps(partial):
        assert written[-1] == run.step
    assert written == [1, 2, 3, 4]


# The rest of a step


def test_the_gradient_of_all_parts_is_clipped_together():
    run = Line(lambda step: (3.0, 4.0), clip=1.0)
    next(run.steps())
    norm = math.sqrt(3 * 3.0**2 + 2 * 4.0**2)
    assert gradients(run) == pytest.approx([3 / norm, 4 / norm])
    small = Line(lambda step: (3.0, 4.0), clip=100.0)
    next(small.steps())
    assert gradients(small) == [3.0, 4.0]


class Still(TrainingLoop):
    """Any number of parameters, and nothing drawn."""

    def __init__(self, weights, clip):
        self.weights = weights
        super().__init__(LoopOptions(1, 0.1, 1, 0), [Group("all", weights, "")], NUMBERS, clip)

    def draw(self, generator):
        return None

    def loss(self, batch):
        return sum((value * 2).sum() for value in self.weights.values())


def test_the_device_is_waited_for_a_fixed_number_of_times(monkeypatch):
    """However many parameters there are: once to look at the gradient, once more to clip it."""
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, original=original: waits.append(0) or original(self))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)

    def counted(parameters, clip):
        run = Still({f"weight{index}": torch.zeros(2) for index in range(parameters)}, clip)
        waits.clear()
        next(run.steps())
        return len(waits)

    assert counted(1, math.inf) == counted(50, math.inf) == 1
    assert counted(1, 1.0) == counted(50, 1.0) == 2


def test_every_step_draws_from_its_seed_alone():
    run = Line(lambda step: (1.0, 1.0))
    list(run.steps())
    assert len(set(run.drawn)) == 4 and run.mean_loss(2) == sum(run.losses[-2:]) / 2
    other = Line(lambda step: (1.0, 1.0), seed=1)
    list(other.steps())
    assert not set(other.drawn) & set(run.drawn)
    again = Line(lambda step: (1.0, 1.0))
    again.restore({"step": torch.tensor([3])})
    assert again.batch() and again.drawn == run.drawn[3:]
    assert torch.equal(torch.rand(2, generator=generator_of(-1)), torch.rand(2, generator=generator_of(2**63 - 1)))


@pytest.mark.parametrize(
    ("first", "last", "every", "expected"),
    [(0, 10, 4, [4, 8, 10]), (5, 10, 4, [8, 10]), (4, 8, 4, [8]), (0, 3, 0, [3]), (3, 3, 1, [3]), (0, 2, 5, [2])],
)
def test_pauses_are_multiples_and_the_last_step(first, last, every, expected):
    assert list(pauses(first, last, every)) == expected
