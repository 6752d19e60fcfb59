"""Options that several commands have, and the exit codes they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backupd.config.load import DEFAULT_PATH

REJECTED = 3
UNAVAILABLE = 69
PENDING = 75
BAD_CONFIG = 78

ConfigPath = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        envvar="BACKUPD_CONFIG",
        help="The configuration file.",
        show_default=True,
        readable=False,  # loading it says more
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

DEFAULT_CONFIG = DEFAULT_PATH
