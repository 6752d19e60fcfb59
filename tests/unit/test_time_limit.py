"""Calls that may never return."""

from __future__ import annotations

import threading

import pytest

from backupd.config.time_limit import NoAnswerError, call, call_all


def fail() -> int:
    raise FileNotFoundError("no such folder")


def test_a_call_that_never_returns_is_an_error_after_the_time_limit() -> None:
    ended = threading.Event()
    try:
        answer = call_all({"hangs": ended.wait}, 0.0)["hangs"]
    finally:
        ended.set()

    assert isinstance(answer, NoAnswerError)
    assert answer.strerror == "does not answer within 0 s"


def test_each_call_has_a_result_or_an_error_of_its_own() -> None:
    answers = call_all({"works": lambda: 1, "fails": fail})

    assert answers["works"] == 1
    assert isinstance(answers["fails"], FileNotFoundError)


def test_the_error_of_a_single_call_is_raised() -> None:
    assert call(lambda: 1) == 1
    with pytest.raises(FileNotFoundError):
        call(fail)


def test_a_bug_in_a_call_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        call_all({"works": lambda: 1, "is wrong": lambda: 1 // 0})
