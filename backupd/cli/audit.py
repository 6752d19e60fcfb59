"""`backupd audit`: compare sent archives, here and at the destinations, with their receipt files."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Annotated, Self

import typer
from rich.progress import MofNCompleteColumn, SpinnerColumn, TimeElapsedColumn

from backupd.cli.options import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigPath,
    DropName,
    Since,
    configured_name,
    parse_time,
)
from backupd.cli.output import print_json, print_line, print_table, progress_bar
from backupd.cli.selection import SomeSelected, parse_selector
from backupd.config.files import folder_errors
from backupd.config.load import load
from backupd.config.models import Config
from backupd.config.time_limit import filesystem_hint
from backupd.core.errors import REJECTED, LedgerError, UsageError
from backupd.core.folder_place import label_of
from backupd.core.model import (
    Archive,
    Deferred,
    Delivered,
    DeliveryState,
    Digest,
    Fingerprint,
    Rejected,
    fingerprint_of,
)
from backupd.core.names import as_text, template_values, without_stamp
from backupd.core.policy import Reason
from backupd.delivery.receipt_file import (
    FoundReceipt,
    ReceiptFileDelivery,
    StoredFile,
    StoredFolder,
    file_time,
)
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.factory import open_history
from backupd.ledger.history import Search, Selector
from backupd.upload.base import UploadJob
from backupd.upload.registry import make_uploader

_CHUNK_BYTES = 1024 * 1024

_MAX_ROWS = 1000
"""Findings in the table; rich needs minutes to lay out a table of many thousand rows."""

_DISPOSITION_TIME = timedelta(minutes=1)
"""Time in which the daemon writes the receipt file of an archive that it has moved."""


class AuditVerdict(StrEnum):
    """The result of checking one copy of an archive; `unknown` is a file without a valid receipt file."""

    OK = "ok"
    MISSING = "missing"
    CHANGED = "changed"
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """The verdict on one copy of an archive; `destination` is None for the copy in sent_dir.

    `delivery_id` is that of a delivery of the archive, None for an unknown file.
    """

    delivery_id: str | None
    drop: str
    path: str
    verdict: AuditVerdict
    detail: str = ""
    destination: str | None = None


def audit(
    selectors: SomeSelected = None,
    config: ConfigPath = DEFAULT_CONFIG,
    drop: DropName = "",
    since: Since = "",
    remote: Annotated[
        bool, typer.Option("--remote", help="Query the destinations that have a query_url, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the files in sent_dir with the sizes and digests in the receipt files beside them.

    With ids, names or digests, only these files are compared. With --remote, also query each destination
    that has a query_url. Exits with 3 if a file is missing, changed or unreadable or has no receipt file, a
    destination no longer has it, or a drop folder can't be read. Files that the daemon removed
    (keep_sent_for, keep_sent_last, min_free) are not reported. The ledger is used only for an archive's
    number, and to find out whether archives were sent if there is no sent_dir.
    """
    loaded = load(config)
    start = parse_time("--since", since, datetime.now(UTC))
    only = configured_name("--drop", drop, list(loaded.drop))
    names = [only] if only else list(loaded.drop)
    wanted = _Wanted.of(loaded, selectors or ())
    verifier = RemoteVerifier(loaded) if remote else None
    counts: dict[str, Counter[str]] = {"kept": Counter()}
    wrong: list[AuditFinding] = []
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with progress_bar(*columns, hidden=as_json) as progress:
            advance = partial(progress.advance, progress.add_task("archives", total=None))
            errors = folder_errors(loaded, names)
            for name in names:
                for finding in _audit_drop(loaded, name, errors.get(name), start, wanted, verifier, advance):
                    counts.setdefault(finding.destination or "kept", Counter())[finding.verdict] += 1
                    if finding.verdict is not AuditVerdict.OK:
                        wrong.append(finding)
    finally:
        if verifier:
            verifier.close()
    if wanted.selectors and not sum(count.total() for count in counts.values()):
        raise UsageError(f"nothing in sent_dir matches {' '.join(selectors or ())}", "see `backupd list`")
    if as_json:
        print_json(
            {"counts": {k: {v: c[v] for v in AuditVerdict} for k, c in counts.items()}, "wrong": wrong}
        )
    else:
        _print(counts, wrong)
    if wrong:
        raise typer.Exit(REJECTED)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The files to compare: all, or those that one of the selectors matches."""

    selectors: Sequence[Selector]

    @classmethod
    def of(cls, config: Config, texts: Sequence[str]) -> Self:
        """Return the files that a person names; the ledger knows the ids of an archive with a number."""
        selectors = [parse_selector(config, text) for text in texts]
        numbered = [selector for selector in selectors if selector.archive_id is not None]
        if numbered:
            with closing(open_history(config)) as history:
                found = history.find(Search(selectors=numbered), len(numbered) * len(config.destination) + 1)
            selectors += [Selector(id_prefix=record.id) for record in found]
        return cls(selectors)

    def includes(self, drop: Drop, file: StoredFile, found: FoundReceipt | None) -> bool:
        """Return whether a file is compared; `found` is None if it has no valid receipt file."""
        return not self.selectors or any(_matches(each, drop, file, found) for each in self.selectors)


def _matches(selector: Selector, drop: Drop, file: StoredFile, found: FoundReceipt | None) -> bool:
    """Return whether a selector matches a file in sent_dir as it does an archive in the ledger."""
    paths = {file.relpath, without_stamp(file.relpath), *([found.original_path] if found else ())}
    if selector.path and selector.drop in (None, drop.name):
        is_whole = selector.drop is not None
        if any(p == selector.path or (not is_whole and p.endswith(b"/" + selector.path)) for p in paths):
            return True
    if found is None:
        return False
    deliveries = found.receipt.deliveries
    if selector.id_prefix and any(d.delivery_id.startswith(selector.id_prefix) for d in deliveries):
        return True
    digests = [digest for digest in (found.receipt.digest, *(d.digest for d in deliveries)) if digest]
    texts = [*digests, *(Digest.parse(digest).hex for digest in digests)]
    return selector.digest != "" and any(text.startswith(selector.digest) for text in texts)


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
        self._host = socket.gethostname()

    def verify(self, archive: Archive, delivery: ReceiptFileDelivery, drop: Drop) -> AuditFinding | None:
        """Return the verdict on a destination's copy; None if the destination has no `query_url`.

        None as well if the delivery has no digest to compare with.
        """
        uploader = self._uploaders.get(delivery.destination)
        if uploader is None or delivery.digest is None:
            return None
        variables = template_values(archive, self._host, drop.label_pattern)
        name = archive.relpath.rpartition(b"/")[2]
        job = UploadJob(delivery.delivery_id, name, -1, archive.fingerprint, variables)
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
            delivery.delivery_id,
            drop.name,
            as_text(archive.relpath),
            verdict,
            detail,
            delivery.destination,
        )

    def close(self) -> None:
        """Close the connections."""
        for uploader in self._uploaders.values():
            uploader.close()


def _audit_drop(
    config: Config,
    name: str,
    unreachable: OSError | None,
    since: datetime | None,
    wanted: _Wanted,
    verifier: RemoteVerifier | None,
    advance: Callable[[], None],
) -> Iterator[AuditFinding]:
    """Yield the findings in a drop; its folder can't be used if `unreachable` is an error."""
    path = config.drop[name].path
    try:
        if unreachable is not None:
            raise unreachable
        folder = DropFolder(str(path))
    except OSError as error:
        detail = f"{path}: {error.strerror}; {filesystem_hint(path, error)}"
        yield _finding(name, b".", AuditVerdict.UNREADABLE, detail)
        return
    unreadable: list[AuditFinding] = []
    missing: set[str] = set()

    def on_unreadable(relpath: bytes, error: OSError) -> None:
        unreadable.append(_finding(name, relpath, AuditVerdict.UNREADABLE, error.strerror or str(error)))

    try:
        drop = Drop.of(name, config.drop[name], folder, ())
        if not folder.may_exist(drop.sent_dir) and _has_sent_archives(config, name):
            detail = "the folder is missing: mount it or move it back; the ledger has archives in it"
            yield _finding(name, drop.sent_dir, AuditVerdict.MISSING, detail)
        for file in StoredFolder.of_sent(drop).files(on_unreadable):
            try:
                for finding in _audit_file(drop, file, since, wanted, verifier):
                    if finding.verdict is AuditVerdict.MISSING and finding.destination is None:
                        if finding.path in missing:
                            continue  # several archives had this name, each with a receipt file of its own
                        missing.add(finding.path)
                    yield finding
            except OSError as error:
                on_unreadable(file.relpath, error)
            advance()
        yield from unreadable
    finally:
        folder.close()


def _has_sent_archives(config: Config, drop: str) -> bool:
    """Return whether archives of a drop were moved to its `sent_dir`, as far as there is a ledger."""
    try:
        with closing(open_history(config)) as history:
            newest = history.find(Search(state=DeliveryState.DELIVERED, drop=drop), 1)
            return any(record.disposed_to is not None for record in newest)
    except LedgerError:
        return False


def _audit_file(
    drop: Drop,
    file: StoredFile,
    since: datetime | None,
    wanted: _Wanted,
    verifier: RemoteVerifier | None,
) -> Iterator[AuditFinding]:
    sent = StoredFolder.of_sent(drop)
    found = _find_receipt(sent, file)
    if not wanted.includes(drop, file, found):
        return
    if found is None:
        if file.status and not _is_in_progress(file):
            yield _finding(drop.name, file.relpath, AuditVerdict.UNKNOWN, "it has no valid receipt file")
        return
    moved_at = found.receipt.moved_at(file.status) if file.status else found.receipt.ended_at
    if since is not None and moved_at < since:
        return
    try:
        verdict, detail = _verify_file(sent, file, found)
    except FileNotFoundError:
        return  # the daemon removed it meanwhile
    except OSError as error:
        verdict, detail = AuditVerdict.UNREADABLE, error.strerror or str(error)
    yield _finding(drop.name, file.relpath, verdict, detail, found.receipt.deliveries[0].delivery_id)
    if verifier is None:
        return
    fingerprint = fingerprint_of(file.status) if file.status else Fingerprint(0, found.receipt.size, 0, 0)
    receipt = found.receipt  # with the name that the drop had then, by which the destination knows it
    archive = Archive(0, label_of(receipt.drop), found.original_path, fingerprint, receipt.queued_at)
    for delivery in found.receipt.deliveries:
        if remote := verifier.verify(archive, delivery, drop):
            yield remote


def _is_in_progress(file: StoredFile) -> bool:
    """Return whether the daemon may still have to write the receipt file."""
    if file.status is None or file.receipt_status is not None:
        return False
    return file_time(file.status.st_ctime_ns) > datetime.now(UTC) - _DISPOSITION_TIME


def _find_receipt(sent: StoredFolder, file: StoredFile) -> FoundReceipt | None:
    """Return the receipt file of an archive, if possible one with its size; None without one."""
    if file.status is None:
        try:
            return sent.lone_receipt(file.relpath, file.receipt_path)
        except FileNotFoundError:
            return None  # the daemon removed it meanwhile
    found = sent.receipts(file.relpath) if file.receipt_status else []
    return next((f for f in found if f.receipt.size == file.status.st_size), next(iter(found), None))


def _verify_file(sent: StoredFolder, file: StoredFile, found: FoundReceipt) -> tuple[AuditVerdict, str]:
    """Return the verdict on the copy in sent_dir, and what is wrong with it."""
    if file.status is None:
        return AuditVerdict.MISSING, ""
    receipt = found.receipt
    if stat.S_ISREG(file.status.st_mode) and file.status.st_size != receipt.size:
        return AuditVerdict.CHANGED, f"it has {file.status.st_size} bytes, {receipt.size} were delivered"
    expected = {digest for digest in (receipt.digest, *(d.digest for d in receipt.deliveries)) if digest}
    fd = sent.folder.open(file.relpath)
    try:
        digests = _digests(fd, {Digest.parse(text).algorithm for text in expected})
    finally:
        os.close(fd)
    if expected != digests:
        return AuditVerdict.CHANGED, "its content differs from the digest in its receipt file"
    return AuditVerdict.OK, ""


def _finding(
    drop: str, relpath: bytes, verdict: AuditVerdict, detail: str, delivery_id: str | None = None
) -> AuditFinding:
    return AuditFinding(delivery_id, drop, as_text(relpath), verdict, detail)


def _digests(fd: int, algorithms: set[str]) -> set[str]:
    hashers = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    while chunk := os.read(fd, _CHUNK_BYTES):
        for hasher in hashers.values():
            hasher.update(chunk)
    return {str(Digest(name, hasher.hexdigest())) for name, hasher in hashers.items()}


def _print(counts: dict[str, Counter[str]], wrong: list[AuditFinding]) -> None:
    if wrong:
        rows = [
            (f.verdict, (f.delivery_id or "")[:8], f.drop, f.path, f.destination or "sent_dir", f.detail)
            for f in wrong[:_MAX_ROWS]
        ]
        headings = ("verdict", "delivery", "drop", "path", "where", "detail")
        has_details = print_table(headings, rows, shortened=["path"], omitted=("detail",))
        typer.echo()
        if not has_details:
            for finding in wrong[:_MAX_ROWS]:
                if finding.detail:
                    print_line(f"{finding.path}: {finding.detail}")
    if len(wrong) > _MAX_ROWS:
        print_line(f"  and {len(wrong) - _MAX_ROWS} more: `backupd audit --json` lists all of them")
    for where, count in counts.items():
        numbers = ", ".join(f"{count[verdict]} {verdict}" for verdict in AuditVerdict)
        is_ok = count.total() == count[AuditVerdict.OK]
        heading = "kept in sent_dir" if where == "kept" else f"at {where}"
        print_line(f"{heading}: {numbers}", "green" if is_ok else "bold red")
    if wrong:
        print_line("  hint: `backupd show ID` lists the attempts of a delivery that the ledger knows")
