"""No secret leaves the process, and no response of an endpoint harms the daemon."""

from __future__ import annotations

import base64
import gzip
import json
import re
import stat
import threading
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.scripted import (
    Peer,
    ScriptedServer,
    accept_all,
    header_of,
    http_response,
    receipt_for,
    server_context,
)
from tests.stage import Stage, until

FAST_RETRY = '[destination.{name}.retry]\ninitial = "0.1s"\nmax = "0.3s"\n'
SECRETS = {
    "token": "tok/en+MARKER=one",
    "password": 'pass"word\\MARKER<two>',
    "client_secret": "client secret/MARKER&three",
    "api_key": "api-key/MARKER+four==",
    "access_token": "granted.MARKER~five",
    "content": "enable secret MARKER six",
}


def forms(secret: str) -> Iterator[bytes]:
    """Yield the encodings of a secret that may occur in an output."""
    for text in {secret, urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret)}:
        yield text.encode()
        yield json.dumps(text)[1:-1].encode()
    yield base64.b64encode(secret.encode())
    yield base64.b64encode(f"ers-admin:{secret}".encode())


def assert_no_secret_in(output: str, data: bytes) -> None:
    for name, secret in SECRETS.items():
        for form in forms(secret):
            assert form not in data, f"{name} as {form!r} in {output}"
    assert b"MARKER" not in data, f"a part of a secret in {output}"
    assert b"PRIVATE KEY" not in data, f"a private key in {output}"


STATUSES = [400, 401, 403, 404, 409, 413, 422, 429, 500, 502, 302]


class Echo:
    """Echoes each request in the header and body of refusals, and accepts the archive in the end."""

    def __init__(self) -> None:
        self.refusals: dict[str, list[int]] = defaultdict(lambda: [*STATUSES])
        """The remaining statuses for each authentication."""
        self.tokens = 0

    def is_done(self) -> bool:
        return len(self.refusals) == 4 and not any(self.refusals.values())

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            echoed = request.head  # the content is not echoed: the daemon can't know its secrets
            if request.path == "/token":
                peer.send(self._token(request.head + request.body))
                continue
            secret = header_of(request.head, "Authorization") or header_of(request.head, "X-API-Key") or ""
            quoted = urllib.parse.quote(secret.rpartition(" ")[2])
            refusals = self.refusals[secret]
            status = refusals.pop(0) if refusals else 201
            if status == 201:
                good = json.loads(receipt_for(request.archive).partition(b"\r\n\r\n")[2])
                good["echo"] = echoed.decode("latin-1")
                peer.send(http_response(201, json.dumps(good).encode()))
            else:
                peer.send(
                    http_response(status, echoed, Location=f"https://x.invalid/{quoted}", X_Echo=quoted)
                )

    def _token(self, request: bytes) -> bytes:
        self.tokens += 1
        if self.tokens == 1:
            error = {"error": "invalid_client", "error_description": request.decode("latin-1")}
            return http_response(401, json.dumps(error).encode())
        return http_response(200, json.dumps({"access_token": SECRETS["access_token"]}).encode())


def destination(stage: Stage, url: str, name: str, lines: str) -> str:
    return (
        f'[destination.{name}]\nurl = "{url}"\nca = "{stage.pki.ca_pem}"\ncert = "{stage.pki.client_cert}"\n'
        f'key = "{stage.pki.client_key}"\nworkers = 1\n{lines}\n{FAST_RETRY.format(name=name)}'
    )


@pytest.fixture
def secrets(stage: Stage) -> Path:
    folder = stage.base / "secrets"
    folder.mkdir()
    for name, secret in SECRETS.items():
        (folder / name).write_text(f"{secret}\n")
    return folder


@pytest.mark.long
def test_no_secret_that_an_endpoint_echoes_leaves_the_process(stage: Stage, secrets: Path) -> None:
    echo = Echo()
    with ScriptedServer(echo, server_context(stage.pki)) as server:
        tables = {
            "bearer": f'[destination.bearer.auth]\ntype = "bearer"\ntoken_file = "{secrets}/token"',
            "basic": '[destination.basic.auth]\ntype = "basic"\nuser = "ers-admin"\n'
            f'password_file = "{secrets}/password"',
            "header": f'header_files = {{ X-API-Key = "{secrets}/api_key" }}',
            "oauth": '[destination.oauth.auth]\ntype = "oauth2"\nclient_id = "backupd"\nsecret_in = "post"\n'
            f'token_url = "https://127.0.0.1:{server.port}/token"\nca = "{stage.pki.ca_pem}"\n'
            f'client_secret_file = "{secrets}/client_secret"\n'
            f'cert = "{stage.pki.client_cert}"\nkey = "{stage.pki.client_key}"',
        }
        stage.config.write_text(
            f'state_dir = "{stage.state}"\nheartbeat_every = "1s"\n[log]\nlevel = "debug"\n'
            f'[drop.switches]\npath = "{stage.drop}"\nstable_for = "0s"\n'
            + "".join(destination(stage, server.url, name, lines) for name, lines in tables.items())
        )
        daemon = stage.daemon().ready()
        line = Path(f"/proc/{daemon.pid}/cmdline").read_bytes()
        names = [f"sw-{number}.cfg" for number in range(len(STATUSES))]
        for name in names:
            stage.put(name, SECRETS["content"].encode() + name.encode())
        until(echo.is_done, f"all refusals\n{daemon.text()[-3000:]}")
        until(
            lambda: len(daemon.events("archive.disposed")) == len(names),
            f"all archives\n{daemon.text()[-3000:]}",
        )
        pushed = stage.backupd("push", str(secrets / "content"))
        echo.refusals.clear()
        refused_push = stage.backupd("push", "--json", str(secrets / "content"))
        outputs = {
            "the log": stage.log.read_bytes(),
            "the command line": line,
            "push": (pushed.stdout + pushed.stderr + refused_push.stdout + refused_push.stderr).encode(),
        }
        commands = [
            ["status"],
            ["status", "--json"],
            ["list"],
            ["list", "--json"],
            ["config", "show"],
            ["check", "--json"],
            ["check"],
        ]
        for delivery in json.loads(stage.backupd("list", "--json").stdout)[::4]:
            commands += [["show", delivery["id"]], ["show", delivery["id"], "--json"]]
        for command in commands:
            done = stage.backupd(*command)
            outputs[" ".join(command)] = (done.stdout + done.stderr).encode()
        assert daemon.stop() == 0
    for path in [*stage.state.iterdir(), *stage.drop.rglob("*.json")]:
        outputs[path.name] = path.read_bytes()
    assert len(outputs) > 25
    for output, data in outputs.items():
        assert_no_secret_in(output, data)
    assert b"***" in outputs["the log"]  # the echo is logged, without the secrets


def test_a_bug_is_logged_without_a_secret_and_loses_no_archive(stage: Stage, secrets: Path) -> None:
    auth = f'[destination.bearer.auth]\ntype = "bearer"\ntoken_file = "{secrets}/token"'
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.config.write_text(
            f'state_dir = "{stage.state}"\n[log]\nlevel = "debug"\n'
            f'[drop.switches]\npath = "{stage.drop}"\nstable_for = "0s"\n'
            + destination(stage, server.url, "bearer", auth)
        )
        stage.put("core.cfg", SECRETS["content"].encode())
        broken = stage.daemon(program="tests.faults.breaking")
        broken.wait_for("attempt.failed", reason="internal_error")
        [failed, *_] = broken.events("daemon.failed")
        assert "a bug near a secret" in failed["error"]
        assert "_evaluate_success" in failed["exception"]
        assert broken.stop() == 0
        assert_no_secret_in("the log of a bug", stage.log.read_bytes())
        daemon = stage.daemon()
        daemon.wait_for("archive.disposed", archive="core.cfg")
        assert daemon.stop() == 0
    assert len({header_of(request.head, "Idempotency-Key") for request in server.requests}) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "content",
    [b"", b"two\nlines MARKER\n", b"\xff\xfeMARKER", b"MARKER " * 20_000],
    ids=["empty", "two_lines", "not_utf_8", "too_long"],  # an id is in the environment of all processes
)
def test_an_unusable_secret_file_is_reported_without_its_content(
    stage: Stage, receiver: RunningReceiver, content: bytes
) -> None:
    token = stage.base / "token"
    token.write_bytes(content)
    auth = f'[destination.vault.auth]\ntype = "bearer"\ntoken_file = "{token}"'
    stage.configure(receiver.url, drop='stable_for = "0s"', more=f"{auth}\n{FAST_RETRY.format(name='vault')}")
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"r1")
    failed = daemon.wait_for("attempt.failed", archive="r1.cfg")[0]
    assert str(token) in failed["error"]
    checked = stage.backupd("check")
    assert_no_secret_in("check", (checked.stdout + checked.stderr).encode())
    assert_no_secret_in("the log", stage.log.read_bytes())
    assert daemon.stop() == 0


# harmful responses


def endless_body(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 500 No\r\nContent-Length: 9000000000\r\n\r\n")
    while True:
        peer.send(bytes(65536))


def endless_chunks(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 201 Yes\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        peer.send(b"10000\r\n" + bytes(65536) + b"\r\n")


def endless_header(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 201 Yes\r\n")
    while True:
        peer.send(b"X-More: " + b"x" * 4000 + b"\r\n")


def endless_interim_responses(peer: Peer) -> None:
    while True:
        peer.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100)


def slow_header(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 201 Yes\r\n" + b"X-More: x\r\n" * 100_000, 0.05)


def a_bomb(peer: Peer) -> None:
    """Send a compressed response that expands to a thousand times its size."""
    body = gzip.compress(bytes(200_000_000), 1)
    peer.send(http_response(201, body, Content_Encoding="gzip", Content_Type="application/json"))
    peer.drain()


def deep_json(peer: Peer) -> None:
    peer.send(http_response(201, b"[" * 60_000))
    peer.drain()


def odd_json(peer: Peer) -> None:
    body = b'{"sha256": "\\ud800", "sha256": NaN, "size": 1e999, "id": %s}' % (b"9" * 5000)
    peer.send(http_response(201, body))
    peer.drain()


HARMFUL = [
    endless_body,
    endless_chunks,
    endless_header,
    endless_interim_responses,
    slow_header,
    a_bomb,
    deep_json,
    odd_json,
]


def once(harm: Callable[[Peer], None]) -> Callable[[Peer], None]:
    """Return the script of an endpoint that harms the first request, and accepts all others."""
    done = threading.Event()

    def only_harm(peer: Peer) -> None:
        done.set()
        harm(peer)

    return before(done, only_harm)


def before(done: threading.Event, harm: Callable[[Peer], None]) -> Callable[[Peer], None]:
    """Return the script of an endpoint that harms each request until `done` is set."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if not done.is_set():
                harm(peer)
                return
            peer.send(receipt_for(request.archive))

    return script


@pytest.mark.long
@pytest.mark.parametrize("harm", HARMFUL)
def test_a_harmful_response_costs_little_memory_and_loses_no_archive(
    stage: Stage, harm: Callable[[Peer], None]
) -> None:
    with ScriptedServer(once(harm), server_context(stage.pki)) as server:
        stage.configure(
            server.url,
            drop='stable_for = "0s"',
            destination='workers = 1\ndeadline = "3s"\ntimeout = { read = "1s" }',
            more=FAST_RETRY.format(name="vault"),
        )
        daemon = stage.daemon().ready()
        stage.put("r1.cfg", b"r1")
        daemon.wait_for("attempt.failed", archive="r1.cfg")
        daemon.wait_for("archive.disposed", archive="r1.cfg")
        assert daemon.memory("VmHWM") < 120 * 2**20
        assert not daemon.events("daemon.failed")
        assert daemon.stop() == 0


def slow_interim_responses(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 102 Wait\r\n\r\n" * 20_000, 0.05)


@pytest.mark.parametrize("harm", [slow_header, slow_interim_responses])
def test_a_response_of_one_byte_at_a_time_is_abandoned_without_a_deadline(
    stage: Stage, harm: Callable[[Peer], None]
) -> None:
    """Else a few such responses would occupy all workers, and no event would be logged."""
    abandoned = threading.Event()
    with ScriptedServer(before(abandoned, harm), server_context(stage.pki)) as server:
        stage.configure(
            server.url,
            drop='stable_for = "0s"',
            destination='workers = 1\ntimeout = { connect = "1s", read = "1s" }',
            more=FAST_RETRY.format(name="vault"),
        )
        daemon = stage.daemon().ready()
        stage.put("r1.cfg", b"r1")
        # attempts on a server that is slow to begin may fail before
        daemon.wait_for("attempt.failed", reason="read_timeout", error="no complete response within 3 s")
        abandoned.set()
        daemon.wait_for("archive.disposed", archive="r1.cfg")
        assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_with_an_archive(stage: Stage, status: int) -> None:
    with ScriptedServer(lambda peer: peer.drain()) as elsewhere:

        def script(peer: Peer) -> None:
            while True:
                peer.read_request()
                peer.send(
                    http_response(
                        status, b"over there", Location=elsewhere.url, Set_Cookie="a=b", Refresh="0"
                    )
                )

        with ScriptedServer(script, server_context(stage.pki)) as server:
            stage.configure(server.url, drop='stable_for = "0s"', more=FAST_RETRY.format(name="vault"))
            daemon = stage.daemon().ready()
            stage.put("r1.cfg", b"r1")
            failed = daemon.wait_for("attempt.failed", 2, archive="r1.cfg")
            assert {line["http_status"] for line in failed} == {status}
            assert daemon.stop() == 0
            assert not any(header_of(head, "Cookie") for head in server.heads)
        assert elsewhere.peers == []


# false receipts


def receipt_with(**changed: object) -> Callable[[bytes], bytes]:
    def receipt(content: bytes) -> bytes:
        good = json.loads(receipt_for(content).partition(b"\r\n\r\n")[2])
        return http_response(
            201, json.dumps({k: v for k, v in (good | changed).items() if v is not None}).encode()
        )

    return receipt


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
FALSE_RECEIPTS: dict[str, Callable[[bytes], bytes]] = {
    "another digest": receipt_with(sha256="0" * 64),
    "the digest of nothing": receipt_with(sha256=EMPTY),
    "no digest": receipt_with(sha256=None),
    "half a digest": lambda content: receipt_with(sha256=hex_of(content)[:32])(content),
    "a digest that is no string": receipt_with(sha256=["a"]),
    "a byte less": lambda content: receipt_with(size=len(content) - 1)(content),
    "an empty body": lambda _: http_response(201),
    "no content": lambda _: http_response(204),
    "a page": lambda _: http_response(200, b"<html>Welcome! Please sign in.</html>"),
}


def hex_of(content: bytes) -> str:
    return str(json.loads(receipt_for(content).partition(b"\r\n\r\n")[2])["sha256"])


@pytest.mark.long
@pytest.mark.parametrize("receipt", FALSE_RECEIPTS.values(), ids=FALSE_RECEIPTS)
def test_a_false_receipt_is_never_accepted(stage: Stage, receipt: Callable[[bytes], bytes]) -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.send(receipt(peer.read_request().archive))

    with ScriptedServer(script, server_context(stage.pki)) as server:
        table = '[destination.vault.receipt]\nsize = "body:/size"'
        more = f"{FAST_RETRY.format(name='vault')}\n{table}"
        stage.configure(server.url, drop='stable_for = "0s"', more=more)
        daemon = stage.daemon().ready()
        stage.put("r1.cfg", b"r1")
        daemon.wait_for("attempt.failed", 2, archive="r1.cfg")
        assert daemon.stop() == 0
        assert not daemon.events("delivery.verified")
        assert not daemon.events("archive.delivered")
        assert (stage.drop / "r1.cfg").read_bytes() == b"r1"


# modes of files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_modes_that_the_security_page_states(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    daemon = stage.daemon(before=["sh", "-c", 'umask 0022; exec "$@"', "sh"]).ready()
    stage.put("site.cfg", b"one")
    daemon.wait_for("archive.disposed")
    found = {
        "state_dir": mode(stage.state),
        "ledger.sqlite3": mode(stage.state / "ledger.sqlite3"),
        "ledger.sqlite3-wal": mode(stage.state / "ledger.sqlite3-wal"),
        "backupd.lock": mode(stage.state / "backupd.lock"),
        "sent_dir": mode(stage.sent),
        "*.receipt.json": mode(stage.sent / "site.cfg.receipt.json"),
    }
    assert daemon.stop() == 0
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `([^`]+)` \|[^|]*\| `(\d{4})`", page, re.MULTILINE))
    assert {name: int(stated[name], 8) & ~0o022 for name in found} == found
