"""The outcome of each response of a destination, as a table, without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

from backupd.core.model import Deferred, Delivered, Outcome, Rejected
from backupd.core.policy import Action, Reason, rule_of
from backupd.upload.base import Abort
from backupd.upload.http.uploader import HttpEndpoint, HttpUploader
from tests.uploading import Sender, a_destination, an_archive

CONTENT = b"the archive's content"
HEX = hashlib.sha256(CONTENT).hexdigest()
RECEIPT = json.dumps({"sha256": HEX}).encode()
URL = "https://vault.test/v1/upload"

Response = httpx.Response | Exception


def upload(
    folder: Path, response: Response, *, name: str = "a.tar.gz", **keys: Any
) -> tuple[Outcome, httpx.Request]:
    """Upload an archive to a destination with this response; return the outcome and the request."""
    router = respx.MockRouter()
    route = router.post(url__startswith="https://vault.test/")
    route.mock(return_value=response if isinstance(response, httpx.Response) else httpx.Response(500))

    def handle(request: httpx.Request) -> httpx.Response:
        read = router.handler(request)  # which reads the body; a real response is streamed
        if isinstance(response, Exception):
            raise response
        return httpx.Response(read.status_code, headers=read.headers, content=iter([read.content]))

    transport = httpx.MockTransport(handle)
    with closing(Abort()) as abort:
        destination = a_destination(keys.pop("url", URL), **keys)
        with closing(
            HttpUploader(HttpEndpoint.open(destination, abort), lambda _limits: transport)
        ) as uploader:
            outcome = Sender(uploader, abort).send(an_archive(folder, CONTENT, name=name))
    assert route.call_count == 1
    return outcome, route.calls[0].request


STATUSES = {
    Reason.REDIRECT: [300, 301, 302, 303, 304, 307, 308],
    Reason.REFUSED: [400, 415, 422],
    Reason.UNAUTHORIZED: [401, 407],
    Reason.FORBIDDEN: [403],
    Reason.NOT_FOUND: [404, 405, 410],
    Reason.CONFLICT: [409],
    Reason.TOO_LARGE: [413],
    Reason.RATE_LIMITED: [429],
    Reason.SERVER_ERROR: [408, 425, 500, 501, 502, 503, 504, 507, 511, 521, 599],
    Reason.UNEXPECTED_STATUS: [203, 205, 206, 207, 402, 406, 418, 421, 451, 499],
}
REJECTING = {Reason.REFUSED, Reason.CONFLICT, Reason.TOO_LARGE}


@pytest.mark.parametrize(
    ("status", "reason"), [(status, reason) for reason, each in STATUSES.items() for status in each]
)
def test_a_status_other_than_success_has_its_reason(tmp_path: Path, status: int, reason: Reason) -> None:
    outcome, _ = upload(tmp_path, httpx.Response(status, content=b"because"))

    assert isinstance(outcome, Rejected if reason in REJECTING else Deferred)
    assert (outcome.reason, outcome.http_status) == (reason, status)
    assert outcome.error.startswith(str(status))
    assert outcome.error.endswith(": because")


def test_only_failures_caused_by_the_archive_reject_it() -> None:
    assert {reason for reason in STATUSES if rule_of(reason).action is Action.REJECT} == REJECTING


@pytest.mark.parametrize("status", [200, 201, 202])
def test_a_success_with_a_matching_receipt_is_a_delivery(tmp_path: Path, status: int) -> None:
    outcome, request = upload(tmp_path, httpx.Response(status, content=RECEIPT))

    assert isinstance(outcome, Delivered)
    assert outcome.verified
    assert str(outcome.digest) == f"sha256:{HEX}"
    assert outcome.receipt.http_status == status
    assert outcome.receipt.body == RECEIPT.decode()
    assert request.headers["Idempotency-Key"] == "the-delivery"
    assert int(request.headers["Content-Length"]) == len(request.content)
    assert request.headers["Accept-Encoding"] == "identity"
    assert CONTENT in request.content


def test_only_the_configured_statuses_are_successes(tmp_path: Path) -> None:
    not_listed, _ = upload(tmp_path, httpx.Response(201, content=RECEIPT), success=[200])
    listed, _ = upload(tmp_path, httpx.Response(207, content=RECEIPT), success=[207])

    assert isinstance(not_listed, Deferred)
    assert not_listed.reason is Reason.UNEXPECTED_STATUS
    assert isinstance(listed, Delivered)


@pytest.mark.parametrize("status", [429, 503, 401, 302])
@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("3600", 3600),
        ("3601", 3600),
        ("9" * 400, 3600),
        ("-5", None),
        ("-" + "9" * 400, None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("120, 60", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 3600),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_honoured_up_to_an_hour(
    tmp_path: Path, status: int, retry_after: str, wait: int | None
) -> None:
    outcome, _ = upload(tmp_path, httpx.Response(status, headers={"Retry-After": retry_after}))

    assert isinstance(outcome, Deferred)
    assert outcome.retry_after == (None if wait is None else timedelta(seconds=wait))


def test_retry_after_can_be_a_date(tmp_path: Path) -> None:
    retry_after = format_datetime(datetime.now(UTC) + timedelta(minutes=30), usegmt=True)

    outcome, _ = upload(tmp_path, httpx.Response(503, headers={"Retry-After": retry_after}))

    assert isinstance(outcome, Deferred)
    assert outcome.retry_after is not None
    assert timedelta(minutes=29) < outcome.retry_after <= timedelta(minutes=30)


def test_retry_after_is_ignored_for_a_rejected_archive(tmp_path: Path) -> None:
    outcome, _ = upload(tmp_path, httpx.Response(422, headers={"Retry-After": "120"}))

    assert outcome == Rejected(Reason.REFUSED, "422 Unprocessable Entity", 422)


@pytest.mark.parametrize(("value", "wait"), [("120", timedelta(minutes=2)), ("1.5", None), ("soon", None)])
def test_an_archive_that_is_too_large_for_the_moment_is_not_rejected(
    tmp_path: Path, value: str, wait: timedelta | None
) -> None:
    outcome, _ = upload(tmp_path, httpx.Response(413, headers={"Retry-After": value}))

    assert isinstance(outcome, Deferred)
    assert (outcome.reason, outcome.retry_after) == (Reason.SERVER_ERROR, wait)


def encoded(algorithm: str, encode: Callable[[bytes], bytes]) -> str:
    return encode(hashlib.new(algorithm, CONTENT).digest()).decode()


@pytest.mark.parametrize(
    ("receipt", "response"),
    [
        ({}, httpx.Response(201, json={"sha256": HEX.upper()})),
        ({}, httpx.Response(201, json={"sha256": f"sha256:{HEX}"})),
        ({}, httpx.Response(201, json={"sha256": f"SHA-256:{HEX}"})),
        ({"digest": "header:X-Sum"}, httpx.Response(204, headers={"x-sum": HEX})),
        ({"digest": "body:/files/0/a~1b"}, httpx.Response(200, json={"files": [{"a/b": HEX}]})),
        ({"prefix": 16}, httpx.Response(201, json={"sha256": HEX[:16]})),
        (
            {"digest": "header:Digest", "encoding": "base64"},
            httpx.Response(201, headers={"Digest": encoded("sha256", base64.b64encode)}),
        ),
        (
            {"encoding": "base64url", "algorithm": "sha512"},
            httpx.Response(201, json={"sha256": encoded("sha512", base64.urlsafe_b64encode).rstrip("=")}),
        ),
        ({"algorithm": "md5"}, httpx.Response(201, json={"sha256": hashlib.md5(CONTENT).hexdigest()})),
    ],
)
def test_a_receipt_is_read_from_its_configured_place(
    tmp_path: Path, receipt: dict[str, Any], response: httpx.Response
) -> None:
    outcome, _ = upload(tmp_path, response, receipt=receipt)

    assert isinstance(outcome, Delivered)
    assert outcome.verified


def test_a_receipt_of_other_content_is_a_mismatch(tmp_path: Path) -> None:
    stated = hashlib.sha256(b"something else").hexdigest()
    outcome, _ = upload(tmp_path, httpx.Response(201, json={"sha256": stated}))

    assert isinstance(outcome, Deferred)
    assert (outcome.reason, outcome.http_status) == (Reason.MISMATCH, 201)
    assert stated in outcome.error


@pytest.mark.parametrize(
    "stated",
    [
        HEX[:16],
        HEX + "00",
        f"md5:{HEX}",
        "",
        "é\udcff\x00\n",
        base64.b64encode(bytes.fromhex(HEX)).decode(),
    ],
)
def test_a_value_that_is_no_digest_in_the_configured_form_verifies_nothing(
    tmp_path: Path, stated: str
) -> None:
    outcome, _ = upload(tmp_path, httpx.Response(201, content=json.dumps({"sha256": stated}).encode()))

    assert isinstance(outcome, Deferred)
    assert (outcome.reason, outcome.http_status) == (Reason.UNVERIFIED, 201)
    assert "no hex sha256" in outcome.error
    assert outcome.error.isprintable()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"text"',
        b'{"sha256": null}',
        b'{"sha256": 12}',
        b'{"sha256": ["%s"]}' % HEX.encode(),
        b'{"SHA256": "%s"}' % HEX.encode(),
        b"<html>welcome to the captive portal</html>",
        b"\xff\xfe\x00",
        b"[" * 60_000,
        b"1" * 60_000,
        RECEIPT[:-1],
        b" " * 70_000 + RECEIPT,
    ],
)
def test_a_success_without_a_receipt_is_not_a_delivery(tmp_path: Path, body: bytes) -> None:
    outcome, _ = upload(tmp_path, httpx.Response(201, content=body))

    assert isinstance(outcome, Deferred)
    assert (outcome.reason, outcome.http_status) == (Reason.UNVERIFIED, 201)


def test_a_response_without_a_receipt_is_a_delivery_only_if_none_is_configured(tmp_path: Path) -> None:
    outcome, _ = upload(tmp_path, httpx.Response(204), receipt={"digest": "none"})

    assert isinstance(outcome, Delivered)
    assert outcome.verified is False


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (httpx.ConnectTimeout("slow"), Reason.CONNECT_TIMEOUT),
        (httpx.ReadTimeout("slow"), Reason.READ_TIMEOUT),
        (httpx.WriteTimeout("slow"), Reason.WRITE_TIMEOUT),
        (httpx.ConnectError("refused"), Reason.CONNECT),
        (caused_by(httpx.ConnectError("?"), socket.gaierror(-2, "Name or service not known")), Reason.DNS),
        (httpx.ReadError("reset"), Reason.CONNECTION_LOST),
        (httpx.WriteError("reset"), Reason.CONNECTION_LOST),
        (httpx.CloseError("reset"), Reason.CONNECTION_LOST),
        (
            httpx.RemoteProtocolError("Server disconnected without sending a response."),
            Reason.CONNECTION_LOST,
        ),
        (httpx.RemoteProtocolError("illegal status line"), Reason.PROTOCOL),
        (httpx.LocalProtocolError("illegal header"), Reason.PROTOCOL),
        (httpx.UnsupportedProtocol("gopher"), Reason.PROTOCOL),
    ],
)
def test_a_transport_error_has_its_reason(tmp_path: Path, error: Exception, reason: Reason) -> None:
    outcome, _ = upload(tmp_path, error)

    assert isinstance(outcome, Deferred)
    assert outcome.reason is reason
    assert outcome.error


@pytest.mark.parametrize(
    ("name", "header", "path"),
    [
        ("plain.tar.gz", "of plain.tar.gz", "/plain.tar.gz"),
        (" at the ends ", "of %20at the ends%20", "/%20at%20the%20ends%20"),
        ("  ", "of %20%20", "/%20%20"),
        ("100%\n.gz", "of 100%25%0A.gz", "/100%25%0A.gz"),
        ("ü?#&.gz", "of %C3%BC?#&.gz", "/%C3%BC%3F%23%26.gz"),
    ],
)
def test_a_name_is_escaped_for_a_header_and_for_the_url(
    tmp_path: Path, name: str, header: str, path: str
) -> None:
    keys = {"url": "https://vault.test/{name}", "headers": {"X-Of": "of {name}", "X-Name": "{name}"}}

    _, request = upload(tmp_path, httpx.Response(503), name=name, **keys)

    assert request.headers["X-Of"] == header
    assert request.headers["X-Name"] == header.removeprefix("of ")
    assert request.url.raw_path.decode() == path


def test_every_registered_status_has_a_rule(tmp_path: Path) -> None:
    for status in HTTPStatus:
        if status >= 300:
            outcome, _ = upload(tmp_path, httpx.Response(status))
            assert isinstance(outcome, Deferred | Rejected)
