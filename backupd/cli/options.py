"""Options that several commands share, and the parsing of option values."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from backupd.config.load import DEFAULT_PATH
from backupd.config.types import parse_duration
from backupd.core.errors import UsageError

DEFAULT_CONFIG = DEFAULT_PATH

ConfigPath = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        envvar="BACKUPD_CONFIG",
        help="The configuration file.",
        show_default=True,
        readable=False,  # loading reports an unreadable file with a hint
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DropName = Annotated[str, typer.Option("--drop", metavar="NAME", help="Only archives of this drop.")]
Since = Annotated[
    str,
    typer.Option("--since", metavar="TIME", help='Only archives since then: "7d" ago, or a date and time.'),
]


class Command(TyperCommand):
    """A command; its help has no types of flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the arguments and options."""
        return _without_flag_types(super().get_params(ctx))


class CommandGroup(TyperGroup):
    """A group of commands; its help has no types of flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options."""
        return _without_flag_types(super().get_params(ctx))


def _without_flag_types(params: list[Any]) -> list[Any]:
    """Return the parameters; a flag loses its type, as a value seems to follow in `--once <bool>`."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


def parse_time(option: str, text: str, now: datetime) -> datetime | None:
    """Return the UTC time that an option gives, as a duration before `now` or in ISO 8601; None if empty.

    A date or time without a zone is local. Raises UsageError for other text.
    """
    if not text:
        return None
    try:
        return now - parse_duration(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{option}: expected a time, got {text!r}",
            'write "7d" for seven days ago, or "2026-03-01T06:00"',
        ) from error


def configured_name(option: str, name: str, names: Sequence[str]) -> str | None:
    """Return the drop or destination that an option names; None if empty.

    Raises UsageError if the configuration has none of that name.
    """
    if name and name not in names:
        raise UsageError(f"{option}: there is no {name!r}", f"there are: {', '.join(names)}")
    return name or None
