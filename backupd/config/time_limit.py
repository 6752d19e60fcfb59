"""Calls on filesystems that may never answer, such as that of a file server that is gone."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

ANSWER_TIMEOUT: Final = 5.0
"""Seconds within which a filesystem has to answer."""

T = TypeVar("T")


class NoAnswerError(TimeoutError):
    """A filesystem did not answer in time."""

    def __init__(self, timeout: float) -> None:
        super().__init__(errno.ETIMEDOUT, f"does not answer within {timeout:g} s")


def call_all(calls: Mapping[str, Callable[[], T]], timeout: float = ANSWER_TIMEOUT) -> dict[str, T | OSError]:
    """Call functions at the same time, each in a thread, and return the result or the OSError of each.

    That is NoAnswerError for a call that has not returned after `timeout` seconds; its thread is left
    behind, because nothing can end it. Any other exception is raised.
    """
    ended: dict[str, T | Exception] = {}

    def run(name: str) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread
        try:
            ended[name] = calls[name]()
        except Exception as error:  # noqa: BLE001 -- the caller's thread raises it
            ended[name] = error

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in calls]
    until = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0.0))
    answers: dict[str, T | OSError] = {}
    for name in calls:
        answer = ended.get(name, NoAnswerError(timeout))
        if isinstance(answer, Exception) and not isinstance(answer, OSError):
            raise answer
        answers[name] = answer
    return answers


def call(function: Callable[[], T]) -> T:
    """Return the result of a function, or raise its exception; see `call_all`."""
    answer = call_all({"": function})[""]
    if isinstance(answer, OSError):
        raise answer
    return answer


def filesystem_hint(path: Path, error: OSError) -> str:
    """Return the commands that show why a file or folder can't be used."""
    if isinstance(error, NoAnswerError):
        return f"check its file server or disk: `findmnt -T {path}`, `dmesg -T`"
    if isinstance(error, FileNotFoundError):
        return f"check that {path} exists and is mounted"
    if isinstance(error, PermissionError):
        return "run this command as the daemon's user"
    return f"check its mount: `findmnt -T {path}`"
