"""The JSON of a `Snapshot` in the ledger."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from backupd.core.snapshot import Snapshot

_SNAPSHOT = TypeAdapter(Snapshot)


def to_json(snapshot: Snapshot) -> str:
    """Return the JSON of a snapshot."""
    return _SNAPSHOT.dump_json(snapshot).decode()


def from_json(text: str) -> Snapshot | None:
    """Return the snapshot with this JSON; None if another version of backupd wrote it in another form."""
    try:
        return _SNAPSHOT.validate_json(text)
    except ValidationError:
        return None
