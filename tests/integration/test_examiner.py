"""The examiner: which job is worked on next, and for how long."""

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


def a_job(name: bytes, size: int) -> ExaminerJob:
    return ExaminerJob(FileCandidate("switches", name, replace(a_fingerprint(), size=size)), 0.0)


def activated(jobs: ExaminerQueue) -> list[bytes]:
    return [job.candidate.relpath for job in jobs.activate()]


def test_large_archives_never_occupy_all_places() -> None:
    jobs = ExaminerQueue()
    for number in range(9):
        jobs.add(a_job(b"large-%d" % number, LARGE))
    assert activated(jobs) == [b"large-0", b"large-1", b"large-2"]
    jobs.add(a_job(b"small", 1))
    assert activated(jobs) == [b"small"]
    assert activated(jobs) == []


def test_small_archives_leave_one_place_to_a_large_one() -> None:
    jobs = ExaminerQueue()
    for number in range(9):
        jobs.add(a_job(b"small-%d" % number, 1))
    jobs.add(a_job(b"large", LARGE))
    assert activated(jobs) == [b"large", b"small-0", b"small-1", b"small-2"]
    jobs.active.clear()
    assert activated(jobs) == [b"small-3", b"small-4", b"small-5", b"small-6"]


def test_a_removed_job_is_not_activated() -> None:
    jobs = ExaminerQueue()
    waiting, active = a_job(b"waiting", 1), a_job(b"active", LARGE)
    jobs.add(active)
    jobs.activate()
    jobs.add(waiting)
    jobs.remove(active)
    jobs.remove(waiting)
    assert not jobs


@pytest.fixture
def examiner(tmp_path: Path) -> Iterator[Examiner]:
    folder = DropFolder(str(tmp_path))
    with open(os.devnull, "wb") as null:
        log = EventLog(LineWriter(null.fileno()))
        examiner = Examiner(a_drop(folder, checksum_file="auto"), log, lambda _path, _error: None)
        yield examiner
        examiner.close()
    folder.close()


def add(examiner: Examiner, path: Path) -> None:
    examiner.add(FileCandidate("switches", os.fsencode(path.name), fingerprint_of(path.stat())))


def test_files_of_terabytes_with_checksums_do_not_delay_a_small_file(
    tmp_path: Path, examiner: Examiner
) -> None:
    for number in range(6):
        path = tmp_path / f"hole-{number}.cfg"
        with path.open("wb") as stream:
            stream.truncate(LARGE)
        path.with_name(f"{path.name}.sha256").write_text("0" * 64)
        add(examiner, path)
    for _ in range(20):
        assert examiner.run_slice() == []
    small = tmp_path / "small.cfg"
    small.write_bytes(b"abc")
    add(examiner, small)
    done: list[FileCandidate] = []
    for _ in range(20):
        done += examiner.run_slice()
    assert [candidate.relpath for candidate in done] == [b"small.cfg"]


def test_a_file_whose_digest_takes_too_long_is_held(
    tmp_path: Path, examiner: Examiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.examiner._MAX_WORK_TIME", 0.0)
    path = tmp_path / "r1.cfg"
    path.write_bytes(b"abc")
    path.with_name("r1.cfg.sha256").write_text("0" * 64)
    add(examiner, path)
    assert examiner.run_slice() == []
    (job,) = examiner._on_hold.values()
    assert job.candidate.relpath == b"r1.cfg"
    assert job.digests == {}
