"""What becomes of the files of settled archives: moved, deleted or kept; rejected ones to quarantine."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from backupd.core.model import DeliveryState
from backupd.core.names import RECORDS, free_names, record_name
from backupd.core.policy import Reason, rule_of
from backupd.delivery.record import written
from backupd.drop.checksum import move_companions
from backupd.drop.folder import DropFolder
from backupd.drop.held import HeldFolder
from backupd.drop.move import FileChangedError, find_moved, move
from backupd.drop.record import write_record
from backupd.ledger.port import Disposed, Settled
from backupd.ops import events
from backupd.ops.log import EventLog

_MOST_HELD = 16
"""Directories that stay open between two archives."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a drop does with its archives; the directories are relative to it.

    With `checksums` an archive's own checksum files go where it goes.
    """

    folder: DropFolder
    on_delivered: str
    sent_dir: bytes
    rejected_dir: bytes
    checksums: bool = False


class Disposal:
    """Disposes of files once their outcome is committed; what it did before a crash it finds again."""

    def __init__(self, rules: Mapping[str, Rule], log: EventLog) -> None:
        self._rules = rules
        self._log = log
        self._failed: set[int] = set()

    def dispose(
        self, settled: Sequence[Settled], alive: Callable[[], None] = lambda: None
    ) -> tuple[list[Disposed], list[int]]:
        """Dispose of each file; return what was done, and the ids of archives that it failed for.

        What is returned as done is durable. `alive` is called before each. What is to be said is said last,
        right before the caller's commit: a kill in between has it said again.
        """
        said: list[Callable[[], None]] = []
        done: list[tuple[Settled, Disposed, str]] = []
        failed: list[int] = []
        touched: set[tuple[str, bytes]] = set()
        held: dict[str, HeldFolder] = {}
        try:
            for one in settled:
                alive()
                if sum(map(len, held.values())) > _MOST_HELD:
                    _close_all(held)
                if not one.announced:
                    said.append(partial(self._announce, one))
                drop = one.archive.drop
                rule = self._rules.get(drop)
                if rule is None:
                    failed.append(one.archive.id)  # until the drop is configured again
                    continue
                if drop not in held:
                    held[drop] = HeldFolder(rule.folder)
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
        self, one: Settled, rule: Rule, folder: HeldFolder, touched: set[tuple[str, bytes]]
    ) -> tuple[Disposed, str]:
        """Return what was done, and the word for it."""
        archive = one.archive
        parent, _, name = archive.relpath.rpartition(b"/")
        action = rule.on_delivered if one.state is DeliveryState.DELIVERED else "reject"
        if action == "keep":
            return Disposed(archive.id, None, left=True), "kept"
        if action == "delete":
            target, name = parent, b".backupd-%d.deleted" % archive.id
        else:
            top = rule.sent_dir if action == "move" else rule.rejected_dir
            target = top + b"/" + parent if parent else top
        moved_to = self._move(one, folder, target, free_names(name, archive.admitted_at))
        if moved_to is None and folder.is_out_of_reach(archive.relpath, archive.fingerprint.device):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if moved_to is None:
            return Disposed(archive.id, None, gone=True), "gone"
        if rule.checksums:
            move_companions(folder, archive, None if action == "delete" else moved_to)
        # those above it, too: they may have been made for it, now or before a crash
        touched |= {(archive.drop, directory) for directory in (parent, *_up_from(target))}
        if action == "delete":
            folder.unlink(moved_to)
            return Disposed(archive.id, None), "deleted"
        self._write_record(one, folder, moved_to)
        return Disposed(archive.id, moved_to), "moved"

    def _move(self, one: Settled, folder: HeldFolder, target: bytes, names: Iterator[bytes]) -> bytes | None:
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

    def _write_record(self, one: Settled, folder: HeldFolder, moved_to: bytes) -> None:
        kind = b"receipt" if one.state is DeliveryState.DELIVERED else b"reason"
        directory, _, name = moved_to.rpartition(b"/")
        own = hashlib.sha256(one.endings[0].delivery_id.encode()).digest()
        numbers = (*range(1, RECORDS + 1), int.from_bytes(own[:8], "big"))  # the last one nobody can guess
        write_record(folder, directory, (record_name(name, kind, n) for n in numbers), written(one))

    def _announce(self, one: Settled) -> None:
        archive = one.archive
        about = {"drop": archive.drop, "archive": archive.relpath, "size": archive.fingerprint.size}
        if one.state is DeliveryState.DELIVERED:
            self._log.emit(
                events.ARCHIVE_DELIVERED,
                exc_info=None,
                **about,
                digest=one.digest,
                destinations=[ending.destination for ending in one.endings],
                verified=all(ending.verified for ending in one.endings),
                duration_s=max(ending.ended_at for ending in one.endings) - archive.admitted_at,
            )
            return
        why = next(ending for ending in one.endings if ending.state is DeliveryState.REJECTED)
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

    def _tell(self, one: Settled, disposed: Disposed, disposition: str) -> None:
        self._failed.discard(one.archive.id)
        self._log.emit(
            events.ARCHIVE_DISPOSED,
            drop=one.archive.drop,
            archive=one.archive.relpath,
            disposition=disposition,
            moved_to=disposed.to,
        )

    def _complain(self, one: Settled, error: OSError) -> None:
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


def _sync(touched: set[tuple[str, bytes]], held: Mapping[str, HeldFolder]) -> None:
    for drop, directory in sorted(touched):
        if len(held[drop]) > _MOST_HELD:
            held[drop].close()
        with suppress(FileNotFoundError):  # the directory was removed with all that was in it
            held[drop].sync(directory)


def _close_all(held: Mapping[str, HeldFolder]) -> None:
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
