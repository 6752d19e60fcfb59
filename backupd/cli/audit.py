"""`backupd audit`: compare sent archives, here and at the destinations, with the recorded digests."""

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
from functools import partial
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, SpinnerColumn, TimeElapsedColumn

from backupd.cli.options import (
    DEFAULT_CONFIG,
    REJECTED,
    AsJson,
    ConfigPath,
    DropName,
    Since,
    configured_name,
    parse_time,
)
from backupd.cli.output import print_json, print_line, print_table, progress_bar
from backupd.config.load import load
from backupd.config.models import Config
from backupd.core.errors import UsageError
from backupd.core.model import Deferred, Delivered, Digest, Rejected
from backupd.core.names import MAX_RECEIPT_FILE_BYTES, as_text, receipt_file_name, template_values
from backupd.core.policy import Reason
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.factory import open_history
from backupd.ledger.history import ArchiveRecord, DeliveryRecord, History
from backupd.upload.base import UploadJob
from backupd.upload.registry import make_uploader

_CHUNK_BYTES = 1024 * 1024
_PAGE_SIZE = 500

_MAX_ROWS = 1000
"""Findings in the table; rich needs minutes to lay out a table of many thousand rows."""


class AuditVerdict(StrEnum):
    """The result of checking one copy of an archive."""

    OK = "ok"
    MISSING = "missing"
    CHANGED = "changed"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """The verdict on one copy of an archive; `destination` is None for the copy in sent_dir."""

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
        bool, typer.Option("--remote", help="Query the destinations that have a query_url, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the files in sent_dir with the digests in the ledger and the receipt files.

    With --remote, also query each destination that has a query_url. Exits with 3 if a file is missing,
    changed or unreadable, or a destination no longer has it. Files that the daemon removed
    (keep_sent_for, keep_sent_last, min_free) are not reported.
    """
    loaded = load(config)
    history = open_history(loaded)
    start = parse_time("--since", since, datetime.now(UTC))
    only = configured_name("--drop", drop, list(loaded.drop))
    drops = [only] if only else list(loaded.drop)
    verifier = RemoteVerifier(loaded) if remote else None
    counts: dict[str, Counter[str]] = {"kept": Counter()}
    wrong: list[AuditFinding] = []
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with progress_bar(*columns, hidden=as_json) as progress:
            task = progress.add_task("archives", total=None)
            advance = partial(progress.advance, task)
            for finding in _audit_drops(loaded, history, drops, start, verifier, advance):
                counts.setdefault(finding.destination or "kept", Counter())[finding.verdict] += 1
                if finding.verdict is not AuditVerdict.OK:
                    wrong.append(finding)
    finally:
        if verifier:
            verifier.close()
    if as_json:
        print_json(
            {"counts": {k: {v: c[v] for v in AuditVerdict} for k, c in counts.items()}, "wrong": wrong}
        )
    else:
        _print(counts, wrong)
    if wrong:
        raise typer.Exit(REJECTED)


class RemoteVerifier:
    """Queries the destinations that have a `query_url` for delivered archives, over one connection each."""

    def __init__(self, config: Config) -> None:
        """Open an uploader for each such destination; raise UsageError if there is none."""
        queryable = {name: d for name, d in config.destination.items() if d.can_query}
        if not queryable:
            raise UsageError(
                "no destination can be queried for archives",
                "set `query_url` for a destination, or omit --remote",
            )
        self._uploaders = {name: make_uploader(destination) for name, destination in queryable.items()}
        self._patterns = {
            name: re.compile(drop.label_pattern) if drop.label_pattern else None
            for name, drop in config.drop.items()
        }
        self._host = socket.gethostname()

    def verify(self, record: ArchiveRecord, delivery: DeliveryRecord) -> AuditFinding | None:
        """Return the verdict on a destination's copy; None if the destination has no `query_url`.

        None as well if the delivery has no digest to compare with.
        """
        uploader = self._uploaders.get(delivery.destination)
        if uploader is None or delivery.digest is None:
            return None
        archive = record.archive
        variables = template_values(archive, self._host, self._patterns[archive.drop])
        name = archive.relpath.rpartition(b"/")[2]
        job = UploadJob(delivery.id, name, -1, archive.fingerprint, variables)
        verdict, detail = AuditVerdict.OK, ""
        match uploader.query(job, Digest.parse(delivery.digest)):
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
        """Close the connections."""
        for uploader in self._uploaders.values():
            uploader.close()


def _audit_drops(
    config: Config,
    history: History,
    drops: list[str],
    since: datetime | None,
    verifier: RemoteVerifier | None,
    advance: Callable[[], None],
) -> Iterator[AuditFinding]:
    for drop in drops:
        path = config.drop[drop].path
        try:
            folder = DropFolder(str(path))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", "run this command as the daemon's user") from error
        try:
            for record in _sent_archives(history, drop, since):
                deliveries = history.deliveries_of(record.archive.id)
                finding = _verify_file(folder, record, deliveries)
                if finding.verdict is AuditVerdict.MISSING and _was_expired(history, record.archive.id):
                    continue
                yield finding
                for delivery in deliveries if verifier else ():
                    if verifier and (remote := verifier.verify(record, delivery)):
                        yield remote
                advance()
        finally:
            folder.close()


def _sent_archives(history: History, drop: str, since: datetime | None) -> Iterator[ArchiveRecord]:
    after = None
    while page := history.sent_archives(drop, since, after, _PAGE_SIZE):
        yield from page
        after = page[-1].archive.id


def _was_expired(history: History, archive_id: int) -> bool:
    """Return whether the daemon removed the file after the page with its record was read."""
    return history.archive(archive_id).removal in ("expiring", "expired")


def _verify_file(folder: DropFolder, record: ArchiveRecord, deliveries: list[DeliveryRecord]) -> AuditFinding:
    archive, path = record.archive, record.disposed_to or b""

    def found(verdict: AuditVerdict, detail: str = "") -> AuditFinding:
        return AuditFinding(archive.id, archive.drop, as_text(path), verdict, detail)

    expected = {d.digest for d in deliveries if d.digest}
    try:
        fd = folder.open(path)
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
        return found(AuditVerdict.CHANGED, "its content differs from the content that was delivered")
    in_receipt = _receipt_digests(folder, path)
    if in_receipt is not None and not expected <= in_receipt:
        return found(AuditVerdict.CHANGED, "its receipt file has a different digest")
    return found(AuditVerdict.OK)


def _digests(fd: int, algorithms: set[str]) -> set[str]:
    hashers = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    while chunk := os.read(fd, _CHUNK_BYTES):
        for hasher in hashers.values():
            hasher.update(chunk)
    return {str(Digest(name, hasher.hexdigest())) for name, hasher in hashers.items()}


def _receipt_digests(folder: DropFolder, path: bytes) -> set[str] | None:
    """Return the digests in the receipt file of an archive; None without one under its usual name."""
    directory, _, name = path.rpartition(b"/")
    receipt = receipt_file_name(name, b"receipt")
    try:
        fields = json.loads(
            folder.read(directory + b"/" + receipt if directory else receipt, MAX_RECEIPT_FILE_BYTES)
        )
        return {each["digest"] for each in fields["deliveries"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None  # there is no such file, or backupd did not write it


def _print(counts: dict[str, Counter[str]], wrong: list[AuditFinding]) -> None:
    if wrong:
        rows = [
            (f.verdict, f"@{f.id}", f.drop, f.path, f.destination or "sent_dir", f.detail)
            for f in wrong[:_MAX_ROWS]
        ]
        print_table(("verdict", "archive", "drop", "path", "where", "detail"), rows)
    if len(wrong) > _MAX_ROWS:
        print_line(f"  and {len(wrong) - _MAX_ROWS} more: `backupd audit --json` lists all of them")
    for where, count in counts.items():
        numbers = ", ".join(f"{count[verdict]} {verdict}" for verdict in AuditVerdict)
        is_ok = count.total() == count[AuditVerdict.OK]
        heading = "kept in sent_dir" if where == "kept" else f"at {where}"
        print_line(f"{heading}: {numbers}", "green" if is_ok else "bold red")
    if wrong:
        print_line("  hint: `backupd show @NUMBER` lists the deliveries of an archive")
