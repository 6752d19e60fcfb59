"""`backupd report`: the page with the state of the daemon and its devices, as a file."""

from __future__ import annotations

import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.load import load
from backupd.core.errors import UsageError
from backupd.ledger.factory import open_history
from backupd.page.document import render_page
from backupd.page.page_data import DAYS, MAX_DAYS, collect_page_data


def report(
    html: Annotated[
        str, typer.Option("--html", metavar="FILE", help="Write the page to this file; - is standard output.")
    ],
    config: ConfigPath = DEFAULT_CONFIG,
    days: Annotated[
        int,
        typer.Option(
            "--days",
            metavar="NUMBER",
            min=1,
            max=MAX_DAYS,
            help="The number of days in the matrix of devices.",
        ),
    ] = DAYS,
) -> None:
    """Write a page with problems, destinations, backups by device and day, and the last archives.

    It is one HTML file without scripts, for a browser, a mail or a ticket. It is the page that the daemon
    serves at `/` if `metrics.listen` is set. The daemon need not run.
    """
    loaded = load(config)
    with closing(open_history(loaded)) as history:
        page = render_page(collect_page_data(history, loaded, datetime.now(UTC), days))
    if html == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(page.encode())
        return
    try:
        Path(html).write_bytes(page.encode())
    except OSError as error:
        raise UsageError(
            f"{html}: can't be created ({error.strerror})", "give a file in a directory that you can write to"
        ) from error
