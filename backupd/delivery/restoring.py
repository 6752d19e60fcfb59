"""Reading the history of a ledger that was begun anew from the records beside archives."""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from backupd.core.checksum import is_checksum_name
from backupd.core.errors import LedgerError
from backupd.core.model import Archive, DeliveryState, fingerprint_of
from backupd.core.names import NAME_MAX, as_text, free_names, record_name
from backupd.core.policy import Reason
from backupd.core.step import archive_state
from backupd.delivery.disposal import Rule
from backupd.drop.removal import LARGEST_RECORD
from backupd.drop.walk import walk
from backupd.ledger.port import Ending, Settled
from backupd.ledger.shelf import Restored, Shelf
from backupd.ops import events
from backupd.ops.log import EventLog
from backupd.ops.pulse import Pulse

_PAGE = 256
"""Archives that are noted in one go."""

_PAUSE = 0.02
"""Seconds between two pages, in which others get the disk and the ledger."""

_MOST = 100
"""Records beside an archive that are read, and names that it may have got, for others that had its own."""

_RECORD = re.compile(rb"\.(receipt|reason)(-\d+)?\.json$")

_Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_Text = Annotated[str, StringConstraints(max_length=64 * 1024)]
_Digest = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,16}:[0-9a-f]{8,128}$")]
_Time = Annotated[AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC))]
_Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]


class _Delivery(BaseModel):
    model_config = ConfigDict(strict=True)

    destination: _Name
    delivery_id: _Id
    state: DeliveryState
    ended_at: _Time
    digest: _Digest | None
    verified: bool | None
    http_status: Annotated[int, Field(ge=100, le=999)] | None
    reason: Reason | None
    error: _Text | None
    receipt: _Text | None


class _Record(BaseModel):
    """What `Disposal` writes beside an archive; here anybody may have written it."""

    model_config = ConfigDict(strict=True)

    archive: _Name
    drop: _Name
    size: int
    digest: _Digest | None
    admitted_at: _Time
    deliveries: Annotated[list[_Delivery], Field(min_length=1, max_length=1000)]


class _File(NamedTuple):
    """A file that was put away; files sort by the time of that, nanoseconds since the epoch."""

    ctime_ns: int
    relpath: bytes
    top: bytes


class Restorer:
    """Has a new ledger know what lies in `sent_dir` and `rejected_dir`; `run` is the body of its thread.

    What a ledger knows stays as it is. `device_of` returns the device of an archive, if it is of interest.
    """

    def __init__(
        self,
        open_shelf: Callable[[], Shelf],
        rules: Mapping[str, Rule],
        device_of: Callable[[Archive], str | None],
        log: EventLog,
    ) -> None:
        self._open_shelf = open_shelf
        self._rules = rules
        self._device_of = device_of
        self._log = log
        self.pulse = Pulse("restorer of history")

    def run(self, stop: threading.Event) -> None:
        """Look through each drop for which that was not done yet; what fails is left to the next start."""
        self.pulse.beat()
        try:
            shelf = self._open_shelf()
            try:
                for drop, rule in [*self._rules.items()]:
                    if not stop.is_set() and not shelf.is_restored(drop):
                        self._restore(shelf, drop, rule, stop)
            finally:
                shelf.close()
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def _restore(self, shelf: Shelf, drop: str, rule: Rule, stop: threading.Event) -> None:
        files = self._files(rule, stop)
        if files is None:
            return
        restored = unknown = 0
        for first in range(0, len(files), _PAGE):
            read = [(file, self._read(drop, rule, file)) for file in files[first : first + _PAGE]]
            restored += shelf.restore([record for _, record in read if record is not None])
            unknown += sum(record is None and not _goes_along(file.relpath) for file, record in read)
            if stop.wait(_PAUSE):
                return
        shelf.note_restored(drop)
        if restored or unknown:
            self._log.emit(events.LEDGER_RESTORED, drop=drop, restored=restored, unknown=unknown)

    def _files(self, rule: Rule, stop: threading.Event) -> list[_File] | None:
        """Return what was put away, the latest first; None where not all of it can be seen now."""
        files: list[_File] = []
        failed: list[bytes] = []

        def go_on() -> bool:
            self.pulse.beat()
            return not stop.is_set()

        tops = [top for top in (rule.sent_dir, rule.rejected_dir) if _is_there(rule, top)]
        for top in tops:
            entries = walk(
                rule.folder,
                top,
                frozenset(),
                lambda path, _: failed.append(path),
                recursive=True,
                go_on=go_on,
            )
            files += [_File(s.st_ctime_ns, path, top) for path, s in entries if stat.S_ISREG(s.st_mode)]
        return sorted(files, reverse=True) if tops and not failed and not stop.is_set() else None

    def _read(self, drop: str, rule: Rule, file: _File) -> Restored | None:
        """Return what the first record that can be of a file tells of it."""
        self.pulse.beat()
        sent = file.top == rule.sent_dir
        wanted, kind = (DeliveryState.DELIVERED, b"receipt") if sent else (DeliveryState.REJECTED, b"reason")
        directory, _, name = file.relpath.rpartition(b"/")
        for number in range(1, _MOST):
            record = directory + b"/" + record_name(name, kind, number)
            try:
                read = _Record.model_validate_json(rule.folder.read(record, LARGEST_RECORD))
                status = rule.folder.stat(file.relpath)
            except FileNotFoundError:
                return None
            except (OSError, ValidationError):  # a link, a folder, or another's file of that name
                continue
            relpath = _dropped_as(read, file)
            if relpath is not None and _can_be_of(read, drop, status, wanted):
                archive = Archive(0, drop, relpath, fingerprint_of(status), read.admitted_at)
                return self._restored(read, archive, wanted, file.relpath)
        return None

    def _restored(self, record: _Record, archive: Archive, state: DeliveryState, to: bytes) -> Restored:
        endings = tuple(
            Ending(
                d.delivery_id,
                d.destination,
                d.state,
                d.ended_at,
                d.digest,
                d.verified,
                d.http_status,
                d.reason,
                d.error,
                d.receipt,
            )
            for d in record.deliveries
        )
        # when it was put away the kernel knows better than whoever wrote the record
        since = datetime.fromtimestamp(min(archive.fingerprint.ctime_ns, time.time_ns()) / 1e9, UTC)
        settled = Settled(archive, state, record.digest, endings, announced=True)
        return Restored(settled, to, since, self._device_of(archive))


def _is_there(rule: Rule, top: bytes) -> bool:
    with suppress(OSError), rule.folder.directory(top):
        return True
    return False


def _goes_along(relpath: bytes) -> bool:
    """Tell whether a file is no archive: a record, a checksum file, or one that is hidden."""
    name = relpath.rpartition(b"/")[2]
    return name.startswith(b".") or bool(_RECORD.search(name)) or is_checksum_name(name)


def _can_be_of(record: _Record, drop: str, status: os.stat_result, wanted: DeliveryState) -> bool:
    """Tell whether a record is of a file: drop, size and state are those, and its times have passed."""
    latest = max(record.admitted_at, *(d.ended_at for d in record.deliveries))
    return (
        stat.S_ISREG(status.st_mode)
        and (record.drop, record.size) == (drop, status.st_size)
        and latest <= datetime.now(UTC)
        and archive_state([d.state for d in record.deliveries]) is wanted
    )


def _dropped_as(record: _Record, file: _File) -> bytes | None:
    """Return the path that an archive had before it was put away; None where it can't lie here.

    Of one that was renamed, as its name was taken, what is no UTF-8 stays escaped.
    """
    lies = file.relpath[len(file.top) + 1 :]
    if as_text(lies) == record.archive:
        return lies
    parent, slash, name = lies.rpartition(b"/")
    said_parent, said_slash, said = record.archive.rpartition("/")
    if said_parent + said_slash != as_text(parent + slash) or said[:1] in ("", ".") or "\0" in said:
        return None
    if len(said.encode()) > NAME_MAX:
        return None
    names = islice(free_names(said.encode(), record.admitted_at), _MOST)
    return parent + slash + said.encode() if as_text(name) in map(as_text, names) else None
