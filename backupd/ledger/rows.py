"""Between the rows of the tables and the records of the model."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from backupd.core.model import (
    Archive,
    Attempt,
    Deferred,
    Delivered,
    DeliveryState,
    Fingerprint,
    Outcome,
    Rejected,
    Superseded,
)
from backupd.ledger.port import Ending, Finished

Row = tuple[Any, ...]
P = ParamSpec("P")
T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

ARCHIVE_COLUMNS = "id, drop_name, relpath, device, inode, size, mtime_ns, ctime_ns, admitted_at"


def as_micros(time: datetime) -> int:
    """Return microseconds since the epoch."""
    return (time - _EPOCH) // _MICROSECOND


class UnreadableRowError(sqlite3.DatabaseError):
    """A row holds a value that none of ours can be."""


def reads(convert: Callable[P, T]) -> Callable[P, T]:
    """Have a conversion of what was read raise UnreadableRowError for what can't be converted."""

    @wraps(convert)
    def converted(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return convert(*arguments, **named)
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            raise UnreadableRowError(str(error)) from error

    return converted


@reads
def as_time(micros: int) -> datetime:
    """Return the UTC time of microseconds since the epoch."""
    return _EPOCH + micros * _MICROSECOND


def time_if_any(micros: int | None) -> datetime | None:
    """Return the UTC time of microseconds since the epoch, if any."""
    return None if micros is None else as_time(micros)


@reads
def path_if_any(path: object) -> bytes | None:
    """Return a path, if any."""
    if not isinstance(path, bytes | None):
        raise TypeError("a path of another type")
    return path


@reads
def as_archive(row: Row) -> Archive:
    """Return the archive of a row of `ARCHIVE_COLUMNS`."""
    if not (isinstance(row[1], str) and isinstance(row[2], bytes)):
        raise TypeError("a drop's name or a path of another type")
    return Archive(row[0], row[1], row[2], Fingerprint(*map(int, row[3:8])), as_time(row[8]))


def as_stored(number: int) -> int | bytes:
    """Return a number as it is; one that SQLite's 64 bits don't hold as its digits, in bytes.

    Network filesystems have inodes of 64 bits without a sign, and a time after 2262 more nanoseconds.
    """
    return number if -(1 << 63) <= number < 1 << 63 else b"%d" % number


def fingerprint_columns(f: Fingerprint) -> Row:
    """Return device, inode, size and times, as they are stored."""
    return tuple(map(as_stored, (f.device, f.inode, f.size, f.mtime_ns, f.ctime_ns)))


@reads
def as_ending(row: Row) -> Ending:
    """Return how a delivery ended."""
    ident, destination, state, ended_at, digest, verified, http_status, reason, error, receipt = row
    return Ending(
        ident,
        destination,
        DeliveryState(state),
        as_time(ended_at),
        digest,
        None if verified is None else bool(verified),
        http_status,
        reason,
        error,
        receipt,
    )


def delivery_row(finished: Finished, now: datetime) -> Row:
    """Return the values of a delivery's update, its id last."""
    delivery, step = finished.delivery, finished.step
    pending = step.state is DeliveryState.PENDING
    reason, error, http_status = _why(step.outcome)
    digest = verified = receipt = None
    if isinstance(step.outcome, Delivered):
        digest, verified = str(step.outcome.digest), step.outcome.verified
        receipt = storable(step.outcome.receipt.body)
    elif isinstance(step.outcome, Deferred) and step.outcome.unknown is not None:
        digest = str(step.outcome.unknown)
    return (
        step.state,
        as_micros(step.due_at or now) if pending else None,
        step.charged,
        step.faults,
        delivery.attempts + len(finished.attempts),
        None if pending else as_micros(now),
        reason,
        error,
        digest,
        verified,
        http_status,
        receipt,
        delivery.id,
    )


def attempt_row(delivery_id: str, number: int, attempt: Attempt) -> Row:
    """Return the row of an attempt."""
    reason, error, http_status = _why(attempt.outcome)
    return (
        delivery_id,
        number,
        as_micros(attempt.started_at),
        attempt.duration // _MICROSECOND,
        attempt.sent,
        type(attempt.outcome).__name__.lower(),
        reason,
        error,
        http_status,
    )


def _why(outcome: Outcome) -> tuple[str | None, str | None, int | None]:
    match outcome:
        case Delivered(receipt=receipt):
            return None, None, receipt.http_status
        case Superseded(error=error):
            return None, storable(error), None
        case Deferred(reason=reason, error=error, http_status=status):
            return reason, storable(error), status
        case Rejected(reason=reason, error=error, http_status=status):
            return reason, storable(error), status


def storable(text: str) -> str:
    """Return a text as valid Unicode: one that is none must not keep an outcome from being recorded."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
