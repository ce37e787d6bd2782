"""Work that is done in pieces, each of which leaves its result in a file: a run that was
stopped goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch


@dataclass(frozen=True)
class Job:
    """Something whose result, which JSON can say, is a file; `work` is called in another process."""

    path: Path
    work: Callable[[], dict]
    title: str


@dataclass(frozen=True)
class Runner:
    """Does jobs in so many processes of one thread each (0: in this one).

    setting: whatever the results depend on; results of another setting are made anew. say: shows progress.
    """

    setting: dict
    workers: int
    say: Callable[[str], None] = partial(print, flush=True)

    def result(self, path: Path) -> dict | None:
        """What an earlier run left; None where there is nothing, or something of another setting."""
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        return found["result"] if found["setting"] == json.loads(json.dumps(self.setting)) else None

    def run(self, jobs: Sequence[Job]) -> list[dict]:
        """The results of all jobs, in order; those that are missing are made."""
        missing = [job for job in jobs if self.result(job.path) is None]
        if missing:
            self.say(f"{len(jobs) - len(missing)} of {len(jobs)} are there already")
            self._make(missing)
        return [self.result(job.path) for job in jobs]

    def _make(self, jobs: Sequence[Job]) -> None:
        started = time.monotonic()
        for count, (job, result) in enumerate(self._results(jobs), start=1):
            self._write(job.path, result)
            passed = time.monotonic() - started
            left = passed / count * (len(jobs) - count) / 60
            self.say(f"[{count}/{len(jobs)}] {job.title}; {passed / 60:.1f} min, about {left:.0f} more")

    def _results(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict]]:
        """Each job with its result, as they are done."""
        if not self.workers:
            yield from ((job, job.work()) for job in jobs)
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_prepare)
        try:
            running = {pool.submit(job.work): job for job in jobs}
            yield from ((running[done], done.result()) for done in as_completed(running))
        finally:  # what is not begun, after an error or an interruption, is not begun
            pool.shutdown(cancel_futures=True)

    def _write(self, path: Path, result: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(json.dumps({"setting": self.setting, "result": result}))
        unfinished.replace(path)


def _prepare() -> None:
    """A worker has one thread, and ends with the run that started it, even one that was killed."""
    torch.set_num_threads(1)
    run = multiprocessing.parent_process()

    def follow() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def file_name(*words: str) -> str:
    """Of these words, and nothing else that files do not like."""
    return "__".join("".join(c if c.isalnum() or c in ".-" else "_" for c in word) for word in words) + ".json"
