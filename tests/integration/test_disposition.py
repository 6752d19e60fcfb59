"""The disposition of files while other programs change the same folders."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backupd.core.model import Archive, DeliveryState, fingerprint_of
from backupd.core.names import receipt_file_name
from backupd.core.policy import Reason
from backupd.delivery.disposition import Disposition
from backupd.dropfolder import move as move_module
from backupd.dropfolder.checksums import move_checksum_files, remove_checksum_files
from backupd.dropfolder.folder import CachedFolder, DropFolder
from backupd.ledger.port import CompletedArchive, DeliveryResult
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import NOW, a_digest, a_drop, an_archive


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "drop").mkdir()
    return tmp_path / "drop"


@pytest.fixture
def folder(root: Path) -> Iterator[DropFolder]:
    folder = DropFolder(str(root))
    yield folder
    folder.close()


def rejected(number: int) -> DeliveryResult:
    return DeliveryResult(
        str(number), "vault", DeliveryState.REJECTED, NOW, None, None, 422, Reason.REFUSED, "no", None
    )


def delivered(root: Path, number: int, name: str = "") -> CompletedArchive:
    name = name or f"r{number}.cfg"
    path = root / name
    path.write_bytes(b"abc")
    archive = Archive(number, "switches", os.fsencode(name), fingerprint_of(path.stat()), NOW)
    digest = str(a_digest(b"abc"))
    result = DeliveryResult(
        str(number), "vault", DeliveryState.DELIVERED, NOW, digest, True, 201, None, None, "{}"
    )
    return CompletedArchive(archive, DeliveryState.DELIVERED, digest, (result,))


def test_a_sent_folder_that_is_removed_during_a_batch_is_created_again(
    folder: DropFolder, root: Path
) -> None:
    drop = a_drop(folder)
    calls = []

    def remove_after_the_first() -> bool:
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(root / "sent")
        return False

    with open(os.devnull, "wb") as null:
        disposition = Disposition({"switches": drop}, EventLog(LineWriter(null.fileno())))
        batch = [delivered(root, number) for number in range(3)]
        done, failed = disposition.dispose(batch, remove_after_the_first)
    assert ([one.moved_to for one in done], failed) == ([b"sent/r0.cfg", b"sent/r1.cfg", b"sent/r2.cfg"], [])
    assert {path.name for path in (root / "sent").iterdir()} >= {"r1.cfg", "r2.cfg", "r2.cfg.receipt.json"}


def test_an_archive_is_missing_if_its_directory_became_a_file(folder: DropFolder, root: Path) -> None:
    (root / "a").mkdir()
    completed = delivered(root, 1, "a/r1.cfg")
    shutil.rmtree(root / "a")
    (root / "a").write_bytes(b"a file")
    with open(os.devnull, "wb") as null:
        drops = {"switches": a_drop(folder)}
        done, failed = Disposition(drops, EventLog(LineWriter(null.fileno()))).dispose([completed])
    assert ([one.moved_to for one in done], failed) == ([None], [])


def test_an_archive_in_a_deep_folder_needs_few_descriptors(folder: DropFolder, root: Path) -> None:
    deep = "/".join(["d"] * 300)
    (root / deep).mkdir(parents=True)
    drop = a_drop(folder)
    one = delivered(root, 1, f"{deep}/r1.cfg")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull, "wb") as null:
        disposition = Disposition({"switches": drop}, EventLog(LineWriter(null.fileno())))
        limit = max(map(int, os.listdir("/proc/self/fd"))) + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
        try:
            done, failed = disposition.dispose([one])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ([one.moved_to for one in done], failed) == ([os.fsencode(f"sent/{deep}/r1.cfg")], [])


def test_a_batch_from_many_directories_is_moved_to_the_right_ones(folder: DropFolder, root: Path) -> None:
    """Also if a file of the same name was sent before, and with more directories than are kept open."""
    drop = a_drop(folder, sent_dir="done/ok", rejected_dir="done/bad")
    batch = []
    for number in range(30):
        for kind in ("ok", "bad"):
            for place in (root / f"d{number}", root / "done" / kind / f"d{number}"):
                place.mkdir(parents=True, exist_ok=True)
            (root / "done" / kind / f"d{number}" / f"{kind}.cfg").write_bytes(b"an older one")
        batch += [delivered(root, number, f"d{number}/ok.cfg"), delivered(root, number, f"d{number}/bad.cfg")]
        batch[-1] = replace(batch[-1], state=DeliveryState.REJECTED, results=(rejected(number),))
    before = len(os.listdir("/proc/self/fd"))
    log = EventLog(LineWriter(os.open(os.devnull, os.O_WRONLY)))
    done, failed = Disposition({"switches": drop}, log).dispose(batch)
    assert failed == []
    assert all(one.moved_to is not None and one.moved_to.startswith(b"done/") for one in done)
    assert len({one.moved_to for one in done}) == 60
    assert not [*root.glob("d*/*.cfg")]
    assert len(os.listdir("/proc/self/fd")) == before + 1  # the log


def test_a_file_that_was_rewritten_after_the_upload_stays(folder: DropFolder, root: Path) -> None:
    """Although its size and modification time were restored; the next scan finds the new content."""
    one = delivered(root, 1)
    path = root / "r1.cfg"
    before = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"xyz")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with open(os.devnull, "wb") as null:
        drop = a_drop(folder)
        disposition = Disposition({"switches": drop}, EventLog(LineWriter(null.fileno())))
        done, failed = disposition.dispose([one])
    assert ([each.moved_to for each in done], failed) == ([None], [])
    assert path.read_bytes() == b"xyz"
    assert not [*root.glob("sent/*")]


@pytest.fixture
def events(tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    """Returns the events with a name that the disposition of `disposition_of` logged."""

    def of_name(name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        return [line for line in lines if line["event"] == name]

    return of_name


@pytest.fixture
def _sigio_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def disposition_of(folder: DropFolder, tmp_path: Path) -> Iterator[Callable[[str], Disposition]]:
    with (tmp_path / "log").open("wb") as log:
        yield lambda action: Disposition(
            {"switches": a_drop(folder, on_delivered=action)},
            EventLog(LineWriter(log.fileno())),
        )


@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_file_that_is_open_for_writing_stays_until_it_is_closed(
    root: Path,
    disposition_of: Callable[[str], Disposition],
    events: Callable[[str], list[dict[str, Any]]],
    action: str,
) -> None:
    one, disposition = delivered(root, 1), disposition_of(action)
    path = root / "r1.cfg"
    with path.open("ab"):
        for _ in range(2):
            assert disposition.dispose([one]) == ([], [1])
        assert path.read_bytes() == b"abc"
    (line,) = events("disposition.failed")
    assert (line["archive"], line["error"]) == ("r1.cfg", "another process has it open for writing")
    assert "fuser" in line["hint"]
    done, failed = disposition.dispose([one])  # it was closed unchanged
    assert ([each.moved_to for each in done], failed) == ([b"sent/r1.cfg" if action == "move" else None], [])
    assert not path.exists()


@pytest.mark.usefixtures("_sigio_ignored")
def test_a_file_with_a_write_lease_stays_until_the_lease_ends(
    root: Path, disposition_of: Callable[[str], Disposition], events: Callable[[str], list[dict[str, Any]]]
) -> None:
    one, disposition = delivered(root, 1), disposition_of("move")
    path = root / "r1.cfg"
    with path.open("r+b") as stream:
        fcntl.fcntl(stream.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert disposition.dispose([one]) == ([], [1])
        assert path.exists()
    (line,) = events("disposition.failed")
    assert line["archive"] == "r1.cfg"
    assert "fuser" in line["hint"]
    done, failed = disposition.dispose([one])
    assert ([each.moved_to for each in done], failed) == ([b"sent/r1.cfg"], [])


@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_file_that_was_appended_to_after_the_upload_stays(
    root: Path, disposition_of: Callable[[str], Disposition], action: str
) -> None:
    one, disposition = delivered(root, 1), disposition_of(action)
    path = root / "r1.cfg"
    with path.open("ab") as stream:
        assert disposition.dispose([one]) == ([], [1])
        stream.write(b"def")
    done, failed = disposition.dispose([one])
    assert ([each.moved_to for each in done], failed) == ([None], [])
    assert path.read_bytes() == b"abcdef"
    assert [entry for entry in root.rglob("*") if entry.is_file()] == [path]


@pytest.mark.usefixtures("_sigio_ignored")
@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_writer_that_opens_a_file_during_its_move_finds_it_in_its_place(
    root: Path,
    disposition_of: Callable[[str], Disposition],
    monkeypatch: pytest.MonkeyPatch,
    action: str,
) -> None:
    """So does a writer that opens the file after the daemon was killed during the move."""
    one, disposition = delivered(root, 1), disposition_of(action)
    path, calls_of_move, real = root / "r1.cfg", [], move_module.move_to_hidden_name

    def move_while_a_writer_opens_it(*arguments: Any) -> None:
        with pytest.raises(BlockingIOError):  # without O_NONBLOCK it would wait until the move has ended
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        calls_of_move.append(1)
        real(*arguments)

    monkeypatch.setattr(move_module, "move_to_hidden_name", move_while_a_writer_opens_it)
    done, failed = disposition.dispose([one])
    assert ([each.moved_to for each in done], failed, calls_of_move) == ([None], [], [1])
    assert path.read_bytes() == b"abc"
    assert [entry for entry in root.rglob("*") if entry.is_file()] == [path]

    two = delivered(root, 2)
    hidden = root / ("sent" if action == "move" else "") / ".backupd-2.taken"
    (root / "r2.cfg").rename(hidden)
    with hidden.open("ab"):
        done, failed = disposition.dispose([two])
    assert ([each.moved_to for each in done], failed) == ([None], [])
    assert (root / "r2.cfg").read_bytes() == b"abc"


def test_an_archive_gets_its_receipt_file_even_if_many_names_are_taken(
    folder: DropFolder,
    root: Path,
    disposition_of: Callable[[str], Disposition],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another user with write permission may have created any number of these names."""
    (root / "sent").mkdir()
    for number in range(1, 400):
        (root / os.fsdecode(b"sent/" + receipt_file_name(b"r1.cfg", b"receipt", number))).write_bytes(b"{}")
    before, synced, real = set((root / "sent").iterdir()), [], os.fsync

    def counted(fd: int) -> None:
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", counted)
    disposition, one = disposition_of("move"), delivered(root, 1)
    assert disposition.dispose([one])[1] == []
    (receipt,) = set((root / "sent").iterdir()) - before - {root / "sent" / "r1.cfg"}
    assert re.fullmatch(r"r1\.cfg\.receipt-\d{10,}\.json", receipt.name)
    assert json.loads(receipt.read_bytes())["archive"] == "r1.cfg"
    assert len(synced) <= 4  # the receipt file and the directories
    assert disposition.dispose([one])[1] == []  # as after a crash
    assert len([*(root / "sent").iterdir()]) == len(before) + 2


@pytest.mark.parametrize("is_kind", [stat.S_ISDIR, stat.S_ISREG], ids=["directory", "receipt file"])
def test_a_failed_fsync_is_logged_and_retried(
    folder: DropFolder,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_kind: Callable[[int], bool],
) -> None:
    """Until then no disposition is reported: a power loss might undo it."""
    drop = a_drop(folder)
    batch = [delivered(root, 1), delivered(root, 2)]
    real = os.fsync

    def fails_for_some(fd: int) -> None:
        if is_kind(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with (tmp_path / "log").open("wb") as log:
        disposition = Disposition({"switches": drop}, EventLog(LineWriter(log.fileno())))
        monkeypatch.setattr(os, "fsync", fails_for_some)
        assert disposition.dispose(batch) == ([], [1, 2])
        again = [replace(one, already_logged=True) for one in batch]
        assert disposition.dispose(again) == ([], [1, 2])
        monkeypatch.undo()
        done, failed = disposition.dispose(again)
    assert ([one.moved_to for one in done], failed) == ([b"sent/r1.cfg", b"sent/r2.cfg"], [])
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted((line["event"], line["archive"]) for line in lines) == [
        (event, name)
        for event in ("archive.delivered", "archive.disposed", "disposition.failed")
        for name in ("r1.cfg", "r2.cfg")
    ]
    assert [line["event"] for line in lines[-2:]] == ["archive.disposed"] * 2
    assert {line["error"] for line in lines if line["event"] == "disposition.failed"} == {
        "Input/output error"
    }


def test_a_directory_in_use_is_never_closed(folder: DropFolder) -> None:
    before = len(os.listdir("/proc/self/fd"))
    cached = CachedFolder(folder)
    with cached.directory(b"site", create=True) as site:
        for number in range(40):
            with cached.directory(b"site-%d" % number, create=True) as one:
                assert os.path.samestat(os.fstat(one), os.stat(folder.path + f"/site-{number}"))
        assert os.path.samestat(os.fstat(site), os.stat(folder.path + "/site"))
    cached.close()
    assert len(os.listdir("/proc/self/fd")) == before


def queued_now(relpath: bytes) -> Archive:
    return an_archive(relpath, queued_at=datetime.now(UTC) + timedelta(seconds=1))


@pytest.mark.parametrize("moved_to", [b"sent/r1.cfg", None])
def test_a_newer_checksum_file_stays(folder: DropFolder, root: Path, moved_to: bytes | None) -> None:
    (root / "sent").mkdir()
    archive = an_archive(b"r1.cfg", queued_at=datetime.now(UTC) - timedelta(hours=1))
    (root / "r1.cfg.sha256").write_text("of a later archive")
    move_checksum_files(folder, archive, moved_to)
    assert (root / "r1.cfg.sha256").read_text() == "of a later archive"
    assert list((root / "sent").iterdir()) == []


def test_a_checksum_file_does_not_overwrite_an_archive(folder: DropFolder, root: Path) -> None:
    (root / "sent").mkdir()
    (root / "sent" / "r1.cfg.sha256").write_text("an archive from before `checksum_file` was set")
    (root / "sent" / "r1.cfg.sha256.receipt.json").write_text("its receipt")
    (root / "r1.cfg.sha256").write_text("of this one")
    move_checksum_files(folder, archive := queued_now(b"r1.cfg"), b"sent/r1.cfg")
    name = f"r1.cfg.sha256.{archive.queued_at:%Y%m%dT%H%M%SZ}"
    assert (root / "sent" / name).read_text() == "of this one"
    assert (root / "sent" / "r1.cfg.sha256").read_text().startswith("an archive")


def test_a_checksum_file_is_moved_with_its_archive_and_replaces_an_old_one(
    folder: DropFolder, root: Path
) -> None:
    (root / "sent").mkdir()
    (root / "sent" / "r1.cfg.sha256").write_text("of one that was removed")
    (root / "r1.cfg.sha256").write_text("of this one")
    move_checksum_files(folder, queued_now(b"r1.cfg"), b"sent/r1.cfg")
    assert (root / "sent" / "r1.cfg.sha256").read_text() == "of this one"
    assert not (root / "r1.cfg.sha256").exists()
    (root / "sent" / "r1.cfg.md5").symlink_to("/etc/passwd")
    remove_checksum_files(folder, b"sent/r1.cfg")
    assert [path.name for path in (root / "sent").iterdir()] == ["r1.cfg.md5"]


def test_the_read_of_a_touched_file_makes_way_for_results_that_wait_but_ends(
    folder: DropFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.delivery.disposition._FIRST_READ_SECONDS", 1e-6)
    one = delivered(root, 1)
    path = root / "r1.cfg"
    path.write_bytes(bytes(8 * 1024 * 1024))
    digest = str(a_digest(path.read_bytes()))
    one = replace(one, archive=replace(one.archive, fingerprint=fingerprint_of(path.stat())), digest=digest)
    path.chmod(0o640)
    with (root.parent / "log").open("wb") as stream:
        disposition = Disposition({"switches": a_drop(folder)}, EventLog(LineWriter(stream.fileno())))
        assert disposition.dispose([one], is_awaited=lambda: True) == ([], [1])
        for _ in range(40):  # each read is twice as long as the one before
            done, failed = disposition.dispose([one], is_awaited=lambda: True)
            if done:
                break
    assert ([each.moved_to for each in done], failed) == ([b"sent/r1.cfg"], [])
    assert "disposition.failed" not in (root.parent / "log").read_text()
