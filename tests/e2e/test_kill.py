"""After `kill -9` at any moment no archive is lost, and none is stored twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.stage import TIMEOUT, Daemon, Stage, until

KILLS = 12
MAX_KILLS = 40
"""Further kills, where the first ones cut too few uploads."""
ARCHIVES_A_KILL = 10
BIG = 12_000_000
"""Bytes of an archive with an upload that takes a while."""


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def rows(stage: Stage, query: str) -> list[tuple[Any, ...]]:
    """Query the ledger, also while a daemon has it open."""
    with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=TIMEOUT)) as ledger:
        return ledger.execute(query).fetchall()


def waiting(stage: Stage) -> list[Path]:
    """Return the archives that are still in the drop folder itself."""
    return [path for path in stage.archives(stage.drop) if not path.is_relative_to(stage.sent)]


def uploading(stage: Stage) -> bool:
    """Return whether the receiver is in the middle of an archive."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_size for path in (stage.store / "incoming").iterdir())
    return False


def assert_all_delivered(stage: Stage, digests: dict[str, str]) -> None:
    """Assert that drop folder, receiver, receipt files and ledger agree that all archives are delivered."""
    assert waiting(stage) == []
    assert {path.name: sha256(path) for path in stage.archives(stage.sent)} == digests
    assert sorted(map(sha256, stage.stored())) == sorted(digests.values())

    receipts = {path.name: json.loads(path.read_bytes()) for path in stage.sent.glob("*.json")}
    assert sorted(receipts) == sorted(f"{name}.receipt.json" for name in digests)
    for record in receipts.values():
        assert record["digest"] == f"sha256:{digests[record['archive']]}"

    listed = json.loads(stage.backupd("list", "--json", "--limit", "100000").stdout)
    assert {r["archive"]["relpath"]: r["digest"] for r in listed} == {
        name: f"sha256:{digest}" for name, digest in digests.items()
    }
    assert len(listed) == len(digests)
    assert {r["state"] for r in listed} == {"delivered"}
    assert {r["disposed_to"] for r in listed} == {f"sent/{name}" for name in digests}
    assert rows(stage, "SELECT DISTINCT state, disposition, has_entry FROM archive") == [
        ("delivered", "done", 0)
    ]
    assert rows(stage, "PRAGMA integrity_check") == [("ok",)]


def put_some(stage: Stage, chance: random.Random, begin: int) -> dict[str, str]:
    """Put a big archive and small ones into the drop folder, and return their digests by name."""
    digests = {}
    big = chance.randrange(ARCHIVES_A_KILL)
    for number in range(ARCHIVES_A_KILL):
        size = BIG if number == big else chance.choice((1, 700, 20_000, 300_000))
        name = f"sw-{begin + number:03}.tar.gz"
        content = b"%d " % (begin + number) + os.urandom(size)
        digests[name] = hashlib.sha256(content).hexdigest()
        stage.put(name, content)
    return digests


def kill_at_a_random_moment(stage: Stage, daemon: Daemon, chance: random.Random) -> bool:
    """Wait for a queued archive and, in most cases, for an upload, then kill; return if an upload was cut."""
    daemon.wait_for("archive.queued")
    if chance.random() < 0.6:
        with contextlib.suppress(AssertionError):  # the uploads were too quick: any other moment will do
            until(lambda: uploading(stage) or not waiting(stage), "an upload", timeout=5)
    time.sleep(chance.random() ** 2 * 0.2)
    daemon.kill()
    return bool(rows(stage, "SELECT 1 FROM delivery WHERE state = 'claimed'"))


@pytest.mark.long
def test_a_dozen_kills_lose_no_archive_and_store_none_twice(stage: Stage, receiver: RunningReceiver) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    stage.configure(
        receiver.url, drop='stable_for = "0s"', destination='[destination.vault.retry]\nmax = "1s"'
    )
    first: Daemon | None = None
    digests: dict[str, str] = {}
    kills = cut = 0
    while kills < KILLS or (cut < KILLS // 4 and kills < MAX_KILLS):
        early = chance.random() < 0.5
        if early:
            digests |= put_some(stage, chance, kills * ARCHIVES_A_KILL)
        daemon = stage.daemon()
        first = first or daemon
        if not early:
            daemon.ready()
            digests |= put_some(stage, chance, kills * ARCHIVES_A_KILL)
        cut += kill_at_a_random_moment(stage, daemon, chance)
        kills += 1

    last = stage.daemon().ready()
    until(lambda: not waiting(stage), f"all archives, seed {seed}\n{last.text()[-3000:]}")
    assert last.stop() == 0

    print(f"{cut} of {kills} kills cut an upload")
    assert cut >= KILLS // 4
    assert len(digests) == kills * ARCHIVES_A_KILL
    assert_all_delivered(stage, digests)
    assert first is not None
    logged = Counter(event["archive"] for event in first.events("archive.delivered"))
    assert set(logged) == set(digests)
    assert not first.events("archive.rejected")
    assert not first.events("ledger.recreated")


class HoldingProxy:
    """A TCP proxy that holds back the response once a connection has sent `after` bytes."""

    def __init__(self, port: int, after: int) -> None:
        self._behind = port
        self._after = after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.release = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._behind))
                held = threading.Event()
                threading.Thread(target=self._pass, args=(client, server, held), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client, held), daemon=True).start()

    def _pass(self, client: socket.socket, server: socket.socket, held: threading.Event) -> None:
        count = 0
        with contextlib.suppress(OSError), client, server:
            while data := client.recv(65536):
                count += len(data)
                if count > self._after:
                    held.set()
                server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket, held: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if held.is_set():
                    self.release.wait()
                client.sendall(data)


@pytest.fixture
def holding(receiver: RunningReceiver) -> Iterator[HoldingProxy]:
    with HoldingProxy(receiver.port, after=100_000) as proxy:
        yield proxy


def test_a_kill_between_the_store_and_the_response_leaves_one_copy(
    stage: Stage, receiver: RunningReceiver, holding: HoldingProxy
) -> None:
    stage.configure(receiver.url.replace(str(receiver.port), str(holding.port)))
    daemon = stage.daemon().ready()
    content = os.urandom(400_000)
    stage.put("core.tar.gz", content)
    until(stage.stored, "the archive at the receiver")
    daemon.kill()
    assert not daemon.events("delivery.verified")
    assert waiting(stage) == [stage.drop / "core.tar.gz"]

    holding.release.set()
    again = stage.daemon()
    verified = again.wait_for("delivery.verified")
    again.wait_for("archive.disposed")

    assert again.events("daemon.ready")[0]["released_claims"] == 1
    assert [event["http_status"] for event in verified] == [200]  # the receiver has it already
    assert again.stop() == 0
    assert_all_delivered(stage, {"core.tar.gz": hashlib.sha256(content).hexdigest()})


def test_a_kill_between_the_commit_and_the_move_is_completed_by_the_next_start(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    stage.sent.write_bytes(b"in the way")
    content = os.urandom(10_000)
    stage.put("core.tar.gz", content)
    daemon.wait_for("disposition.failed", archive="core.tar.gz")
    daemon.kill()
    assert rows(stage, "SELECT state, disposition FROM archive") == [("delivered", "due")]
    assert (stage.drop / "core.tar.gz").read_bytes() == content

    stage.sent.unlink()
    again = stage.daemon().ready()
    again.wait_for("archive.disposed", disposition="moved")

    assert again.events("daemon.ready")[0]["pending_dispositions"] == 1
    assert not again.events("delivery.verified")  # no second upload
    assert daemon.events("archive.delivered")
    assert again.stop() == 0
    assert_all_delivered(stage, {"core.tar.gz": hashlib.sha256(content).hexdigest()})


@pytest.mark.long
@pytest.mark.parametrize("left", ["no receipt file", "half of a temporary one", "a complete one"])
def test_a_kill_between_the_move_and_its_commit_leaves_one_complete_receipt_file(
    stage: Stage, receiver: RunningReceiver, left: str
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    content = os.urandom(10_000)
    stage.put("core.tar.gz", content)
    daemon.wait_for("archive.disposed")
    daemon.kill()
    receipt = stage.sent / "core.tar.gz.receipt.json"
    whole = receipt.read_bytes()
    # the state after a kill between the rename and the last commit
    with (
        contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=TIMEOUT)) as ledger,
        ledger,
    ):
        ledger.execute(
            "UPDATE archive SET disposition = 'due', moved_to = NULL, disposed_at = NULL, has_entry = 1"
        )
    match left:
        case "no receipt file":
            receipt.unlink()
        case "half of a temporary one":
            receipt.rename(part := receipt.with_name(".backupd-1-1.part"))
            os.truncate(part, len(whole) // 2)

    again = stage.daemon().ready()
    again.wait_for("archive.disposed", disposition="moved")

    assert receipt.read_bytes() == whole
    assert not list(stage.sent.glob(".*"))
    assert again.stop() == 0
    assert_all_delivered(stage, {"core.tar.gz": hashlib.sha256(content).hexdigest()})
