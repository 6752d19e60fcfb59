"""`backupd forget`: stop expecting archives from a device, or give up what is pending for a removed part."""

from __future__ import annotations

import os
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.load import load
from backupd.core.errors import UsageError
from backupd.core.names import as_text, printable
from backupd.ledger.factory import open_history
from backupd.ledger.history import History


def forget(
    device: Annotated[
        str | None, typer.Argument(metavar="DEVICE", help="Its name, as in `drop.overdue` in the log.")
    ] = None,
    drop: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Forget the device in this drop only. Without a device: give up what is pending from this"
            " removed drop.",
        ),
    ] = "",
    destination: Annotated[
        str, typer.Option(metavar="NAME", help="Give up what is pending for this removed destination.")
    ] = "",
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Forget a device that no longer sends archives, or a drop or destination that is no longer configured.

    A running daemon applies this at its next heartbeat. A device is expected again once an archive of it
    arrives. Of a drop or destination, the pending deliveries are given up; no file is moved or removed.
    """
    if (device is not None or bool(drop)) == bool(destination):
        raise UsageError(
            "give the name of a device, or --drop or --destination",
            "such as `backupd forget --destination NAME`; `backupd status` shows what is pending",
        )
    loaded, now = load(config), datetime.now(UTC)
    history = open_history(loaded)
    if device is not None:
        _forget_device(history, device, drop, now)
    elif drop:
        _refuse_configured("drop", drop, loaded.drop)
        name = as_text(os.fsencode(drop))
        _print_given_up("drop", name, history.give_up_drop(name, now), "the files stay where they are")
    else:
        _refuse_configured("destination", destination, loaded.destination)
        name = as_text(os.fsencode(destination))
        number = history.give_up_destination(name, now)
        _print_given_up("destination", name, number, "archives for no other destination are queued again")


def _refuse_configured(kind: str, name: str, configured: Collection[str]) -> None:
    if name in configured:
        raise UsageError(
            f"the {kind} {name!r} is configured", f"remove `{kind}.{name}`, reload the daemon, and try again"
        )


def _print_given_up(kind: str, name: str, number: int, consequence: str) -> None:
    if not number:
        raise UsageError(
            f"nothing is pending for a {kind} called {name!r}", "`backupd status` shows the names"
        )
    noun = "delivery" if number == 1 else "deliveries"
    typer.echo(f"{printable(name)}: {number} pending {noun} given up; {consequence}")


def _forget_device(history: History, device: str, drop: str, now: datetime) -> None:
    name = as_text(os.fsencode(device))  # the form in which the ledger stores a name that is not UTF-8
    forgotten = history.forget_device(name, as_text(os.fsencode(drop)) or None, now)
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
