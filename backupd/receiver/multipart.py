"""Parse a multipart form (RFC 7578) while it is received, without holding the archive in memory.

Starlette's form parser writes temporary files of its own and returns only once the whole body was received,
so this uses the parser below it, python-multipart.
"""

import re

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

MAX_HEADER_BYTES = 16 * 1024
MAX_FIELD_BYTES = 1024 * 1024
"""Bytes of all form fields of one request together."""

_DISPOSITION_PARAMETER = re.compile(
    rb';\s*(name|filename)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))', re.IGNORECASE | re.DOTALL
)
# The escapes that browsers, curl and httpx use for quotes, backslashes and line ends in parameters.
_ESCAPES = {rb"\"": b'"', rb"\\": b"\\", b"%22": b'"', b"%0a": b"\n", b"%0d": b"\r"}
_ESCAPED = re.compile(rb'\\["\\]|%22|%0A|%0D', re.IGNORECASE)


class MalformedFormError(Exception):
    """The body is not a form with one file; the message is sent to the client."""


class FormReader:
    """An incremental parser: it is fed the chunks of the body, and returns the fields and the file.

    Call `feed` with each chunk, `pop_file_data` often enough to bound the memory, and `finish` at the end.
    `file_size` and `pending_size` are bytes: of the file so far, and of its data not yet popped.
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
        """Parse the next chunk of the body; raise MalformedFormError if it is invalid."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise MalformedFormError(f"not multipart/form-data: {error}") from error

    @property
    def pending_pieces(self) -> int:
        """The number of pieces of file data not yet popped."""
        return len(self._pieces)

    def pop_file_data(self) -> list[bytes | memoryview]:
        """Return the file data that was parsed since the last call, in order."""
        pieces, self._pieces = self._pieces, []
        self.pending_size = 0
        return pieces

    def finish(self) -> str:
        """Return the file's name; raise MalformedFormError if the form is incomplete or has no file."""
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
            # Names count as well, or a form of many empty fields could use any amount of memory.
            self._field_bytes += len(self._field_name)
            self.fields[self._field_name] = self._field.decode("utf-8", "backslashreplace")
        self._field.clear()
        self._in_file = False

    def _end(self) -> None:
        self._ended = True


def _names(disposition: bytes | None) -> tuple[str, str | None]:
    """Return the field name and the file name in a Content-Disposition (RFC 7578 section 4.2)."""
    if disposition is None or not disposition.lower().startswith(b"form-data"):
        raise MalformedFormError("a part has no Content-Disposition: form-data")
    found = {
        name.lower(): _decode(quoted or bare)
        for name, quoted, bare in _DISPOSITION_PARAMETER.findall(disposition)
    }
    if b"name" not in found:
        raise MalformedFormError("a part has no name")
    return found[b"name"], found.get(b"filename")


def _decode(value: bytes) -> str:
    plain = _ESCAPED.sub(lambda match: _ESCAPES[match.group().lower()], value)
    return plain.decode("utf-8", "backslashreplace")
