"""When a run is written to the disk, what that may cost, and what is left of it."""

import pytest
import torch

from profusion import files
from profusion.keeping import SECONDS, SHARE, Partial, digest, seconds_to_write


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Run:
    """Steps of some seconds each, and savings that take some too."""

    def __init__(self, folder, cost=0.0, expected=0.0, overwrite=False):
        self.clock, self.step, self.cost, self.failing = Clock(), 0, cost, None
        self.folder, self.overwrite, self.saved_at = folder, overwrite, []
        self.said = []
        self.partial = Partial(self.write, expected, self.said.append, clock=self.clock)

    def write(self):
        self.clock.now += self.cost
        if self.failing:
            raise self.failing
        path = self.folder / ("run" if self.overwrite else f"run_{self.step}")
        path.write_text(str(self.step))
        self.saved_at.append(self.clock.now)
        return path

    def work(self, steps, seconds=1.0):
        for _ in range(steps):
            self.step += 1
            self.clock.now += seconds
            self.partial.after_step()

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())


def test_it_is_written_every_so_many_seconds_and_only_the_newest_stays(tmp_path):
    run = Run(tmp_path)
    run.work(int(SECONDS) - 1)
    assert not run.files()
    run.work(1)
    assert run.files() == [f"run_{SECONDS:.0f}"]
    run.work(int(SECONDS))
    assert run.files() == [f"run_{2 * SECONDS:.0f}"] and run.partial.path == tmp_path / run.files()[0]
    run.partial.discard()
    assert not run.files() and run.partial.path is None


def test_a_file_under_one_name_is_replaced_and_not_removed(tmp_path):
    run = Run(tmp_path, overwrite=True)
    run.work(3 * int(SECONDS))
    assert run.files() == ["run"] and (tmp_path / "run").read_text() == f"{3 * SECONDS:.0f}"


@pytest.mark.parametrize("cost", [0.01, 0.5, 20.0])
def test_it_never_takes_more_than_its_share_of_the_time(tmp_path, cost):
    run = Run(tmp_path, cost)
    run.work(20_000)
    assert len(run.saved_at) >= 5
    between = [later - earlier for earlier, later in zip(run.saved_at, run.saved_at[1:], strict=False)]
    assert all(cost / gap <= SHARE * 1.01 for gap in between) and min(between) >= SECONDS
    assert max(between) <= max(SECONDS, cost / SHARE) + cost + 2


def test_a_large_file_waits_for_its_first_time_too(tmp_path):
    run = Run(tmp_path, cost=8.0, expected=8.0)
    run.work(10_000)
    assert 8.0 / run.saved_at[0] <= SHARE


def test_how_long_writing_takes_is_told_by_a_little_of_it(tmp_path, monkeypatch):
    small, large = (seconds_to_write(tmp_path / "sub" / "x", size) for size in (1 << 22, 1 << 32))
    assert 0 < small < large and large > (1 << 32) / 1e10
    assert not list((tmp_path / "sub").iterdir())
    (tmp_path / "file").touch()
    assert seconds_to_write(tmp_path / "file" / "x", 1) == 0


def test_at_a_pause_it_is_written_earlier_unless_that_costs_too_much(tmp_path):
    run = Run(tmp_path, cost=0.1)
    run.work(2)
    run.partial.at_a_pause()
    assert run.files() == ["run_2"]
    run.work(2)
    run.partial.at_a_pause()
    assert run.files() == ["run_2"], "0.1 s of 2 s would be more than its share"
    run.work(9)
    run.partial.at_a_pause()
    assert run.files() == ["run_13"]


@pytest.mark.parametrize("problem", [OSError("the disk is full"), RuntimeError("out of memory"), ValueError("bad")])
def test_a_saving_that_fails_stops_nothing_keeps_the_last_one_and_is_tried_again(tmp_path, problem):
    run = Run(tmp_path)
    run.work(int(SECONDS))
    run.failing = problem
    run.work(int(SECONDS))
    assert run.files() == [f"run_{SECONDS:.0f}"] and run.partial.problem is problem
    run.work(int(SECONDS))
    assert (
        len(run.said) == 1
        and "cannot be written" in run.said[0]
        and ("full" in run.said[0] or "memory" in run.said[0] or "bad" in run.said[0])
    )
    run.failing = None
    run.work(int(SECONDS))
    assert run.files() == [f"run_{4 * SECONDS:.0f}"] and run.partial.problem is None
    run.work(int(SECONDS))
    assert len(run.said) == 2 and f"written again: {tmp_path / f'run_{4 * SECONDS:.0f}'}" in run.said[1]


def test_without_somebody_to_tell_the_log_is_told(tmp_path, caplog):
    def fail():
        raise OSError("the disk is full")

    partial = Partial(fail, clock=(clock := Clock()))
    clock.now = SECONDS
    partial.after_step()
    assert "cannot be written (the disk is full)" in caplog.text


def test_a_saving_that_was_asked_for_raises(tmp_path):
    run = Run(tmp_path)
    run.failing = OSError("the disk is full")
    with pytest.raises(OSError, match="full"):
        run.partial.save()


def test_an_interrupt_while_it_is_written_is_not_swallowed(tmp_path):
    run = Run(tmp_path)
    run.failing = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run.work(int(SECONDS))


def test_a_file_that_somebody_removed_is_no_problem(tmp_path):
    run = Run(tmp_path)
    run.work(int(SECONDS))
    run.partial.path.unlink()
    run.work(int(SECONDS))
    assert run.files() == [f"run_{2 * SECONDS:.0f}"]
    run.partial.path.unlink()
    run.partial.discard()


# Several processes


@pytest.mark.skipif(files.fcntl is None, reason="this system has no locks")
def test_a_run_takes_no_file_that_another_one_works_on(tmp_path):
    first, second = Run(tmp_path), Run(tmp_path)
    first.work(int(SECONDS))
    path = first.partial.path
    assert not second.partial.take(path) and second.partial.path is None
    first.partial.leave()
    assert first.partial.path is None and second.partial.take(path) and second.partial.path == path
    second.step = 100
    second.partial.save()
    assert second.files() == ["run_100"]
    assert not second.partial.take(tmp_path / "none") and second.partial.path == tmp_path / "run_100"


def test_what_another_run_has_put_in_its_place_is_left_alone(tmp_path):
    """Also where nobody can lock anything."""
    first = Run(tmp_path, overwrite=True)
    first.work(int(SECONDS))
    new = tmp_path / "new"
    new.write_text("of another run")
    new.replace(tmp_path / "run")
    assert first.partial.path is None
    first.partial.discard()
    assert (tmp_path / "run").read_text() == "of another run"
    second = Run(tmp_path)
    second.work(int(SECONDS))
    second.partial.path.write_text("of another run")
    second.work(int(SECONDS))
    assert second.files() == ["run", f"run_{SECONDS:.0f}", f"run_{2 * SECONDS:.0f}"]


# Which training it is


def test_a_digest_tells_apart_what_differs_anywhere():
    picture, network = torch.zeros(5, 4, 64, 64), torch.zeros(3_000_000)
    things = ["cat", 1, {"a": picture, "b": 2.0}, (network, None)]
    assert digest(*things) == digest(*things) and len(digest()) == 16
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 1, "b": 2})
    assert len({digest(1), digest("1"), digest(1.0), digest(1, 1), digest([1, 1]), digest(11)}) == 6
    assert len({digest(torch.zeros(2, dtype=kind)) for kind in (torch.float16, torch.bfloat16, torch.float32)}) == 3
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))
    changed = picture.clone()
    changed[3, 2, 17, 5] = 1e-6
    assert digest(changed) != digest(picture)
    assert digest(network + 1e-6) != digest(network)
