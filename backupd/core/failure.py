"""Failures as outcomes: an archive is rejected or its delivery deferred, as the failure policy decides."""

from __future__ import annotations

from datetime import timedelta

from backupd.core.model import Deferred, Rejected
from backupd.core.policy import Action, Reason, rule_of


def failure(
    reason: Reason, error: str, http_status: int | None = None, retry_after: timedelta | None = None
) -> Deferred | Rejected:
    """Return `Rejected` if the policy rejects the archive for this reason, `Deferred` otherwise."""
    if rule_of(reason).action is Action.REJECT:
        return Rejected(reason, error, http_status)
    return Deferred(reason, error, http_status, retry_after)
