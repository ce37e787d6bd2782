import contextvars
import threading

import pytest

from profusion.coroutine import Coroutine


def test_questions_and_answers_alternate():
    log = []

    def function(ask):
        for number in range(3):
            log.append(f"asks {number}")
            log.append(f"hears {ask(number)}")
        return "done"

    coroutine = Coroutine(function)
    answer = None
    while (question := coroutine.resume(answer)) is not None:
        log.append(f"answers {question}")
        answer = question * 10
    assert coroutine.finished and coroutine.result == "done"
    assert log == [line for n in range(3) for line in (f"asks {n}", f"answers {n}", f"hears {n * 10}")]
    assert coroutine.resume() is None


def test_an_error_reaches_the_caller():
    def function(ask):
        ask("anything")
        raise KeyError("broken")

    coroutine = Coroutine(function)
    coroutine.resume()
    with pytest.raises(KeyError, match="broken"):
        coroutine.resume()
    assert coroutine.finished


def test_closing_unwinds_the_function_and_ends_its_thread():
    unwound = []

    def function(ask):
        try:
            ask("never answered")
        finally:
            unwound.append(True)
            ask("nor this")

    before = threading.active_count()
    coroutine = Coroutine(function)
    coroutine.resume()
    coroutine.close()
    coroutine.close()
    assert unwound == [True] and threading.active_count() == before


def test_closing_before_the_start_is_nothing():
    Coroutine(lambda ask: None).close()


def test_context_variables_are_the_callers():
    variable = contextvars.ContextVar("variable")
    variable.set("here")
    coroutine = Coroutine(lambda ask: variable.get())
    coroutine.resume()
    assert coroutine.result == "here"
