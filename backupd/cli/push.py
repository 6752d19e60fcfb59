"""`backupd push`: deliver files now, beside the daemon, and show the progress."""

from __future__ import annotations

import os
import re
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import print_json, progress_bar, shorten_middle
from backupd.config.load import load
from backupd.config.models import Config
from backupd.config.time_limit import NoAnswerError, call, filesystem_hint
from backupd.core.errors import PENDING, REJECTED, UNAVAILABLE, UsageError
from backupd.core.model import Archive, Deferred, Delivered, Outcome, Rejected, Superseded, fingerprint_of
from backupd.core.names import as_text, printable, template_values
from backupd.core.policy import Reason, rule_of
from backupd.core.units import human_size
from backupd.delivery.worker import short_attempts
from backupd.dropfolder.folder import DropFolder, close_descriptor
from backupd.upload.base import OnProgress, UploadJob
from backupd.upload.registry import make_uploader

_MAX_BARS = 10
"""Bars that are visible at a time; rich cuts off those that do not fit on the terminal."""

_BESIDE_NAME = 58
"""Columns of a bar's line beside the names: the bar, the bytes, the rate and the time."""


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


@dataclass(frozen=True, slots=True)
class PushTrace:
    """How a file was sent, for `--verbose`; `address` and `tls_version` are empty if unknown."""

    url: str
    address: str
    tls_version: str
    sent_bytes: int
    took_s: float


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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print failures only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the connection and the response, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Deliver files now, beside the daemon, and verify the receipts.

    Exits with 0 if every destination has every file, 3 if one was rejected, 69 if a destination is
    unavailable, 75 if a file changed or could not be read meanwhile. The ledger has no record of it.
    """
    if quiet and verbose:
        raise UsageError("--quiet and --verbose contradict each other", "leave one of them out")
    loaded = load(config)
    unknown = [name for name in to or () if name not in loaded.destination]
    if unknown:
        raise UsageError(f"no destination named {unknown[0]}", f"there are: {', '.join(loaded.destination)}")
    sizes = [_require_file(file) for file in files]  # all of them before the first upload
    results: list[PushResult] = []
    waiting: list[str] = []
    bars = _Bars(hidden=as_json or quiet)
    try:
        with bars.progress:
            for name in to or loaded.destination:
                for file, size in zip(files, sizes, strict=True):
                    result, trace = _push(file, name, loaded, bars.add(file, size, name))
                    results.append(result)
                    if not as_json and not (quiet and result.outcome == "delivered"):
                        waiting += _lines(result, trace if verbose else None)
                    if bars.progress.disable:
                        _print(waiting)
    finally:  # below the bars, which are in the way until they end; after Ctrl-C, too
        _print(waiting)
    if as_json:
        print_json(results)
    _exit(results)


def _exit(results: list[PushResult]) -> None:
    """Raise `typer.Exit` with the exit code of the results, unless each is delivered."""
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


def push_file(file: Path, destination: str, config: Config) -> PushResult:
    """Deliver a file to a destination, and return the result."""
    return _push(file, destination, config, lambda _sent: None)[0]


def _push(
    file: Path, destination: str, config: Config, on_progress: OnProgress
) -> tuple[PushResult, PushTrace]:
    """Deliver a file to a destination; `on_progress` gets the bytes sent so far."""
    name, started, url = os.fsencode(file.name), time.monotonic(), config.destination[destination].address
    try:
        fd, status = call(partial(_open, file))
    except OSError as error:
        failure = Deferred(Reason.UNREADABLE, error.strerror or str(error))
        return _result(as_text(name), destination, failure), PushTrace(url, "", "", 0, 0.0)
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
    trace = PushTrace(url, job.address, job.tls_version, job.sent_bytes, time.monotonic() - started)
    return _result(as_text(name), destination, outcomes[-1]), trace


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


def _lines(result: PushResult, trace: PushTrace | None) -> list[str]:
    """Return the lines for a result, with those of a trace."""
    heading = f"{printable(result.file)} → {result.destination}:"
    if result.outcome == "delivered":
        lines = [f"{heading} delivered, {result.digest}"]
        console = Console()
        if console.is_terminal and cell_len(lines[0]) > console.width:
            lines = [f"{heading} delivered", f"  {result.digest}"]
    else:
        verdict = "rejected" if result.outcome == "rejected" else "NOT delivered"
        lines = [f"{heading} {verdict} ({result.reason or result.outcome}): {printable(result.error or '')}"]
    if result.hint:
        lines.append(f"  hint: {result.hint}")
    if trace is not None:
        lines += [f"  {name:10} {printable(value)}" for name, value in _facts(result, trace) if value]
    return lines


def _facts(result: PushResult, trace: PushTrace) -> Iterator[tuple[str, str]]:
    """Yield the names and values of the facts that `--verbose` adds; a value may be empty."""
    yield "url", trace.url
    yield "connection", " ".join(part for part in (trace.address, trace.tls_version) if part)
    yield "status", "" if result.http_status is None else str(result.http_status)
    yield "sent", f"{human_size(trace.sent_bytes)} in {trace.took_s:.2f} s"
    if result.outcome == "delivered":
        yield "receipt", "its digest matches" if result.verified else "the configuration requires none"
    yield "response", result.response


def _print(lines: list[str]) -> None:
    """Print lines to standard output, and remove them from the list."""
    for line in lines:
        typer.echo(line)
    lines.clear()
    sys.stdout.flush()


class _Bars:
    """The progress bars of the files, which stay on the terminal at the end."""

    def __init__(self, *, hidden: bool) -> None:
        self.progress: Progress = progress_bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=14),
            _BytesColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            hidden=hidden,
            transient=False,
        )
        self._shown: list[TaskID] = []

    def add(self, file: Path, size: int, destination: str) -> OnProgress:
        """Add the bar of a file, remove the oldest of too many, and return the function that updates it."""
        if len(self._shown) == _MAX_BARS:
            self.progress.remove_task(self._shown.pop(0))
        width = max(self.progress.console.width - _BESIDE_NAME, 16)
        names = shorten_middle(f"{printable(file.name)} → {destination}", width)
        task = self.progress.add_task(names, total=size)
        self._shown.append(task)
        return lambda sent_bytes: self.progress.update(task, completed=sent_bytes)


class _BytesColumn(ProgressColumn):
    """The bytes that were sent, and the rate."""

    def render(self, task: Task) -> Text:
        """Return the text of the column, such as `1.5 MiB/2.0 MiB 1.1 MiB/s`."""
        rate = task.finished_speed or task.speed
        sent = f"{human_size(int(task.completed))}/{human_size(int(task.total or 0))}"
        return Text(sent if rate is None else f"{sent} {human_size(int(rate))}/s")
