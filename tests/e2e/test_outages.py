"""Destinations that are down, refuse an archive or fail on it lose no archive and delay no other one."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.pki import Pki
from tests.stage import TIMEOUT, Daemon, Stage, until

FAST_RETRY = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"'


class Endpoint:
    """Accepts uploads over mTLS; `status_of` returns the status of the response for a file name."""

    def __init__(self, pki: Pki, status_of: Callable[[str], int]) -> None:
        self.status_of = status_of
        self.seen: list[tuple[str, int, str]] = []
        """Name, status and Idempotency-Key of each request."""
        self.stored: dict[str, bytes] = {}
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki.ca_pem)
        context.load_cert_chain(pki.server_cert, pki.server_key)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server = _Server(context, self)
        self.url = f"https://127.0.0.1:{self._server.server_port}/upload"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self) -> list[str]:
        """Return the names of the uploaded files, in order."""
        return [name for name, _, _ in self.seen]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, context: ssl.SSLContext, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._context = context
        super().__init__(("127.0.0.1", 0), _Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Do the TLS handshake in the thread of the request, so that no client delays another."""
        with contextlib.suppress(OSError), self._context.wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about clients that closed the connection."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        part = body.split(b"--" + boundary)[1]
        head, _, content = part.partition(b"\r\n\r\n")
        found = re.search(rb'filename="([^"]*)"', head)
        assert found
        name, content = found[1].decode(), content.removesuffix(b"\r\n")
        endpoint = self.server.endpoint
        status = endpoint.status_of(name)
        receipt = {"detail": f"{name} is refused"}
        if status < 300:
            endpoint.stored[name] = content
            receipt = {"sha256": hashlib.sha256(content).hexdigest()}
        endpoint.seen.append((name, status, self.headers["Idempotency-Key"]))
        content = json.dumps(receipt).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def ledger(stage: Stage, query: str) -> list[tuple[Any, ...]]:
    """Query the ledger while the daemon runs."""
    with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=TIMEOUT)) as connection:
        return connection.execute(query).fetchall()


def a_receiver(stage: Stage, port: int = 0, store: str = "store") -> RunningReceiver:
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    return RunningReceiver(stage.base / store, tls, port=port)


def order_of(daemon: Daemon, *names: str) -> list[str]:
    """Return the events of these names in order, without repetitions."""
    found = [event["event"] for event in daemon.events() if event["event"] in names]
    return [name for number, name in enumerate(found) if number == 0 or found[number - 1] != name]


def test_a_destination_that_is_down_at_the_start_gets_all_archives_once_it_is_up(stage: Stage) -> None:
    port = stage.a_free_port()
    stage.configure(f"https://127.0.0.1:{port}/v1/upload", destination=FAST_RETRY)
    contents = {f"sw-{number}.tar.gz": os.urandom(5000) for number in range(20)}
    for name, content in contents.items():
        stage.put(name, content)
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.queued", count=20)
    daemon.wait_for("destination.paused", count=3)
    assert len(stage.archives(stage.drop)) == 20
    assert not stage.sent.exists()
    assert ledger(stage, "SELECT DISTINCT archive_failures FROM delivery") == [(0,)]

    with a_receiver(stage, port):
        daemon.wait_for("archive.disposed", count=20)

    assert {path.name: path.read_bytes() for path in stage.archives(stage.sent)} == contents
    assert sorted(path.read_bytes() for path in stage.stored()) == sorted(contents.values())
    assert not daemon.events("archive.rejected")
    assert not stage.rejected.exists()
    assert ledger(stage, "SELECT DISTINCT archive_failures, state FROM delivery") == [(0, "delivered")]
    paused, resumed = daemon.events("destination.paused"), daemon.events("destination.resumed")
    assert len(resumed) == 1
    assert {event["reason"] for event in paused} == {"connect_failed"}
    assert all(0 < event["paused_for_s"] <= 0.5 for event in paused)
    assert [event["failures"] for event in paused] == list(range(1, len(paused) + 1))
    assert resumed[0]["down_for_s"] > 0
    assert daemon.stop() == 0


@pytest.mark.long
def test_while_a_destination_is_down_only_one_archive_at_a_time_is_tried(stage: Stage) -> None:
    stage.configure(f"https://127.0.0.1:{stage.a_free_port()}/", destination=f"workers = 8\n{FAST_RETRY}")
    daemon = stage.daemon().ready()
    for number in range(50):
        stage.put(f"sw-{number}.tar.gz", b"x")
    daemon.wait_for("destination.paused", count=6)

    tried = len(daemon.events("attempt.failed"))
    # up to eight were in progress, with three short attempts each, then one at a time
    assert tried <= 8 * 3 + len(daemon.events("destination.paused")) * 3
    assert daemon.stop() == 0


@pytest.mark.long
def test_uploads_resume_after_an_outage_of_the_destination(stage: Stage) -> None:
    receiver = a_receiver(stage)
    with receiver:
        stage.configure(receiver.url, destination=FAST_RETRY)
        daemon = stage.daemon().ready()
        stage.put("one.tar.gz", b"1")
        daemon.wait_for("archive.disposed", archive="one.tar.gz")
    stage.put("two.tar.gz", b"2")
    daemon.wait_for("destination.paused")
    assert json.loads(stage.backupd("status", "--json").stdout)["destinations"][0]["circuit"] != "working"

    with receiver:
        daemon.wait_for("archive.disposed", archive="two.tar.gz")
        daemon.wait_for("destination.resumed")

    wanted = ["destination.paused", "destination.resumed"]
    assert order_of(daemon, *wanted) == wanted
    assert len(stage.stored()) == 2
    assert json.loads(stage.backupd("status", "--json").stdout)["destinations"][0]["circuit"] == "working"


@pytest.mark.parametrize(
    ("status", "reason"), [(422, "archive_refused"), (409, "conflict"), (413, "too_large")]
)
def test_a_refused_archive_is_rejected_alone(stage: Stage, status: int, reason: str) -> None:
    with Endpoint(stage.pki, lambda name: status if "poison" in name else 201) as endpoint:
        stage.configure(endpoint.url, destination=FAST_RETRY)
        stage.put("a-poison.tar.gz", b"poison")
        daemon = stage.daemon().ready()
        daemon.wait_for("archive.rejected", archive="a-poison.tar.gz")
        for number in range(10):
            stage.put(f"sw-{number}.tar.gz", b"%d" % number)
        daemon.wait_for("archive.delivered", count=10)
        daemon.wait_for("archive.disposed", count=11)

    assert endpoint.names().count("a-poison.tar.gz") == 1
    assert not daemon.events("destination.paused")
    assert not daemon.events("attempt.failed")
    assert stage.archives(stage.rejected) == [stage.rejected / "a-poison.tar.gz"]
    record = json.loads((stage.rejected / "a-poison.tar.gz.reason.json").read_bytes())
    assert record["deliveries"][0]["reason"] == reason
    assert "a-poison.tar.gz is refused" in record["deliveries"][0]["error"]
    event = daemon.events("archive.rejected")[0]
    assert (event["reason"], event["http_status"]) == (reason, status)
    assert event["hint"]
    assert len(stage.archives(stage.sent)) == 10


def test_an_archive_on_which_the_destination_fails_does_not_delay_the_others(stage: Stage) -> None:
    with Endpoint(stage.pki, lambda name: 500 if "poison" in name else 201) as endpoint:
        stage.configure(endpoint.url, destination=FAST_RETRY)
        stage.put("a-poison.tar.gz", b"poison")
        daemon = stage.daemon().ready()
        daemon.wait_for("destination.paused")
        for number in range(20):
            stage.put(f"sw-{number}.tar.gz", b"%d" % number)

        daemon.wait_for("archive.disposed", count=20)

        count = endpoint.names().count("a-poison.tar.gz")
        until(lambda: endpoint.names().count("a-poison.tar.gz") > count, "one more attempt")
        assert daemon.stop() == 0
    assert not daemon.events("archive.rejected")
    assert (stage.drop / "a-poison.tar.gz").exists()
    keys = {key for name, _, key in endpoint.seen if name == "a-poison.tar.gz"}
    assert len(keys) == 1
    # while others pass, it counts against the archive from its fifth failure on
    reasons = [event["reason"] for event in daemon.events("attempt.failed")]
    counted = [(reasons.count("fails_alone"),)]
    assert ledger(stage, "SELECT archive_failures FROM delivery WHERE state <> 'delivered'") == counted


@pytest.fixture
def two(stage: Stage) -> Iterator[RunningReceiver]:
    """A receiver that is up; `second` configures another destination."""
    with a_receiver(stage, store="store") as receiver:
        yield receiver


def second(stage: Stage, url: str) -> str:
    """Return the configuration of a second destination."""
    return f"""
[destination.cellar]
url = "{url}"
ca = "{stage.pki.ca_pem}"
cert = "{stage.pki.client_cert}"
key = "{stage.pki.client_key}"
[destination.cellar.retry]
initial = "0.1s"
max = "0.5s"
"""


def test_an_archive_stays_in_the_drop_folder_until_both_destinations_have_it(
    stage: Stage, two: RunningReceiver
) -> None:
    port = stage.a_free_port()
    stage.configure(two.url, more=second(stage, f"https://127.0.0.1:{port}/v1/upload"))
    daemon = stage.daemon().ready()
    for number in range(5):
        stage.put(f"sw-{number}.tar.gz", b"content %d" % number)

    daemon.wait_for("delivery.verified", count=5, destination="vault")
    daemon.wait_for("destination.paused", count=3, destination="cellar")
    assert len(stage.archives(stage.drop)) == 5
    assert not stage.sent.exists()
    assert not daemon.events("archive.delivered")
    assert not [e for e in daemon.events("destination.paused") if e["destination"] == "vault"]

    with a_receiver(stage, port, store="cellar"):
        daemon.wait_for("archive.disposed", count=5)

    assert len(stage.archives(stage.sent)) == 5
    assert len(stage.stored()) == 5
    assert len(stage.archives(stage.base / "cellar" / "archives")) == 5
    assert len(daemon.events("archive.delivered")) == 5
    record = json.loads((stage.sent / "sw-0.tar.gz.receipt.json").read_bytes())
    assert [each["destination"] for each in record["deliveries"]] == ["cellar", "vault"]


def test_an_archive_that_one_of_two_destinations_refuses_is_rejected_after_both_have_responded(
    stage: Stage, two: RunningReceiver
) -> None:
    with Endpoint(stage.pki, lambda name: 422) as endpoint:
        stage.configure(two.url, more=second(stage, endpoint.url))
        daemon = stage.daemon().ready()
        stage.put("sw.tar.gz", b"content")
        daemon.wait_for("archive.disposed")

    assert len(stage.stored()) == 1
    assert len(daemon.events("archive.rejected")) == 1
    assert not daemon.events("archive.delivered")
    assert stage.archives(stage.rejected) == [stage.rejected / "sw.tar.gz"]
    record = json.loads((stage.rejected / "sw.tar.gz.reason.json").read_bytes())
    assert [each["state"] for each in record["deliveries"]] == ["rejected", "delivered"]


@contextlib.contextmanager
def mounted_over(folder: Path, *, file: str = "") -> Iterator[None]:
    """Mount a filesystem, empty or with one file, over a folder for a while."""
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=False).returncode:
        pytest.skip("no filesystem can be mounted here")
    try:
        if file:
            (folder / file).write_bytes(b"another")
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.long
@pytest.mark.root
def test_a_pending_archive_waits_while_another_disk_is_mounted_over_the_root_of_its_disk(
    stage: Stage,
) -> None:
    """The roots of two disks have the same inode."""
    port = stage.a_free_port()
    stage.configure(f"https://127.0.0.1:{port}/v1/upload", destination=FAST_RETRY, drop='rescan_every = "1s"')
    with mounted_over(stage.drop):
        daemon = stage.daemon().ready()
        (stage.drop / "core.tar.gz").write_bytes(b"content")
        daemon.wait_for("archive.queued")
        daemon.wait_for("destination.paused")
        with mounted_over(stage.drop, file="other.tar.gz"):
            daemon.wait_for("archive.queued", archive="other.tar.gz")
            daemon.wait_for("attempt.failed", archive="core.tar.gz", reason="archive_unreadable")
            assert daemon.stop() == 0
            daemon = stage.daemon().ready()
            daemon.wait_for("attempt.failed", archive="core.tar.gz", reason="archive_unreadable")
        with a_receiver(stage, port):
            daemon.wait_for("archive.disposed", archive="core.tar.gz", disposition="moved")
        assert daemon.stop() == 0
    assert "core.tar.gz" not in {e.get("archive") for e in daemon.events("archive.missing")}


@pytest.mark.long
@pytest.mark.root
def test_a_pending_archive_waits_while_its_filesystem_is_not_mounted(stage: Stage) -> None:
    port = stage.a_free_port()
    stage.configure(f"https://127.0.0.1:{port}/v1/upload", destination=FAST_RETRY, drop='rescan_every = "1s"')
    daemon = stage.daemon().ready()
    stage.put("core.tar.gz", b"content")
    daemon.wait_for("archive.queued")
    daemon.wait_for("destination.paused")
    with mounted_over(stage.drop):
        failed = daemon.wait_for("attempt.failed", reason="archive_unreadable")[0]
        assert failed["error"].startswith("the drop folder is not the directory in which it was queued")
        assert daemon.stop() == 0
        daemon = stage.daemon().ready()
        daemon.wait_for("attempt.failed", reason="archive_unreadable")
    with a_receiver(stage, port):
        daemon.wait_for("archive.disposed", disposition="moved")
    assert daemon.stop() == 0
    assert "archive.missing" not in stage.log.read_text()
    assert ledger(stage, "SELECT count(*) FROM archive") == [(1,)]


@pytest.mark.long
@pytest.mark.root
def test_a_delivered_archive_is_moved_once_its_filesystem_is_mounted_again(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    stage.sent.write_bytes(b"in the way")
    stage.put("core.tar.gz", b"content")
    daemon.wait_for("disposition.failed")
    daemon.kill()
    stage.sent.unlink()
    with mounted_over(stage.drop):
        again = stage.daemon().ready()
        (failed,) = again.wait_for("disposition.failed")
        assert failed["hint"].startswith("mount the filesystem")
        assert again.stop() == 0
        assert list(stage.drop.iterdir()) == []
    again = stage.daemon().ready()
    again.wait_for("archive.disposed", disposition="moved")
    assert ledger(stage, "SELECT count(*) FROM archive") == [(1,)]


@pytest.mark.long
def test_retried_archives_are_delivered_once_the_destination_accepts_them(stage: Stage) -> None:
    with Endpoint(stage.pki, lambda name: 422) as endpoint:
        stage.configure(endpoint.url, destination=FAST_RETRY)
        daemon = stage.daemon().ready()
        for number in range(3):
            stage.put(f"sw-{number}.tar.gz", b"content %d" % number)
        daemon.wait_for("archive.disposed", count=3)
        assert len(stage.archives(stage.rejected)) == 3

        endpoint.status_of = lambda name: 201
        rejected = json.loads(stage.backupd("list", "--state", "rejected", "--json").stdout)
        chosen = next(r for r in rejected if r["archive"]["relpath"] == "sw-2.tar.gz")
        one = stage.backupd("retry", chosen["id"][:13])
        assert (one.returncode, one.stderr) == (0, "")
        assert "put back" in one.stdout
        daemon.wait_for("archive.delivered", archive="sw-2.tar.gz")
        daemon.wait_for("archive.disposed", archive="sw-2.tar.gz", disposition="moved", count=2)
        assert stage.archives(stage.sent) == [stage.sent / "sw-2.tar.gz"]
        assert not (stage.rejected / "sw-2.tar.gz.reason.json").exists()

        every = stage.backupd("retry", "--all")
        assert every.returncode == 0
        assert every.stdout.startswith("2 archives put back")
        daemon.wait_for("archive.delivered", count=3)
        until(lambda: len(stage.archives(stage.sent)) == 3, "all archives in sent/")

    assert list(stage.rejected.iterdir()) == []
    assert len(endpoint.stored) == 3
    again = stage.backupd("retry", chosen["id"])
    assert again.returncode == 2
    assert "it was put back already" in again.stderr
    assert stage.backupd("retry", "--all").stdout == "nothing put back: no archive is rejected\n"
    [destination] = json.loads(stage.backupd("status", "--json").stdout)["destinations"]
    assert destination["rejected"] == 0


@pytest.fixture
def refused(stage: Stage) -> Iterator[Stage]:
    """A stage where an archive was rejected; no daemon runs."""
    with Endpoint(stage.pki, lambda name: 422) as endpoint:
        stage.configure(endpoint.url)
        daemon = stage.daemon().ready()
        stage.put("sw.tar.gz", b"content")
        daemon.wait_for("archive.disposed")
        assert daemon.stop() == 0
        yield stage


def rejections(stage: Stage) -> int:
    """Return the number of archives in quarantine, whether a daemon runs or not."""
    records = json.loads(stage.backupd("list", "--state", "rejected", "--json").stdout)
    return sum(record["disposed_to"] is not None for record in records)


@pytest.mark.long
@pytest.mark.parametrize("how", ["by its id", "all"])
def test_retry_stops_counting_archives_that_were_removed_from_quarantine(refused: Stage, how: str) -> None:
    (refused.rejected / "sw.tar.gz").unlink()
    [record] = json.loads(refused.backupd("list", "--json").stdout)
    assert rejections(refused) == 1
    done = refused.backupd("retry", *(["--all"] if how == "all" else [record["id"]]))
    assert ("nothing put back" in done.stdout) if how == "all" else ("not in quarantine" in done.stderr)
    assert rejections(refused) == 0
    assert list(refused.rejected.iterdir()) == []


@pytest.mark.long
def test_retry_moves_no_archive_while_another_process_locks_the_ledger(refused: Stage) -> None:
    [record] = json.loads(refused.backupd("list", "--json").stdout)
    with contextlib.closing(sqlite3.connect(refused.state / "ledger.sqlite3")) as other:
        other.execute("BEGIN IMMEDIATE")
        done = refused.backupd("retry", record["id"])
    assert done.returncode == 78
    assert "another process holds it" in done.stderr
    assert (refused.rejected / "sw.tar.gz").exists()
    assert refused.backupd("retry", record["id"]).returncode == 0
    assert (refused.drop / "sw.tar.gz").read_bytes() == b"content"
    assert rejections(refused) == 0
    assert list(refused.rejected.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("all_of_them", [False, True])
def test_retry_moves_no_archive_while_the_drop_folder_is_missing(refused: Stage, all_of_them: bool) -> None:
    [record] = json.loads(refused.backupd("list", "--json").stdout)
    away = refused.drop.rename(refused.base / "away")
    done = refused.backupd("retry", "--all" if all_of_them else record["id"])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "No such file or directory" in done.stderr
    away.rename(refused.drop)
    assert rejections(refused) == 1
    assert refused.backupd("retry", "--all").stdout.startswith("1 archive put back")


@pytest.mark.long
def test_an_archive_that_is_retried_without_a_daemon_is_delivered_by_the_next_one(stage: Stage) -> None:
    with Endpoint(stage.pki, lambda name: 422) as endpoint:
        stage.configure(endpoint.url)
        daemon = stage.daemon().ready()
        stage.put("sw.tar.gz", b"content")
        daemon.wait_for("archive.disposed")
        daemon.stop()
        endpoint.status_of = lambda name: 201

        back = stage.backupd("retry", "--all")
        assert "once the daemon runs" in back.stdout
        assert (stage.drop / "sw.tar.gz").read_bytes() == b"content"

        stage.daemon().wait_for("archive.disposed", disposition="moved")
    assert stage.archives(stage.sent) == [stage.sent / "sw.tar.gz"]


@pytest.mark.long
def test_retry_leaves_an_archive_that_is_named_like_a_reason_file(stage: Stage) -> None:
    with Endpoint(stage.pki, lambda name: 422) as endpoint:
        stage.configure(endpoint.url)
        daemon = stage.daemon().ready()
        for name in ("x.gz.reason.json", "x.gz"):
            stage.put(name, b"the only copy of " + name.encode())
            daemon.wait_for("archive.disposed", archive=name)
        daemon.stop()
        chosen, _ = json.loads(stage.backupd("list", "--json").stdout)

        assert stage.backupd("retry", chosen["id"]).returncode == 0

    assert (stage.drop / "x.gz").read_bytes() == b"the only copy of x.gz"
    left = {"x.gz.reason.json": b"the only copy of x.gz.reason.json"}
    other = "x.gz.reason.json.reason.json"
    assert {p.name: p.read_bytes() for p in stage.rejected.iterdir() if p.name != other} == left
    assert (stage.rejected / other).exists()


@pytest.mark.long
def test_retry_overwrites_no_file(stage: Stage) -> None:
    with Endpoint(stage.pki, lambda name: 422) as endpoint:
        stage.configure(endpoint.url)
        daemon = stage.daemon().ready()
        stage.put("daily.tar.gz", b"monday")
        stage.put("other.tar.gz", b"other")
        daemon.wait_for("archive.disposed", count=2)
        daemon.stop()
        stage.put("daily.tar.gz", b"tuesday")

        back = stage.backupd("retry", "--all")

    assert back.returncode == 2
    assert "the name is taken" in back.stderr
    assert "1 archive put back" in back.stdout  # the other one
    assert (stage.drop / "daily.tar.gz").read_bytes() == b"tuesday"
    assert (stage.rejected / "daily.tar.gz").read_bytes() == b"monday"
    assert (stage.drop / "other.tar.gz").exists()


@pytest.mark.long
def test_retry_makes_a_pending_delivery_due_at_once(stage: Stage) -> None:
    port = stage.a_free_port()
    wait = '[destination.vault.retry]\ninitial = "1h"\nmax = "1h"'
    stage.configure(f"https://127.0.0.1:{port}/v1/upload", destination=wait)
    daemon = stage.daemon().ready()
    stage.put("sw.tar.gz", b"content")
    daemon.wait_for("delivery.deferred")
    [pending] = json.loads(stage.backupd("list", "--json").stdout)

    done = stage.backupd("retry", pending["id"])

    assert (done.returncode, done.stderr) == (0, "")
    [retried] = json.loads(stage.backupd("list", "--json").stdout)
    assert retried["due_at"] < pending["due_at"]


def test_an_archive_older_than_give_up_after_is_rejected(stage: Stage) -> None:
    retry = f'{FAST_RETRY}\ngive_up_after = "1s"'
    stage.configure(f"https://127.0.0.1:{stage.a_free_port()}/", destination=retry)
    daemon = stage.daemon().ready()
    stage.put("sw.tar.gz", b"content")

    daemon.wait_for("archive.disposed")

    [event] = daemon.events("archive.rejected")
    assert event["reason"] == "gave_up"
    assert "Connection refused" in event["error"]
    assert stage.archives(stage.rejected) == [stage.rejected / "sw.tar.gz"]
    [delivery] = json.loads((stage.rejected / "sw.tar.gz.reason.json").read_bytes())["deliveries"]
    assert delivery["reason"] == "gave_up"
