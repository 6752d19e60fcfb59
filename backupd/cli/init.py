"""`backupd init`: a commented configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from backupd.config.render import example_toml
from backupd.core.errors import UsageError


def init(
    file: Annotated[
        Path | None, typer.Argument(help="Where to write it; standard output if left out. Never overwrites.")
    ] = None,
) -> None:
    """Print a complete, commented configuration, or write it to a file."""
    text = example_toml()
    if file is None:
        sys.stdout.write(text)
        return
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    except OSError as error:
        hint = "name another file; this one is left as it is" if isinstance(error, FileExistsError) else ""
        raise UsageError(f"{file}: can't be made ({error.strerror})", hint) from error
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        stream.write(text)
    typer.echo(f"wrote {file}; edit it, then try `backupd check --config {file}`")
