"""The JSON of a `NotificationState` in the ledger."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from backupd.core.notifications import NotificationState

_STATE = TypeAdapter(NotificationState)


def notifications_to_json(state: NotificationState) -> str:
    """Return the JSON of what a receiver of messages knows."""
    return _STATE.dump_json(state).decode()


def notifications_from_json(text: str) -> NotificationState | None:
    """Return the state with this JSON; None if another version of backupd wrote it in another form."""
    try:
        return _STATE.validate_json(text)
    except ValidationError:
        return None
