"""`backupd` with each step of a delivery made known to the preloaded library; run as the daemon by the tests.

The program itself knows nothing of it: the steps are told from outside, by wrapping what carries them out.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

from backupd.cli import main
from backupd.delivery import disposition
from backupd.dropfolder.folder import CachedFolder
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.upload.http.body import UploadBody
from backupd.upload.http.uploader import HttpUploader

STEPS = (
    "seen",
    "admitted",
    "claimed",
    "first byte",
    "last byte",
    "answer received",
    "outcome committed",
    "moved",
    "receipt written",
    "directories synced",
    "disposition committed",
)
"""The durable steps of a delivery, in their order; a call belongs to the step that it leads to."""


def _enter(step: str) -> None:
    ctypes.CDLL(None).fault_step(STEPS.index(step))


def _during(step: str, after: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        _enter(step)
        try:
            return function(*arguments, **named)
        finally:
            _enter(after)

    return wrapped


def tell_steps() -> None:
    """Wrap whatever carries out a step."""

    def wrap(owner: Any, name: str, step: str, after: str) -> None:
        setattr(owner, name, _during(step, after, getattr(owner, name)))

    wrap(SqliteLedger, "enqueue", "admitted", "seen")
    wrap(SqliteLedger, "claim", "claimed", "claimed")
    wrap(HttpUploader, "upload", "first byte", "claimed")
    wrap(SqliteLedger, "record", "outcome committed", "moved")
    wrap(disposition, "write_receipt_file", "receipt written", "moved")
    wrap(CachedFolder, "sync", "directories synced", "moved")
    wrap(SqliteLedger, "record_dispositions", "disposition committed", "moved")

    pieces = UploadBody.__iter__

    def told(body: UploadBody) -> Iterator[bytes]:
        for piece in pieces(body):
            yield piece
            _enter("last byte")
        _enter("answer received")

    UploadBody.__iter__ = told  # type: ignore[method-assign]


if __name__ == "__main__":
    tell_steps()
    main()
