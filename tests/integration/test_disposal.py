"""Disposing of a batch of files, while somebody else works in the same folders."""

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
from tests.factories import NOW, a_drop, an_archive


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
    ending = DeliveryResult(
        str(number), "vault", DeliveryState.DELIVERED, NOW, "sha256:00", True, 201, None, None, "{}"
    )
    return CompletedArchive(archive, DeliveryState.DELIVERED, "sha256:00", (ending,))


def test_a_sent_folder_that_is_removed_in_mid_batch_is_made_anew(folder: DropFolder, root: Path) -> None:
    rule = a_drop(folder)
    begun = []

    def remove_after_the_first() -> None:
        begun.append(1)
        if len(begun) == 2:
            shutil.rmtree(root / "sent")

    with open(os.devnull, "wb") as null:
        disposal = Disposition({"switches": rule}, EventLog(LineWriter(null.fileno())))
        batch = [delivered(root, number) for number in range(3)]
        done, failed = disposal.dispose(batch, remove_after_the_first)
    assert ([one.moved_to for one in done], failed) == ([b"sent/r0.cfg", b"sent/r1.cfg", b"sent/r2.cfg"], [])
    assert {path.name for path in (root / "sent").iterdir()} >= {"r1.cfg", "r2.cfg", "r2.cfg.receipt.json"}


def test_an_archive_whose_directory_became_a_file_is_gone(folder: DropFolder, root: Path) -> None:
    (root / "a").mkdir()
    settled = delivered(root, 1, "a/r1.cfg")
    shutil.rmtree(root / "a")
    (root / "a").write_bytes(b"a file")
    with open(os.devnull, "wb") as null:
        rules = {"switches": a_drop(folder)}
        done, failed = Disposition(rules, EventLog(LineWriter(null.fileno()))).dispose([settled])
    assert ([one.moved_to for one in done], failed) == ([None], [])


def test_an_archive_in_a_deep_folder_takes_few_descriptors(folder: DropFolder, root: Path) -> None:
    deep = "/".join(["d"] * 300)
    (root / deep).mkdir(parents=True)
    rule = a_drop(folder)
    one = delivered(root, 1, f"{deep}/r1.cfg")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull, "wb") as null:
        disposal = Disposition({"switches": rule}, EventLog(LineWriter(null.fileno())))
        few = max(map(int, os.listdir("/proc/self/fd"))) + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            done, failed = disposal.dispose([one])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ([one.moved_to for one in done], failed) == ([os.fsencode(f"sent/{deep}/r1.cfg")], [])


def test_a_batch_over_many_directories_goes_where_it_should(folder: DropFolder, root: Path) -> None:
    """Also where a file of the same name was sent before, and more directories than are held at a time."""
    rule = a_drop(folder, sent_dir="done/ok", rejected_dir="done/bad")
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
    done, failed = Disposition({"switches": rule}, log).dispose(batch)
    assert failed == []
    assert all(one.moved_to is not None and one.moved_to.startswith(b"done/") for one in done)
    assert len({one.moved_to for one in done}) == 60
    assert not [*root.glob("d*/*.cfg")]
    assert len(os.listdir("/proc/self/fd")) == before + 1  # the log


def test_what_was_rewritten_behind_our_back_is_not_taken_for_what_was_sent(
    folder: DropFolder, root: Path
) -> None:
    """With its size and times put back, after the last byte was sent: it stays, and is found by the scan."""
    one = delivered(root, 1)
    path = root / "r1.cfg"
    before = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"xyz")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with open(os.devnull, "wb") as null:
        rule = a_drop(folder)
        disposal = Disposition({"switches": rule}, EventLog(LineWriter(null.fileno())))
        done, failed = disposal.dispose([one])
    assert ([each.moved_to for each in done], failed) == ([None], [])
    assert path.read_bytes() == b"xyz"
    assert not [*root.glob("sent/*")]


@pytest.fixture
def told(tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What was logged by the disposal of `disposal_of`, by the event's name."""

    def events(name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        return [line for line in lines if line["event"] == name]

    return events


@pytest.fixture
def _sigio_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def disposal_of(folder: DropFolder, tmp_path: Path) -> Iterator[Callable[[str], Disposition]]:
    with (tmp_path / "log").open("wb") as log:
        yield lambda action: Disposition(
            {"switches": a_drop(folder, on_delivered=action)},
            EventLog(LineWriter(log.fileno())),
        )


@pytest.mark.parametrize("action", ["move", "delete"])
def test_what_somebody_writes_to_again_stays_until_it_is_closed(
    root: Path,
    disposal_of: Callable[[str], Disposition],
    told: Callable[[str], list[dict[str, Any]]],
    action: str,
) -> None:
    one, disposal = delivered(root, 1), disposal_of(action)
    path = root / "r1.cfg"
    with path.open("ab"):
        for _ in range(2):
            assert disposal.dispose([one]) == ([], [1])
        assert path.read_bytes() == b"abc"
    (line,) = told("disposition.failed")
    assert (line["archive"], line["error"]) == ("r1.cfg", "another process has it open for writing")
    assert "fuser" in line["hint"]
    done, failed = disposal.dispose([one])  # it was closed as it was
    assert ([each.moved_to for each in done], failed) == ([b"sent/r1.cfg" if action == "move" else None], [])
    assert not path.exists()


@pytest.mark.usefixtures("_sigio_ignored")
def test_what_somebody_holds_a_write_lease_on_stays_until_that_is_given_back(
    root: Path, disposal_of: Callable[[str], Disposition], told: Callable[[str], list[dict[str, Any]]]
) -> None:
    one, disposal = delivered(root, 1), disposal_of("move")
    path = root / "r1.cfg"
    with path.open("r+b") as stream:
        fcntl.fcntl(stream.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert disposal.dispose([one]) == ([], [1])
        assert path.exists()
    (line,) = told("disposition.failed")
    assert line["archive"] == "r1.cfg"
    assert "fuser" in line["hint"]
    done, failed = disposal.dispose([one])
    assert ([each.moved_to for each in done], failed) == ([b"sent/r1.cfg"], [])


@pytest.mark.parametrize("action", ["move", "delete"])
def test_what_was_added_to_an_archive_that_was_sent_starts_over(
    root: Path, disposal_of: Callable[[str], Disposition], action: str
) -> None:
    one, disposal = delivered(root, 1), disposal_of(action)
    path = root / "r1.cfg"
    with path.open("ab") as stream:
        assert disposal.dispose([one]) == ([], [1])
        stream.write(b"def")
    done, failed = disposal.dispose([one])
    assert ([each.moved_to for each in done], failed) == ([None], [])
    assert path.read_bytes() == b"abcdef"
    assert [entry for entry in root.rglob("*") if entry.is_file()] == [path]


@pytest.mark.usefixtures("_sigio_ignored")
@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_writer_that_comes_while_it_is_moved_finds_it_where_it_was(
    root: Path,
    disposal_of: Callable[[str], Disposition],
    monkeypatch: pytest.MonkeyPatch,
    action: str,
) -> None:
    """As does one that was let in by the end of a daemon that was killed right then."""
    one, disposal = delivered(root, 1), disposal_of(action)
    path, came, real = root / "r1.cfg", [], move_module.move_to_hidden_name

    def take(*arguments: Any) -> None:
        with pytest.raises(BlockingIOError):  # without O_NONBLOCK it would wait for the end of the move
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        came.append(1)
        real(*arguments)

    monkeypatch.setattr(move_module, "move_to_hidden_name", take)
    done, failed = disposal.dispose([one])
    assert ([each.moved_to for each in done], failed, came) == ([None], [], [1])
    assert path.read_bytes() == b"abc"
    assert [entry for entry in root.rglob("*") if entry.is_file()] == [path]

    two = delivered(root, 2)
    hidden = root / ("sent" if action == "move" else "") / ".backupd-2.taken"
    (root / "r2.cfg").rename(hidden)
    with hidden.open("ab"):
        done, failed = disposal.dispose([two])
    assert ([each.moved_to for each in done], failed) == ([None], [])
    assert (root / "r2.cfg").read_bytes() == b"abc"


def test_names_that_are_taken_cost_little_and_no_archive_its_record(
    folder: DropFolder, root: Path, disposal_of: Callable[[str], Disposition], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write in the folder may have taken any number of them."""
    (root / "sent").mkdir()
    for number in range(1, 400):
        (root / os.fsdecode(b"sent/" + receipt_file_name(b"r1.cfg", b"receipt", number))).write_bytes(b"{}")
    before, synced, real = set((root / "sent").iterdir()), [], os.fsync

    def counted(fd: int) -> None:
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", counted)
    disposal, one = disposal_of("move"), delivered(root, 1)
    assert disposal.dispose([one])[1] == []
    (record,) = set((root / "sent").iterdir()) - before - {root / "sent" / "r1.cfg"}
    assert re.fullmatch(r"r1\.cfg\.receipt-\d{10,}\.json", record.name)
    assert json.loads(record.read_bytes())["archive"] == "r1.cfg"
    assert len(synced) <= 4  # the record, and the directories
    assert disposal.dispose([one])[1] == []  # as after a crash
    assert len([*(root / "sent").iterdir()]) == len(before) + 2


@pytest.mark.parametrize("is_kind", [stat.S_ISDIR, stat.S_ISREG], ids=["a directory", "a record"])
def test_what_cannot_be_synced_is_said_and_tried_again(
    folder: DropFolder,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_kind: Callable[[int], bool],
) -> None:
    """Until it can be, nothing is told to be disposed of: a power cut might undo it."""
    rule = a_drop(folder)
    batch = [delivered(root, 1), delivered(root, 2)]
    real = os.fsync

    def fails_for_some(fd: int) -> None:
        if is_kind(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with (tmp_path / "log").open("wb") as log:
        disposal = Disposition({"switches": rule}, EventLog(LineWriter(log.fileno())))
        monkeypatch.setattr(os, "fsync", fails_for_some)
        assert disposal.dispose(batch) == ([], [1, 2])
        again = [replace(one, already_logged=True) for one in batch]
        assert disposal.dispose(again) == ([], [1, 2])
        monkeypatch.undo()
        done, failed = disposal.dispose(again)
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


def test_a_directory_in_use_is_never_let_go(folder: DropFolder) -> None:
    before = len(os.listdir("/proc/self/fd"))
    held = CachedFolder(folder)
    with held.directory(b"site", create=True) as site:
        for number in range(40):
            with held.directory(b"site-%d" % number, create=True) as one:
                assert os.path.samestat(os.fstat(one), os.stat(folder.path + f"/site-{number}"))
        assert os.path.samestat(os.fstat(site), os.stat(folder.path + "/site"))
    held.close()
    assert len(os.listdir("/proc/self/fd")) == before


def admitted_now(relpath: bytes) -> Archive:
    return an_archive(relpath, admitted_at=datetime.now(UTC) + timedelta(seconds=1))


@pytest.mark.parametrize("moved_to", [b"sent/r1.cfg", None])
def test_a_checksum_file_of_what_is_to_come_stays(
    folder: DropFolder, root: Path, moved_to: bytes | None
) -> None:
    (root / "sent").mkdir()
    archive = an_archive(b"r1.cfg", admitted_at=datetime.now(UTC) - timedelta(hours=1))
    (root / "r1.cfg.sha256").write_text("of tomorrow's")
    move_checksum_files(folder, archive, moved_to)
    assert (root / "r1.cfg.sha256").read_text() == "of tomorrow's"
    assert list((root / "sent").iterdir()) == []


def test_a_checksum_file_takes_no_archive_s_place(folder: DropFolder, root: Path) -> None:
    (root / "sent").mkdir()
    (root / "sent" / "r1.cfg.sha256").write_text("an archive, of when there were no checksum files")
    (root / "sent" / "r1.cfg.sha256.receipt.json").write_text("its receipt")
    (root / "r1.cfg.sha256").write_text("of this one")
    move_checksum_files(folder, archive := admitted_now(b"r1.cfg"), b"sent/r1.cfg")
    name = f"r1.cfg.sha256.{archive.queued_at:%Y%m%dT%H%M%SZ}"
    assert (root / "sent" / name).read_text() == "of this one"
    assert (root / "sent" / "r1.cfg.sha256").read_text().startswith("an archive")


def test_a_checksum_file_goes_with_its_archive_and_in_place_of_an_old_one(
    folder: DropFolder, root: Path
) -> None:
    (root / "sent").mkdir()
    (root / "sent" / "r1.cfg.sha256").write_text("of one that was removed")
    (root / "r1.cfg.sha256").write_text("of this one")
    move_checksum_files(folder, admitted_now(b"r1.cfg"), b"sent/r1.cfg")
    assert (root / "sent" / "r1.cfg.sha256").read_text() == "of this one"
    assert not (root / "r1.cfg.sha256").exists()
    (root / "sent" / "r1.cfg.md5").symlink_to("/etc/passwd")
    remove_checksum_files(folder, b"sent/r1.cfg")
    assert [path.name for path in (root / "sent").iterdir()] == ["r1.cfg.md5"]
