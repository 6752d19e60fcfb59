"""The framing of a multipart/form-data body with one file (RFC 7578)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def file_name(name: bytes) -> str:
    r"""Return a file name as every common parser reads it: UTF-8, with escapes where they would err.

    Quotes, backslashes, control and other unprintable characters and bytes that are no UTF-8 become
    `%NN`, as browsers do for quotes and line ends (https://url.spec.whatwg.org, multipart/form-data).
    """
    text = name.decode("utf-8", "surrogateescape")
    return "".join(c if c.isprintable() and c not in '"\\' else _percent(c) for c in text)


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True, slots=True)
class Framing:
    """The bytes around a file: all that goes before it, and a function's worth of what goes after.

    Without a boundary there is nothing around it.
    """

    boundary: str
    before: bytes
    digest_field: str

    def after(self, digest: str) -> bytes:
        """Return what follows the file; its length is the same for every digest of one algorithm."""
        if not self.boundary:
            return b""
        part = b""
        if self.digest_field:
            part = _part(self.boundary, self.digest_field) + digest.encode("ascii") + b"\r\n"
        return b"\r\n" + part + f"--{self.boundary}--\r\n".encode("ascii")

    @property
    def content_type(self) -> str:
        """Return the Content-Type of the request."""
        if not self.boundary:
            return "application/octet-stream"
        return f"multipart/form-data; boundary={self.boundary}"


def raw() -> Framing:
    """Return the framing of a body that is the file itself."""
    return Framing("", b"", "")


def frame(
    boundary: str, fields: Mapping[str, str], file_field: str, name: bytes, digest_field: str
) -> Framing:
    """Return the framing of a body with these fields, then the file, then the digest field."""
    parts: Iterable[bytes] = [
        _part(boundary, key) + value.encode("utf-8", "backslashreplace") + b"\r\n"
        for key, value in fields.items()
    ]
    head = (
        f"--{boundary}\r\nContent-Disposition: form-data; "
        f'name="{_quoted(file_field)}"; filename="{file_name(name)}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return Framing(boundary, b"".join(parts) + head.encode("utf-8"), digest_field)


def _part(boundary: str, name: str) -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{_quoted(name)}"\r\n\r\n'.encode()


def _quoted(name: str) -> str:
    return "".join(_percent(c) if c in '"\\\r\n' else c for c in name)
