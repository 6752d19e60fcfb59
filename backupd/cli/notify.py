"""`backupd notify`: test the targets of notifications and the hook."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime
from typing import Annotated

import typer

from backupd import __version__
from backupd.cli.options import DEFAULT_CONFIG, ConfigPath, configured_name
from backupd.cli.output import print_line
from backupd.config.load import load
from backupd.config.models import Config
from backupd.config.notification_files import INSTALL_HINT, has_apprise, read_urls
from backupd.core.errors import UNAVAILABLE, BackupdError, ConfigError, UsageError
from backupd.telemetry.sender import Envelope, scheme_of, send

_HINTS = "check the URL, and the user and password in it; https://appriseit.com has the URLs of all services"


def notify(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Only this target.")] = "",
    config: ConfigPath = DEFAULT_CONFIG,
    test: Annotated[bool, typer.Option("--test", help="Send a test message now.")] = False,
) -> None:
    """Send a test message to every target of notifications, and print what happened.

    Run it as the daemon's user, as it reads the same files. Exits with 69 if a message could not be sent.
    """
    if not test:
        raise UsageError("nothing to do", "`backupd notify --test` sends a test message")
    loaded = load(config)
    if not loaded.notify:
        raise UsageError("the configuration has no target", "add a table [notify.NAME] with a url_file")
    configured_name("NAME", name, tuple(loaded.notify))
    envelopes, failed = _envelopes(loaded, [name] if name else list(loaded.notify))
    errors = send(envelopes, lambda: False) if envelopes else {}
    for each in envelopes:
        where, error = f"{each.receiver} ({scheme_of(each.url)})", errors[each.receiver]
        if error:
            _print_failure(where, error, _HINTS)
        else:
            print_line(f"ok: {where}")
    if failed or any(errors.values()):
        raise typer.Exit(UNAVAILABLE)


def _envelopes(config: Config, names: list[str]) -> tuple[list[Envelope], bool]:
    """Return a test message for each URL, and whether one of the files with the URLs can't be used."""
    envelopes, failed = [], False
    host = socket.gethostname().partition(".")[0]
    now = datetime.now(UTC)
    body = (
        f"This is a test of `backupd notify --test` on {socket.gethostname()}, by uid {os.geteuid()}.\n\n"
        f"backupd {__version__}, {now:%Y-%m-%d %H:%M} UTC"
    )
    for name in names:
        try:
            if not has_apprise():
                raise ConfigError("the library apprise is not installed", INSTALL_HINT)
            urls = read_urls(config.notify[name].url_file)
        except BackupdError as error:
            _print_failure(f"notify.{name}", error.message, error.hint)
            failed = True
            continue
        for number, url in enumerate(urls, 1):
            receiver = f"notify.{name}, URL {number}"
            envelopes.append(Envelope(receiver, url, f"backupd {host}: test", body))
    return envelopes, failed


def _print_failure(where: str, error: str, hint: str) -> None:
    print_line(f"failed: {where}: {error}")
    print_line(f"  hint: {hint}")
