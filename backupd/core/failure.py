"""From a reason to the outcome that the policy asks for."""

from __future__ import annotations

from datetime import timedelta

from backupd.core.model import Deferred, Rejected
from backupd.core.policy import Action, Reason, rule_of


def failure(
    reason: Reason, error: str, http_status: int | None = None, retry_after: timedelta | None = None
) -> Deferred | Rejected:
    """Return `Rejected` where the policy rejects the archive, else `Deferred`."""
    if rule_of(reason).action is Action.REJECT:
        return Rejected(reason, error, http_status)
    return Deferred(reason, error, http_status, retry_after)
