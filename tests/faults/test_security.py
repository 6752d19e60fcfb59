"""What leaves the process holds no secret, and nothing that an endpoint answers does harm."""

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
from tests.scripted import Peer, ScriptedServer, answer, header_of, receipt_for, server_context, take_all
from tests.stage import Stage, until

QUICK = '[destination.{name}.retry]\ninitial = "0.1s"\nmax = "0.3s"\n'
SECRETS = {
    "token": "tok/en+MARKER=one",
    "password": 'pass"word\\MARKER<two>',
    "client_secret": "client secret/MARKER&three",
    "api_key": "api-key/MARKER+four==",
    "access_token": "granted.MARKER~five",
    "content": "enable secret MARKER six",
}


def forms(secret: str) -> Iterator[bytes]:
    """Yield what a secret may look like somewhere else."""
    for text in {secret, urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret)}:
        yield text.encode()
        yield json.dumps(text)[1:-1].encode()
    yield base64.b64encode(secret.encode())
    yield base64.b64encode(f"ers-admin:{secret}".encode())


def assert_no_secret_in(where: str, data: bytes) -> None:
    for name, secret in SECRETS.items():
        for form in forms(secret):
            assert form not in data, f"{name} as {form!r} in {where}"
    assert b"MARKER" not in data, f"some of a secret in {where}"
    assert b"PRIVATE KEY" not in data, f"a private key in {where}"


STATUSES = [400, 401, 403, 404, 409, 413, 422, 429, 500, 502, 302]


class Echo:
    """Answers each request with all that it holds, in header and body; sooner or later with yes."""

    def __init__(self) -> None:
        self.refusals: dict[str, list[int]] = defaultdict(lambda: [*STATUSES])
        """What is still to be answered to each who signs in."""
        self.tokens = 0

    def is_done(self) -> bool:
        return len(self.refusals) == 4 and not any(self.refusals.values())

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            said = request.head  # what a content holds, nobody can know and take out
            if request.path == "/token":
                peer.send(self._token(request.head + request.body))
                continue
            secret = header_of(request.head, "Authorization") or header_of(request.head, "X-API-Key") or ""
            quoted = urllib.parse.quote(secret.rpartition(" ")[2])
            refusals = self.refusals[secret]
            status = refusals.pop(0) if refusals else 201
            if status == 201:
                good = json.loads(receipt_for(request.archive).partition(b"\r\n\r\n")[2])
                good["said"] = said.decode("latin-1")
                peer.send(answer(201, json.dumps(good).encode()))
            else:
                peer.send(answer(status, said, Location=f"https://x.invalid/{quoted}", X_Said=quoted))

    def _token(self, said: bytes) -> bytes:
        self.tokens += 1
        if self.tokens == 1:
            error = {"error": "invalid_client", "error_description": said.decode("latin-1")}
            return answer(401, json.dumps(error).encode())
        return answer(200, json.dumps({"access_token": SECRETS["access_token"]}).encode())


def destination(stage: Stage, url: str, name: str, lines: str) -> str:
    return (
        f'[destination.{name}]\nurl = "{url}"\nca = "{stage.pki.ca_pem}"\ncert = "{stage.pki.client_cert}"\n'
        f'key = "{stage.pki.client_key}"\nworkers = 1\n{lines}\n{QUICK.format(name=name)}'
    )


@pytest.fixture
def secrets(stage: Stage) -> Path:
    folder = stage.base / "secrets"
    folder.mkdir()
    for name, secret in SECRETS.items():
        (folder / name).write_text(f"{secret}\n")
    return folder


def test_no_secret_leaves_the_process_whatever_an_endpoint_echoes(stage: Stage, secrets: Path) -> None:
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
            f"all to end\n{daemon.text()[-3000:]}",
        )
        pushed = stage.backupd("push", str(secrets / "content"))
        echo.refusals.clear()
        pushed_in_vain = stage.backupd("push", "--json", str(secrets / "content"))
        said = {
            "the log": stage.log.read_bytes(),
            "the command line": line,
            "push": (pushed.stdout + pushed.stderr + pushed_in_vain.stdout + pushed_in_vain.stderr).encode(),
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
            said[" ".join(command)] = (done.stdout + done.stderr).encode()
        assert daemon.stop() == 0
    for path in [*stage.state.iterdir(), *stage.drop.rglob("*.json")]:
        said[path.name] = path.read_bytes()
    assert len(said) > 25
    for where, data in said.items():
        assert_no_secret_in(where, data)
    assert b"***" in said["the log"]  # it was echoed, and quoted


def test_a_bug_is_told_without_a_secret_and_costs_no_archive(stage: Stage, secrets: Path) -> None:
    auth = f'[destination.bearer.auth]\ntype = "bearer"\ntoken_file = "{secrets}/token"'
    with ScriptedServer(take_all, server_context(stage.pki)) as server:
        stage.config.write_text(
            f'state_dir = "{stage.state}"\n[log]\nlevel = "debug"\n'
            f'[drop.switches]\npath = "{stage.drop}"\nstable_for = "0s"\n'
            + destination(stage, server.url, "bearer", auth)
        )
        stage.put("core.cfg", SECRETS["content"].encode())
        broken = stage.daemon(program="tests.faults.breaking")
        broken.wait_for("attempt.failed", reason="internal_error")
        [said, *_] = broken.events("daemon.failed")
        assert "a bug near a secret" in said["error"]
        assert "_judged" in said["exception"]
        assert broken.stop() == 0
        assert_no_secret_in("the log of a bug", stage.log.read_bytes())
        daemon = stage.daemon()
        daemon.wait_for("archive.disposed", archive="core.cfg")
        assert daemon.stop() == 0
    assert len({header_of(request.head, "Idempotency-Key") for request in server.requests}) == 1


@pytest.mark.parametrize("content", [b"", b"two\nlines MARKER\n", b"\xff\xfeMARKER", b"MARKER " * 20_000])
def test_a_secret_file_that_cannot_be_used_is_told_without_its_content(
    stage: Stage, receiver: RunningReceiver, content: bytes
) -> None:
    token = stage.base / "token"
    token.write_bytes(content)
    auth = f'[destination.vault.auth]\ntype = "bearer"\ntoken_file = "{token}"'
    stage.configure(receiver.url, drop='stable_for = "0s"', more=f"{auth}\n{QUICK.format(name='vault')}")
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"r1")
    failed = daemon.wait_for("attempt.failed", archive="r1.cfg")[0]
    assert str(token) in failed["error"]
    checked = stage.backupd("check")
    assert_no_secret_in("check", (checked.stdout + checked.stderr).encode())
    assert_no_secret_in("the log", stage.log.read_bytes())
    assert daemon.stop() == 0


# answers that do harm


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


def endless_interim_answers(peer: Peer) -> None:
    while True:
        peer.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100)


def slow_header(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 201 Yes\r\n" + b"X-More: x\r\n" * 100_000, 0.05)


def a_bomb(peer: Peer) -> None:
    """Said to be compressed, with a thousand times its size."""
    body = gzip.compress(bytes(200_000_000), 1)
    peer.send(answer(201, body, Content_Encoding="gzip", Content_Type="application/json"))
    peer.drain()


def deep_json(peer: Peer) -> None:
    peer.send(answer(201, b"[" * 60_000))
    peer.drain()


def odd_json(peer: Peer) -> None:
    body = b'{"sha256": "\\ud800", "sha256": NaN, "size": 1e999, "id": %s}' % (b"9" * 5000)
    peer.send(answer(201, body))
    peer.drain()


HARMFUL = [
    endless_body,
    endless_chunks,
    endless_header,
    endless_interim_answers,
    slow_header,
    a_bomb,
    deep_json,
    odd_json,
]


def once(harm: Callable[[Peer], None]) -> Callable[[Peer], None]:
    """Return the script of an endpoint that does harm to the first request, and is good to all others."""
    done = threading.Event()

    def last_harm(peer: Peer) -> None:
        done.set()
        harm(peer)

    return before(done, last_harm)


def before(done: threading.Event, harm: Callable[[Peer], None]) -> Callable[[Peer], None]:
    """Return the script of an endpoint that does harm to each request until it is done."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if not done.is_set():
                harm(peer)
                return
            peer.send(receipt_for(request.archive))

    return script


@pytest.mark.parametrize("harm", HARMFUL)
def test_an_answer_that_does_harm_costs_little_memory_and_no_archive(
    stage: Stage, harm: Callable[[Peer], None]
) -> None:
    with ScriptedServer(once(harm), server_context(stage.pki)) as server:
        stage.configure(
            server.url,
            drop='stable_for = "0s"',
            destination='workers = 1\ndeadline = "3s"\ntimeout = { read = "1s" }',
            more=QUICK.format(name="vault"),
        )
        daemon = stage.daemon().ready()
        stage.put("r1.cfg", b"r1")
        daemon.wait_for("attempt.failed", archive="r1.cfg")
        daemon.wait_for("archive.disposed", archive="r1.cfg")
        assert daemon.memory("VmHWM") < 120 * 2**20
        assert not daemon.events("daemon.failed")
        assert daemon.stop() == 0


def slow_interim_answers(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 102 Wait\r\n\r\n" * 20_000, 0.05)


@pytest.mark.parametrize("harm", [slow_header, slow_interim_answers])
def test_an_answer_a_byte_at_a_time_is_given_up_without_a_deadline_too(
    stage: Stage, harm: Callable[[Peer], None]
) -> None:
    """Else a few of them would keep all workers, and no event tell why nothing arrives."""
    given_up = threading.Event()
    with ScriptedServer(before(given_up, harm), server_context(stage.pki)) as server:
        stage.configure(
            server.url,
            drop='stable_for = "0s"',
            destination='workers = 1\ntimeout = { connect = "1s", read = "1s" }',
            more=QUICK.format(name="vault"),
        )
        daemon = stage.daemon().ready()
        stage.put("r1.cfg", b"r1")
        # a server that is slow to begin may be given up for that before
        daemon.wait_for("attempt.failed", reason="read_timeout", error="no end of the answer after 3 s")
        given_up.set()
        daemon.wait_for("archive.disposed", archive="r1.cfg")
        assert daemon.stop() == 0


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_with_an_archive(stage: Stage, status: int) -> None:
    with ScriptedServer(lambda peer: peer.drain()) as elsewhere:

        def script(peer: Peer) -> None:
            while True:
                peer.read_request()
                peer.send(
                    answer(status, b"over there", Location=elsewhere.url, Set_Cookie="a=b", Refresh="0")
                )

        with ScriptedServer(script, server_context(stage.pki)) as server:
            stage.configure(server.url, drop='stable_for = "0s"', more=QUICK.format(name="vault"))
            daemon = stage.daemon().ready()
            stage.put("r1.cfg", b"r1")
            failed = daemon.wait_for("attempt.failed", 2, archive="r1.cfg")
            assert {line["http_status"] for line in failed} == {status}
            assert daemon.stop() == 0
            assert not any(header_of(head, "Cookie") for head in server.heads)
        assert elsewhere.peers == []


# receivers that lie


def lie(**said: object) -> Callable[[bytes], bytes]:
    def told(content: bytes) -> bytes:
        good = json.loads(receipt_for(content).partition(b"\r\n\r\n")[2])
        return answer(201, json.dumps({k: v for k, v in (good | said).items() if v is not None}).encode())

    return told


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
LIES: dict[str, Callable[[bytes], bytes]] = {
    "another digest": lie(sha256="0" * 64),
    "the digest of nothing": lie(sha256=EMPTY),
    "no digest": lie(sha256=None),
    "half a digest": lambda content: lie(sha256=hex_of(content)[:32])(content),
    "a digest that is no text": lie(sha256=["a"]),
    "a byte less": lambda content: lie(size=len(content) - 1)(content),
    "nothing": lambda _: answer(201),
    "nothing, politely": lambda _: answer(204),
    "a page": lambda _: answer(200, b"<html>Welcome! Please sign in.</html>"),
}


def hex_of(content: bytes) -> str:
    return str(json.loads(receipt_for(content).partition(b"\r\n\r\n")[2])["sha256"])


@pytest.mark.parametrize("told", LIES.values(), ids=LIES)
def test_a_receiver_that_lies_is_never_believed(stage: Stage, told: Callable[[bytes], bytes]) -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.send(told(peer.read_request().archive))

    with ScriptedServer(script, server_context(stage.pki)) as server:
        receipt = '[destination.vault.receipt]\nsize = "body:/size"'
        more = f"{QUICK.format(name='vault')}\n{receipt}"
        stage.configure(server.url, drop='stable_for = "0s"', more=more)
        daemon = stage.daemon().ready()
        stage.put("r1.cfg", b"r1")
        daemon.wait_for("attempt.failed", 2, archive="r1.cfg")
        assert daemon.stop() == 0
        assert not daemon.events("delivery.verified")
        assert not daemon.events("archive.delivered")
        assert (stage.drop / "r1.cfg").read_bytes() == b"r1"


# what is kept where


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_kept_has_the_modes_that_the_page_on_security_states(
    stage: Stage, receiver: RunningReceiver
) -> None:
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
