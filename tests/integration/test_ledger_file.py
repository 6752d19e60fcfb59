"""The file of the SQLite ledger: its lock and schema, damage, a full disk, and a killed process."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from backupd.core.devices import Device
from backupd.core.errors import (
    LedgerDamagedError,
    LedgerError,
    LedgerFullError,
    LedgerUnreachableError,
    LedgerUnreadableError,
)
from backupd.ledger.port import ClockReading, DispositionResult
from backupd.ledger.sqlite.connection import (
    FILE_NAME,
    LOCK_NAME,
    StateLock,
    daemon_pid,
    open_for_reading,
    open_ledger,
)
from backupd.ledger.sqlite.deliveries import SqliteLedger
from tests.factories import (
    NOW,
    a_candidate,
    a_claim_result,
    a_snapshot,
    deferred,
    delivered,
    record_dispositions,
)
from tests.privileges import a_folder_of_nobody, without_rights


def a_ledger_with(state: Path, *names: bytes) -> None:
    """Create a ledger with a pending archive for each name."""
    ledger = SqliteLedger(open_ledger(state).connection)
    ledger.enqueue([a_candidate(name) for name in names], ["vault"], NOW)
    ledger.close()


def pending(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM delivery WHERE state = 'pending'").fetchone()[0])


def quarantined_ledgers(state: Path) -> list[Path]:
    return sorted(path for path in state.glob("*.damaged-*") if not path.name.endswith(("-wal", "-shm")))


# one daemon at a time

HOLD_LOCK = """
import sys
from pathlib import Path
from backupd.ledger.sqlite.connection import StateLock
lock = StateLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process with the lock on the state directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_daemon_is_refused_with_the_process_id_of_the_first(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(LedgerError) as refused:
        StateLock(tmp_path)
    assert f"another backupd (process {holder.pid}) uses it" in refused.value.message
    assert daemon_pid(tmp_path) == holder.pid


def test_a_killed_daemon_leaves_no_lock_and_requires_a_check(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    holder.kill()
    holder.wait()
    assert daemon_pid(tmp_path) is None
    with StateLock(tmp_path) as lock:
        assert lock.check
        assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"


def test_after_a_clean_end_no_check_is_required(tmp_path: Path) -> None:
    with StateLock(tmp_path) as first:
        assert not first.check
    with StateLock(tmp_path) as second:
        assert not second.check


def test_after_an_error_a_check_is_required(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StateLock(tmp_path):
        _ = 1 / 0
    with StateLock(tmp_path) as lock:
        assert lock.check


def test_without_a_daemon_there_is_no_process_id(tmp_path: Path) -> None:
    assert daemon_pid(tmp_path / "nowhere") is None
    with StateLock(tmp_path):
        pass
    assert daemon_pid(tmp_path) is None


def test_a_running_daemon_is_found_by_its_process_id(tmp_path: Path) -> None:
    with StateLock(tmp_path):
        assert daemon_pid(tmp_path) == os.getpid()


def test_a_state_directory_that_cannot_be_created_is_an_error() -> None:
    with a_folder_of_nobody() as folder:
        folder.chmod(0o555)
        with without_rights(), pytest.raises(LedgerError) as refused:
            StateLock(folder / "state")
    assert "can't be written" in refused.value.message


# the file and its schema


def test_a_ledger_is_readable_by_its_owner_and_group_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with StateLock(tmp_path / "state"):
            ledger = SqliteLedger(open_ledger(tmp_path / "state").connection)
            ledger.enqueue([a_candidate()], ["vault"], NOW)
            modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
            ledger.close()
    finally:
        os.umask(before)
    assert modes.pop(LOCK_NAME) == 0o640
    assert modes == dict.fromkeys((FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"), 0o640)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o750


def test_a_reopened_ledger_has_its_content_after_every_check(tmp_path: Path) -> None:
    a_ledger_with(tmp_path, b"r1", b"r2")
    for check in ("", "quick_check", "integrity_check"):
        opened = open_ledger(tmp_path, check=check)
        assert opened.quarantined_path is None
        assert pending(opened.connection) == 2
        opened.connection.close()


def test_a_ledger_with_a_newer_schema_is_refused_and_not_changed(tmp_path: Path) -> None:
    a_ledger_with(tmp_path, b"r1")
    with sqlite3.connect(tmp_path / FILE_NAME) as raw:
        raw.execute("PRAGMA user_version = 999")
    raw.close()
    for opener in (open_ledger, open_for_reading):
        with pytest.raises(LedgerError, match="schema version 999"):
            opener(tmp_path)
    assert quarantined_ledgers(tmp_path) == []


def test_a_ledger_without_permission_is_refused_and_not_changed() -> None:
    with a_folder_of_nobody() as folder:
        a_ledger_with(folder, b"r1")
        (folder / FILE_NAME).chmod(0)
        before = sorted(path.name for path in folder.iterdir())
        with without_rights(), pytest.raises(LedgerError, match="unable to open"):
            open_ledger(folder)
        assert sorted(path.name for path in folder.iterdir()) == before


def test_a_ledger_of_another_owner_with_write_permission_is_usable() -> None:
    """The owner is another user, as after a `backupd retry` by root."""
    with a_folder_of_nobody() as folder:
        a_ledger_with(folder, b"r1")
        (folder / FILE_NAME).chmod(0o666)
        with without_rights():
            opened = open_ledger(folder)
            assert pending(opened.connection) == 1
            opened.connection.close()


def test_commands_open_the_ledger_read_only(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger here yet"):
        open_for_reading(tmp_path)
    a_ledger_with(tmp_path, b"r1")
    connection = open_for_reading(tmp_path)
    assert pending(connection) == 1
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM delivery")
    connection.close()


class WatchedConnection(sqlite3.Connection):
    """Records the `synchronous` level of each commit."""

    levels: list[int]

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql == "COMMIT":
            self.levels.append(super().execute("PRAGMA synchronous").fetchone()[0])
        return super().execute(sql, parameters)


NORMAL, FULL = 1, 2


def test_results_are_synced_and_claims_are_not(tmp_path: Path) -> None:
    a_ledger_with(tmp_path)
    connection = sqlite3.connect(tmp_path / FILE_NAME, factory=WatchedConnection, isolation_level=None)
    connection.levels = []
    ledger = SqliteLedger(connection)
    ledger.enqueue([a_candidate()], ["vault"], NOW)
    (delivery,) = ledger.claim("vault", NOW)
    assert connection.levels == [NORMAL, NORMAL, NORMAL]  # the first one begins the session
    ledger.record([a_claim_result(delivery, delivered())], NOW)
    assert connection.levels == [NORMAL, NORMAL, NORMAL, FULL]
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    ledger.close()


def test_changes_are_found_by_an_index(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    plans = []
    for cursor in ((), ledger.known_since("switches").cursor):
        statements: list[str] = []
        ledger._db.set_trace_callback(statements.append)
        ledger.known_since("switches", cursor)
        ledger._db.set_trace_callback(None)
        plans += [row[3] for each in statements for row in ledger._db.execute(f"EXPLAIN QUERY PLAN {each}")]
    newest = ["SCAN change", "SCALAR SUBQUERY 1", "SEARCH archive"]  # one row, and the end of the table
    assert plans == [
        *newest,
        "SEARCH archive USING INDEX archive_with_entry (drop_name=?)",
        *newest,
        "SEARCH archive USING INDEX archive_changed (changed>?)",
        "CORRELATED SCALAR SUBQUERY 1",
        "SEARCH other USING INDEX archive_with_entry (drop_name=? AND relpath=?)",
    ]
    ledger.close()


def steps_of_all_calls(ledger: SqliteLedger) -> dict[str, int]:
    """Call every method that a daemon calls repeatedly; return the number of SQLite steps of each."""
    costs: dict[str, int] = {}

    def cost(method: Callable[..., Any], *arguments: Any) -> Any:
        steps = [0]
        ledger._db.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)
        result = method(*arguments)
        ledger._db.set_progress_handler(None, 1)
        costs[method.__name__] = steps[0]
        return result

    before = ledger.known_since("switches").cursor
    cost(ledger.enqueue, [a_candidate(b"new.cfg")], ["vault"], NOW)
    (delivery,) = cost(ledger.claim, "vault", NOW)
    cost(ledger.next_due, "vault")
    cost(ledger.bring_forward, "vault", NOW)
    cost(ledger.backlog)
    cost(ledger.release, [delivery])
    cost(ledger.release_own)
    cost(ledger.reap)
    (delivery,) = ledger.claim("vault", NOW)
    (completed,) = cost(ledger.record, [a_claim_result(delivery, delivered())], NOW).completed
    cost(ledger.pending_dispositions)
    cost(ledger.count_pending_dispositions)
    terms = cost(ledger.stewardship, ["switches"])
    done = [DispositionResult(completed.archive.id, b"sent/new.cfg")]
    cost(ledger.record_dispositions, done, [], terms, NOW)
    cost(ledger.known_since, "switches")
    cost(ledger.known_since, "switches", before)
    cost(ledger.count_quarantined)
    cost(ledger.queue_state, ["switches"], ["vault"])
    cost(ledger.save_failure, "vault", None)
    cost(ledger.save_snapshot, a_snapshot())
    cost(ledger.pauses)
    cost(ledger.delete_ended_pauses, NOW)
    cost(ledger.foreign_version)
    cost(ledger.drop_states)
    cost(ledger.count_devices)
    cost(ledger.possibly_overdue, NOW)
    cost(ledger.record_alarms, [Device("switches", "sw1", NOW)], [])
    cost(ledger.mark_reported, cost(ledger.unusual_archives))
    cost(ledger.save_clock_reading, ClockReading(NOW))
    cost(ledger.last_clock_reading)
    cost(ledger.prune, NOW - timedelta(days=1), 100)
    cost(ledger.learn_devices, "switches", [])
    cost(ledger.knows_devices, "switches")
    return costs


def test_no_call_gets_more_expensive_with_the_history(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    costs = []
    for count in (10, 2000):
        archives = ledger.enqueue([a_candidate(b"%d" % n) for n in range(count)], ["vault"], NOW).queued
        ledger.record(
            [a_claim_result(d, delivered()) for _ in archives for d in ledger.claim("vault", NOW)], NOW
        )
        record_dispositions(
            ledger, [DispositionResult(archive.id, b"sent/x") for archive in archives], [], NOW
        )
        costs.append(steps_of_all_calls(ledger))
    ledger.close()
    few, many = costs
    assert {name: (few[name], many[name]) for name in few if many[name] > few[name] + 200} == {}


# damage


def garbage(ledger: Path) -> None:
    ledger.write_bytes(b"this is no database\n" * 1000)


def emptied(ledger: Path) -> None:
    ledger.write_bytes(b"")


def cut(ledger: Path) -> None:
    os.truncate(ledger, ledger.stat().st_size // 2)


def torn_pages(ledger: Path) -> None:
    with ledger.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (ledger.stat().st_size - 4096))


@pytest.mark.parametrize("damage", [garbage, emptied, cut, torn_pages])
def test_a_damaged_ledger_is_renamed_and_never_deleted(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    a_ledger_with(tmp_path, *(b"r%d" % number for number in range(300)))
    damage(tmp_path / FILE_NAME)
    remains = (tmp_path / FILE_NAME).read_bytes()

    opened = open_ledger(tmp_path, check="quick_check")

    assert opened.quarantined_path is not None
    assert quarantined_ledgers(tmp_path) == [opened.quarantined_path]
    assert opened.quarantined_path.read_bytes() == remains
    assert pending(opened.connection) == 0
    opened.connection.close()
    a_ledger_with(tmp_path, b"r1")
    again = open_ledger(tmp_path, check="quick_check")
    assert (again.quarantined_path, pending(again.connection)) == (None, 1)
    again.connection.close()


@pytest.mark.parametrize("damage", [garbage, emptied])
def test_the_write_ahead_log_of_a_damaged_ledger_is_kept(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """The last transactions may be in the write-ahead log only."""
    live, state = tmp_path / "live", tmp_path / "state"
    live.mkdir()
    opened = open_ledger(live)
    SqliteLedger(opened.connection).enqueue([a_candidate(b"in-the-log")], ["vault"], NOW)
    shutil.copytree(live, state)  # the state after a power loss
    opened.connection.close()
    log = (state / f"{FILE_NAME}-wal").read_bytes()
    assert b"in-the-log" in log
    damage(state / FILE_NAME)

    again = open_ledger(state, check="quick_check")

    found = b"".join(path.read_bytes() for path in state.iterdir())
    assert b"in-the-log" in found
    if again.quarantined_path is not None:
        assert Path(f"{again.quarantined_path}-wal").read_bytes() == log
    else:
        assert pending(again.connection) == 1
    again.connection.close()


def test_damage_in_a_page_that_opening_does_not_read_is_detected_by_the_check(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    ledger.enqueue([a_candidate(b"r%d" % number) for number in range(2000)], ["vault"], NOW)
    ledger.close()
    path = tmp_path / FILE_NAME
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4096 // 2 * 4096)  # a page in the middle
        file.write(b"\xff" * 4096)

    opened = open_ledger(tmp_path)
    assert opened.quarantined_path is None
    opened.connection.close()
    opened = open_ledger(tmp_path, check="quick_check")
    assert opened.quarantined_path is not None
    opened.connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE archive SET drop_name = CAST(x'ff' AS TEXT)",
        "UPDATE archive SET queued_at = 1 << 62",
        "UPDATE archive SET inode = 'none'",
        "UPDATE delivery SET archive_id = archive_id + 900",
        "UPDATE delivery SET due_at = due_at - (1 << 62)",
        "UPDATE delivery SET digest = CAST(x'ff' AS TEXT)",
        "DROP INDEX delivery_due",
        "DROP TABLE attempt",
        "CREATE UNIQUE INDEX another ON delivery (digest)",
    ],
)
def test_an_invalid_value_or_schema_is_damage_although_a_check_passes(tmp_path: Path, damage: str) -> None:
    a_ledger_with(tmp_path, b"r1", b"r2")
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as db:
        db.execute(damage)
    opened = open_ledger(tmp_path, check="quick_check")
    assert opened.quarantined_path is None
    ledger = SqliteLedger(opened.connection)
    with pytest.raises(LedgerUnreadableError):
        _deliver_all(ledger)
    ledger.close()


def test_a_value_that_cannot_be_written_is_no_damage(tmp_path: Path) -> None:
    """The value came from a destination, which must not cause the ledger to be replaced."""
    a_ledger_with(tmp_path, b"r1")
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    [delivery] = ledger.claim("vault", NOW)
    with pytest.raises(OverflowError):
        ledger.record([a_claim_result(delivery, replace(deferred(), http_status=10**30))], NOW)
    ledger.record([a_claim_result(delivery, delivered())], NOW)
    ledger.close()


def test_a_transaction_that_was_left_open_is_rolled_back_by_the_next_one(tmp_path: Path) -> None:
    a_ledger_with(tmp_path, b"r1")
    opened = open_ledger(tmp_path)
    ledger = SqliteLedger(opened.connection)
    opened.connection.execute("BEGIN IMMEDIATE")
    opened.connection.execute("DELETE FROM archive")
    assert len(ledger.claim("vault", NOW)) == 1
    ledger.close()


def _deliver_all(ledger: SqliteLedger) -> None:
    ledger.backlog()
    ledger.next_due("vault")
    ledger.record([a_claim_result(one, delivered()) for one in ledger.claim("vault", NOW, limit=9)], NOW)


def test_the_end_of_a_daemon_determines_the_check_at_the_next_start(tmp_path: Path) -> None:
    damaged, unreadable = LedgerDamagedError("damaged"), LedgerUnreadableError("a text is none")
    seen = []
    for error in (None, OSError("another one"), damaged, unreadable, damaged, None, None):
        with contextlib.suppress(LedgerDamagedError, OSError), StateLock(tmp_path) as lock:
            seen.append((lock.check, lock.must_replace))
            assert daemon_pid(tmp_path) == os.getpid()
            if error is not None:
                raise error
    quick, full, none = ("quick_check", False), ("integrity_check", False), ("", False)
    assert seen == [none, none, quick, full, ("quick_check", True), full, none]

    a_ledger_with(tmp_path, b"r1")
    opened = open_ledger(tmp_path, must_replace=True)
    assert pending(opened.connection) == 0
    opened.connection.close()
    assert opened.quarantined_path is not None
    with contextlib.closing(sqlite3.connect(opened.quarantined_path)) as quarantined:
        assert pending(quarantined) == 1


def test_two_damaged_ledgers_are_both_kept(tmp_path: Path) -> None:
    for content in (b"one" * 1000, b"two" * 1000):
        (tmp_path / FILE_NAME).write_bytes(content)
        open_ledger(tmp_path).connection.close()
    assert [path.read_bytes()[:3] for path in quarantined_ledgers(tmp_path)] == [b"one", b"two"]


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.root
def test_a_full_disk_undoes_whole_transactions_and_the_ledger_stays_usable(small_disk: Path) -> None:
    connection = open_ledger(small_disk).connection
    ledger = SqliteLedger(connection)
    names = [b"r%d" % number for number in range(100)]
    ledger.enqueue([a_candidate(name) for name in names], ["vault"], NOW)
    claims = ledger.claim("vault", NOW, limit=len(names))
    ended = [a_claim_result(one, deferred(), delivered(body="x" * 4000)) for one in claims]
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # so that the log has no free pages
    filler = fill(small_disk)

    with pytest.raises(LedgerError, match="full") as failed:
        ledger.record(ended, NOW)
    assert "free space" in failed.value.hint
    with pytest.raises(LedgerError, match="full"):
        ledger.enqueue(
            [a_candidate(b"more-%d" % number + bytes(3000)) for number in range(100)], ["vault"], NOW
        )

    assert ledger.pending_dispositions() == []
    assert ledger.backlog()["vault"].pending == 100
    assert len(ledger.known_since("switches").added) == 100
    filler.unlink()
    assert len(ledger.record(ended, NOW).completed) == 100
    ledger.close()
    reopened = open_ledger(small_disk, check="quick_check")
    assert reopened.quarantined_path is None
    assert len(SqliteLedger(reopened.connection).pending_dispositions()) == 100
    assert reopened.connection.execute("SELECT count(*) FROM attempt").fetchone() == (200,)
    reopened.connection.close()


@pytest.mark.root
def test_a_full_disk_at_the_start_is_an_error_and_leaves_no_empty_ledger(small_disk: Path) -> None:
    state = small_disk / "state"
    with StateLock(state):
        pass
    filler = fill(small_disk)
    with pytest.raises(LedgerError, match="can't be written"):
        StateLock(state)
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"full|disk"):
            open_ledger(state)
    filler.unlink()
    with StateLock(state) as lock:
        assert not lock.check
        opened = open_ledger(state)
        assert opened.quarantined_path is None
        opened.connection.close()


# an outage of the disk


@contextlib.contextmanager
def failing_writes(state: Path) -> Iterator[None]:
    """Make writes that would enlarge the write-ahead log fail with an I/O error, as on a broken disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((state / f"{FILE_NAME}-wal").stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_outage_ends_with_the_first_change_that_is_written(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    for _ in range(2):
        ledger.check_storage()
        with failing_writes(tmp_path):
            for _ in range(3):
                with pytest.raises(LedgerUnreachableError, match="disk I/O error") as failed:
                    ledger.enqueue([a_candidate()], ["vault"], NOW)
            assert failed.value.exit_code == 69
            assert ledger.backlog() == {}  # SQLite reads what it has in memory
        with pytest.raises(LedgerUnreachableError, match="disk I/O error"):
            ledger.check_storage()
        ledger.save_failure("vault", "connect_failed")
    ledger.check_storage()
    ledger.close()


# a process that is killed

RECORD_UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.port import DispositionResult
from backupd.ledger.sqlite.deliveries import SqliteLedger
from tests.factories import NOW, a_candidate, delivered, a_claim_result, record_dispositions
ledger = SqliteLedger(open_ledger(Path(sys.argv[1])).connection)
for number in itertools.count():
    names = [b"%s-%d-%d" % (sys.argv[2].encode(), number, n) for n in range(3)]
    ledger.enqueue([a_candidate(name) for name in names], ["vault"], NOW)
    ended = [a_claim_result(one, delivered()) for one in ledger.claim("vault", NOW, limit=2)]
    completed = ledger.record(ended, NOW).completed
    print(*(one.delivery.id for one in ended), flush=True)
    record_dispositions(ledger, [DispositionResult(completed[0].archive.id, b"sent/x")], [], NOW)
"""


def test_a_killed_process_loses_no_recorded_result(tmp_path: Path) -> None:
    recorded: set[str] = set()
    for turn in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", RECORD_UNTIL_KILLED, str(tmp_path), str(turn)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            for _ in range(20 + 13 * turn):
                recorded |= set(process.stdout.readline().split())
            process.send_signal(signal.SIGKILL)
            recorded |= {ident for line in process.stdout if line.endswith("\n") for ident in line.split()}
    opened = open_ledger(tmp_path, check="quick_check")
    assert opened.quarantined_path is None
    query = "SELECT id, state, (SELECT count(*) FROM attempt WHERE delivery_id = id) FROM delivery"
    found = {ident: (state, attempts) for ident, state, attempts in opened.connection.execute(query)}
    assert len(recorded) >= 2 * (20 + 33 + 46 + 59)
    assert {found[ident] for ident in recorded} == {("delivered", 1)}
    assert set(found.values()) <= {("delivered", 1), ("pending", 0), ("claimed", 0)}
    opened.connection.close()


def test_workers_that_claim_after_the_disk_was_full_are_in_one_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session could not begin when the ledger was opened; claims of a second one would be released."""

    def full(_ledger: SqliteLedger) -> None:
        raise LedgerFullError("the ledger can't be written: database or disk is full", "free space")

    for number in range(20):
        (tmp_path / str(number)).mkdir()
        with monkeypatch.context() as patched:
            patched.setattr(SqliteLedger, "renew", full)
            ledger = SqliteLedger(open_ledger(tmp_path / str(number)).connection)
        ledger.enqueue([a_candidate(b"r%d" % each) for each in range(8)], ["vault"], NOW)
        start = threading.Barrier(8)

        def claim(ledger: SqliteLedger = ledger, start: threading.Barrier = start) -> set[int]:
            start.wait()
            return {delivery.claim.session for delivery in ledger.claim("vault", NOW)}

        with ThreadPoolExecutor(8) as pool:
            sessions = set[int]().union(*(each.result() for each in [pool.submit(claim) for _ in range(8)]))
        assert sessions == {ledger.session}
        assert ledger.reap() == 0
        ledger.close()
