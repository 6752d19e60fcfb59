"""Reads a multipart form as it arrives; the archive in it is handed on in pieces, never held whole.

RFC 7578 (multipart/form-data). Starlette's own form reader spools to files of its own and needs
the whole body before it returns, so this drives the parser underneath it.
"""

import re

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

MAX_HEADER_BYTES = 16 * 1024
MAX_FIELD_BYTES = 1024 * 1024
"""All form fields of one request together."""

_DISPOSITION_PARAMETER = re.compile(
    rb';\s*(name|filename)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))', re.IGNORECASE | re.DOTALL
)
# What browsers, curl and httpx write for the three characters that would end the line or the quotes.
_ESCAPES = {rb"\"": b'"', rb"\\": b"\\", b"%22": b'"', b"%0a": b"\n", b"%0d": b"\r"}
_ESCAPED = re.compile(rb'\\["\\]|%22|%0A|%0D', re.IGNORECASE)


class MalformedFormError(Exception):
    """The body isn't the form that the contract asks for; the message is meant for the client."""


class FormReader:
    """Takes the body chunk by chunk; gives the form fields, the file's name and its data.

    `feed` every chunk, `take_file_data` as often as is good for memory, `finish` at the end.
    """

    def __init__(self, boundary: bytes, file_field: str) -> None:
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None
        self.file_size = 0
        self.pending_size = 0
        self._pieces: list[bytes | memoryview] = []
        self._file_field = file_field
        self._in_file = False
        self._ended = False
        self._field_name = ""
        self._field = bytearray()
        self._field_bytes = 0
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._header_bytes = 0
        self._disposition: bytes | None = None
        self._parser = self._new_parser(boundary)

    def feed(self, chunk: bytes) -> None:
        """Parse the next chunk of the body; raise MalformedFormError."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise MalformedFormError(f"not multipart/form-data: {error}") from error

    @property
    def pending_pieces(self) -> int:
        """How many pieces of file data wait to be taken."""
        return len(self._pieces)

    def take_file_data(self) -> list[bytes | memoryview]:
        """Return the file data that came since the last call."""
        pieces, self._pieces = self._pieces, []
        self.pending_size = 0
        return pieces

    def finish(self) -> str:
        """Return the file's name, or raise MalformedFormError when the form isn't complete."""
        if not self._ended:
            raise MalformedFormError("the body ended before its closing boundary")
        if self.file_name is None:
            raise MalformedFormError(f"the form has no file part named {self._file_field!r}")
        return self.file_name

    def _new_parser(self, boundary: bytes) -> MultipartParser:
        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._header_name_data,
                    "on_header_value": self._header_value_data,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._part_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise MalformedFormError(str(error)) from error

    def _begin_part(self) -> None:
        self._disposition = None
        self._header_bytes = 0

    def _header_name_data(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _header_value_data(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise MalformedFormError(f"the headers of a part are longer than {MAX_HEADER_BYTES} bytes")

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        name, file_name = _names(self._disposition)
        self._in_file = name == self._file_field
        self._field_name = name
        if self._in_file:
            self._begin_file(file_name)
        elif file_name is not None:
            raise MalformedFormError(f"the file belongs in the part {self._file_field!r}, not in {name!r}")

    def _begin_file(self, file_name: str | None) -> None:
        if self.file_name is not None:
            raise MalformedFormError(f"the form has more than one part named {self._file_field!r}")
        if file_name is None:
            raise MalformedFormError(f"the part {self._file_field!r} has no filename")
        self.file_name = file_name

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        size = end - start
        if self._in_file:
            self._pieces.append(data if size == len(data) else memoryview(data)[start:end])
            self.pending_size += size
            self.file_size += size
            return
        self._field_bytes += size
        if self._field_bytes > MAX_FIELD_BYTES:
            raise MalformedFormError(f"the form fields are longer than {MAX_FIELD_BYTES} bytes")
        self._field += data[start:end]

    def _end_part(self) -> None:
        if not self._in_file:
            # Names count as well, or a form of empty fields would grow without end.
            self._field_bytes += len(self._field_name)
            self.fields[self._field_name] = self._field.decode("utf-8", "backslashreplace")
        self._field.clear()
        self._in_file = False

    def _end(self) -> None:
        self._ended = True


def _names(disposition: bytes | None) -> tuple[str, str | None]:
    """Return the field name and the file name that a Content-Disposition states (RFC 7578, 4.2)."""
    if disposition is None or not disposition.lower().startswith(b"form-data"):
        raise MalformedFormError("a part has no Content-Disposition: form-data")
    found = {
        name.lower(): _decoded(quoted or bare)
        for name, quoted, bare in _DISPOSITION_PARAMETER.findall(disposition)
    }
    if b"name" not in found:
        raise MalformedFormError("a part has no name")
    return found[b"name"], found.get(b"filename")


def _decoded(value: bytes) -> str:
    plain = _ESCAPED.sub(lambda match: _ESCAPES[match.group().lower()], value)
    return plain.decode("utf-8", "backslashreplace")
