"""`backupd forget`: no longer expect archives of a device that is gone."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.load import load
from backupd.core.errors import UsageError
from backupd.core.names import as_text, printable
from backupd.ledger.sqlite.connection import open_for_reading
from backupd.ledger.sqlite.queries import LedgerQueries


def forget(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Its name, as `drop.overdue` tells it.")],
    drop: Annotated[
        str, typer.Option(metavar="NAME", help="Forget it in this drop alone, not in every one.")
    ] = "",
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Forget a device that sends nothing any more; a running daemon heeds it at its next heartbeat.

    It is known again as soon as an archive of it comes.
    """
    loaded = load(config)
    history = LedgerQueries(open_for_reading(loaded.state_dir))
    device = as_text(os.fsencode(device))  # as the ledger has names that are no UTF-8
    forgotten = history.forget_device(device, as_text(os.fsencode(drop)) or None, datetime.now(UTC))
    if not forgotten:
        raise UsageError(
            f"no device is called {device!r}" + (f" in the drop {drop!r}" if drop else ""),
            "names are as `drop.overdue` in the log tells them",
        )
    for name, listed in forgotten:
        typer.echo(f"{printable(device)} of {name}: {'its wait begins anew' if listed else 'forgotten'}")
        if listed:
            key = f"drop.{name}.expect.devices" if device else f"drop.{name}.expect"
            typer.echo(f"  hint: it is expected by {key}; take it out there and reload the daemon")
