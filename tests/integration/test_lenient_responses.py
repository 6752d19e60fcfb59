"""Responses with faults that other clients overlook: a receipt that can be read counts."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path

import pytest

from backupd.core.model import Deferred, Delivered, Outcome
from backupd.core.policy import Reason
from tests.pki import Pki
from tests.scripted import Peer, ScriptedServer, server_context
from tests.uploading import a_destination, a_sender, an_archive

CONTENT = b"content"
RECEIPT = json.dumps({"sha256": hashlib.sha256(CONTENT).hexdigest(), "note": "für"}, ensure_ascii=False)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def response(*lines: bytes, body: bytes = RECEIPT.encode(), end: bytes = b"\r\n") -> bytes:
    """Return a 201 with these header lines, and a Content-Length unless one of them has it."""
    head = [b"HTTP/1.1 201 Created", *lines]
    if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in lines):
        head.append(b"Content-Length: %d" % len(body))
    return end.join([*head, b"", b""]) + body


def send_to(folder: Path, pki: Pki, reply: bytes) -> Outcome:
    """Send an archive to an endpoint that responds with these bytes, and return the outcome."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(reply)

    with ScriptedServer(script, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki)) as sender:
            return sender.send(an_archive(folder, CONTENT))


LENGTH = b"%d" % len(RECEIPT.encode())

CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(RECEIPT.encode()), RECEIPT.encode())

FAULTY = [
    response(b"Content-Length : " + LENGTH),
    response(b"Content-Length\t:" + LENGTH),
    response(b"X Powered By: PHP"),
    response(b"X/Cache: HIT", b"Server: a"),
    response(b"no colon at all"),
    response(b": no name"),
    response(b"(comment): x"),
    response(b"X-Byte: a\x01b"),
    response(b"X Folded: a", b" and more", b"Server: a"),
    response("Größe: 5".encode()),
    response(b"X Cache: HIT", end=b"\n"),
    response(b"Transfer-Encoding: identity", b"Content-Length: " + LENGTH),
    response(b"Transfer-Encoding: chunked, chunked", body=CHUNKED),
    response(b"Transfer-Encoding: Chunked", b"Server: a", b"transfer-encoding: chunked", body=CHUNKED),
    response(b"Server: a").replace(b"HTTP/1.1", b"HTTP/2"),
    response(b"Server: a").replace(b"HTTP/1.1 ", b"HTTP/1.1  "),
]

WELL_FORMED = [
    response(b"Server: a", b"X-Empty:"),
    response(b"X-Folded: a", b" and more"),
    response(b"X-Latin: gr\xfc\xdfe"),
    response(b"Server: a", end=b"\n"),
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + response(b"Server: a"),
    response(b"Transfer-Encoding: chunked", body=CHUNKED),
]


@pytest.mark.parametrize("one_byte_each", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("reply", FAULTY + WELL_FORMED)
def test_a_receipt_below_a_faulty_head_counts_and_the_connection_is_closed(
    tmp_path: Path, pki: Pki, reply: bytes, one_byte_each: bool
) -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.read_request()
            for piece in [bytes([byte]) for byte in reply] if one_byte_each else [reply]:
                peer.send(piece)

    with ScriptedServer(script, server_context(pki)) as server, a_sender(a_destination(server.url, pki)) as s:
        outcomes = [s.send(an_archive(tmp_path, CONTENT)) for _ in range(2)]
    assert [type(outcome) for outcome in outcomes] == [Delivered, Delivered], outcomes
    assert len(server.peers) == (2 if reply in FAULTY else 1)


@pytest.mark.parametrize(
    "reply",
    [
        response(b"Content-Length: 5", b"Content-Length: 6"),
        response(b"Content-Length: five"),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 fine\r\n\r\n",
        b"HTTP/1.1 201 Created\r\n" + b"X-Long: " + b"x" * 200_000,
    ],
)
def test_a_head_that_leaves_the_length_or_the_status_open_voids_the_response(
    tmp_path: Path, pki: Pki, reply: bytes
) -> None:
    outcome = send_to(tmp_path, pki, reply)
    assert isinstance(outcome, Deferred)
    assert outcome.reason in (Reason.PROTOCOL, Reason.CONNECTION_LOST)


@pytest.mark.parametrize("lines", [[b"no colon"], [b"X: a\x01b"], [b"Content Length: 5"]])
def test_a_body_of_unknown_length_below_a_faulty_head_is_not_waited_for(
    tmp_path: Path, pki: Pki, lines: list[bytes]
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"\r\n".join([b"HTTP/1.1 500 No", *lines, b"", b""]))
        peer.drain()

    with ScriptedServer(script, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, timeout={"read": "1h"})) as sender:
            outcome = sender.send(an_archive(tmp_path, CONTENT))
    assert isinstance(outcome, Deferred)
    assert (outcome.reason, outcome.http_status) == (Reason.SERVER_ERROR, 500)


@pytest.mark.parametrize("ends", ["closes the connection", "says so and closes it", "keeps it open"])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_body_without_a_length_below_a_faulty_head_is_read(
    tmp_path: Path, pki: Pki, ends: str, version: bytes
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        connection = b"Connection: close\r\n" if "says so" in ends else b""
        head = b"HTTP/%s 201 Created\r\nX Powered By: PHP\r\n%s\r\n" % (version, connection)
        peer.send(head + RECEIPT.encode())
        if "open" in ends:
            peer.drain()

    with ScriptedServer(script, server_context(pki)) as server, a_sender(a_destination(server.url, pki)) as s:
        assert isinstance(s.send(an_archive(tmp_path, CONTENT)), Delivered)


def test_a_faulty_interim_response_does_not_cut_the_body_of_the_final_one(tmp_path: Path, pki: Pki) -> None:
    """The body arrives later than one of unknown length would be waited for."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 103 Early Hints\r\nX Powered By: PHP\r\n\r\n")
        head, _, body = response(b"Server: a").partition(b"\r\n\r\n")
        peer.send(head + b"\r\n\r\n")
        server.stopping.wait(3.0)
        peer.send(body)

    with ScriptedServer(script, server_context(pki)) as server, a_sender(a_destination(server.url, pki)) as s:
        assert isinstance(s.send(an_archive(tmp_path, CONTENT)), Delivered)


def deflated(data: bytes, wbits: int) -> bytes:
    compressor = zlib.compressobj(wbits=wbits)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    "reply",
    [
        response(b"Content-Encoding: gzip", body=gzip.compress(RECEIPT.encode(), mtime=0)),
        response(b"Content-Encoding: X-GZIP", body=gzip.compress(RECEIPT.encode(), mtime=0)),
        response(b"Content-Encoding: deflate", body=deflated(RECEIPT.encode(), 15)),
        response(b"Content-Encoding: deflate", body=deflated(RECEIPT.encode(), -15)),
        response(b"Content-Encoding: identity"),
        response(b"Content-Type: application/json; charset=utf-16", body=RECEIPT.encode("utf-16")),
        response(b'Content-Type: application/json; charset="ISO-8859-1"', body=RECEIPT.encode("latin-1")),
        response(b"Content-Type: text/plain; charset=windows-1252", body=RECEIPT.encode("cp1252")),
        response(b"Content-Type: application/json; charset=punycode"),
        response(b"Content-Type: application/json; charset=utf-8", body=b"\xef\xbb\xbf" + RECEIPT.encode()),
        response(b"Content-Type: application/json; charset=us-ascii"),
        response(b"Content-Type: application/json; charset=latin1", body=RECEIPT.encode("latin-1")),
        response(b"Content-Type: application/json", body=RECEIPT.encode("latin-1")),
        response(b"Content-Type: application/json; charset=GBK", body=RECEIPT.encode("gbk")),
        response(b"Content-Type: application/json; charset=unknown", body=RECEIPT.encode("latin-1")),
        response(b"Content-Type: application/json; charset=iso-8859-12"),
        response(b"Content-Type: application/json; charset=utf-8le"),
        response(b"Content-Type: application/json; charset=windows-1259"),
        response(body=b"\xef\xbb\xbf" + RECEIPT.encode()),
    ],
)
def test_a_receipt_that_is_compressed_or_in_another_charset_is_read(
    tmp_path: Path, pki: Pki, reply: bytes
) -> None:
    outcome = send_to(tmp_path, pki, reply)
    assert isinstance(outcome, Delivered), outcome


@pytest.mark.parametrize("length", [1000, 50_000_000])
def test_of_a_body_that_decompresses_to_a_large_one_only_the_beginning_is_kept(
    tmp_path: Path, pki: Pki, length: int
) -> None:
    bomb = gzip.compress(b" " * length + RECEIPT.encode(), mtime=0)

    outcome = send_to(tmp_path, pki, response(b"Content-Encoding: gzip", body=bomb))
    assert isinstance(outcome, Delivered) == (length == 1000), outcome


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_an_html_response_is_quoted_by_its_text(tmp_path: Path, pki: Pki, mark: bytes) -> None:
    page = mark + (
        b"<!DOCTYPE html>\n<html><head><style>h1 { color: red }</style><title>Sign in &amp; wait</title>"
        b"</head><body><!-- a comment --><h1>Maintenance</h1>\n<p>until&nbsp;noon</p></body></html>"
    )

    outcome = send_to(
        tmp_path, pki, b"HTTP/1.1 503 Unavailable\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page)
    )
    assert isinstance(outcome, Deferred)
    assert outcome.error == "503 Unavailable: Sign in & wait Maintenance until noon"


def test_a_secret_that_a_page_quotes_with_entities_is_redacted(tmp_path: Path, pki: Pki) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a&b<c>d'secret")

    def script(peer: Peer) -> None:
        peer.read_request()
        page = b"<html>key a&amp;b&lt;c&gt;d&#39;secret</html>"
        peer.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page))

    with ScriptedServer(script, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, header_files={"X-Key": str(secret)})) as sender:
            outcome = sender.send(an_archive(tmp_path, CONTENT))
    assert isinstance(outcome, Deferred)
    assert outcome.error == "403 Forbidden: key ***"
