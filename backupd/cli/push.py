"""`backupd push`: deliver files now, with a progress bar."""

from __future__ import annotations

import os
import re
import socket
import stat
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from backupd.cli.options import DEFAULT_CONFIG, PENDING, REJECTED, UNAVAILABLE, AsJson, ConfigPath
from backupd.cli.output import print_json
from backupd.config.load import load
from backupd.config.models import Config
from backupd.core.errors import UsageError
from backupd.core.model import Archive, Deferred, Delivered, Outcome, Rejected, Superseded, fingerprint_of
from backupd.core.names import as_text, printable, template_values
from backupd.core.policy import Reason, rule_of
from backupd.daemon.assembly import make_uploader
from backupd.delivery.worker import short_attempts
from backupd.dropfolder.folder import DropFolder
from backupd.upload.base import UploadJob
from backupd.upload.http.limits import Abort

PushProgress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Pushed:
    file: str
    destination: str
    outcome: str
    digest: str | None
    reason: str | None
    error: str | None
    hint: str | None
    http_status: int | None


def push(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="Files to deliver; they stay where they are.", readable=False),
    ],
    to: Annotated[
        list[str] | None, typer.Option("--to", help="A destination; every one if left out.")
    ] = None,
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Deliver files now, beside the daemon, and verify the receipts.

    Ends with 0 if every destination has every file, 3 if one was rejected, 69 if a destination is
    unavailable, 75 if a file changed or could not be read meanwhile. Nothing is recorded in the ledger.
    """
    loaded = load(config)
    unknown = [name for name in to or () if name not in loaded.destination]
    if unknown:
        raise UsageError(f"no destination named {unknown[0]}", f"there are: {', '.join(loaded.destination)}")
    for file in files:  # before anything is sent
        _require_file(file)
    results = []
    with _bars(quiet=as_json) as bar:
        for name in to or loaded.destination:
            for file in files:
                results.append(_push(file, name, loaded, bar(file, name)))
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


def _require_file(file: Path) -> None:
    try:
        status = file.lstat()
    except OSError as error:
        raise UsageError(f"{printable(str(file))}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{printable(str(file))}: not a regular file", "name the archives themselves")
    if status.st_size == 0:
        raise UsageError(f"{printable(str(file))}: is empty", "an empty backup is no backup; see the device")
    if not os.access(file, os.R_OK):
        raise UsageError(f"{printable(str(file))}: Permission denied", "let your user read it")


def _push(file: Path, destination: str, config: Config, progress: PushProgress) -> _Pushed:

    name = os.fsencode(file.name)
    try:
        folder = DropFolder(str(file.absolute().parent))
        fd = folder.open(name)
    except OSError as error:
        raise UsageError(f"{printable(str(file))}: {error.strerror}") from error
    archive = Archive(0, "push", name, fingerprint_of(os.fstat(fd)), datetime.now(UTC))
    values = dict.fromkeys(_labels(config), "") | template_values(archive, socket.gethostname(), None)
    uploader = make_uploader(config.destination[destination], Abort())
    outcomes: list[Outcome] = []

    def once() -> Outcome:
        outcome = uploader.upload(cargo)
        if isinstance(outcome, Deferred):  # what may be there is asked about before the next attempt
            cargo.unconfirmed_digest = outcome.unconfirmed_digest
        outcomes.append(outcome)
        return outcome

    cargo = UploadJob(str(uuid.uuid4()), name, fd, archive.fingerprint, values, progress)
    try:
        short_attempts(once, threading.Event())
    finally:
        uploader.close()
        os.close(fd)
        folder.close()
    return _described(as_text(name), destination, outcomes[-1])


def _labels(config: Config) -> set[str]:
    """Return the names of all labels: a pushed file has no path to take their values from."""
    patterns = [drop.label_pattern for drop in config.drop.values() if drop.label_pattern]
    return {group for pattern in patterns for group in re.compile(pattern).groupindex}


def _described(file: str, destination: str, outcome: Outcome) -> _Pushed:
    kind = type(outcome).__name__.lower()
    match outcome:
        case Delivered(digest=digest, receipt=receipt):
            return _Pushed(file, destination, kind, str(digest), None, None, None, receipt.http_status)
        case Superseded(error=error):
            return _Pushed(
                file, destination, kind, None, None, error, "push it again once it is finished", None
            )
        case (
            Deferred(reason=reason, error=error, http_status=status)
            | Rejected(reason=reason, error=error, http_status=status)
        ):
            return _Pushed(file, destination, kind, None, reason, error, _hint(reason), status)


def _hint(reason: Reason) -> str:
    """Return what to do about it; the ledger's commands know nothing of what is pushed."""
    if reason is Reason.REFUSED:
        return "see what it says of the archive"
    return rule_of(reason).hint.replace("`backupd retry`", "push it again").replace(" (`backupd show`)", "")


def _print(r: _Pushed) -> None:
    if r.outcome == "delivered":
        typer.echo(f"{printable(r.file)} → {r.destination}: delivered, {r.digest}")
        return
    verdict = "rejected" if r.outcome == "rejected" else "NOT delivered"
    why = f"({r.reason or r.outcome}): {printable(r.error or '')}"
    typer.echo(f"{printable(r.file)} → {r.destination}: {verdict} {why}")
    if r.hint:
        typer.echo(f"  hint: {r.hint}")


class _bars:  # noqa: N801 -- reads as the function that it is
    """Progress bars while in a `with` block; none where the output is no terminal."""

    def __init__(self, *, quiet: bool) -> None:

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> Callable[[Path, str], PushProgress]:
        self._progress.start()
        return self._bar

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _bar(self, file: Path, destination: str) -> PushProgress:
        total = file.stat().st_size if file.is_file() else None
        task = self._progress.add_task(f"{printable(file.name)} → {destination}", total=total)
        return lambda sent: self._progress.update(task, completed=sent)
