"""`backupd forget`: stop expecting archives from a device."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.load import load
from backupd.core.errors import UsageError
from backupd.core.names import as_text, printable
from backupd.ledger.factory import open_history


def forget(
    device: Annotated[
        str, typer.Argument(metavar="DEVICE", help="Its name, as in `drop.overdue` in the log.")
    ],
    drop: Annotated[
        str, typer.Option(metavar="NAME", help="Forget it in this drop only; all drops by default.")
    ] = "",
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Forget a device that no longer sends archives; a running daemon applies this at its next heartbeat.

    The device is expected again once an archive of it arrives.
    """
    history = open_history(load(config))
    name = as_text(os.fsencode(device))  # the form in which the ledger stores a name that is not UTF-8
    forgotten = history.forget_device(name, as_text(os.fsencode(drop)) or None, datetime.now(UTC))
    if not forgotten:
        raise UsageError(
            f"no device is called {name!r}" + (f" in the drop {drop!r}" if drop else ""),
            "give the name as in `drop.overdue` in the log",
        )
    for drop_name, is_listed in forgotten:
        result = "its interval starts again" if is_listed else "forgotten"
        typer.echo(f"{printable(name)} of {drop_name}: {result}")
        if is_listed:
            key = f"drop.{drop_name}.expect.devices" if name else f"drop.{drop_name}.expect"
            typer.echo(f"  hint: {key} expects it; remove it there and reload the daemon")
