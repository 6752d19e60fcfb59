"""`backupd pause` and `resume`: hold the uploads to a destination, or from a drop, for a while."""

from __future__ import annotations

import getpass
import os
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.load import load
from backupd.config.models import Config
from backupd.config.types import parse_duration
from backupd.core.errors import UsageError
from backupd.core.health import hold_text
from backupd.core.names import printable
from backupd.core.snapshot import OperatorPause
from backupd.ledger.factory import open_history
from backupd.ledger.history import History

_MAX_NOTE = 200

_DAEMON_TIMEOUT, _POLL_EVERY = 10.0, 0.05
"""Seconds to wait for the daemon, and between two looks at its state."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="A destination or a drop.")]
IsDrop = Annotated[bool, typer.Option("--drop", help="NAME is a drop.")]
IsDestination = Annotated[bool, typer.Option("--destination", help="NAME is a destination.")]


def pause(
    name: Name,
    length: Annotated[
        str,
        typer.Option("--for", metavar="TIME", help='How long, such as "2h"; until `resume` unless given.'),
    ] = "",
    note: Annotated[str, typer.Option(metavar="TEXT", help="The reason, shown wherever the pause is.")] = "",
    is_drop: IsDrop = False,
    is_destination: IsDestination = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Hold the uploads to a destination, or from a drop, as for a maintenance window.

    Files are noticed and queued as ever, and an upload under way is finished. The pause is kept across
    restarts. It raises no alarm until its end; one without an end is a warning.
    """
    loaded, now = load(config), datetime.now(UTC)
    if len(note) > _MAX_NOTE:
        raise UsageError(f"--note: {len(note)} characters", f"write at most {_MAX_NOTE}")
    try:
        until = now + parse_duration(length) if length else None
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--for: {error}", 'write "2h" for two hours') from error
    if until is not None and until < now + timedelta(seconds=1):
        raise UsageError("--for: the pause would be over at once", 'write "2h" for two hours')
    kind = _kind(loaded, name, is_drop=is_drop, is_destination=is_destination)
    requested = OperatorPause(kind, name, now, until, _user(), note)
    with closing(open_history(loaded)) as history:
        history.pause(requested)
        remark = _await_daemon(history, requested)
    typer.echo(printable(hold_text(requested)))
    if remark:
        typer.echo(remark)


def resume(
    name: Name,
    is_drop: IsDrop = False,
    is_destination: IsDestination = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """End the pause of a destination or a drop that `backupd pause` began."""
    loaded = load(config)
    with closing(open_history(loaded)) as history:
        kinds = [each.kind for each in history.pauses() if each.name == name]
        if is_drop or is_destination or len(kinds) > 1:
            kinds = [_kind(loaded, name, is_drop=is_drop, is_destination=is_destination)]
        if not kinds or not history.resume(kinds[0], name):
            hint = "a destination that is down is paused by the daemon: `backupd status` shows why"
            raise UsageError(f"nobody has paused {printable(name)}", hint)
    typer.echo(f"the pause of the {kinds[0]} {printable(name)} has ended")


def _kind(config: Config, name: str, *, is_drop: bool, is_destination: bool) -> str:
    """Return whether a name is that of a `destination` or a `drop`; raise UsageError if it is not certain."""
    names = {"destination": [*config.destination], "drop": [*config.drop]}
    wanted = [kind for kind, flag in (("destination", is_destination), ("drop", is_drop)) if flag] or [*names]
    found = [kind for kind in wanted if name in names[kind]]
    if len(found) > 1:
        raise UsageError(f"{name} is a destination and a drop", "add --destination or --drop")
    if not found:
        known = ", ".join(each for kind in wanted for each in names[kind])
        raise UsageError(f"there is no {' or '.join(wanted)} named {printable(name)}", f"there are: {known}")
    return found[0]


def _await_daemon(history: History, requested: OperatorPause) -> str:
    """Wait until the daemon holds the uploads; return a remark if it does not within some seconds."""
    end = time.monotonic() + _DAEMON_TIMEOUT
    key = (requested.kind, requested.name, requested.since)
    while history.daemon_pid() is not None:
        held = [pause for snapshot in history.snapshots() for pause in snapshot.holds]
        if any((each.kind, each.name, each.since) == key for each in held):
            return ""
        if time.monotonic() > end:
            return "the daemon has not taken it over yet: `backupd status` shows when it has"
        time.sleep(_POLL_EVERY)
    return "the daemon does not run; the pause is active once it does"


def _user() -> str:
    """Return the name of the person at the terminal; root by sudo is the one who called it."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (OSError, KeyError):  # the user id has no name
        return str(os.getuid())
