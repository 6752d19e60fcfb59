"""`backupd push`: deliver files now, beside the daemon, and show the progress."""

from __future__ import annotations

import os
import re
import socket
import stat
import threading
import uuid
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from backupd.cli.options import DEFAULT_CONFIG, PENDING, REJECTED, UNAVAILABLE, AsJson, ConfigPath
from backupd.cli.output import print_json, progress_bar
from backupd.config.load import load
from backupd.config.models import Config
from backupd.config.time_limit import NoAnswerError, call, filesystem_hint
from backupd.core.errors import UsageError
from backupd.core.model import Archive, Deferred, Delivered, Outcome, Rejected, Superseded, fingerprint_of
from backupd.core.names import as_text, printable, template_values
from backupd.core.policy import Reason, rule_of
from backupd.delivery.worker import short_attempts
from backupd.dropfolder.folder import DropFolder, close_descriptor
from backupd.upload.base import OnProgress, UploadJob
from backupd.upload.registry import make_uploader


@dataclass(frozen=True, slots=True)
class PushResult:
    """The result of pushing a file to a destination; `outcome` is an outcome's class name in lower case.

    `verified` is whether a receipt was checked, and `response` the beginning of the response of a destination
    that has the file. `may_be_stored` is whether all bytes were sent and the response shows nothing.
    """

    file: str
    destination: str
    outcome: str
    digest: str | None
    reason: str | None
    error: str | None
    hint: str | None
    http_status: int | None
    verified: bool = False
    response: str = ""
    may_be_stored: bool = False


def push(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="The files to deliver; they are not moved or removed.",
            parser=Path,  # the parser of typer accesses the files, which may hang
        ),
    ],
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="NAME", help="Only to this destination.")
    ] = None,
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Deliver files now, beside the daemon, and verify the receipts.

    Exits with 0 if every destination has every file, 3 if one was rejected, 69 if a destination is
    unavailable, 75 if a file changed or could not be read meanwhile. The ledger has no record of it.
    """
    loaded = load(config)
    unknown = [name for name in to or () if name not in loaded.destination]
    if unknown:
        raise UsageError(f"no destination named {unknown[0]}", f"there are: {', '.join(loaded.destination)}")
    sizes = [_require_file(file) for file in files]  # all of them before the first upload
    results = []
    with _progress_bar(hidden=as_json) as progress:
        for name in to or loaded.destination:
            for file, size in zip(files, sizes, strict=True):
                results.append(push_file(file, name, loaded, _add_task(progress, file, size, name)))
                if not as_json:
                    _print(results[-1])
    if as_json:
        print_json(results)
    if any(r.outcome == "rejected" for r in results):
        raise typer.Exit(REJECTED)
    if any(r.outcome == "deferred" and r.reason != Reason.UNREADABLE for r in results):
        raise typer.Exit(UNAVAILABLE)
    if any(r.outcome != "delivered" for r in results):
        raise typer.Exit(PENDING)


def _require_file(file: Path) -> int:
    """Return the size of a file; raise UsageError if it can't be pushed."""
    try:
        status = call(file.lstat)
        is_readable = call(partial(os.access, file, os.R_OK))
    except OSError as error:
        hint = filesystem_hint(file, error) if isinstance(error, NoAnswerError) else ""
        raise UsageError(f"{printable(str(file))}: {error.strerror}", hint) from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{printable(str(file))}: not a regular file", "give the paths of the archives")
    if status.st_size == 0:
        raise UsageError(f"{printable(str(file))}: is empty", "check the device that wrote the backup")
    if not is_readable:
        raise UsageError(f"{printable(str(file))}: Permission denied", "let your user read it")
    return status.st_size


def push_file(
    file: Path, destination: str, config: Config, on_progress: OnProgress = lambda _sent: None
) -> PushResult:
    """Deliver a file to a destination, and return the result; `on_progress` gets the bytes sent so far."""
    name = os.fsencode(file.name)
    try:
        fd, status = call(partial(_open, file))
    except OSError as error:
        return _result(as_text(name), destination, Deferred(Reason.UNREADABLE, error.strerror or str(error)))
    archive = Archive(0, "push", name, fingerprint_of(status), datetime.now(UTC))
    variables = dict.fromkeys(_label_names(config), "") | template_values(archive, socket.gethostname(), None)
    job = UploadJob(str(uuid.uuid4()), name, fd, archive.fingerprint, variables, on_progress)
    uploader = make_uploader(config.destination[destination])
    outcomes: list[Outcome] = []

    def attempt() -> Outcome:
        outcome = uploader.upload(job)
        if isinstance(outcome, Deferred):  # the next attempt asks first whether the content arrived
            job.unconfirmed_digest = outcome.unconfirmed_digest
        outcomes.append(outcome)
        return outcome

    try:
        short_attempts(attempt, threading.Event())
    finally:
        uploader.close()
        close_descriptor(fd)
    return _result(as_text(name), destination, outcomes[-1])


def _open(file: Path) -> tuple[int, os.stat_result]:
    """Return a descriptor of a regular file, which the caller closes, and its status."""
    with closing(DropFolder(str(file.absolute().parent))) as folder:
        fd = folder.open(os.fsencode(file.name))
    return fd, os.fstat(fd)


def _label_names(config: Config) -> set[str]:
    """Return the names of all labels; they are empty for a pushed file, which has no path in a drop."""
    patterns = [drop.label_pattern for drop in config.drop.values() if drop.label_pattern]
    return {group for pattern in patterns for group in re.compile(pattern).groupindex}


def _result(file: str, destination: str, outcome: Outcome) -> PushResult:
    kind = type(outcome).__name__.lower()
    match outcome:
        case Delivered(digest=digest, receipt=receipt, verified=verified):
            status, response = receipt.http_status, receipt.body
            return PushResult(
                file, destination, kind, str(digest), None, None, None, status, verified, response
            )
        case Superseded(error=error):
            hint = "push it again once it is finished"
            return PushResult(file, destination, kind, None, None, error, hint, None)
        case (
            Deferred(reason=reason, error=error, http_status=status)
            | Rejected(reason=reason, error=error, http_status=status)
        ):
            may_be_stored = isinstance(outcome, Deferred) and outcome.unconfirmed_digest is not None
            return PushResult(
                file,
                destination,
                kind,
                None,
                reason,
                error,
                _hint(reason),
                status,
                may_be_stored=may_be_stored,
            )


def _hint(reason: Reason) -> str:
    """Return the hint of the failure rule, without the commands that need a delivery in the ledger."""
    if reason is Reason.REFUSED:
        return "read the destination's response in the error"
    return rule_of(reason).hint.replace("`backupd retry`", "push it again").replace(" (`backupd show`)", "")


def _print(result: PushResult) -> None:
    if result.outcome == "delivered":
        typer.echo(f"{printable(result.file)} → {result.destination}: delivered, {result.digest}")
        return
    verdict = "rejected" if result.outcome == "rejected" else "NOT delivered"
    why = f"({result.reason or result.outcome}): {printable(result.error or '')}"
    typer.echo(f"{printable(result.file)} → {result.destination}: {verdict} {why}")
    if result.hint:
        typer.echo(f"  hint: {result.hint}")


def _progress_bar(*, hidden: bool) -> Progress:
    return progress_bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        hidden=hidden,
    )


def _add_task(progress: Progress, file: Path, size: int, destination: str) -> OnProgress:
    """Add a bar for a file, and return the function that updates it."""
    task = progress.add_task(f"{printable(file.name)} → {destination}", total=size)
    return lambda sent_bytes: progress.update(task, completed=sent_bytes)
