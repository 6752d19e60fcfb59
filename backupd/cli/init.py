"""`backupd init`: an example configuration."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from backupd.config.render import example_toml
from backupd.config.time_limit import call
from backupd.core.errors import UsageError


def init(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="The file to write; standard output by default. An existing file is kept.",
            parser=Path,  # the parser of typer accesses the file, which may hang
        ),
    ] = None,
) -> None:
    """Print a complete, commented configuration, or write it to a file."""
    text = example_toml()
    if file is None:
        sys.stdout.write(text)
        return
    try:
        call(partial(_create, file, text))
    except OSError as error:
        hint = "give another file; an existing one is never overwritten"
        raise UsageError(
            f"{file}: can't be created ({error.strerror})", hint if isinstance(error, FileExistsError) else ""
        ) from error
    typer.echo(f"wrote {file}; edit it, then run `backupd check --config {file}`")


def _create(file: Path, text: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    if os.geteuid() == 0:  # the daemon's group, which may read /etc/backupd, must be able to read it
        with suppress(OSError):  # the filesystem may have no groups
            os.fchown(fd, -1, os.stat(file.parent).st_gid)
            os.fchmod(fd, 0o640)
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        stream.write(text)
