"""Failures as outcomes, and errors with a hint and an exit code."""

from datetime import timedelta

import pytest

from backupd.core.errors import BackupdError, ConfigError, LedgerError, UnavailableError, UsageError
from backupd.core.failure import failure
from backupd.core.model import Deferred, Rejected
from backupd.core.policy import Action, Reason, rule_of


@pytest.mark.parametrize("reason", Reason)
def test_the_policy_decides_whether_a_failure_rejects_or_defers(reason: Reason) -> None:
    outcome = failure(reason, "why", 418, timedelta(seconds=5))
    rejects = rule_of(reason).action is Action.REJECT
    assert isinstance(outcome, Rejected) == rejects
    assert (outcome.reason, outcome.error, outcome.http_status) == (reason, "why", 418)
    if isinstance(outcome, Deferred):
        assert outcome.retry_after == timedelta(seconds=5)


def test_a_failure_without_a_response_has_no_status() -> None:
    assert failure(Reason.DNS, "no such host") == Deferred(Reason.DNS, "no such host", None, None)


def test_an_error_shows_its_hint_if_it_has_one() -> None:
    assert str(BackupdError("the problem")) == "the problem"
    assert str(BackupdError("the problem", "the fix")) == "the problem\n  hint: the fix"


def test_each_class_of_error_has_its_exit_code() -> None:
    kinds = (BackupdError, UsageError, UnavailableError, ConfigError, LedgerError)
    assert [kind("x").exit_code for kind in kinds] == [1, 2, 69, 78, 78]
