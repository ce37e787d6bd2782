"""A server works through prompts of every kind, some of them interrupted: `make soak` 1,000 of them, this a few.

SOAK: how many.
"""

import os

import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: none is watched at work")

from conftest import HOST

from tools import soak

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("survival")]

PROMPTS = int(os.environ.get("SOAK", "10"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="what a process holds is read from Linux's /proc")
def test_a_server_at_work_fails_nothing_holds_no_more_and_draws_the_same_plain_picture(capsys):
    with capsys.disabled():
        wrong = soak.run(HOST, PROMPTS, seed=0, interrupts=0.3, every=max(1, PROMPTS // 100))
    assert not wrong


def test_what_goes_wrong_is_said(monkeypatch):
    """Each of its verdicts, on made-up figures."""
    work = soak.Soak.__new__(soak.Soak)
    work.server = type("Server", (), {"base": "nowhere"})
    good = soak.Held(1000, 6, 9)
    for last, word in (
        (good, ""),
        (soak.Held(1300, 6, 9), "memory"),
        (soak.Held(1000, 60, 9), "threads"),
        (soak.Held(1000, 6, 90), "files"),
    ):
        work.failures, work.pictures, work.seen = [], {"one"}, [good, good, last]
        assert [text.split(":")[0] for text in work.verdict()] == ([word] if word else [])
    work.pictures, work.failures, work.seen = {"one", "two"}, ["training: no"], [good]
    assert work.verdict() == ["training: no", "2 different plain pictures"]
