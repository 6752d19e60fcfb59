"""The JSON of a `Snapshot` in the ledger."""

from __future__ import annotations

import json
import re

from pydantic import TypeAdapter, ValidationError

from backupd.core.snapshot import Snapshot

_SNAPSHOT = TypeAdapter(Snapshot)

_SURROGATE = re.compile("[\ud800-\udfff]")
"""A character that no encoding has; an error of the operating system may quote one from a file name."""


def to_json(snapshot: Snapshot) -> str:
    """Return the JSON of a snapshot."""
    text = json.dumps(_SNAPSHOT.dump_python(snapshot, mode="json"), ensure_ascii=False, separators=(",", ":"))
    return _SURROGATE.sub(lambda found: rf"\\u{ord(found[0]):04x}", text)


def from_json(text: str) -> Snapshot | None:
    """Return the snapshot with this JSON; None if another version of backupd wrote it in another form."""
    try:
        return _SNAPSHOT.validate_json(text)
    except ValidationError:
        return None
