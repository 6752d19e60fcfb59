"""Problems of files in drop folders: each file that will not be sent, or not moved, as things are.

An archive that was queued although it looks damaged is a problem as well, wherever its file is now.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

FOLDER_FAILED = "folder_failed"
"""The reason for a drop folder that cannot be used: none of its files is sent. It is critical."""

NOT_ANSWERING = "not_answering"
"""The reason for a drop folder on a filesystem that does not answer. It is critical."""

FOLDER_REASONS = frozenset((FOLDER_FAILED, NOT_ANSWERING))

NOT_MOVED = "not_moved"
"""The reason for a file of a completed archive that cannot be moved or deleted."""

SUSPICIOUS = "suspicious"
"""The reason for an archive that was queued although it looks truncated or damaged."""

SUSPICIOUS_FOR = timedelta(days=7)
"""How long that is a problem, unless an archive of the same name is queued before."""

NOT_CONFIGURED = "not_configured"
"""The reason that stands for the archives that wait in a folder that is no drop folder any more.

Also for those that wait for a destination that was removed; `drop` is `destination:NAME` then.
"""

NOT_LISTED = "not_listed"
"""The reason that stands for further files, which are counted but not listed."""


@dataclass(frozen=True, slots=True)
class DropProblem:
    """Why a file stays where it is, until a person or another program does something.

    Or why an archive is `SUSPICIOUS`. `relpath` is relative to the drop folder, empty for the folder itself.
    `reason` is one word of a fixed list. `files` is more than 1 if the problem stands for further files that
    are not listed one by one.
    """

    drop: str
    relpath: bytes
    reason: str
    since: datetime
    error: str
    hint: str
    size_bytes: int | None = None
    files: int = 1


@dataclass(frozen=True, slots=True)
class ProblemCount:
    """The problems of a drop with one reason: their number, and the time of the oldest one.

    `example` is the path of the oldest one's file, with its `error` and `hint`.
    """

    drop: str
    reason: str
    files: int
    since: datetime
    example: bytes
    error: str
    hint: str


@dataclass(frozen=True, slots=True)
class DropState:
    """How the daemon notices the files of a drop, as far as it could open its folder.

    `fault` is why files are found by scans only, empty while events arrive. `blind_spot` is why files that
    are still open for writing cannot be detected, empty if they can be.
    """

    drop: str
    observer: str
    filesystem: str
    fault: str
    blind_spot: str
