"""The intake with checks: large archives, archives that change while they are examined, and its end."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backupd.dropfolder.inspect import inspect
from tests.integration.test_intake import LONG, RunningIntake, running_intake
from tests.stage import until

TERABYTE = 10**12
LARGE = 65 << 20
"""Bytes of an archive that counts as large."""


def a_tar(size: int) -> bytes:
    """Return the header of a tar with one member of zeros; the whole tar has `size` bytes."""
    header = bytearray(512)
    header[:1], header[124:136] = b"a", b"\x80" + (size - 1536).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def put_sparse(scene: RunningIntake, name: str, size: int, content: bytes = b"") -> Path:
    """Rename a file that starts with `content` and has zeros up to its size into the folder."""
    part = scene.base / "part"
    with part.open("wb") as stream:
        stream.write(content)
        stream.truncate(size)
    return part.rename(scene.root / name)


def is_open(path: Path) -> bool:
    """Return whether this process has a file open."""
    return any(os.path.realpath(fd) == str(path) for fd in Path("/proc/self/fd").iterdir())


@pytest.fixture
def full(tmp_path: Path) -> Iterator[RunningIntake]:
    """A drop folder in which everything is checked, scanned once at the start."""
    with running_intake(tmp_path, rescan_every=LONG, inspect="full", checksum_file="auto") as scene:
        yield scene


def put_huge(scene: RunningIntake) -> Path:
    """Put a tar of a terabyte into the folder, and wait until it is being read."""
    path = put_sparse(scene, "huge.tar", TERABYTE, a_tar(TERABYTE))
    until(lambda: is_open(path), "the tar to be examined")
    return path


def test_archives_of_terabytes_do_not_delay_small_ones(full: RunningIntake) -> None:
    put_huge(full)
    for number in range(6):
        put_sparse(full, f"huge-{number}.tar", TERABYTE, a_tar(TERABYTE))
        full.put(f"hole-{number}.cfg.sha256", b"0" * 64)
        put_sparse(full, f"hole-{number}.cfg", TERABYTE)
    small = [f"r{number}.cfg" for number in range(20)]
    for name in small:
        full.put(name)

    full.wait_queued(*small)


@pytest.mark.parametrize("large_bytes", [0, 2 * TERABYTE], ids=["large", "small"])
def test_costly_archives_make_way_for_the_others_of_their_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    """Each of the first ones would take hours."""
    monkeypatch.setattr("backupd.intake.examiner._LARGE_BYTES", large_bytes)
    with running_intake(tmp_path, rescan_every=LONG, inspect="full") as scene:
        for number in range(8):
            put_sparse(scene, f"costly-{number}.tar", TERABYTE, a_tar(TERABYTE))
        for number in range(20):
            scene.put(f"r{number}.tar.gz", gzip.compress(a_tar(4096) + bytes(4096 - 512)))

        scene.wait_queued(*(f"r{number}.tar.gz" for number in range(20)))

        assert not [name for name in scene.queued() if name.startswith("costly")]


def test_a_costly_archive_is_examined_to_its_end_if_others_go_on_arriving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.examiner._ROUNDS", (0.0, 0.0))
    with running_intake(tmp_path, rescan_every=LONG, inspect="full") as scene:
        put_sparse(scene, "costly.tar", 300 << 20, a_tar(300 << 20))
        for number in itertools.count():
            scene.put(f"r{number}.cfg")
            if "costly.tar" in scene.queued():
                break

        scene.wait_queued(*(f"r{each}.cfg" for each in range(number)))


def test_an_archive_that_no_other_one_waits_for_is_examined_without_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.examiner._ROUNDS", (0.0, 0.0))
    read: list[int] = []

    def counted(fd: int, *args: Any, **keys: Any) -> Any:
        read.append(fd)
        return inspect(fd, *args, **keys)

    monkeypatch.setattr("backupd.intake.examiner.inspect", counted)
    with running_intake(tmp_path, rescan_every=LONG, inspect="full") as scene:
        put_sparse(scene, "r1.tar", 300 << 20, a_tar(300 << 20))

        scene.wait_queued("r1.tar")

    assert len(read) == 1


def test_a_drop_with_costly_archives_does_not_delay_another_drop(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    with (
        running_intake(tmp_path / "one", rescan_every=LONG, inspect="full") as costly,
        running_intake(tmp_path / "other", rescan_every=LONG, inspect="full") as scene,
    ):
        for number in range(8):
            put_sparse(costly, f"costly-{number}.tar", TERABYTE, a_tar(TERABYTE))
        scene.put("r1.tar.gz", gzip.compress(a_tar(4096) + bytes(4096 - 512)))

        scene.wait_queued("r1.tar.gz")


@pytest.mark.parametrize("change", ["removed", "replaced", "rewritten"])
def test_a_file_that_changes_during_its_examination_makes_room_for_the_next_one(
    full: RunningIntake, change: str
) -> None:
    huge = put_huge(full)

    if change == "removed":
        huge.unlink()
    elif change == "replaced":
        put_sparse(full, "huge.tar", 4096, a_tar(4096))
    else:
        huge.write_bytes(a_tar(4096) + bytes(4096 - 512))
    put_sparse(full, "large.tar", LARGE, a_tar(LARGE))

    full.wait_queued("large.tar", *([] if change == "removed" else ["huge.tar"]))
    assert not full.events("archive.ignored")
    assert not full.events("archive.waiting")


def test_an_archive_that_is_replaced_by_copies_during_its_examination_is_queued(
    full: RunningIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run of `rsync --ignore-times` replaces it."""
    path, aside = full.root / "r1.tar", full.base / "aside"

    def replace_and_inspect(*args: Any, **keys: Any) -> Any:
        shutil.copy2(path, aside)
        aside.rename(path)
        return inspect(*args, **keys)

    monkeypatch.setattr("backupd.intake.examiner.inspect", replace_and_inspect)

    put_sparse(full, "r1.tar", 4096, a_tar(4096))

    full.wait_queued("r1.tar")


def test_another_content_of_the_same_size_and_time_is_examined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def replace_and_inspect(fd: int, *args: Any, **keys: Any) -> Any:
        read.append(os.pread(fd, LARGE, 0))
        if len(read) == 1:
            before, aside = path.stat(), scene.base / "aside"
            aside.write_bytes(bytes(before.st_size))
            os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
            aside.rename(path)
        return inspect(fd, *args, **keys)

    monkeypatch.setattr("backupd.intake.examiner.inspect", replace_and_inspect)
    options: dict[str, Any] = {"inspect": "full", "inspect_grace": "0s", "on_suspicious": "reject"}
    with running_intake(tmp_path, rescan_every=LONG, **options) as scene:
        path = scene.root / "r1.tar.gz"
        scene.put(path.name, gzip.compress(a_tar(4096) + bytes(4096 - 512))[:-5])

        until(scene.ledger.pending_dispositions, "the rejection")

    assert read[1:] == [bytes(len(read[0]))]


def test_a_file_with_changed_metadata_is_examined_again_without_a_scan(full: RunningIntake) -> None:
    """There is no event of a chmod."""
    huge = put_huge(full)
    large = put_sparse(full, "large.tar", LARGE, a_tar(LARGE))
    full.wait_found_by_event()  # large.tar has been noticed as well, and waits for the thread
    large.chmod(0o640)
    huge.unlink()

    full.wait_queued("large.tar")
    assert not full.events("watch.degraded")


def test_the_intake_ends_during_an_examination(tmp_path: Path) -> None:
    with running_intake(tmp_path, rescan_every=LONG, inspect="full") as scene:
        put_huge(scene)
    # that its threads have ended is asserted by `RunningIntake.stop`


def test_an_archive_that_takes_too_long_to_inspect_is_queued(
    full: RunningIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.examiner._MAX_TIME", 0.0)

    put_sparse(full, "r1.tar", 4096, a_tar(4096))

    full.wait_queued("r1.tar")
    (ended,) = full.events("inspection.ended")
    assert "longer than 0 s" in ended["error"]


def test_an_archive_that_takes_too_long_to_hash_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.examiner._MAX_TIME", 0.0)
    with running_intake(tmp_path, checksum_file="auto") as scene:
        scene.put("r1.cfg.sha256", hashlib.sha256(b"abc").hexdigest().encode())
        scene.put("r1.cfg")

        (waiting,) = scene.wait_event("archive.waiting")

        assert (waiting["archive"], waiting["reason"]) == ("r1.cfg", "checksum_unusable")
        assert "longer than 0 s" in waiting["error"]
        assert scene.queued() == []


def test_a_checksum_file_that_is_corrected_during_the_examination_is_used(tmp_path: Path) -> None:
    digest = hashlib.md5()
    for _ in range(512):
        digest.update(bytes(1 << 20))
    with running_intake(tmp_path, rescan_every=LONG, checksum_file="auto", inspect_grace="0s") as scene:
        scene.put("r1.cfg.md5", b"0" * 32)
        path = put_sparse(scene, "r1.cfg", 512 << 20)
        until(lambda: is_open(path), "the file to be read")

        scene.put("r1.cfg.md5", digest.hexdigest().encode())

        scene.wait_queued("r1.cfg")
