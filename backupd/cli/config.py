"""`backupd config`: the schema, and what is in force."""

from __future__ import annotations

import sys

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.cli.output import print_json
from backupd.config.load import load
from backupd.config.render import effective_toml, json_schema

app = typer.Typer(no_args_is_help=True, help="Show the configuration's schema, or what is in force.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors that complete from one."""
    print_json(json_schema())


@app.command()
def show(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Print the configuration in force as TOML: defaults filled in, secrets left out."""
    sys.stdout.write(effective_toml(load(config)))
