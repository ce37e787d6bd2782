"""Streams whose process is interrupted, told to end or killed: the workers end too, and say nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from profusion.pretraining.opening import open_source
from profusion.pretraining.stream import PictureStream, StreamError
from tests.pretraining.examples import coded, picture

TRAINING = """
import os, sys, time
sys.path.insert(0, {root!r})
from profusion.pretraining.opening import open_source
from profusion.pretraining.stream import PictureStream
stream = PictureStream(open_source({where!r}), size=64, batch=8, workers=2)
try:
    for batch in stream.batches():
        print(batch.step, flush=True)
        time.sleep(0.02)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        (folder / f"{number:02}.png").write_bytes(coded(picture(number)))
    return folder


def live_processes(place: int, number: int) -> list[int]:
    """Those whose line in /proc has this number at a place, those that wait to be collected apart."""
    found = []
    for name in os.listdir("/proc"):
        try:
            fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split() if name.isdigit() else []
        except OSError:
            continue
        if fields and int(fields[place]) == number and fields[0] != "Z":
            found.append(int(name))
    return found


def processes_of(group: int) -> list[int]:
    return live_processes(2, group)


def children() -> set[int]:
    """This process's own: other tests, whose processes may be of the same group, run beside it."""
    return set(live_processes(1, os.getpid()))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are counted by /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("to_all", [True, False])
def test_workers_end_with_their_process(folder, root, number, to_all):
    code = TRAINING.format(root=str(root), where=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert [process.stdout.readline() for _ in range(3)] == ["0\n", "1\n", "2\n"]
        assert len(processes_of(process.pid)) >= 3
        if to_all:  # as a terminal's Ctrl-C, or a scheduler
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said, errors = process.communicate(timeout=30)
        until = time.monotonic() + 20
        while processes_of(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not processes_of(process.pid)
        assert "Traceback" not in errors
        assert said.endswith("interrupted\n") == (number == signal.SIGINT)
    finally:
        for left in processes_of(process.pid):
            os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("ending", ["pass", "[os.kill(one, 15) for one in workers]"], ids=["by itself", "told to"])
def test_one_that_is_left_open_ends_quietly(folder, root, ending):
    """At the end of its process, and where a scheduler tells every process to end while this one still saves."""
    code = f"""
import os, sys, time
import torch.multiprocessing
sys.path.insert(0, {str(root)!r})
from profusion.pretraining.opening import open_source
from profusion.pretraining.stream import PictureStream
batches = PictureStream(open_source({str(folder)!r}), size=64, batch=8, workers=2).batches()
next(batches)
workers = [one.pid for one in torch.multiprocessing.active_children()]
assert len(workers) == 2
{ending}
time.sleep(0.5)
print("saved")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "saved\n", "")


class Killing:
    """A source by which whoever reads a certain picture is killed."""

    parts = ()

    def __init__(self, source):
        self.source, self.where, self.key = source, source.where, source.key

    def __len__(self):
        return len(self.source)

    def read(self, entry):
        if entry == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(entry)


def test_a_worker_that_ends_by_itself_is_an_error_that_says_what_to_do(folder):
    stream = PictureStream(Killing(open_source(str(folder))), size=16, batch=4, workers=2)
    with pytest.raises(StreamError, match="a worker that reads pictures ended by itself .* Use fewer workers, or 0"):
        for _ in zip(stream.batches(), range(20), strict=False):
            pass


def test_an_ended_stream_leaves_no_worker(folder):
    before = children()
    batches = PictureStream(open_source(str(folder)), size=16, batch=4, workers=2).batches()
    next(batches)
    assert len(children() - before) == 2
    batches.close()
    until = time.monotonic() + 10
    while children() - before and time.monotonic() < until:
        time.sleep(0.05)
    assert not children() - before


@pytest.mark.parametrize("workers", [0, 2])
def test_it_draws_nothing_from_everybodys_generator(folder, workers):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(PictureStream(open_source(str(folder)), size=16, batch=4, workers=workers, crop="random").batches())
    assert torch.equal(torch.rand(3), expected)
