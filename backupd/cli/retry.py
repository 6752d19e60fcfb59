"""`backupd retry`: put rejected archives back into their drop folder, and make pending deliveries due now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath, configured_name
from backupd.cli.selection import Selected, select
from backupd.config.files import folder_errors
from backupd.config.load import load
from backupd.config.models import Config
from backupd.config.time_limit import filesystem_hint
from backupd.core.errors import UsageError
from backupd.core.model import Archive, DeliveryState
from backupd.core.names import as_text, printable
from backupd.delivery.receipt_file import remove_receipt_file
from backupd.dropfolder.checksums import restore_checksum_files
from backupd.dropfolder.folder import DropFolder
from backupd.dropfolder.move import rename_no_replace
from backupd.ledger.factory import open_history
from backupd.ledger.history import DeliveryRecord, History, Search

_MAX_DELIVERIES = 1_000_000

_RETRIED_STATES = (DeliveryState.REJECTED, DeliveryState.PENDING)


def retry(
    selector: Selected = "",
    every: Annotated[bool, typer.Option("--all", help="All rejected archives.")] = False,
    drop: Annotated[str, typer.Option(metavar="NAME", help="With --all: only archives of this drop.")] = "",
    destination: Annotated[
        str, typer.Option(metavar="NAME", help="With --all: only archives that this destination rejected.")
    ] = "",
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Put rejected archives back into their drop folder, where they are queued again.

    A pending delivery becomes due at once. A paused destination stays paused. Of several archives with the
    same path, the newest one that is rejected or pending is retried.
    """
    if bool(selector) == every:
        raise UsageError(
            "name one archive or delivery, or use --all", "`backupd list --state rejected` shows the ids"
        )
    if not every and (drop or destination):
        raise UsageError("--drop and --destination limit --all", "add --all")
    loaded = load(config)
    history = open_history(loaded)
    when = "" if history.daemon_pid() else " once the daemon runs"
    if every:
        search = Search(
            DeliveryState.REJECTED,
            configured_name("--drop", drop, list(loaded.drop)),
            configured_name("--destination", destination, list(loaded.destination)),
        )
        _restore_all(loaded, history, search, when)
        return
    selection = select(history, loaded, selector, _RETRIED_STATES)
    records = [selection.delivery] if selection.delivery else selection.deliveries
    _retry(loaded, history, [r for r in records if r.state in _RETRIED_STATES] or records, when)


def _retry(config: Config, history: History, records: list[DeliveryRecord], when: str) -> None:
    """Retry the deliveries of an archive; raise UsageError if they are not rejected or pending."""
    record, name = records[0], printable(as_text(records[0].archive.relpath))
    rejected = [r for r in records if r.state is DeliveryState.REJECTED]
    if rejected:
        if not _restore(config, history, rejected[0], _folder_errors(config, rejected)):
            raise UsageError(
                f"{rejected[0].id}: its file is not in quarantine",
                "it was removed, or its other deliveries have not ended: see `backupd list`",
            )
        typer.echo(f"{name} was put back into the drop folder; it is queued again{when}")
    elif due := [r.destination for r in records if history.retry_now(r.id)]:
        typer.echo(f"{name} is due now for {', '.join(due)}{f'; it is uploaded{when}' if when else ''}")
    elif record.state is DeliveryState.RETRIED:
        raise UsageError(
            f"{record.id}: it was put back already, or its file was removed",
            f"`backupd show {name}` shows the newest delivery of this file",
        )
    else:
        raise UsageError(
            f"{record.id} is {record.state}", "only rejected and pending deliveries can be retried"
        )


def _restore_all(config: Config, history: History, search: Search, when: str) -> None:
    """Put back all rejected archives of a search, oldest first; raise UsageError for failures at the end."""
    restored, failed = 0, []
    records = history.find(search, _MAX_DELIVERIES)
    errors = _folder_errors(config, records)
    for record in reversed(records):
        try:
            restored += _restore(config, history, record, errors)
        except UsageError as error:
            failed.append(str(error))
    noun = "archive" if restored == 1 else "archives"
    nothing = "nothing put back" if records else "nothing put back: no archive is rejected"
    typer.echo(f"{restored} {noun} put back; queued again{when}" if restored else nothing)
    if failed:
        raise UsageError("some archives could not be put back:\n" + "\n".join(failed))


def _folder_errors(config: Config, records: list[DeliveryRecord]) -> dict[str, OSError]:
    """Return why the folders of the drops of rejected archives can't be reached, by drop."""
    drops = {record.archive.drop for record in records if record.disposed_to is not None}
    return folder_errors(config, drops & config.drop.keys())


def _restore(config: Config, history: History, record: DeliveryRecord, errors: Mapping[str, OSError]) -> bool:
    """Move a file from rejected_dir to its place in the drop folder; return False if it is not there.

    Raises UsageError if the file can't be moved, or `errors` has one of its folder.
    """
    drop = config.drop.get(record.archive.drop)
    if record.disposed_to is None:
        return False
    if drop is None:
        raise UsageError(
            f"{record.id}: its folder is that of no drop: {printable(record.archive.drop)}",
            "configure a drop with that `path`, or move the file to another drop folder yourself",
        )
    try:
        if error := errors.get(record.archive.drop):
            raise error
        folder = DropFolder(str(drop.path))
        folder.imitates_owner = os.geteuid() == 0  # else the daemon could not move the archive out again
    except OSError as error:
        raise UsageError(f"{drop.path}: {error.strerror}", filesystem_hint(drop.path, error)) from error
    try:
        moved_to = _quarantined_path(folder, record.archive, record.disposed_to, drop.rejected_dir)
        return _put_back(history, record, folder, moved_to, checksums=drop.checksum_file != "off")
    except FileExistsError as error:
        path = printable(as_text(record.archive.relpath))
        raise UsageError(
            f"{drop.path}/{path}: the name is taken",
            "retry once the archive of that name is delivered, or move it away",
        ) from error
    except OSError as error:
        path = printable(as_text(record.disposed_to))
        raise UsageError(
            f"{drop.path}/{path}: {error.strerror}", filesystem_hint(drop.path, error)
        ) from error
    finally:
        folder.close()


def _quarantined_path(folder: DropFolder, archive: Archive, moved_to: bytes, rejected_dir: str) -> bytes:
    """Return where a rejected file is now: in the `rejected_dir` of today if that folder was renamed."""
    parent, name = archive.relpath.rpartition(b"/")[0], moved_to.rpartition(b"/")[2]
    renamed = os.path.join(os.fsencode(rejected_dir.strip("/")), parent, name)
    return moved_to if folder.may_exist(moved_to) or not folder.may_exist(renamed) else renamed


def _put_back(
    history: History, record: DeliveryRecord, folder: DropFolder, moved_to: bytes, *, checksums: bool
) -> bool:
    archive = record.archive
    source, _, name = moved_to.rpartition(b"/")
    target, _, original_name = archive.relpath.rpartition(b"/")
    with history.mark_retried(archive.id):
        try:
            with folder.directory(source) as quarantine, folder.directory(target, create=True) as directory:
                rename_no_replace(quarantine, name, directory, original_name)
        except FileNotFoundError:
            if folder.is_unmounted(archive.folder_id):
                raise
            found = False  # it was removed by hand, and no longer counts as rejected
        else:
            found = True
            if checksums:  # left behind, they would not be found beside the archive
                restore_checksum_files(folder, archive.relpath, moved_to)
    remove_receipt_file(folder, moved_to, archive, b"reason")
    return found
