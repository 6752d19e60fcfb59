"""What becomes of the files of settled archives: moved, deleted or kept; rejected ones to quarantine."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError

from backupd.core.model import DIGEST_BYTES, Archive, DeliveryState
from backupd.core.names import (
    MAX_RECEIPT_FILE_BYTES,
    RECEIPT_FILE_KINDS,
    as_text,
    free_names,
    receipt_file_name,
)
from backupd.core.policy import Reason, rule_of
from backupd.core.transition import archive_state
from backupd.dropfolder.checksums import move_checksum_files
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import CachedFolder
from backupd.dropfolder.move import FileChangedError, find_moved, move, write_receipt_file
from backupd.ledger.port import CompletedArchive, DeliveryResult, DispositionResult
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_DIGEST = "|".join(f"{algorithm}:[0-9a-f]{{{2 * size}}}" for algorithm, size in DIGEST_BYTES.items())

_Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_Text = Annotated[str, StringConstraints(max_length=8 * 1024)]
_Digest = Annotated[str, StringConstraints(pattern=f"^({_DIGEST})$")]
_Id = Annotated[str, StringConstraints(pattern="^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
_Time = Annotated[AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC))]


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


class ReceiptFile(BaseModel):
    """What a record tells; whoever may write in the folder may have written it."""

    model_config = ConfigDict(strict=True)

    archive: _Name
    drop: _Name
    size: int
    digest: _Digest | None
    queued_at: _Time
    deliveries: Annotated[list[_Delivery], FailFast(), Field(min_length=1, max_length=64)]

    @property
    def state(self) -> DeliveryState:
        """Return what the deliveries make of the archive."""
        return archive_state([delivery.state for delivery in self.deliveries])

    @property
    def ended_at(self) -> datetime:
        """Return when all was over, not before the admission, however the clock was set meanwhile."""
        return max(self.queued_at, *(delivery.ended_at for delivery in self.deliveries))

    def settled(self, archive: Archive) -> CompletedArchive:
        """Return how the deliveries of an archive ended, which was announced then."""
        endings = tuple(
            DeliveryResult(
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
            for d in self.deliveries
        )
        return CompletedArchive(archive, self.state, self.digest, endings, already_logged=True)


def as_json(one: CompletedArchive) -> bytes:
    """Return the content of the record of an archive."""
    archive = one.archive
    fields = {
        "archive": as_text(archive.relpath),
        "drop": archive.drop,
        "size": archive.fingerprint.size,
        "digest": one.digest,
        "queued_at": archive.queued_at.isoformat(),
        "deliveries": [
            {
                "destination": ending.destination,
                "delivery_id": ending.delivery_id,
                "state": ending.state,
                "ended_at": ending.ended_at.isoformat(),
                "digest": ending.digest,
                "verified": ending.verified,
                "http_status": ending.http_status,
                "reason": ending.reason,
                "error": ending.error,
                "receipt": ending.receipt,
            }
            for ending in one.results
        ],
    }
    return (json.dumps(fields, indent=2) + "\n").encode("ascii")


def parse_receipt_file(content: bytes) -> ReceiptFile | None:
    """Return what a record tells; None where it is none, or tells what no archive can come to.

    What was delivered has a digest: without one nothing could be shown of it.
    """
    if len(content) > MAX_RECEIPT_FILE_BYTES:
        return None
    try:
        record = ReceiptFile.model_validate_json(content)
    except ValidationError:
        return None
    delivered = [d for d in record.deliveries if d.state is DeliveryState.DELIVERED]
    proved = all(d.digest for d in delivered) and (record.digest or not delivered)
    return record if proved else None


_MOST_HELD = 16
"""Directories that stay open between two archives."""


class Disposition:
    """Disposes of files once their outcome is committed; what it did before a crash it finds again."""

    def __init__(self, drops: Mapping[str, Drop], log: EventLog) -> None:
        self._drops = drops
        self._log = log
        self._failed: set[int] = set()

    def dispose(
        self, settled: Sequence[CompletedArchive], alive: Callable[[], None] = lambda: None
    ) -> tuple[list[DispositionResult], list[int]]:
        """Dispose of each file; return what was done, and the ids of archives that it failed for.

        What is returned as done is durable. `alive` is called before each. What is to be said is said last,
        right before the caller's commit: a kill in between has it said again.
        """
        said: list[Callable[[], None]] = []
        done: list[tuple[CompletedArchive, DispositionResult, str]] = []
        failed: list[int] = []
        touched: set[tuple[str, bytes]] = set()
        held: dict[str, CachedFolder] = {}
        try:
            for one in settled:
                alive()
                if sum(map(len, held.values())) > _MOST_HELD:
                    _close_all(held)
                if not one.already_logged:
                    said.append(partial(self._announce, one))
                drop = one.archive.drop
                rule = self._drops.get(drop)
                if rule is None:
                    failed.append(one.archive.id)  # until the drop is configured again
                    continue
                if drop not in held:
                    held[drop] = CachedFolder(rule.folder)
                try:
                    done.append((one, *self._dispose(one, rule, held[drop], touched)))
                except OSError as error:
                    self._complain(one, error)
                    failed.append(one.archive.id)
            try:
                _sync(touched, held)
            except OSError as error:
                for one, _, _ in done:
                    said.append(partial(self._complain, one, error))
                    failed.append(one.archive.id)
                done = []
            said += [partial(self._tell, *each) for each in done]
            return [disposed for _, disposed, _ in done], failed
        finally:
            for say in said:
                say()
            _close_all(held)

    def _dispose(
        self,
        one: CompletedArchive,
        rule: Drop,
        folder: CachedFolder,
        touched: set[tuple[str, bytes]],
    ) -> tuple[DispositionResult, str]:
        """Return what was done, and the word for it."""
        archive = one.archive
        parent, _, name = archive.relpath.rpartition(b"/")
        action = rule.config.on_delivered if one.state is DeliveryState.DELIVERED else "reject"
        if action == "keep":
            return DispositionResult(archive.id, None, kept_in_place=True), "kept"
        if action == "delete":
            target, name = parent, b".backupd-%d.deleted" % archive.id
        else:
            top = rule.sent_dir if action == "move" else rule.rejected_dir
            target = top + b"/" + parent if parent else top
        moved_to = self._move(one, folder, target, free_names(name, archive.queued_at))
        if moved_to is None and folder.is_unreachable(archive.relpath, archive.fingerprint.device):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if moved_to is None:
            return DispositionResult(archive.id, None, missing=True), "gone"
        if rule.uses_checksum_files:
            move_checksum_files(folder, archive, None if action == "delete" else moved_to)
        # those above it, too: they may have been made for it, now or before a crash
        touched |= {(archive.drop, directory) for directory in (parent, *_up_from(target))}
        if action == "delete":
            folder.unlink(moved_to)
            return DispositionResult(archive.id, None), "deleted"
        self._write_record(one, folder, moved_to)
        return DispositionResult(archive.id, moved_to), "moved"

    def _move(
        self, one: CompletedArchive, folder: CachedFolder, target: bytes, names: Iterator[bytes]
    ) -> bytes | None:
        """Move the file; None if it is gone, or another content has its name: that one starts over."""
        archive, expected = one.archive, one.archive.fingerprint
        names, anew, again = itertools.tee(names, 3)
        hidden = b".backupd-%d.taken" % archive.id
        try:
            try:
                return move(folder, archive.relpath, expected, target, names, hidden)
            except (FileNotFoundError, NotADirectoryError):
                folder.close()  # it may be the directory that is gone
                return move(folder, archive.relpath, expected, target, anew, hidden)
        except (FileNotFoundError, NotADirectoryError, FileChangedError):
            return find_moved(folder, archive.relpath, expected, target, again, hidden)

    def _write_record(self, one: CompletedArchive, folder: CachedFolder, moved_to: bytes) -> None:
        kind = b"receipt" if one.state is DeliveryState.DELIVERED else b"reason"
        directory, _, name = moved_to.rpartition(b"/")
        own = hashlib.sha256(one.results[0].delivery_id.encode()).digest()
        numbers = (
            *range(1, RECEIPT_FILE_KINDS + 1),
            int.from_bytes(own[:8], "big"),
        )  # the last one nobody can guess
        write_receipt_file(
            folder, directory, (receipt_file_name(name, kind, n) for n in numbers), as_json(one)
        )

    def _announce(self, one: CompletedArchive) -> None:
        archive = one.archive
        about = {"drop": archive.drop, "archive": archive.relpath, "size_bytes": archive.fingerprint.size}
        if one.state is DeliveryState.DELIVERED:
            self._log.emit(
                events.ARCHIVE_DELIVERED,
                exc_info=None,
                **about,
                digest=one.digest,
                destinations=[ending.destination for ending in one.results],
                verified=all(ending.verified for ending in one.results),
                duration_s=max(ending.ended_at for ending in one.results) - archive.queued_at,
            )
            return
        why = next(ending for ending in one.results if ending.state is DeliveryState.REJECTED)
        self._log.emit(
            events.ARCHIVE_REJECTED,
            exc_info=None,
            **about,
            digest=one.digest,
            destination=why.destination,
            delivery_id=why.delivery_id,
            reason=why.reason,
            error=why.error,
            http_status=why.http_status,
            hint=rule_of(Reason(why.reason)).hint if why.reason else None,
        )

    def _tell(self, one: CompletedArchive, disposed: DispositionResult, disposition: str) -> None:
        self._failed.discard(one.archive.id)
        self._log.emit(
            events.ARCHIVE_DISPOSED,
            drop=one.archive.drop,
            archive=one.archive.relpath,
            disposition=disposition,
            moved_to=disposed.moved_to,
        )

    def _complain(self, one: CompletedArchive, error: OSError) -> None:
        if one.archive.id in self._failed:
            return
        self._failed.add(one.archive.id)
        self._log.emit(
            events.DISPOSITION_FAILED,
            drop=one.archive.drop,
            archive=one.archive.relpath,
            error=error.strerror or str(error),
            hint=_hint(error),
        )


def _up_from(directory: bytes) -> Iterator[bytes]:
    while directory:
        yield directory
        directory = directory.rpartition(b"/")[0]
    yield b""


def _sync(touched: set[tuple[str, bytes]], held: Mapping[str, CachedFolder]) -> None:
    for drop, directory in sorted(touched):
        if len(held[drop]) > _MOST_HELD:
            held[drop].close()
        with suppress(FileNotFoundError):  # the directory was removed with all that was in it
            held[drop].sync(directory)


def _close_all(held: Mapping[str, CachedFolder]) -> None:
    for folder in held.values():
        folder.close()


def _hint(error: OSError) -> str:
    if error.errno in (errno.EEXIST, errno.EISDIR):
        return "remove what has the hidden name of a file of ours in the folder, `sent_dir` or `rejected_dir`"
    if error.errno in (errno.ETXTBSY, errno.EAGAIN):
        return "see who has it open (`fuser`); it stays until that is over, and is sent anew if changed"
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        return "`sent_dir` and `rejected_dir` have to be folders, neither files nor links"
    if error.errno == errno.ENODEV:
        return "mount the filesystem of the archive on the drop folder"
    if error.errno == errno.EXDEV:
        return "`sent_dir` and `rejected_dir` have to be on the filesystem of the archive"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room on that filesystem; it is tried again"
    if error.errno in (errno.EIO, errno.EROFS):
        return "see what the kernel says of that disk; the archive is still there, and it is tried again"
    return "give the daemon's user write permission to the folder, `sent_dir` and `rejected_dir`"
