"""The password of a private key, for whoever checks the key and whoever uses it."""

from pathlib import Path


def key_password(path: Path) -> bytes:
    """Return the password in the file at `path`: its content less the line end."""
    return path.read_bytes().rstrip(b"\r\n")
