"""Whose turn it is to be examined."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backupd.core.model import fingerprint_of
from backupd.dropfolder.folder import DropFolder
from backupd.intake.examiner import Examiner, ExaminerJob, ExaminerQueue
from backupd.ledger.port import FileCandidate
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import a_drop, a_fingerprint

LARGE = 10**12


def a_case(name: bytes, size: int) -> ExaminerJob:
    return ExaminerJob(FileCandidate("switches", name, replace(a_fingerprint(), size=size)), 0.0)


def begun(turns: ExaminerQueue) -> list[bytes]:
    return [case.sighting.relpath for case in turns.begin()]


def test_large_ones_never_have_all_turns() -> None:
    turns = ExaminerQueue()
    for number in range(9):
        turns.add(a_case(b"large-%d" % number, LARGE))
    assert begun(turns) == [b"large-0", b"large-1", b"large-2"]
    turns.add(a_case(b"small", 1))
    assert begun(turns) == [b"small"]
    assert begun(turns) == []


def test_small_ones_never_have_all_turns_either() -> None:
    turns = ExaminerQueue()
    for number in range(9):
        turns.add(a_case(b"small-%d" % number, 1))
    turns.add(a_case(b"large", LARGE))
    assert begun(turns) == [b"large", b"small-0", b"small-1", b"small-2"]
    turns.active.clear()
    assert begun(turns) == [b"small-3", b"small-4", b"small-5", b"small-6"]


def test_what_is_dropped_gets_no_turn() -> None:
    turns = ExaminerQueue()
    waiting, active = a_case(b"waiting", 1), a_case(b"active", LARGE)
    turns.add(active)
    turns.begin()
    turns.add(waiting)
    turns.drop(active)
    turns.drop(waiting)
    assert not turns


@pytest.fixture
def examination(tmp_path: Path) -> Iterator[Examiner]:
    folder = DropFolder(str(tmp_path))
    with open(os.devnull, "wb") as null:
        log = EventLog(LineWriter(null.fileno()))
        examination = Examiner(a_drop(folder, checksum_file="auto"), log, lambda _path, _error: None)
        yield examination
        examination.close()
    folder.close()


def take(examination: Examiner, path: Path) -> None:
    examination.add(FileCandidate("switches", os.fsencode(path.name), fingerprint_of(path.stat())))


def test_files_of_terabytes_with_checksums_keep_no_other_waiting(
    tmp_path: Path, examination: Examiner
) -> None:
    for number in range(6):
        path = tmp_path / f"hole-{number}.cfg"
        with path.open("wb") as stream:
            stream.truncate(LARGE)
        path.with_name(f"{path.name}.sha256").write_text("0" * 64)
        take(examination, path)
    for _ in range(20):
        assert examination.run_slice() == []
    honest = tmp_path / "honest.cfg"
    honest.write_bytes(b"abc")
    take(examination, honest)
    done: list[FileCandidate] = []
    for _ in range(20):
        done += examination.run_slice()
    assert [sighting.relpath for sighting in done] == [b"honest.cfg"]


def test_a_digest_that_takes_too_long_is_given_up_and_that_is_waited_for(
    tmp_path: Path, examination: Examiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.examiner._LONGEST", 0.0)
    path = tmp_path / "r1.cfg"
    path.write_bytes(b"abc")
    path.with_name("r1.cfg.sha256").write_text("0" * 64)
    take(examination, path)
    assert examination.run_slice() == []
    (case,) = examination._held.values()
    assert case.sighting.relpath == b"r1.cfg"
    assert case.digests == {}
