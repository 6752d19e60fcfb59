"""Run `backupd` with each step of a delivery reported to the preloaded library; the tests start this module.

The program contains no hook for this: the functions that carry out the steps are wrapped here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

from backupd.cli import main
from backupd.delivery import disposition
from backupd.delivery.receipt_file import write_receipt_file
from backupd.dropfolder.folder import CachedFolder
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.upload.http.body import UploadBody
from backupd.upload.http.uploader import HttpUploader

STEPS = (
    "seen",
    "queued",
    "claimed",
    "first byte",
    "last byte",
    "response received",
    "outcome committed",
    "moved",
    "receipt written",
    "directories synced",
    "disposition committed",
)
"""The durable steps of a delivery, in order; a system call belongs to the step that follows it."""


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


def mark_steps() -> None:
    """Wrap the functions that carry out the steps."""

    def wrap(owner: Any, function: Callable[..., Any], step: str, after: str) -> None:
        name = function.__name__
        assert getattr(owner, name) is function
        setattr(owner, name, _during(step, after, function))

    wrap(SqliteLedger, SqliteLedger.enqueue, "queued", "seen")
    wrap(SqliteLedger, SqliteLedger.claim, "claimed", "claimed")
    wrap(HttpUploader, HttpUploader.upload, "first byte", "claimed")
    wrap(SqliteLedger, SqliteLedger.record, "outcome committed", "moved")
    wrap(disposition, write_receipt_file, "receipt written", "moved")
    wrap(CachedFolder, CachedFolder.sync, "directories synced", "moved")
    wrap(SqliteLedger, SqliteLedger.record_dispositions, "disposition committed", "moved")

    chunks = UploadBody.__iter__

    def marked(body: UploadBody) -> Iterator[bytes]:
        for chunk in chunks(body):
            yield chunk
            _enter("last byte")
        _enter("response received")

    UploadBody.__iter__ = marked  # type: ignore[method-assign]


if __name__ == "__main__":
    mark_steps()
    main()
