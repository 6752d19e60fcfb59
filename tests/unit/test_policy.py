"""The failure policy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.policy import RULES, Action, Blame, Reason, reason_of_status, rule_of


def test_every_reason_has_exactly_one_rule() -> None:
    assert [rule.reason for rule in RULES] == list(dict.fromkeys(rule.reason for rule in RULES))
    assert {rule.reason for rule in RULES} == set(Reason)
    assert all(rule_of(reason).reason is reason for reason in Reason)


@pytest.mark.parametrize("reason", Reason)
def test_every_rule_has_a_meaning_and_a_hint(reason: Reason) -> None:
    rule = rule_of(reason)
    assert rule.meaning
    assert rule.hint
    assert not rule.hint.endswith(".")


@pytest.mark.parametrize("reason", Reason)
def test_only_the_destination_is_paused_and_only_archives_are_rejected(reason: Reason) -> None:
    rule = rule_of(reason)
    if rule.action is Action.PAUSE:
        assert rule.blame is Blame.DESTINATION
    if rule.action is Action.REJECT:
        assert rule.blame is Blame.ARCHIVE


def test_only_a_failed_or_lost_connection_is_retried_immediately() -> None:
    assert {rule.reason for rule in RULES if rule.retry_immediately} == {
        Reason.CONNECT,
        Reason.CONNECTION_LOST,
    }


@pytest.mark.parametrize(
    ("status", "action"),
    [
        *((status, Action.REJECT) for status in (400, 409, 413, 415, 422)),
        *((status, Action.PAUSE) for status in (401, 403, 404, 405, 407, 408, 410, 418, 425, 429)),
        *((status, Action.PAUSE) for status in (301, 302, 303, 307, 308, 500, 502, 503, 504, 507, 599)),
        *((status, Action.PAUSE) for status in (203, 206)),
    ],
)
def test_a_status_rejects_the_archive_only_if_the_archive_is_to_blame(status: int, action: Action) -> None:
    assert rule_of(reason_of_status(status)).action is action


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (302, Reason.REDIRECT),
        (401, Reason.UNAUTHORIZED),
        (403, Reason.FORBIDDEN),
        (404, Reason.NOT_FOUND),
        (409, Reason.CONFLICT),
        (413, Reason.TOO_LARGE),
        (422, Reason.REFUSED),
        (429, Reason.RATE_LIMITED),
        (503, Reason.SERVER_ERROR),
        (418, Reason.UNEXPECTED_STATUS),
        (226, Reason.UNEXPECTED_STATUS),
    ],
)
def test_a_status_maps_to_its_reason(status: int, reason: Reason) -> None:
    assert reason_of_status(status) is reason


@given(st.integers(0, 9999))
def test_every_status_has_a_rule(status: int) -> None:
    assert rule_of(reason_of_status(status)).hint
