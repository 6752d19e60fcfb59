"""The disposition of a completed archive's file: it is moved, deleted or kept, and gets a receipt file."""

from __future__ import annotations

import errno
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from backupd.core.drop_problem import NOT_MOVED, DropProblem
from backupd.core.model import Archive, DeliveryState, Digest
from backupd.core.names import as_text, free_names
from backupd.core.policy import REJECTED_BY_INTAKE, Reason, rule_of
from backupd.delivery.receipt_file import write_receipt_file
from backupd.dropfolder.checksums import move_checksum_files
from backupd.dropfolder.content import ExpectedFile
from backupd.dropfolder.decompress import ShouldStop, StoppedError
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import CachedFolder
from backupd.dropfolder.move import FileChangedError, find_moved, move, remove_partial_files
from backupd.ledger.port import CompletedArchive, DispositionResult
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_MAX_OPEN_DIRECTORIES = 16
"""Directories that stay open between two archives."""

_FIRST_READ_SECONDS = 0.5
"""Seconds for which a content is read before results that wait end it; twice as long each further time."""


class Disposition:
    """Moves, deletes or keeps the files of archives, once their results are committed.

    A disposition that a crash interrupted is found and finished by the next call for the same archive.
    `session` returns that of the ledger.
    """

    def __init__(
        self, drops: Mapping[str, Drop], log: EventLog, session: Callable[[], int] = lambda: 1
    ) -> None:
        self._drops = drops
        self._log = log
        self._session = session
        self._expected: dict[int, ExpectedFile] = {}
        """The files that could not be moved or deleted yet, by the ids of their archives."""
        self.problems: dict[int, DropProblem] = {}
        """The problems of the files that could not be moved or deleted, by the ids of their archives."""
        self._read_seconds: dict[int, float] = {}
        """How long the content of each file that was not read to its end may be read next."""
        self.in_drop: str | None = None
        """The drop with the folder that is being used."""
        self.left_alone: set[str] = set()
        """The drops with a folder in which another thread hangs."""

    def dispose(
        self,
        completed: Sequence[CompletedArchive],
        should_stop: ShouldStop = lambda: False,
        is_awaited: Callable[[], bool] = lambda: False,
    ) -> tuple[list[DispositionResult], list[int]]:
        """Dispose of the file of each archive; return the results, and the ids of those that failed.

        The results are durable. `should_stop` is called before each file, and while one is read; once it
        returns True, the others fail without a message. While other work waits for this call (`is_awaited`),
        a long read of one file ends, and fails without a message, too. A file that cannot be moved or deleted
        is logged at once. The rest is logged at the end, right before the caller's commit: after a crash in
        between it is logged twice.
        """
        reports: list[Callable[[], None]] = []
        done: list[tuple[CompletedArchive, DispositionResult, str]] = []
        failed: list[int] = []
        changed: set[tuple[str, bytes]] = set()
        interrupted: set[tuple[str, bytes]] = set()
        folders: dict[str, CachedFolder] = {}
        try:
            for one in completed:
                if sum(map(len, folders.values())) > _MAX_OPEN_DIRECTORIES:
                    _close_all(folders)
                if not one.already_logged:
                    reports.append(partial(self._log_completed, one))
                drop = self._drops.get(one.archive.drop)
                result = None
                if drop is not None and self._is_ready(drop) and not should_stop():
                    self.in_drop = drop.name
                    must_stop = self._read_limit(one, should_stop, is_awaited)
                    result = self._try_to_dispose(one, drop, must_stop, folders, changed, interrupted)
                if result is None:
                    failed.append(one.archive.id)  # until the drop is configured, or its folder usable, again
                else:
                    done.append((one, *result))
            self._remove_partial_files(interrupted, folders)
            try:
                self._sync(changed, folders)
            except OSError as error:
                for one, _, _ in done:
                    reports.append(partial(self._log_failed, one, self._drops[one.archive.drop], error))
                    failed.append(one.archive.id)
                done = []
            reports += [partial(self._log_disposed, *each) for each in done]
            return [result for _, result, _ in done], failed
        finally:
            self.in_drop = None
            for report in reports:
                report()
            _close_all(folders)

    def _read_limit(
        self, completed: CompletedArchive, should_stop: ShouldStop, is_awaited: Callable[[], bool]
    ) -> ShouldStop:
        """Return what ends the read of a file's content: `should_stop`, or other work after some time."""
        id_ = completed.archive.id
        seconds = self._read_seconds.get(id_, _FIRST_READ_SECONDS)
        until = time.monotonic() + seconds

        def should_end() -> bool:
            if should_stop():
                return True
            is_over = time.monotonic() >= until and is_awaited()
            if is_over:
                self._read_seconds[id_] = 2 * seconds
            return is_over

        return should_end

    def _is_ready(self, drop: Drop) -> bool:
        return drop.name not in self.left_alone and drop.folder.is_ready()

    def _try_to_dispose(
        self,
        completed: CompletedArchive,
        drop: Drop,
        should_stop: ShouldStop,
        folders: dict[str, CachedFolder],
        changed: set[tuple[str, bytes]],
        interrupted: set[tuple[str, bytes]],
    ) -> tuple[DispositionResult, str] | None:
        """Return what `_dispose` returns, None if it has failed; log that."""
        id_ = completed.archive.id
        expected = self._expected.pop(id_, None) or _expected_file(completed)
        expected.should_stop = should_stop
        try:
            if drop.name not in folders:
                folders[drop.name] = CachedFolder(drop.folder)
            return self._dispose(completed, expected, drop, folders[drop.name], changed, interrupted)
        except StoppedError:
            return None
        except OSError as error:
            self._expected[id_] = expected  # a content that was compared is not read again
            self._log_failed(completed, drop, error)
            return None

    def _dispose(
        self,
        completed: CompletedArchive,
        expected: ExpectedFile,
        drop: Drop,
        folder: CachedFolder,
        changed: set[tuple[str, bytes]],
        interrupted: set[tuple[str, bytes]],
    ) -> tuple[DispositionResult, str]:
        """Return the result, and its name in the log.

        The directories to be synced are added to `changed`, those of earlier attempts to `interrupted`.
        """
        archive = completed.archive
        parent, _, name = archive.relpath.rpartition(b"/")
        action = drop.config.on_delivered if completed.state is DeliveryState.DELIVERED else "reject"
        if action == "keep":
            return DispositionResult(archive.id, None, kept_in_place=True), "kept"
        if action == "delete":
            # A deletion is a move, then an unlink. Like every move it goes through the name `.taken`, under
            # which the file is checked again. A file named `.deleted` passed this check, so that it can be
            # unlinked after a crash; one named `.taken` may be another file, which is moved back.
            target, name = parent, b".backupd-%d.deleted" % archive.id
        else:
            top = drop.sent_dir if action == "move" else drop.rejected_dir
            target = top + b"/" + parent if parent else top
        moved_to, was_moved = self._move(archive, expected, folder, target, name)
        if moved_to is None and folder.is_unmounted(archive.folder_id):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if moved_to is None:
            return DispositionResult(archive.id, None, missing=True), "missing"
        if drop.uses_checksum_files:
            move_checksum_files(folder, archive, None if action == "delete" else moved_to)
        # the parents of the target as well: this move, or one before a crash, may have created them
        changed |= {(archive.drop, directory) for directory in (parent, *_and_parents(target))}
        if was_moved:
            interrupted.add((archive.drop, target))
        if action == "delete":
            folder.unlink(moved_to)
            return DispositionResult(archive.id, None), "deleted"
        write_receipt_file(folder, completed, moved_to, self._session())
        return DispositionResult(archive.id, moved_to), "moved"

    def _move(
        self, archive: Archive, expected: ExpectedFile, folder: CachedFolder, target: bytes, name: bytes
    ) -> tuple[bytes | None, bool]:
        """Move the file; return its new path, and whether an earlier attempt moved it.

        The path is None if it is gone or has changed.
        """
        hidden = b".backupd-%d.taken" % archive.id
        names = partial(free_names, name, archive.queued_at)
        try:
            try:
                return move(folder, archive.relpath, expected, target, names(), hidden), False
            except (FileNotFoundError, NotADirectoryError):
                folder.close()  # a cached directory may have been removed
                return move(folder, archive.relpath, expected, target, names(), hidden), False
        except (FileNotFoundError, NotADirectoryError, FileChangedError):
            return find_moved(folder, archive.relpath, expected, target, names(), hidden), True

    def _remove_partial_files(
        self, directories: set[tuple[str, bytes]], folders: Mapping[str, CachedFolder]
    ) -> None:
        for drop, directory in directories:
            self.in_drop = drop
            with suppress(OSError):  # a file that is left does no harm
                remove_partial_files(folders[drop], directory, self._session())

    def _sync(self, changed: set[tuple[str, bytes]], folders: Mapping[str, CachedFolder]) -> None:
        for drop, directory in sorted(changed):
            self.in_drop = drop
            if len(folders[drop]) > _MAX_OPEN_DIRECTORIES:
                folders[drop].close()
            with suppress(FileNotFoundError):  # the directory was removed with everything in it
                folders[drop].sync(directory)

    def _log_completed(self, completed: CompletedArchive) -> None:
        archive = completed.archive
        keys = {"drop": archive.drop, "archive": archive.relpath, "size_bytes": archive.fingerprint.size}
        if completed.state is DeliveryState.DELIVERED:
            self._log.emit(
                events.ARCHIVE_DELIVERED,
                exc_info=None,
                **keys,
                digest=completed.digest,
                destinations=[result.destination for result in completed.results],
                verified=all(result.verified for result in completed.results),
                duration_s=max(result.ended_at for result in completed.results) - archive.queued_at,
            )
            return
        rejected = next(result for result in completed.results if result.state is DeliveryState.REJECTED)
        self._log.emit(
            events.ARCHIVE_REJECTED,
            exc_info=None,
            **keys,
            digest=completed.digest,
            destination=None if rejected.reason in REJECTED_BY_INTAKE else rejected.destination,
            delivery_id=rejected.delivery_id,
            reason=rejected.reason,
            error=rejected.error,
            http_status=rejected.http_status,
            hint=rule_of(Reason(rejected.reason)).hint if rejected.reason else None,
        )

    def _log_disposed(self, completed: CompletedArchive, result: DispositionResult, disposition: str) -> None:
        self.problems.pop(completed.archive.id, None)
        self._read_seconds.pop(completed.archive.id, None)
        self._log.emit(
            events.ARCHIVE_DISPOSED,
            drop=completed.archive.drop,
            archive=completed.archive.relpath,
            disposition=disposition,
            moved_to=result.moved_to,
        )

    def _log_failed(self, completed: CompletedArchive, drop: Drop, error: OSError) -> None:
        archive = completed.archive
        if archive.id in self.problems and self.problems[archive.id].drop == drop.name:
            return
        text, hint = error.strerror or str(error), _hint(error, drop, archive)
        self.problems[archive.id] = DropProblem(
            drop.name, archive.relpath, NOT_MOVED, datetime.now(UTC), text, hint, archive.fingerprint.size
        )
        self._log.emit(
            events.DISPOSITION_FAILED, drop=drop.name, archive=archive.relpath, error=text, hint=hint
        )


def _expected_file(completed: CompletedArchive) -> ExpectedFile:
    digest = Digest.parse(completed.digest) if completed.digest else None
    return ExpectedFile(completed.archive.fingerprint, digest)


def _and_parents(directory: bytes) -> Iterator[bytes]:
    while directory:
        yield directory
        directory = directory.rpartition(b"/")[0]
    yield b""


def _close_all(folders: Mapping[str, CachedFolder]) -> None:
    for folder in folders.values():
        folder.close()


def _hint(error: OSError, drop: Drop, archive: Archive) -> str:
    """Return how the operator fixes a failed disposition, with the commands."""
    root = drop.folder.path
    path = os.path.join(root, as_text(archive.relpath))
    file, folder, parent = shlex.quote(path), shlex.quote(root), shlex.quote(os.path.dirname(path))
    sent, rejected = (
        shlex.quote(os.path.join(root, as_text(directory)))
        for directory in (drop.sent_dir, drop.rejected_dir)
    )
    match error.errno:
        case errno.EEXIST | errno.EISDIR:
            return (
                "another program uses a hidden name of backupd: list the names with"
                f" `find {folder} -name '.backupd-*'`, and remove or rename that entry"
            )
        case errno.ETXTBSY | errno.EAGAIN:
            return (
                f"`fuser -v {file}` shows the process that has it open; the file stays until it is closed,"
                " and is delivered again if it has changed"
            )
        case errno.ENOTDIR | errno.ELOOP:
            return f"`ls -ld {sent} {rejected}`: both must be directories, neither files nor links"
        case errno.ENODEV:
            return (
                f"mount the filesystem of the archive on the drop folder again; check `findmnt -T {folder}`"
            )
        case errno.EXDEV:
            return (
                "`sent_dir` and `rejected_dir` must be below the same mount as the archive, or bind mount:"
                f" compare `findmnt -T {file}` and `findmnt -T {sent}`, and mount what is below a drop folder"
                " elsewhere, as a drop of its own"
            )
        case errno.ENOSPC | errno.EDQUOT:
            return (
                f"free space, inodes or quota on that filesystem: `df -h {folder}`, `df -i {folder}`; retried"
            )
        case errno.EIO | errno.EROFS:
            return (
                "the archive is still there; check the disk with `dmesg -T` and its mount with"
                f" `findmnt -T {folder}`; retried"
            )
        case _:
            return (
                "give the daemon's user write permission to the archive's folder, `sent_dir` and"
                f" `rejected_dir`, and make none of them sticky; check `ls -ld {parent} {sent} {rejected}`"
            )
