"""Secrets, which are files: read when they are needed, so that a new one counts at once."""

from __future__ import annotations

from pathlib import Path

from backupd.core.errors import ConfigError

_MOST = 64 * 1024


class SecretError(ConfigError):
    """A secret's file can't be used; its content is never part of the message."""


def read_secret(path: Path) -> str:
    """Return the content of a secret's file less white space at its end."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST + 1)
    except OSError as error:
        raise SecretError(
            f"{path}: can't be read ({error.strerror})", "check the file and its owner"
        ) from error
    if len(content) > _MOST:
        raise SecretError(f"{path}: is larger than 64 KiB", "write the bare token or password")
    secret = content.rstrip()
    if not secret or not all(0x20 <= byte < 0x7F for byte in secret):
        raise SecretError(f"{path}: holds no secret on one line of ASCII", "write the bare token or password")
    return secret.decode("ascii")
