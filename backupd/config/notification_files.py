"""The files that notifications and hooks use, and their problems; none of these prevents a start."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from backupd.config.certificate_files import mode_problems
from backupd.config.models import Config
from backupd.config.problems import FileProblem, NamedPath, error_text
from backupd.core.errors import ConfigError

INSTALL_HINT: Final = "pip install 'backupd[notify]', with the pip of backupd's own environment"

_MAX_BYTES: Final = 65536
_URL: Final = re.compile(r"[A-Za-z0-9_+.-]+://\S.*")


def has_apprise() -> bool:
    """Return whether the library that sends notifications is installed, without importing it."""
    return find_spec("apprise") is not None


def read_urls(path: Path) -> list[str]:
    """Return the URLs in a `url_file`, without comments and blank lines.

    Raise ConfigError, without any part of a URL, if it can't be read or a line is no URL.
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a FIFO or a device may never end
            raise ConfigError(f"{path} is not a regular file", "name a regular file, or a link to one")
        with path.open("rb") as stream:
            text = stream.read(_MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error_text(error)}", _read_hint(path)) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8", "save it as UTF-8 text") from None
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than 64 KiB", "keep one URL a line")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    urls = [(number, line) for number, line in lines if line and not line.startswith("#")]
    for number, line in urls:
        if not _URL.fullmatch(line) or not line.isprintable():
            hint = "write one URL a line, such as mailto://user:password@mail.example.net"
            raise ConfigError(f"{path}: line {number} is not a URL for Apprise", hint)
    if not urls:
        raise ConfigError(f"{path} has no URL", "write one URL for Apprise a line")
    return [line for _, line in urls]


def notification_problems(config: Config) -> Iterator[FileProblem]:
    """Yield the problems of the URL files and of the hook's program."""
    for name, target in config.notify.items():
        where = f"notify.{name}"
        if not has_apprise():
            text = "needs the library apprise, which is not installed"
            yield FileProblem(where, text, INSTALL_HINT, fatal=True, prevents_start=False)
        try:
            read_urls(target.url_file)
        except ConfigError as error:
            yield FileProblem(
                f"{where}.url_file", error.message, error.hint, fatal=True, prevents_start=False
            )
        yield from mode_problems(NamedPath(f"{where}.url_file", target.url_file))
    if config.on_event:
        program = config.on_event[0]
        if not os.path.isfile(program) or not os.access(program, os.X_OK):
            text, hint = "is not an executable file", f"chmod a+x {program}, or name another program"
            yield NamedPath("on_event", Path(program)).problem(text, hint, prevents_start=False)


def _read_hint(path: Path) -> str:
    return f"permit the daemon's user (uid {os.geteuid()}) to read {path}"
