"""The few short attempts within one claim; anything longer is the ledger's `due_at`."""

from __future__ import annotations

import threading
from collections.abc import Callable

import tenacity

from backupd.core.model import Deferred, Outcome
from backupd.core.policy import rule_of

_MOST = 3


class _StoppingError(Exception):
    """The wait was ended by the stop event; tenacity would make one more attempt if it only returned."""


def short_attempts(once: Callable[[], Outcome], stop: threading.Event) -> None:
    """Call `once` until its outcome is one that a moment's patience can't mend, three times at most."""

    def sleep(seconds: float) -> None:
        if stop.wait(seconds):
            raise _StoppingError

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_MOST),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=2),
        retry=tenacity.retry_if_result(_is_worth_another),
        retry_error_callback=lambda _state: None,
        sleep=sleep,
    )
    try:
        retrying(once)
    except _StoppingError:
        return


def _is_worth_another(outcome: Outcome) -> bool:
    return isinstance(outcome, Deferred) and rule_of(outcome.reason).at_once
