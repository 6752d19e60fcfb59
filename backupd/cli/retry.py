"""`backupd retry`: put rejected archives back into their drop folder, and hasten pending ones."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.models import Config
from backupd.core.errors import UsageError
from backupd.core.model import DeliveryState
from backupd.core.names import as_text, printable
from backupd.ledger.history import DeliveryRecord, History


def retry(
    delivery: Annotated[str, typer.Argument(metavar="ID", help="A delivery's id, or how it begins.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Every rejected archive.")] = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Put rejected archives back into their drop folder, where they start over.

    A delivery that is pending is made due at once; a paused destination stays paused.
    """
    from backupd.config.loading import load  # noqa: PLC0415
    from backupd.ledger.database import open_for_reading  # noqa: PLC0415

    if bool(delivery) == every:
        raise UsageError(
            "give the id of one delivery, or --all", "`backupd list --state rejected` shows them"
        )
    loaded = load(config)
    history = History(open_for_reading(loaded.state_dir))
    if every:
        records = history.deliveries(DeliveryState.REJECTED, 1_000_000)
        restored = sum(_restore(loaded, record) for record in records)
        typer.echo(f"{restored} put back")
        return
    record = history.delivery(delivery)
    if record.state is DeliveryState.REJECTED:
        if not _restore(loaded, record):
            raise UsageError(
                f"{record.id}: its file is no longer in quarantine", "it may have been put back before"
            )
        typer.echo("put back; it starts over")
    elif history.hasten(record.id, datetime.now(UTC)):
        typer.echo("due now")
    else:
        raise UsageError(
            f"{record.id} is {record.state}", "only rejected and pending deliveries can be retried"
        )


def _restore(config: Config, record: DeliveryRecord) -> bool:
    """Move a file from quarantine to where it was dropped; False if it is not in quarantine any more."""
    from backupd.drop.folder import DropFolder  # noqa: PLC0415
    from backupd.drop.move import rename_no_replace  # noqa: PLC0415

    drop = config.drop.get(record.archive.drop)
    if drop is None or record.disposed_to is None:
        return False
    folder = DropFolder(str(drop.path))
    try:
        source, _, name = record.disposed_to.rpartition(b"/")
        target, _, original = record.archive.relpath.rpartition(b"/")
        with folder.directory(source) as quarantine, folder.directory(target, create=True) as place:
            rename_no_replace(quarantine, name, place, original)
        with suppress(FileNotFoundError):
            folder.unlink(record.disposed_to + b".reason.json")
    except FileNotFoundError:
        return False
    except FileExistsError as error:
        shown = printable(as_text(record.archive.relpath))
        raise UsageError(f"{drop.path}/{shown}: the name is taken", "move that file away first") from error
    except OSError as error:
        place_name = os.fsdecode(record.disposed_to)
        raise UsageError(
            f"{drop.path}/{place_name}: {error.strerror}", "run this as the daemon's user"
        ) from error
    finally:
        folder.close()
    return True
