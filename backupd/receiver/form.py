"""Parse a multipart form (RFC 7578) while it is received, without holding the archive in memory.

Starlette's form parser writes temporary files of its own and returns only once the whole body was received.
"""

import re

from multipart import (  # type: ignore[import-untyped]
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

MAX_HEADER_BYTES = 16 * 1024
"""Bytes of one header line of a part; a part has at most eight."""

MAX_FIELD_BYTES = 1024 * 1024
"""Bytes of all form fields of one request together, without their names."""

MAX_PARTS = 128

# The escapes that browsers, curl and httpx use for quotes, backslashes and line ends in parameters.
_ESCAPES = {r"\"": '"', r"\\": "\\", "%22": '"', "%0a": "\n", "%0d": "\r"}
_ESCAPED = re.compile(r'\\["\\]|%22|%0A|%0D', re.IGNORECASE)


class MalformedFormError(Exception):
    """The body is not a form with one file; the message is sent to the client."""


class FormReader:
    """An incremental parser: it is fed the chunks of the body, and returns the fields and the file.

    Call `feed` with each chunk, `pop_file_data` often enough to bound the memory, and `finish` at the end.
    `file_size` is the number of bytes of the file so far.
    """

    def __init__(self, boundary: bytes, file_field: str) -> None:
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None
        self.file_size = 0
        self._file_data = bytearray()
        self._file_field = file_field
        self._field_name: str | None = None
        """The field of the current part; None for the file."""
        self._field = bytearray()
        self._field_bytes = 0
        self._parser = PushMultipartParser(
            boundary,
            max_header_size=MAX_HEADER_BYTES,
            max_segment_count=MAX_PARTS,
            header_charset="latin-1",  # any byte is valid in it, so that any file name can be decoded later
        )

    def feed(self, chunk: bytes) -> None:
        """Parse the next chunk of the body; raise MalformedFormError if it is invalid."""
        if not chunk:  # the parser would take it for the end
            return
        try:
            for event in self._parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    self._begin_part(event.header("Content-Disposition"))
                elif event is None:
                    self._end_part()
                else:
                    self._add_data(event)
        except MultipartError as error:
            raise MalformedFormError(f"not multipart/form-data: {error}") from error

    @property
    def pending_size(self) -> int:
        """The number of bytes of the file that were not popped yet."""
        return len(self._file_data)

    def pop_file_data(self) -> bytearray:
        """Return the file data that was parsed since the last call."""
        data, self._file_data = self._file_data, bytearray()
        return data

    def finish(self) -> str:
        """Return the file's name; raise MalformedFormError if the form is incomplete or has no file."""
        try:
            self._parser.close()
        except MultipartError:
            raise MalformedFormError("the multipart body ended before its closing boundary") from None
        if self.file_name is None:
            raise MalformedFormError(f"the form has no file part named {self._file_field!r}")
        return self.file_name

    def _begin_part(self, disposition: str) -> None:
        # not `MultipartSegment.filename`: it is cut at the last backslash, as Internet Explorer once required
        _, parameters = parse_options_header(disposition, unquote=_unquote)
        name, file_name = parameters.get("name"), parameters.get("filename")
        if name is None:
            raise MalformedFormError("a part has no name")
        if name == self._file_field:
            self._field_name = None
            self._begin_file(file_name)
        elif file_name is not None:
            raise MalformedFormError(f"the file belongs in the part {self._file_field!r}, not in {name!r}")
        else:
            self._field_name = name

    def _begin_file(self, file_name: str | None) -> None:
        if self.file_name is not None:
            raise MalformedFormError(f"the form has more than one part named {self._file_field!r}")
        if file_name is None:
            raise MalformedFormError(f"the part {self._file_field!r} has no filename")
        self.file_name = file_name

    def _add_data(self, data: bytes) -> None:
        if self._field_name is None:
            self._file_data += data
            self.file_size += len(data)
            return
        self._field_bytes += len(data)
        if self._field_bytes > MAX_FIELD_BYTES:
            raise MalformedFormError(f"the form fields are longer than {MAX_FIELD_BYTES} bytes")
        self._field += data

    def _end_part(self) -> None:
        if self._field_name is not None:
            self.fields[self._field_name] = self._field.decode("utf-8", "backslashreplace")
            self._field.clear()


def _unquote(value: str, _is_file_name: bool = False) -> str:
    """Return the text of a parameter of Content-Disposition, in quotes or not (RFC 7578 section 4.2)."""
    if value.startswith('"'):
        value = value[1:-1]
    plain = _ESCAPED.sub(lambda match: _ESCAPES[match[0].lower()], value)
    return plain.encode("latin-1").decode("utf-8", "backslashreplace")
