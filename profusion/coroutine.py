"""Run a function in step with its caller."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any


class _Closed(BaseException):
    """Unwinds a function whose answers nobody will give any more. Not an Exception: nobody should catch it."""


class Coroutine:
    """A function that stops wherever it calls `ask(question)` and goes on once it is answered.

    What a generator does at `yield`, for functions that ask from deep inside code that was not written as a
    generator, as a sampler calls its model. The function has a thread of its own, but it and its caller never run at
    the same time.
    """

    def __init__(self, function: Callable[[Callable[[Any], Any]], Any]):
        self._function = function
        self._answers, self._questions = SimpleQueue(), SimpleQueue()
        self._thread: Thread | None = None
        self.finished = False
        self.result: Any = None

    def resume(self, answer: Any = None) -> Any:
        """Start, or answer the last question, and return the next one; None once the function has returned.

        Whatever the function raises is raised here.
        """
        if self.finished:
            return None
        if self._thread is None:
            context = contextvars.copy_context()
            self._thread = Thread(target=context.run, args=(self._run,), name="profusion-coroutine", daemon=True)
            self._thread.start()
        else:
            self._answers.put((True, answer))
        kind, content = self._questions.get()
        if kind == "question":
            return content
        self.finished = True
        self._thread.join()
        if kind == "error":
            raise content
        self.result = content
        return None

    def questions(self) -> Iterator[Any]:
        """Each question in turn, answered by None once the next one is wanted; closed when no more are."""
        try:
            while (question := self.resume()) is not None:
                yield question
        finally:
            self.close()

    def close(self) -> None:
        """Unwind the function if it is still waiting for an answer."""
        if self._thread is None or self.finished:
            return
        self.finished = True
        self._answers.put((False, None))
        self._thread.join()

    def _ask(self, question: Any) -> Any:
        if self.finished:
            raise _Closed  # closed, and asking again while it unwinds
        self._questions.put(("question", question))
        answered, answer = self._answers.get()
        if not answered:
            raise _Closed
        return answer

    def _run(self) -> None:
        try:
            self._questions.put(("result", self._function(self._ask)))
        except _Closed:
            pass
        except BaseException as error:
            self._questions.put(("error", error))
