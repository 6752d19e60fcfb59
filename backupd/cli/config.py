"""`backupd config`: the JSON Schema, and the effective configuration."""

from __future__ import annotations

import sys

import typer

from backupd.cli.options import DEFAULT_CONFIG, Command, CommandGroup, ConfigPath
from backupd.cli.output import print_json
from backupd.config.load import load
from backupd.config.render import effective_toml, json_schema

app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    help="Print the JSON Schema of the configuration, or the effective configuration.",
)


@app.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors that complete and check by it."""
    print_json(json_schema())


@app.command(cls=Command)
def show(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Print the effective configuration as TOML, with the defaults filled in and the secrets left out."""
    sys.stdout.write(effective_toml(load(config)))
