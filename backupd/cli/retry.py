"""`backupd retry`: put rejected archives back into their drop folder, and hasten pending ones."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.load import load
from backupd.config.models import Config
from backupd.core.errors import UsageError
from backupd.core.model import DeliveryState
from backupd.core.names import as_text, printable
from backupd.dropfolder.checksums import restore_checksum_files
from backupd.dropfolder.folder import DropFolder
from backupd.dropfolder.move import remove_receipt_file, rename_no_replace
from backupd.ledger.sqlite.connection import daemon_pid, open_for_reading
from backupd.ledger.sqlite.queries import DeliveryRecord, LedgerQueries


def retry(
    delivery: Annotated[str, typer.Argument(metavar="ID", help="A delivery's id, or how it begins.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Every rejected archive.")] = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Put rejected archives back into their drop folder, where they start over.

    A delivery that is pending is made due at once; a paused destination stays paused.
    """
    if bool(delivery) == every:
        raise UsageError(
            "give the id of one delivery, or --all", "`backupd list --state rejected` shows them"
        )
    loaded = load(config)
    history = LedgerQueries(open_for_reading(loaded.state_dir))
    then = "" if daemon_pid(loaded.state_dir) else " once the daemon runs"
    if every:
        _restore_all(loaded, history, then)
        return
    record = history.delivery(delivery)
    if record.state is DeliveryState.REJECTED:
        if not _restore(loaded, history, record):
            raise UsageError(
                f"{record.id}: its file is not in quarantine",
                "it was put back or removed, or another destination has yet to have it: see `backupd list`",
            )
        typer.echo(f"put back; it starts over{then}")
    elif history.retry_now(record.id, datetime.now(UTC)):
        typer.echo(f"due now{then}")
    else:
        raise UsageError(
            f"{record.id} is {record.state}", "only rejected and pending deliveries can be retried"
        )


def _restore_all(config: Config, history: LedgerQueries, then: str) -> None:
    """Put back whatever can be, the oldest first, and tell of the rest."""
    restored, failed = 0, []
    for record in reversed(history.deliveries(DeliveryState.REJECTED, 1_000_000)):
        try:
            restored += _restore(config, history, record)
        except UsageError as error:
            failed.append(str(error))
    noun = "archive" if restored == 1 else "archives"
    typer.echo(f"{restored} {noun} put back; starting over{then}" if restored else "nothing put back")
    if failed:
        raise UsageError("not all could be put back:\n" + "\n".join(failed))


def _restore(config: Config, history: LedgerQueries, record: DeliveryRecord) -> bool:
    """Move a file from quarantine to where it was dropped; False if it is not in quarantine any more."""
    drop = config.drop.get(record.archive.drop)
    if drop is None or record.disposed_to is None:
        return False
    try:
        folder = DropFolder(str(drop.path))
    except OSError as error:
        raise UsageError(
            f"{drop.path}: {error.strerror}", "see that the drop folder is there, and mounted"
        ) from error
    try:
        return _put_back(history, record, folder, record.disposed_to, checksums=drop.checksum_file != "off")
    except FileExistsError as error:
        shown = printable(as_text(record.archive.relpath))
        raise UsageError(
            f"{drop.path}/{shown}: the name is taken", "try again once that archive is delivered, or move it"
        ) from error
    except OSError as error:
        shown = printable(as_text(record.disposed_to))
        raise UsageError(f"{drop.path}/{shown}: {error.strerror}", "run this as the daemon's user") from error
    finally:
        folder.close()


def _put_back(
    history: LedgerQueries, record: DeliveryRecord, folder: DropFolder, moved_to: bytes, *, checksums: bool
) -> bool:

    archive = record.archive
    source, _, name = moved_to.rpartition(b"/")
    target, _, original = archive.relpath.rpartition(b"/")
    with history.mark_retried(archive.id):
        try:
            with folder.directory(source) as quarantine, folder.directory(target, create=True) as place:
                rename_no_replace(quarantine, name, place, original)
        except FileNotFoundError:
            if folder.is_unreachable(moved_to, archive.fingerprint.device):
                raise
            found = False  # removed by hand: it must not count as rejected for ever
        else:
            found = True
            if checksums:  # or they would be archives
                restore_checksum_files(folder, archive.relpath, moved_to)
    remove_receipt_file(folder, moved_to, archive, b"reason")
    return found
