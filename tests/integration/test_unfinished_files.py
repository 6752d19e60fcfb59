"""`UnfinishedFiles`: which files are finished, and which are logged as ignored."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from backupd.dropfolder.folder import DropFolder
from backupd.intake.problem_list import ProblemList
from backupd.intake.unfinished_files import UnfinishedFiles
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import a_drop


class Locked(DropFolder):
    """A folder that cannot be read while `is_locked` is set."""

    is_locked = False

    def stat(self, relpath: bytes) -> os.stat_result:
        if self.is_locked:
            raise PermissionError(13, "Permission denied")
        return super().stat(relpath)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Locked]:
    folder = Locked(str(tmp_path))
    yield folder
    folder.close()


@pytest.fixture
def unfinished(folder: Locked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnfinishedFiles]:
    ledger = SqliteLedger(open_ledger(tmp_path_factory.mktemp("state")).connection)
    drop = a_drop(folder, stable_for=timedelta(seconds=5))
    with (log_of(folder)).open("wb") as stream:
        problems = ProblemList(drop.name, ledger)
        yield UnfinishedFiles(drop, problems, EventLog(LineWriter(stream.fileno())))
    ledger.close()


def log_of(folder: Locked) -> Path:
    return Path(folder.path) / ".log"


def a_file(folder: Locked) -> Path:
    path = Path(folder.path) / "r1.cfg"
    path.write_bytes(b"abc")
    return path


def test_a_file_that_becomes_a_folder_is_forgotten(folder: Locked, unfinished: UnfinishedFiles) -> None:
    """Otherwise it would always be due and be checked in a busy loop."""
    path = a_file(folder)
    assert unfinished.check(b"r1.cfg", now=0.0) is None
    assert unfinished.next_due() == 5.0
    path.unlink()
    path.mkdir()
    assert unfinished.check(b"r1.cfg", now=5.0) is None
    assert unfinished.next_due() is None


def test_a_file_that_becomes_unreadable_is_retried_at_the_next_scan(
    folder: Locked, unfinished: UnfinishedFiles
) -> None:
    a_file(folder)
    assert unfinished.check(b"r1.cfg", now=0.0) is None
    folder.is_locked = True
    assert unfinished.check(b"r1.cfg", now=5.0) is None
    assert unfinished.next_due() is None
    folder.is_locked = False
    assert unfinished.check(b"r1.cfg", now=6.0) is None
    assert unfinished.check(b"r1.cfg", now=11.0) is not None


def test_a_file_that_is_written_to_for_an_hour_is_logged_once(
    folder: Locked, unfinished: UnfinishedFiles
) -> None:
    path = a_file(folder)
    for now in range(0, 9000, 4):
        with path.open("ab") as stream:
            stream.write(b"more")
        assert unfinished.check(b"r1.cfg", float(now)) is None
    (record,) = [json.loads(line) for line in log_of(folder).read_text().splitlines()]
    assert (record["event"], record["archive"], record["reason"]) == (
        "archive.waiting",
        "r1.cfg",
        "unfinished",
    )
    assert unfinished.check(b"r1.cfg", 9100.0) is not None

    with path.open("ab") as stream:
        stream.write(b"another one")
    assert unfinished.check(b"r1.cfg", 9200.0) is None
    assert len(log_of(folder).read_text().splitlines()) == 1


def test_a_write_lease_of_the_owner_is_named_in_the_hint(folder: Locked, unfinished: UnfinishedFiles) -> None:
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with a_file(folder).open("r+b") as stream:
            fcntl.fcntl(stream.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
            for now in (0.0, 6.0):
                assert unfinished.check(b"r1.cfg", now) is None
        (record,) = [json.loads(line) for line in log_of(folder).read_text().splitlines()]
        assert (record["archive"], record["reason"]) == ("r1.cfg", "unreadable")
        assert "write lease" in record["hint"]
    finally:
        signal.signal(signal.SIGIO, before)


@pytest.mark.parametrize(("number", "hint"), [(errno.EACCES, "read permission"), (errno.EIO, "dmesg")])
def test_the_hint_of_an_unreadable_file_fits_its_error(
    unfinished: UnfinishedFiles, folder: Locked, number: int, hint: str
) -> None:
    unfinished.add_unreadable(b"r1.cfg", OSError(number, os.strerror(number)))

    (line,) = log_of(folder).read_text().splitlines()
    assert json.loads(line)["error"] == os.strerror(number)
    assert hint in json.loads(line)["hint"]
