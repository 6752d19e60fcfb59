"""The requests for an archive, the evaluation of the receipt, and queries after a lost response."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from backupd.config.models import HttpDestinationConfig
from backupd.core.model import Deferred, Delivered, Digest, Outcome, Rejected, Superseded, fingerprint_of
from backupd.core.policy import Reason
from backupd.upload.base import Abort, UploadJob
from backupd.upload.http.limits import AttemptLimits
from backupd.upload.http.request import ConfirmedDigests, RequestBuilder
from backupd.upload.http.uploader import HttpEndpoint, HttpUploader
from tests.pki import Pki
from tests.scripted import (
    Peer,
    Request,
    Script,
    ScriptedServer,
    accept_all,
    http_response,
    in_turn,
    receipt_for,
    server_context,
)
from tests.stage import Stage, until
from tests.uploading import MIB, a_destination, a_sender, an_archive

CONTENT = b"the content of an archive" * 1000
FAST_RETRY = 'retry = { initial = "0.1s", max = "0.3s" }'


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def always(reply: bytes | Callable[[Request], bytes]) -> Script:
    """Return a script that responds to every request in the same way."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            peer.send(reply if isinstance(reply, bytes) else reply(request))

    return script


def upload(
    folder: Path,
    pki: Pki,
    script: Script,
    archive: Path | None = None,
    variables: Mapping[str, str] | None = None,
    **keys: Any,
) -> tuple[Outcome, list[Request]]:
    """Upload an archive; return the outcome and the requests."""
    with ScriptedServer(script, server_context(pki)) as server:
        url = server.url + keys.pop("path", "")
        if "query_path" in keys:
            keys["query_url"] = server.url + keys.pop("query_path")
        with a_ledger_sender(a_destination(url, pki, **keys)) as sender:
            sender.variables = variables
            outcome = sender.send(archive or an_archive(folder, CONTENT))
    return outcome, server.requests


class LedgerSender:
    """Sends files through one uploader, with the variables and unconfirmed digest that a worker passes."""

    def __init__(self, uploader: HttpUploader) -> None:
        self._uploader = uploader
        self.variables: Mapping[str, str] | None = None
        self.unconfirmed: Digest | None = None
        self.before_upload: Callable[[], object] = int

    def send(self, path: Path) -> Outcome:
        fd = os.open(path, os.O_RDONLY)
        try:
            variables = {"name": path.name} if self.variables is None else self.variables
            fingerprint = fingerprint_of(os.fstat(fd))
            self.before_upload()
            job = UploadJob(
                "the-delivery",
                os.fsencode(path.name),
                fd,
                fingerprint,
                variables,
                unconfirmed_digest=self.unconfirmed,
            )
            return self._uploader.upload(job)
        finally:
            os.close(fd)


@contextmanager
def a_ledger_sender(destination: HttpDestinationConfig) -> Iterator[LedgerSender]:
    abort = Abort()
    uploader = HttpEndpoint.open(destination, abort).make_uploader()
    try:
        yield LedgerSender(uploader)
    finally:
        uploader.close()
        abort.close()


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    return hashlib.new(algorithm, content).hexdigest()


# The request


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
@pytest.mark.parametrize("body", ["multipart", "raw"])
def test_every_method_works_with_every_form_of_body(tmp_path: Path, pki: Pki, method: str, body: str) -> None:
    def reply(request: Request) -> bytes:
        return receipt_for(request.body if body == "raw" else request.archive)

    outcome, (request,) = upload(tmp_path, pki, always(reply), method=method, body=body)
    assert isinstance(outcome, Delivered)
    assert request.head.startswith(f"{method} /v1/upload HTTP/1.1\r\n".encode())
    assert request.header("idempotency-key") == "the-delivery"
    assert request.header("transfer-encoding") is None
    if body == "raw":
        assert request.body == CONTENT
        assert request.header("content-type") == "application/octet-stream"
    else:
        assert request.archive == CONTENT
        assert (request.header("content-type") or "").startswith("multipart/form-data; boundary=")


@pytest.mark.parametrize(
    "content",
    [b"\r\n\r\n", b"x" * 100 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", os.urandom(600_000)],
    ids=["line_ends", "text", "response", "random_bytes"],
)
def test_a_raw_body_arrives_unchanged(tmp_path: Path, pki: Pki, content: bytes) -> None:
    outcome, (request,) = upload(
        tmp_path,
        pki,
        always(lambda request: receipt_for(request.body)),
        an_archive(tmp_path, content),
        body="raw",
    )
    assert isinstance(outcome, Delivered)
    assert request.body == content


@pytest.mark.parametrize(
    ("algorithm", "name"), [("sha256", "sha-256"), ("sha512", "sha-512"), ("sha1", "sha"), ("md5", "md5")]
)
def test_the_digest_of_a_raw_body_is_in_the_headers(
    tmp_path: Path, pki: Pki, algorithm: str, name: str
) -> None:
    outcome, (request,) = upload(
        tmp_path,
        pki,
        always(lambda request: http_response(201, Repr_Digest=request.header("repr-digest") or "")),
        body="raw",
        method="PUT",
        digest_at="header",
        headers={"X-Digest": "{digest}"},
        receipt={"digest": "header:Repr-Digest", "algorithm": algorithm},
    )
    raw = hashlib.new(algorithm, CONTENT).digest()
    assert request.header("repr-digest") == f"{name}=:{base64.b64encode(raw).decode()}:"
    assert request.header("x-digest") == raw.hex()
    assert isinstance(outcome, Delivered)


def test_blake2b_is_available_as_a_placeholder_and_not_in_repr_digest(tmp_path: Path, pki: Pki) -> None:
    outcome, (request,) = upload(
        tmp_path,
        pki,
        always(lambda request: http_response(201, X_Stored=request.header("x-digest") or "")),
        body="raw",
        digest_at="header",
        headers={"X-Digest": "{digest}"},
        receipt={"digest": "header:X-Stored", "algorithm": "blake2b"},
    )
    assert request.header("repr-digest") is None
    assert isinstance(outcome, Delivered)


@pytest.mark.parametrize("digest_at", ["before", "after"])
def test_the_digest_field_is_where_digest_at_puts_it(tmp_path: Path, pki: Pki, digest_at: str) -> None:
    outcome, (request,) = upload(
        tmp_path,
        pki,
        always(lambda request: receipt_for(request.archive)),
        digest_at=digest_at,
        digest_field="sum",
        fields={"note": "n"},
    )
    assert isinstance(outcome, Delivered)
    at = request.body.index(b'name="sum"\r\n\r\n' + digest_of(CONTENT).encode() + b"\r\n")
    assert (at < request.body.index(b"filename=")) == (digest_at == "before")
    assert request.body.index(b'name="note"') < request.body.index(b"filename=")


@pytest.mark.parametrize("keys", [{"digest_at": "before"}, {"digest_at": "header", "body": "raw"}])
@pytest.mark.parametrize("undetected", [True, False])
def test_a_file_that_is_rewritten_between_its_two_reads_is_superseded(
    tmp_path: Path, pki: Pki, keys: dict[str, Any], undetected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = an_archive(tmp_path, CONTENT)
    read_once = RequestBuilder.digest_of

    def digest_then_rewrite(self: RequestBuilder, job: Any) -> Any:
        digest = read_once(self, job)
        archive.write_bytes(CONTENT[::-1])
        if undetected:  # as on a filesystem with coarse timestamps
            job.fingerprint = fingerprint_of(os.fstat(job.fd))
        return digest

    monkeypatch.setattr(RequestBuilder, "digest_of", digest_then_rewrite)
    outcome, requests = upload(
        tmp_path, pki, always(lambda request: receipt_for(request.archive)), archive, **keys
    )
    assert isinstance(outcome, Superseded)
    assert requests == []


def test_a_file_that_is_truncated_while_its_digest_is_calculated_is_superseded(
    tmp_path: Path, pki: Pki
) -> None:
    archive = an_archive(tmp_path, CONTENT)
    with ScriptedServer(accept_all, server_context(pki)) as server:
        with a_ledger_sender(a_destination(server.url, pki, digest_at="before")) as sender:
            sender.before_upload = lambda: os.truncate(archive, 5)
            assert isinstance(sender.send(archive), Superseded)
        assert not server.heads


HOSTILE = [
    "a b.tar.gz",
    " leading and trailing ",
    "x\r\nX-Injected: yes\r\n\r\nGET / HTTP/1.1",
    "../../etc/passwd",
    "..",
    ".",
    "a?b=c&d#e",
    "%2e%2e%2f",
    "100%",
    'quo"te\\back',
    "naïve-日本-\U0001f600",
    "tab\there\x00nul\x7f",
    "a;b,c:d@e[f]{g}|h^`i",
    "\\xff\\xfe",
    "+plus+",
    "",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_escaped_for_their_place(tmp_path: Path, pki: Pki, value: str) -> None:
    outcome, (request,) = upload(
        tmp_path,
        pki,
        always(lambda request: receipt_for(request.archive)),
        variables={"name": value, "device": value, "relpath": f"folder/{value or 'x'}"},
        path="/{device}/{name}?n={name}&f={{x}}",
        headers={"X-Name": "{name}", "X-Both": "of {device} {name}"},
        fields={"note": "{name}", "twice": "{name}{name}"},
    )
    assert isinstance(outcome, Delivered)
    lines = request.head.decode("ascii").split("\r\n")
    assert {line.partition(":")[0].lower() for line in lines[1:]} == {
        *("host", "accept", "accept-encoding", "connection", "user-agent", "idempotency-key"),
        *("content-length", "content-type", "x-name", "x-both"),
    }
    path, _, query = request.path.partition("?")
    first, second, *segments = path.split("/")[1:]
    assert (first, second) == ("v1", "upload")
    assert len(segments) == 2
    decoded = unescape(segments[0])
    assert segments[0] == segments[1]
    if value.strip("."):
        assert decoded == value
    else:  # as a whole segment it would lead to another folder
        assert decoded == value.replace(".", "%2E")
    assert query.split("&")[0] == f"n={segments[0]}"
    assert query.count("&") == 1
    assert unescape(request.header("x-name") or "") == value
    assert f'name="note"\r\n\r\n{value}\r\n'.encode() in request.body
    assert f'name="twice"\r\n\r\n{value}{value}\r\n'.encode() in request.body


def unescape(escaped: str) -> str:
    """Return a text with `%NN` decoded once."""
    return urllib.parse.unquote(escaped)


def test_a_relative_path_keeps_its_folders_in_a_url(tmp_path: Path, pki: Pki) -> None:
    outcome, (request,) = upload(
        tmp_path,
        pki,
        always(lambda request: receipt_for(request.archive)),
        variables={"name": "c d", "relpath": "a/b&/c d"},
        path="/{relpath}?p={name}",
    )
    assert isinstance(outcome, Delivered)
    assert request.path == "/v1/upload/a/b%26/c%20d?p=c%20d"


def test_the_daemon_delivers_archives_with_hostile_names(stage: Stage) -> None:
    names = [
        b"a\r\nX-Injected: 1.tar.gz",
        b" b.tar.gz",
        b"bad\xff\xfe.tar.gz",
        b'q"u\\o;te.tar.gz',
        b"x_.._y.gz",
    ]
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(
            server.url + "/{kind}/{name}",
            drop="label_pattern = '(?:[^_]*_)?(?P<kind>[^_]*)(?:_.*)?'",
            destination='headers = { X-Name = "{name}", X-Kind = "{kind}" }\nfields = { note = "of {name}" }',
        )
        daemon = stage.daemon().ready()
        for number, name in enumerate(names):
            stage.put(name, b"content %d" % number)
        daemon.wait_for("archive.disposed", count=len(names))
        assert not daemon.events("attempt.failed")
        assert daemon.stop() == 0
    assert all(b"\r\nx-injected" not in head.lower() for head in server.heads)
    assert all(request.path.startswith("/v1/upload/") for request in server.requests)
    assert sorted(request.archive for request in server.requests) == [
        b"content %d" % number for number in range(len(names))
    ]


# The receipt


SHA256 = digest_of(CONTENT)
RAW = bytes.fromhex(SHA256)


def in_json(value: object) -> bytes:
    return http_response(201, json.dumps(value).encode())


@pytest.mark.parametrize(
    ("receipt", "reply"),
    [
        ({"digest": "body:/files/0/sums/sha~1256"}, in_json({"files": [{"sums": {"sha/256": SHA256}}]})),
        ({"digest": "body:/sha256"}, in_json({"sha256": SHA256.upper()})),
        ({"digest": "body:/sha256"}, in_json({"sha256": f"  sha256:{SHA256}\n"})),
        ({"digest": "body:/sha256"}, in_json({"sha256": f"SHA-256:{SHA256}"})),
        ({"digest": "header:X-Sum"}, http_response(204, X_Sum=SHA256)),
        ({"digest": "header:x-sum"}, http_response(200, b"<html>", X_SUM=SHA256)),
        ({"digest": "body:/d", "encoding": "base64"}, in_json({"d": base64.b64encode(RAW).decode()})),
        (
            {"digest": "body:/d", "encoding": "base64"},
            in_json({"d": base64.b64encode(RAW).decode().rstrip("=")}),
        ),
        (
            {"digest": "body:/d", "encoding": "base64url"},
            in_json({"d": base64.urlsafe_b64encode(RAW).decode()}),
        ),
        (
            {"digest": "header:Repr-Digest"},
            http_response(201, Repr_Digest=f"sha-256=:{base64.b64encode(RAW).decode()}:"),
        ),
        (
            {"digest": "header:Content-Digest"},
            http_response(201, Content_Digest=f"md5=:AAAA:, sha-256=:{base64.b64encode(RAW).decode()}:"),
        ),
        ({"digest": "body:/sha256", "prefix": 12}, in_json({"sha256": SHA256[:12]})),
        (
            {"digest": "body:/d", "encoding": "base64", "prefix": 10},
            in_json({"d": base64.b64encode(RAW).decode()[:10]}),
        ),
        ({"digest": "body:/sha256", "size": "body:/n"}, in_json({"sha256": SHA256, "n": len(CONTENT)})),
        ({"digest": "body:/sha256", "size": "body:/n"}, in_json({"sha256": SHA256, "n": str(len(CONTENT))})),
        (
            {"digest": "body:/sha256", "size": "header:X-Size"},
            http_response(201, json.dumps({"sha256": SHA256}).encode(), X_Size=str(len(CONTENT))),
        ),
        *(
            ({"digest": "body:/d", "algorithm": algorithm}, in_json({"d": digest_of(CONTENT, algorithm)}))
            for algorithm in ("sha512", "sha1", "md5", "blake2b")
        ),
    ],
)
def test_a_matching_receipt_is_accepted(
    tmp_path: Path, pki: Pki, receipt: dict[str, Any], reply: bytes
) -> None:
    outcome, _ = upload(tmp_path, pki, always(reply), receipt=receipt)
    assert isinstance(outcome, Delivered), outcome
    assert outcome.verified


LENGTH = len(CONTENT)
SIZES_THAT_ARE_NO_NUMBER: list[dict[str, object]] = [
    {},
    {"n": float(LENGTH)},
    {"n": f"{LENGTH} B"},
    {"n": None},
    {"n": True},
    {"n": [LENGTH]},
    {"n": ""},
    {"n": f"+{LENGTH}"},
]


@pytest.mark.parametrize(
    ("receipt", "reply", "reason"),
    [
        ({}, http_response(201), Reason.UNVERIFIED),
        ({}, http_response(204), Reason.UNVERIFIED),
        ({}, http_response(200, b"<html>welcome</html>"), Reason.UNVERIFIED),
        ({}, in_json({"sha256": None}), Reason.UNVERIFIED),
        ({}, in_json({"sha256": 5}), Reason.UNVERIFIED),
        ({}, in_json([SHA256]), Reason.UNVERIFIED),
        ({}, http_response(200, b"{" + b'"a":' * 5), Reason.UNVERIFIED),
        ({}, http_response(200, b"[" * 60_000), Reason.UNVERIFIED),
        ({}, http_response(200, b" " * 70_000 + json.dumps({"sha256": SHA256}).encode()), Reason.UNVERIFIED),
        ({}, in_json({"sha256": ""}), Reason.UNVERIFIED),
        ({}, in_json({"sha256": digest_of(b"else")}), Reason.MISMATCH),
        ({}, in_json({"sha256": f"md5:{SHA256}"}), Reason.UNVERIFIED),
        ({}, in_json({"sha256": SHA256[:12]}), Reason.UNVERIFIED),
        ({}, in_json({"sha256": "\ud800"}), Reason.UNVERIFIED),
        ({"prefix": 12}, in_json({"sha256": SHA256}), Reason.UNVERIFIED),
        ({"encoding": "base64"}, in_json({"sha256": SHA256}), Reason.UNVERIFIED),
        ({"digest": "header:X-Sum"}, http_response(201), Reason.UNVERIFIED),
        (
            {"digest": "header:Repr-Digest"},
            http_response(201, Repr_Digest="sha-256=:AAAA:"),
            Reason.UNVERIFIED,
        ),
        (
            {"digest": "header:Repr-Digest"},
            http_response(201, Repr_Digest="sha-512=:AAAA:"),
            Reason.UNVERIFIED,
        ),
        ({"size": "body:/n"}, in_json({"sha256": SHA256, "n": 5}), Reason.MISMATCH),
        ({"size": "body:/n", "digest": "none"}, in_json({"n": 5}), Reason.MISMATCH),
        *(
            ({"size": "body:/n", "digest": digest}, in_json({"sha256": SHA256, **size}), Reason.UNVERIFIED)
            for digest in ("body:/sha256", "none")
            for size in SIZES_THAT_ARE_NO_NUMBER
        ),
        ({"size": "header:X-Size", "digest": "none"}, http_response(201, X_Size="5, 6"), Reason.UNVERIFIED),
    ],
)
def test_a_success_without_a_matching_receipt_is_not_a_delivery(
    tmp_path: Path, pki: Pki, receipt: dict[str, Any], reply: bytes, reason: Reason
) -> None:
    outcome, _ = upload(tmp_path, pki, always(reply), receipt=receipt)
    assert isinstance(outcome, Deferred), outcome
    assert outcome.reason is reason


def test_without_a_configured_receipt_a_success_is_delivered_and_not_verified(
    tmp_path: Path, pki: Pki
) -> None:
    outcome, _ = upload(tmp_path, pki, always(http_response(204)), receipt={"digest": "none"})
    assert isinstance(outcome, Delivered)
    assert not outcome.verified


def test_an_unverified_archive_is_sent_again_and_stays_in_its_place(stage: Stage) -> None:
    other = http_response(200, b'{"sha256":"%s"}' % digest_of(b"else").encode())
    replies = [http_response(200), other, other] * 2  # a mismatch is confirmed over another connection

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if replies:
                assert (stage.drop / "a.tar.gz").read_bytes() == CONTENT
                peer.send(replies.pop(0))
            else:
                peer.send(receipt_for(request.archive))

    with ScriptedServer(script, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=FAST_RETRY, drop='on_delivered = "delete"')
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", CONTENT)
        daemon.wait_for("archive.disposed", disposition="deleted")
        failed = [event["reason"] for event in daemon.events("attempt.failed")]
        assert failed == ["unverified", "digest_mismatch"] * 2
        assert daemon.stop() == 0
    assert len({request.header("idempotency-key") for request in server.requests}) == 1
    assert len(server.requests) == 7


# Duplicates


def early(reply: bytes) -> Script:
    """Return a script that responds after the head of a request, and reads no further request."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(reply)
        peer.half_close()
        peer.drain()

    return script


@pytest.mark.parametrize("response", ["complete", "early"])
@pytest.mark.parametrize("size", [len(CONTENT), 20 * MIB])
class TestDuplicates:
    @staticmethod
    def _upload(
        folder: Path, pki: Pki, response: str, size: int, body: bytes, **keys: Any
    ) -> tuple[Outcome, bytes]:
        content = (CONTENT * (size // len(CONTENT) + 1))[:size]
        body = body.replace(b"DIGEST", digest_of(content).encode())
        reply = http_response(409, body)
        script = always(reply) if response == "complete" else early(reply)
        outcome, _ = upload(folder, pki, script, an_archive(folder, content), **keys)
        return outcome, content

    def test_a_409_with_a_matching_receipt_is_a_delivery(
        self, tmp_path: Path, pki: Pki, response: str, size: int
    ) -> None:
        outcome, content = self._upload(tmp_path, pki, response, size, b'{"sha256":"DIGEST"}')
        assert isinstance(outcome, Delivered), outcome
        assert outcome.digest.hex == digest_of(content)
        assert outcome.receipt.http_status == 409

    @pytest.mark.parametrize("body", [b'{"sha256":"1234"}', b'{"title":"taken"}', b""])
    def test_a_409_without_a_matching_receipt_rejects_the_archive_with_the_text_of_the_endpoint(
        self, tmp_path: Path, pki: Pki, response: str, size: int, body: bytes
    ) -> None:
        outcome, _ = self._upload(tmp_path, pki, response, size, body)
        assert isinstance(outcome, Rejected), outcome
        assert outcome.reason is Reason.CONFLICT
        assert body.decode() in outcome.error

    @pytest.mark.parametrize("keys", [{"on_duplicate": "reject"}, {"receipt": {"digest": "none"}}])
    def test_a_409_is_a_rejection_if_no_receipt_is_evaluated(
        self, tmp_path: Path, pki: Pki, response: str, size: int, keys: dict[str, Any]
    ) -> None:
        outcome, _ = self._upload(tmp_path, pki, response, size, b'{"sha256":"DIGEST"}', **keys)
        assert isinstance(outcome, Rejected), outcome


def test_a_file_that_changes_before_an_early_409_is_compared_is_superseded(tmp_path: Path, pki: Pki) -> None:
    archive = an_archive(tmp_path, size=20 * MIB)
    other = b"z" * 1000

    def script(peer: Peer) -> None:
        peer.read_head()
        archive.write_bytes(other)
        peer.send(http_response(409, json.dumps({"sha256": digest_of(other)}).encode()))
        peer.half_close()
        peer.drain()

    outcome, _ = upload(tmp_path, pki, script, archive)
    assert isinstance(outcome, Superseded), outcome


# Lost responses


class Vault:
    """An endpoint that stores archives, loses `lose` responses, and responds to queries."""

    def __init__(self, lose: int = 1, *, finds: bool = True) -> None:
        self.lose = lose
        self.finds = finds
        self.stored: list[bytes] = []
        self.queries: list[str] = []
        self.keys: list[str | None] = []
        self.log: list[str] = []

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.head.startswith(b"GET"):
                self.log.append("queried")
                self.queries.append(request.path)
                peer.send(self._found(request.path.rpartition("/")[2]))
                continue
            self.log.append("sent")
            self.keys.append(request.header("idempotency-key"))
            self.stored.append(request.archive)
            if self.lose:
                self.lose -= 1
                return
            peer.send(receipt_for(request.archive))

    def _found(self, digest: str) -> bytes:
        for content in self.stored:
            if self.finds and digest_of(content) == digest:
                return receipt_for(content, 200)
        return http_response(404)


def test_an_archive_with_a_lost_response_is_queried_and_not_sent_again(tmp_path: Path, pki: Pki) -> None:
    vault = Vault()
    outcome, _ = upload(tmp_path, pki, vault, query_path="/{digest}")
    assert isinstance(outcome, Delivered), outcome
    assert vault.log == ["sent", "queried"]
    assert vault.queries == [f"/v1/upload/{digest_of(CONTENT)}"]


def test_an_archive_that_the_endpoint_does_not_have_is_sent_again_with_the_same_key(stage: Stage) -> None:
    vault = Vault(finds=False)
    with ScriptedServer(vault, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=f'{FAST_RETRY}\nquery_url = "{server.url}/{{digest}}"')
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", CONTENT)
        daemon.wait_for("archive.disposed")
        assert daemon.stop() == 0
    assert vault.log[0] == "sent"
    assert vault.log[-2:] == ["queried", "sent"]
    assert vault.log.count("sent") == 2
    assert len(set(vault.keys)) == 1
    assert vault.stored == [CONTENT, CONTENT]


def test_an_archive_is_not_sent_again_before_the_query_succeeds(tmp_path: Path, pki: Pki) -> None:
    """The endpoint stores the archive and fails; while it is unreachable, nothing is sent again."""
    vault = Vault()

    def unreachable(peer: Peer) -> None:
        peer.reset()

    with ScriptedServer(in_turn(vault, unreachable, unreachable, vault), server_context(pki)) as server:
        destination = a_destination(server.url, pki, query_url=f"{server.url}/{{digest}}")
        with a_ledger_sender(destination) as sender:
            archive = an_archive(tmp_path, CONTENT)
            first = sender.send(archive)
            assert isinstance(first, Deferred)
            assert first.unconfirmed_digest is not None
            sender.unconfirmed = first.unconfirmed_digest
            second = sender.send(archive)
            assert isinstance(second, Deferred)
            assert second.unconfirmed_digest == first.unconfirmed_digest
            assert isinstance(sender.send(archive), Delivered)
    assert vault.log == ["sent", "queried"]


@pytest.mark.parametrize(
    "status",
    [200, 201, 202, 204, 206, 207, 302, 303, 408, 444, 499, 500, 502, 503, 504, 509, 520, 524, 530, 599],
)
def test_an_archive_that_may_be_stored_is_queried_before_it_is_sent_again(
    tmp_path: Path, pki: Pki, status: int
) -> None:
    """The endpoint has stored the archive, whatever it responds; no response of these has a receipt."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.head.startswith(b"GET"):
                peer.send(receipt_for(CONTENT, 200))
            else:
                peer.send(http_response(status))

    with ScriptedServer(script, server_context(pki)) as server:
        destination = a_destination(server.url, pki, query_url=f"{server.url}/{{digest}}")
        with a_ledger_sender(destination) as sender:
            archive = an_archive(tmp_path, CONTENT)
            first = sender.send(archive)
            assert isinstance(first, Deferred)
            assert (first.unconfirmed_digest, first.http_status) == (Digest("sha256", SHA256), status)
            sender.unconfirmed = first.unconfirmed_digest
            assert isinstance(sender.send(archive), Delivered)
    assert [request.head[:4] for request in server.requests] == [b"POST", b"GET "]


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 429, 501, 507])
def test_an_archive_that_was_refused_is_sent_again_without_a_query(
    tmp_path: Path, pki: Pki, status: int
) -> None:
    outcome, _ = upload(tmp_path, pki, always(http_response(status)), query_path="/{digest}")
    assert getattr(outcome, "unconfirmed_digest", None) is None


def test_push_queries_before_it_sends_again(stage: Stage) -> None:
    vault = Vault()

    def unreachable(peer: Peer) -> None:
        peer.reset()

    with ScriptedServer(in_turn(vault, unreachable, vault), server_context(stage.pki)) as server:
        stage.configure(server.url, destination=f'query_url = "{server.url}/{{digest}}"')
        done = stage.backupd("push", str(an_archive(stage.base, CONTENT)))
    assert done.returncode == 0, done.stdout
    assert vault.log == ["sent", "queried"]


def test_an_invalid_query_url_does_not_prevent_the_upload(tmp_path: Path, pki: Pki) -> None:
    vault = Vault()
    with ScriptedServer(vault, server_context(pki)) as server:
        too_long = f"{server.url}/{'x' * 70_000}{{digest}}"
        with a_ledger_sender(a_destination(server.url, pki, query_url=too_long)) as sender:
            archive = an_archive(tmp_path, CONTENT)
            first = sender.send(archive)
            assert isinstance(first, Deferred)
            assert first.reason is Reason.CONNECTION_LOST
            assert first.unconfirmed_digest is not None
            sender.unconfirmed = first.unconfirmed_digest
            assert isinstance(sender.send(archive), Delivered)
    assert vault.log == ["sent", "sent"]


def fail_queries(tmp_path: Path, pki: Pki, status: int) -> tuple[Vault, list[Outcome]]:
    """Lose a response, respond to two queries with a status, and then work normally."""
    vault, refusals = Vault(), [http_response(status, Retry_After="7")] * 2

    def script(peer: Peer) -> None:
        if peer.number in (1, 2):
            peer.read_request()
            vault.log.append(f"responded {status}")  # before the next connection can arrive
            peer.send(refusals.pop())
        vault(peer)

    outcomes: list[Outcome] = []
    with ScriptedServer(script, server_context(pki)) as server:
        destination = a_destination(server.url, pki, query_url=f"{server.url}/{{digest}}")
        archive = an_archive(tmp_path, CONTENT)
        for _ in range(3):
            with a_ledger_sender(destination) as sender:  # as after a restart: only the ledger has the digest
                last = outcomes[-1] if outcomes else None
                sender.unconfirmed = last.unconfirmed_digest if isinstance(last, Deferred) else None
                outcomes.append(sender.send(archive))
            if isinstance(outcomes[-1], Delivered):
                break
    return vault, outcomes


@pytest.mark.parametrize("status", [202, 408, 425, 429, 500, 502, 503, 504])
def test_nothing_is_sent_again_while_queries_fail_temporarily(tmp_path: Path, pki: Pki, status: int) -> None:
    vault, (first, second, third) = fail_queries(tmp_path, pki, status)

    assert isinstance(first, Deferred)
    assert isinstance(second, Deferred)
    assert second.unconfirmed_digest == first.unconfirmed_digest
    assert second.http_status == status
    assert second.retry_after == timedelta(seconds=7)
    assert str(status) in second.error
    assert isinstance(third, Delivered)
    assert vault.log == ["sent", f"responded {status}", f"responded {status}", "queried"]


@pytest.mark.parametrize("status", [302, 400, 401, 403, 405, 409, 422, 501])
def test_the_archive_is_sent_again_if_queries_are_not_supported(
    tmp_path: Path, pki: Pki, status: int
) -> None:
    """An endpoint that accepts archives and no queries still gets the archive."""
    vault, outcomes = fail_queries(tmp_path, pki, status)

    assert isinstance(outcomes[-1], Delivered)
    assert vault.log == ["sent", f"responded {status}", f"responded {status}", "sent"]
    assert len(set(vault.keys)) == 1


@pytest.mark.parametrize("query", ["with query_url", "without"])
def test_an_unconfirmed_upload_survives_sigkill_of_the_daemon(stage: Stage, query: str) -> None:
    vault = Vault(lose=1)
    is_up = [True]

    def script(peer: Peer) -> None:
        if not is_up[0]:
            peer.reset()
            return
        try:
            vault(peer)
        finally:
            is_up[0] = False

    with ScriptedServer(script, server_context(stage.pki)) as server:
        query_url = f'query_url = "{server.url}/{{digest}}"' if query == "with query_url" else ""
        stage.configure(server.url, destination=f"{FAST_RETRY}\n{query_url}")
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", CONTENT)
        daemon.wait_for("destination.paused")
        daemon.wait_for("delivery.deferred")
        daemon.kill()
        again_sent = [event["sent_bytes"] for event in daemon.events("attempt.failed")][1:]
        assert again_sent
        assert query == "without" or set(again_sent) == {0}
        assert (stage.drop / "a.tar.gz").exists()
        is_up[0] = True
        again = stage.daemon().ready()
        again.wait_for("archive.disposed")
        assert again.stop() == 0
    assert vault.log == (["sent", "queried"] if query == "with query_url" else ["sent", "sent"])
    assert len(set(vault.keys)) == 1
    assert not stage.archives(stage.rejected)


def test_a_query_with_the_receipt_of_other_content_confirms_nothing(tmp_path: Path, pki: Pki) -> None:
    vault = Vault()
    queries: list[str] = []

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.head.startswith(b"GET"):
                queries.append(request.path)
                peer.send(receipt_for(b"something else", 200))
            elif vault.lose:
                vault.lose -= 1
                return
            else:
                peer.send(receipt_for(request.archive))

    outcome, requests = upload(tmp_path, pki, script, query_path="/{digest}")
    assert isinstance(outcome, Deferred)
    assert outcome.unconfirmed_digest is not None
    assert len(requests) == 2
    until(lambda: queries, "the query")


# Reading an archive before its upload


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.parametrize("changes", [False, True])
def test_an_archive_is_read_once_while_its_destination_is_down(
    tmp_path: Path, pki: Pki, changes: bool
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{reserved.getsockname()[1]}/"
        archive = an_archive(tmp_path, size=20 * MIB)
        read = []
        with a_sender(a_destination(url, pki, digest_at="header")) as sender:
            for _ in range(4):
                before = bytes_read()
                outcome = sender.send(archive)
                assert isinstance(outcome, Deferred), outcome
                read.append(bytes_read() - before)
                if changes:
                    os.utime(archive)
    assert read[0] >= 20 * MIB
    assert all((count >= 20 * MIB) == changes for count in read[1:]), read


def test_a_content_that_was_confirmed_is_not_read_again(tmp_path: Path) -> None:
    archive = an_archive(tmp_path, size=20 * MIB)
    fingerprint = fingerprint_of(archive.stat())
    archive.chmod(0o600)  # from now on the content has to be compared
    digest = Digest("sha256", hashlib.sha256(archive.read_bytes()).hexdigest())
    config, abort, known = a_destination("http://127.0.0.1:9/"), Abort(), ConfirmedDigests()
    read = []
    for _ in range(3):
        builder = RequestBuilder(config, AttemptLimits(abort), known)
        fd = os.open(archive, os.O_RDONLY)
        before = bytes_read()
        job = UploadJob("the-delivery", b"a", fd, fingerprint, {})
        builder.confirm_content(job, digest)
        read.append(bytes_read() - before)
        assert job.confirmed == fingerprint_of(archive.stat())
        os.close(fd)
    abort.close()
    assert read[0] >= 20 * MIB
    assert max(read[1:]) < MIB
