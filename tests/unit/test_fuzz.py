"""Random responses of a destination, and random file names."""

from __future__ import annotations

import html
import io
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import django  # type: ignore[import-untyped]
import httpx
import pytest
import werkzeug.formparser
from django.conf import settings  # type: ignore[import-untyped]
from django.core.files.uploadhandler import MemoryFileUploadHandler  # type: ignore[import-untyped]
from django.http.multipartparser import MultiPartParser  # type: ignore[import-untyped]
from hypothesis import assume, example, given
from hypothesis import strategies as st
from python_multipart import create_form_parser

from backupd.config.models import ReceiptConfig
from backupd.core.backoff import parse_retry_after
from backupd.core.model import Deferred, Delivered, Digest, Rejected
from backupd.core.verify import ReceiptExpectation, matches
from backupd.receiver.form import FormReader
from backupd.upload.http.body import file_name, frame
from backupd.upload.http.response import ResponseEvaluator, _stated, failure_from_response

SENT = Digest("sha256", "0123456789abcdef" * 4)

a_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
a_body = (
    st.binary(max_size=300) | a_json.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 50_000)
)
a_pointer = st.lists(st.text(alphabet=st.characters(exclude_characters="/~")), min_size=1, max_size=4).map(
    lambda parts: "body:/" + "/".join(parts)
)
a_header = st.text(
    alphabet=st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=200
)


# Responses


def values_in(body: bytes) -> list[object]:
    """Return all values within a JSON body, itself included; none if it is not JSON."""
    try:
        values: list[object] = [json.loads(body)]
    except (ValueError, RecursionError):
        return []
    for value in values:
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    return values


@given(a_pointer | st.sampled_from(["body:/0/1", "body:/0/sha256", "body:/-", "body:/99999999999"]), a_body)
def test_any_pointer_into_any_body_yields_a_value_of_it_or_none(where: str, body: bytes) -> None:
    value = _stated(where, httpx.Response(200), body)
    assert json.dumps(value) in {"null", *map(json.dumps, values_in(body))}


@given(
    status=st.integers(200, 599),
    body=a_body,
    stated=a_header,
    retry_after=a_header,
    source=st.sampled_from(["body:/sha256", "body:/0", "header:X-Sum", "none"]),
    size=st.sampled_from(["", "body:/size", "header:X-Size"]),
    encoding=st.sampled_from(["hex", "base64", "base64url"]),
)
def test_any_response_is_evaluated_without_an_exception(
    status: int, body: bytes, stated: str, retry_after: str, source: str, size: str, encoding: str
) -> None:
    config = ReceiptConfig.model_validate({"digest": source, "size": size, "encoding": encoding})

    def an_httpx_response() -> httpx.Response:
        headers = [(b"X-Sum", stated.encode("latin-1")), (b"X-Size", stated.encode("latin-1"))]
        headers += [(b"Retry-After", retry_after.encode("latin-1")), (b"Location", stated.encode("latin-1"))]
        request = httpx.Request("POST", "https://vault.test/", headers={"Authorization": "Basic YTpiYmJi"})
        return httpx.Response(status, headers=headers, stream=_Bytes(body), request=request)

    outcome = ResponseEvaluator(config).evaluate_success(an_httpx_response(), SENT, 5)
    assert isinstance(outcome, Delivered) == (
        source == "none" and "receipt" not in getattr(outcome, "error", "")
    )
    assert isinstance(failure_from_response(an_httpx_response()), Deferred | Rejected)
    assert isinstance(
        ResponseEvaluator(config).evaluate_duplicate(_as_409(an_httpx_response()), SENT, 5), Rejected
    )


class _Bytes(httpx.SyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield self._body


def _as_409(response: httpx.Response) -> httpx.Response:
    response.status_code = 409
    return response


@given(
    st.text() | a_header | st.text(st.sampled_from("sha256-:=,; \tAZaz09+/")),
    st.sampled_from(["sha256", "sha512", "sha1", "md5", "blake2b"]),
    st.sampled_from(["hex", "base64", "base64url"]),
    st.integers(0, 88),
)
@example("sha-256=::", "sha256", "hex", 0)
@example("\ud800", "sha256", "base64", 0)
def test_no_random_value_matches_the_digest(stated: str, algorithm: str, encoding: str, prefix: int) -> None:
    sent = Digest(algorithm, "0f" * 64)
    assume(prefix == 0 or prefix >= 8)
    assert matches(sent, stated, ReceiptExpectation(True, encoding, prefix)) is False


@given(a_header | st.text())
def test_any_retry_after_is_at_most_an_hour_or_none(value: str) -> None:
    wait = parse_retry_after(value, datetime(2030, 1, 1, tzinfo=UTC))
    assert wait is None or 0 <= wait.total_seconds() <= 3600


# File names


if not settings.configured:
    settings.configure(DEFAULT_CHARSET="utf-8", FILE_UPLOAD_MAX_MEMORY_SIZE=10**7)
    django.setup()

a_name = st.binary(min_size=1, max_size=255).filter(
    lambda name: not {0, ord("/")} & set(name) and name not in (b".", b"..")
)
a_readable_name = st.text(min_size=1, max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))
any_name = a_name | a_readable_name.filter(
    lambda name: not {0, ord("/")} & set(name) and name not in (b".", b"..") and len(name) <= 255
)
a_value = st.text(max_size=100)
Parsed = tuple[dict[str, str], str, bytes]
"""The fields, and name and content of the file."""


def by_python_multipart(content_type: str, body: bytes) -> Parsed:
    fields: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []

    def on_field(field: object) -> None:
        name, value = field.field_name, field.value  # type: ignore[attr-defined]
        fields[name.decode()] = (value or b"").decode()

    def on_file(file: object) -> None:
        file.file_object.seek(0)  # type: ignore[attr-defined]
        files.append((file.file_name.decode(), file.file_object.read()))  # type: ignore[attr-defined]
        file.close()  # type: ignore[attr-defined]

    parser = create_form_parser(
        {"Content-Type": content_type.encode(), "Content-Length": str(len(body)).encode()}, on_field, on_file
    )
    parser.write(body)
    parser.finalize()
    parser.close()
    ((name, content),) = files
    return fields, name, content


def by_receiver(content_type: str, body: bytes) -> Parsed:
    reader = FormReader(content_type.partition("; boundary=")[2].encode(), "file")
    reader.feed(body)
    return dict(reader.fields), reader.finish(), bytes(reader.pop_file_data())


def by_werkzeug(content_type: str, body: bytes) -> Parsed:
    parser = werkzeug.formparser.FormDataParser(silent=False)
    mime, _, boundary = content_type.partition("; boundary=")
    _, form, files = parser.parse(io.BytesIO(body), mime, len(body), {"boundary": boundary})
    (file,) = files.values()
    content = file.stream.read()
    file.close()
    return dict(form.items()), file.filename or "", content


def by_django(content_type: str, body: bytes) -> Parsed:
    meta = {"CONTENT_TYPE": content_type, "CONTENT_LENGTH": str(len(body))}
    post, files = MultiPartParser(meta, io.BytesIO(body), [MemoryFileUploadHandler()]).parse()
    (file,) = files.values()
    content = file.read()
    file.close()
    return dict(post.items()), file.name, content


@pytest.mark.parametrize("parse", [by_receiver, by_python_multipart, by_werkzeug, by_django])
@given(
    name=any_name,
    value=a_value,
    content=st.binary(max_size=200) | st.just(b"\r\n--"),
    digest_at=st.sampled_from(["before", "after", ""]),
)
@example(b'q"uo\\te;\r\nX: y.gz', "a\r\n--b", b"\r\n--b--\r\n", "after")
@example(b"\xff\xfe \xc3\xa9.gz ", "\ud800", b"", "after")
@example("日本; filename*=UTF-8''x.gz".encode(), "", b"\0", "before")
def test_every_parser_reads_the_name_and_content_that_were_sent(
    parse: Callable[[str, bytes], Parsed], name: bytes, value: str, content: bytes, digest_at: str
) -> None:
    shown = file_name(name)
    assert shown.isprintable()
    assert not set(shown) & set('"\\\r\n')
    if parse is by_django:
        # Django unescapes HTML and drops everything up to the last separator
        assume(html.unescape(shown) == shown)
    fields = {"note": value, **({"sum": SENT.hex} if digest_at == "before" else {})}
    framing = frame("b" * 32, fields, "file", name, "sum" if digest_at == "after" else "")
    assume(b"b" * 32 not in content + value.encode("utf-8", "backslashreplace"))
    body = framing.before + content + framing.after(SENT.hex)

    parsed_fields, parsed_name, parsed_content = parse(framing.content_type, body)

    assert parsed_content == content
    if parse is by_receiver:  # reads what browsers write
        shown = re.sub("(?i)%22|%0A|%0D", lambda escape: urllib.parse.unquote(escape[0]), shown)
    assert parsed_name == (shown.replace("%22", '"') if parse is by_werkzeug else shown)
    assert parsed_fields == {
        "note": value.encode("utf-8", "backslashreplace").decode(),
        **({"sum": SENT.hex} if digest_at else {}),
    }


@pytest.mark.parametrize("parse", [by_receiver, by_python_multipart, by_werkzeug, by_django])
@given(st.text(min_size=1, max_size=30).filter(str.isprintable))
@example("a\\b")
@example("a\\")
@example('"')
def test_every_parser_reads_a_field_with_its_name(parse: Callable[[str, bytes], Parsed], name: str) -> None:
    assume(name.strip() == name)  # Django strips names
    assume("%0" not in name and name != "file")
    framing = frame("b" * 32, {name: "value"}, "file", b"a.gz", "")

    fields, _, _ = parse(framing.content_type, framing.before + framing.after(""))

    (read,) = fields
    # not all parsers decode quotes and backslashes alike, but each keeps them distinct from others
    assert read.replace('"', "%22") == name.replace('"', "%22").replace("\\", "%5C")
    assert fields[read] == "value"
