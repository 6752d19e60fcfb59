"""The command line: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

from backupd import __version__
from backupd.cli import (
    audit,
    check,
    config,
    demo,
    forget,
    init,
    install,
    push,
    receive,
    retry,
    run,
    status,
)
from backupd.cli import (
    list as listing,
)

app = typer.Typer(
    name="backupd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Delivers configuration backups from drop folders to HTTPS endpoints, verified.\n\n"
    "Start with `backupd demo`, which shows an archive going through; then `backupd init` for a "
    "configuration, `backupd check` to try it, and `backupd run`.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 something was rejected, 69 a destination is unavailable, "
    "75 still pending, 78 configuration.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"backupd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return


app.command("run")(run.run)
app.command("check")(check.check)
app.command("push")(push.push)
app.command("status")(status.status)
app.command("list")(listing.list_deliveries)
app.command("show")(listing.show)
app.command("audit")(audit.audit)
app.command("retry")(retry.retry)
app.command("forget")(forget.forget)
app.command("init")(init.init)
app.add_typer(config.app, name="config")
app.command("install")(install.install)
app.command("uninstall")(install.uninstall)
app.command("receive")(receive.receive)
app.command("demo")(demo.demo)
