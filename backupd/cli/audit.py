"""`backupd audit`: whether what is kept, and what was delivered, is still what it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

from backupd.cli.list import DropName, Since, open_history
from backupd.cli.options import DEFAULT_CONFIG, REJECTED, AsJson, ConfigPath
from backupd.cli.output import known, print_json, print_table, say, time_of
from backupd.config.models import Config
from backupd.core.errors import UsageError
from backupd.core.model import Deferred, Delivered, Digest, Rejected
from backupd.core.names import MAX_RECEIPT_FILE_BYTES, as_text, receipt_file_name, template_values
from backupd.core.policy import Reason
from backupd.daemon.assembly import make_uploader
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.sqlite.queries import ArchiveRecord, DeliveryRecord, LedgerQueries
from backupd.upload.base import UploadJob
from backupd.upload.http.limits import Abort

_CHUNK = 1024 * 1024
_PAGE = 500

_MOST_TOLD = 1000
"""Findings in a table: nobody reads more, and it would be made for minutes without a word."""


class AuditVerdict(StrEnum):
    """What was found of an archive."""

    OK = "ok"
    MISSING = "missing"
    CHANGED = "changed"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """What was found of an archive; `destination` is None for the file that is kept here."""

    id: int
    drop: str
    path: str
    verdict: AuditVerdict
    detail: str = ""
    destination: str | None = None


def audit(
    config: ConfigPath = DEFAULT_CONFIG,
    drop: DropName = "",
    since: Since = "",
    remote: Annotated[
        bool, typer.Option("--remote", help="Ask the destinations that have a query_url, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read what is kept in sent_dir anew, and compare it with the digests of ledger and receipts.

    Ends with 3 if something is missing, changed or unreadable, or a destination no longer has it. What
    the daemon removed in time (`keep_sent_for` and the like) is not looked for.
    """
    loaded, history = open_history(config)
    start = time_of("--since", since, datetime.now(UTC))
    only = known("--drop", drop, list(loaded.drop))
    names = [only] if only else list(loaded.drop)
    asker = RemoteVerifier(loaded) if remote else None
    counts: dict[str, Counter[str]] = {"kept": Counter()}
    wrong: list[AuditFinding] = []
    try:
        with _bar(quiet=as_json) as advance:
            for finding in _findings(loaded, history, names, start, asker, advance):
                counts.setdefault(finding.destination or "kept", Counter())[finding.verdict] += 1
                if finding.verdict is not AuditVerdict.OK:
                    wrong.append(finding)
    finally:
        if asker:
            asker.close()
    if as_json:
        print_json(
            {"counts": {k: {v: c[v] for v in AuditVerdict} for k, c in counts.items()}, "wrong": wrong}
        )
    else:
        _print(counts, wrong)
    if wrong:
        raise typer.Exit(REJECTED)


Ask = Callable[[ArchiveRecord, DeliveryRecord], AuditFinding | None]


def _findings(
    config: Config,
    history: LedgerQueries,
    names: list[str],
    since: datetime | None,
    asker: Ask | None,
    advance: Callable[[int], None],
) -> Iterator[AuditFinding]:

    for name in names:
        try:
            folder = DropFolder(str(config.drop[name].path))
        except OSError as error:
            raise UsageError(
                f"{config.drop[name].path}: {error.strerror}", "run this as the daemon's user"
            ) from error
        try:
            for record in _kept(history, name, since):
                deliveries = history.deliveries_of(record.archive.id)
                finding = _look(folder, record, deliveries)
                if finding.verdict is AuditVerdict.MISSING and history.archive(record.archive.id).removal in (
                    "expiring",
                    "expired",
                ):
                    continue  # removed in time, while we were looking
                yield finding
                for delivery in deliveries if asker else ():
                    if asker and (said := asker(record, delivery)):
                        yield said
                advance(1)
        finally:
            folder.close()


def _kept(history: LedgerQueries, drop: str, since: datetime | None) -> Iterator[ArchiveRecord]:
    after = None
    while page := history.sent_archives(drop, since, after, _PAGE):
        yield from page
        after = page[-1].archive.id


def _look(folder: DropFolder, record: ArchiveRecord, deliveries: list[DeliveryRecord]) -> AuditFinding:
    archive, to = record.archive, record.disposed_to or b""

    def found(verdict: AuditVerdict, detail: str = "") -> AuditFinding:
        return AuditFinding(archive.id, archive.drop, as_text(to), verdict, detail)

    expected = {d.digest for d in deliveries if d.digest}
    try:
        fd = folder.open(to)
    except (FileNotFoundError, NotADirectoryError):
        return found(AuditVerdict.MISSING)
    except OSError as error:
        return found(AuditVerdict.UNREADABLE, error.strerror or str(error))
    try:
        digests = _digests(fd, {Digest.parse(text).algorithm for text in expected})
    except OSError as error:
        return found(AuditVerdict.UNREADABLE, error.strerror or str(error))
    finally:
        os.close(fd)
    if expected != digests:
        return found(AuditVerdict.CHANGED, "its content is not the one that was delivered")
    stated = _stated(folder, to)
    if stated is not None and not expected <= stated:
        return found(AuditVerdict.CHANGED, "its receipt states another digest")
    return found(AuditVerdict.OK)


def _digests(fd: int, algorithms: set[str]) -> set[str]:
    hashers = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    while chunk := os.read(fd, _CHUNK):
        for hasher in hashers.values():
            hasher.update(chunk)
    return {str(Digest(name, hasher.hexdigest())) for name, hasher in hashers.items()}


def _stated(folder: DropFolder, to: bytes) -> set[str] | None:
    """Return the digests that the receipt beside a file states; None without one under its usual name."""
    directory, _, name = to.rpartition(b"/")
    record = receipt_file_name(name, b"receipt")
    try:
        fields = json.loads(
            folder.read(directory + b"/" + record if directory else record, MAX_RECEIPT_FILE_BYTES)
        )
        return {each["digest"] for each in fields["deliveries"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None  # none, or somebody else's


def _print(counts: dict[str, Counter[str]], wrong: list[AuditFinding]) -> None:
    if wrong:
        rows = [
            (f.verdict, f"@{f.id}", f.drop, f.path, f.destination or "kept here", f.detail)
            for f in wrong[:_MOST_TOLD]
        ]
        print_table(("found", "archive", "drop", "path", "where", "detail"), rows)
    if len(wrong) > _MOST_TOLD:
        say(f"  and {len(wrong) - _MOST_TOLD} more: `backupd audit --json` tells of each")
    for where, count in counts.items():
        told = ", ".join(f"{count[verdict]} {verdict}" for verdict in AuditVerdict)
        bad = count.total() - count[AuditVerdict.OK]
        say(
            f"{'kept in sent_dir' if where == 'kept' else f'at {where}'}: {told}",
            "bold red" if bad else "green",
        )
    if wrong:
        say("  hint: `backupd show @NUMBER` tells what was delivered where and when")


class _bar:  # noqa: N801 -- reads as the function that it is
    """A count of archives while in a `with` block; none where the output is no terminal."""

    def __init__(self, *, quiet: bool) -> None:

        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("archives", total=None)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda count: self._progress.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class RemoteVerifier:
    """Asks each destination with a `query_url` over one connection; raises UsageError where none has one."""

    def __init__(self, config: Config) -> None:

        able = {name: d for name, d in config.destination.items() if d.query_url}
        if not able:
            raise UsageError("no destination has a `query_url`", "give it one, or leave --remote out")
        self._uploaders = {name: make_uploader(destination, Abort()) for name, destination in able.items()}
        self._patterns = {
            name: re.compile(drop.label_pattern) if drop.label_pattern else None
            for name, drop in config.drop.items()
        }
        self._host = socket.gethostname()

    def __call__(self, record: ArchiveRecord, delivery: DeliveryRecord) -> AuditFinding | None:
        """Return what the destination of a delivery says of it; None where it can't be asked such things."""
        uploader = self._uploaders.get(delivery.destination)
        if uploader is None or delivery.digest is None:
            return None
        archive = record.archive
        values = template_values(archive, self._host, self._patterns[archive.drop])
        name = archive.relpath.rpartition(b"/")[2]
        cargo = UploadJob(delivery.id, name, -1, archive.fingerprint, values)
        verdict, detail = AuditVerdict.OK, ""
        match uploader.query(cargo, Digest.parse(delivery.digest)):
            case Delivered():
                pass
            case Deferred(reason=reason, error=detail) | Rejected(reason=reason, error=detail):
                differs = reason in (Reason.MISMATCH, Reason.UNVERIFIED)
                verdict = AuditVerdict.CHANGED if differs else AuditVerdict.UNREADABLE
            case _:
                verdict, detail = AuditVerdict.MISSING, "the destination no longer has it"
        return AuditFinding(
            archive.id, archive.drop, as_text(archive.relpath), verdict, detail, delivery.destination
        )

    def close(self) -> None:
        """Give the connections back."""
        for uploader in self._uploaders.values():
            uploader.close()
