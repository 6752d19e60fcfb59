"""Intake on a real folder with real inotify: whatever blinds it, nothing is missed, and it is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from watchdog.observers.inotify import InotifyObserver
from watchdog.observers.inotify_c import InotifyConstants, inotify_rm_watch

from backupd.config.models import DropConfig
from backupd.core.errors import LedgerError
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DropFolder
from backupd.intake.intake import Intake
from backupd.ledger.port import DispositionResult, EnqueueResult, FileCandidate
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import NOW, delivered, finished
from tests.privileges import a_folder_of_nobody, without_rights
from tests.stage import PATIENCE, until

SOON = timedelta(milliseconds=250)
NEVER = timedelta(hours=1)
HOUR = 3600.0


class Watching:
    """One drop folder with its intake at work, a real ledger, and a log in a file."""

    def __init__(self, base: Path, kind: type[SqliteLedger] = SqliteLedger, **config: Any) -> None:
        self.base = base
        self.root = base / "drop"
        self.root.mkdir(exist_ok=True)
        self.state = base / "state"
        self.state.mkdir()
        self.ledger = kind(open_ledger(self.state).connection)
        self.config = DropConfig(
            path=self.root,
            **{
                "stable_for": timedelta(milliseconds=50),
                "rescan_every": SOON,
                "observer": "inotify",
                **config,
            },
        )
        self.folder = DropFolder(str(self.root))
        self._log = os.open(base / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.woken: list[Sequence[str]] = []
        self.intake = Intake(
            Drop.of("switches", self.config, self.folder, ("vault",)),
            self.ledger,
            EventLog(LineWriter(self._log), level="debug"),
            self.woken.append,
            lambda: None,
        )
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.intake.run(self._stop)
        except BaseException as error:  # noqa: BLE001 -- told by `end`
            self._failure = error

    def start(self) -> None:
        self._thread.start()
        assert self.intake.ready.wait(PATIENCE)

    def end(self) -> None:
        self._stop.set()
        self.intake.wake()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the intake did not end"
        self.ledger.close()
        self.folder.close()
        os.close(self._log)
        if self._failure is not None:
            raise self._failure

    @property
    def observer(self) -> InotifyObserver:
        watcher = self.intake._sight._watcher
        assert watcher is not None
        assert isinstance(watcher._observer, InotifyObserver)
        return watcher._observer

    def events(self, name: str) -> list[dict[str, Any]]:
        size = os.fstat(self._log).st_size
        lines = os.pread(self._log, size, 0).split(b"\n")[:-1]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def admitted(self) -> list[str]:
        """Return what was admitted, in order."""
        return [event["archive"] for event in self.events("archive.queued")]

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            until(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{(self.base / 'log').read_text()[-6000:]}") from None

    def pending(self) -> int:
        backlog = self.ledger.backlog()
        return backlog["vault"].pending if backlog else 0

    def wait_admitted(self, *names: str) -> None:
        self._until(lambda: set(names) <= set(self.admitted()), f"{names} to be admitted")

    def wait_event(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        self._until(lambda: len(self.events(name)) >= count, f"{count} x {name}")
        return self.events(name)

    def wait_scan(self) -> None:
        """Wait until a scan has begun and ended from now on."""
        before = len(self.events("drop.scanned"))
        self.wait_event("drop.scanned", before + 2)

    def scan_no_more(self) -> None:
        """Have no more scans, so that what is admitted from now on came by events."""
        self.intake._sight._config = self.config.model_copy(update={"rescan_every": NEVER})
        self.wait_event("drop.scanned", len(self.events("drop.scanned")) + 1)

    def put(self, name: str, content: bytes = b"abc") -> Path:
        """Rename a finished file into the folder."""
        part = self.base / f"part-{time.monotonic_ns()}"
        part.write_bytes(content)
        return part.rename(self.root / name)


@pytest.fixture(autouse=True)
def _sigio_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, before)


@contextmanager
def watching(base: Path, kind: type[SqliteLedger] = SqliteLedger, **config: Any) -> Iterator[Watching]:
    scene = Watching(base, kind, **config)
    try:
        scene.start()
        yield scene
    finally:
        scene.end()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Watching]:
    """A drop folder that is looked through every quarter of a second."""
    with watching(tmp_path) as scene:
        yield scene


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By how many seconds the clock of the intake is ahead, for a test to change."""
    seconds = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + seconds[0], time=lambda: time.time() + seconds[0]
    )
    monkeypatch.setattr("backupd.intake.intake.time", clock)
    monkeypatch.setattr("backupd.intake.intake._SURELY_MISSED", HOUR)
    return seconds


@pytest.fixture
def by_events(tmp_path: Path) -> Iterator[Watching]:
    """A drop folder that is looked through once, at the start: the rest has to come by events."""
    with watching(tmp_path, rescan_every=NEVER) as scene:
        yield scene


# seeing


def test_events_alone_bring_files_however_they_came(by_events: Watching) -> None:
    root = by_events.root
    (root / "written.cfg").write_bytes(b"abc")
    by_events.put("moved-in.cfg")
    (root / "renamed.cfg.part").write_bytes(b"abc")
    (root / "renamed.cfg.part").rename(root / "renamed.cfg")
    (by_events.base / "source").write_bytes(b"abc")
    os.link(by_events.base / "source", root / "linked.cfg")
    fd = os.open(root, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"abc")
    # with a descriptor it is linkat(2), which follows this link
    os.link(f"/proc/self/fd/{fd}", root / "unnamed.cfg", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)
    by_events.wait_admitted("written.cfg", "moved-in.cfg", "renamed.cfg", "linked.cfg", "unnamed.cfg")
    assert len(by_events.admitted()) == 5


def test_events_alone_bring_whole_trees(by_events: Watching) -> None:
    tree = by_events.base / "tree"
    for name in ("a/r1.cfg", "a/b/r2.cfg"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"abc")
    shutil.copytree(tree, by_events.root / "copied")
    tree.rename(by_events.root / "moved")
    names = [f"{top}/{name}" for top in ("copied", "moved") for name in ("a/r1.cfg", "a/b/r2.cfg")]
    by_events.wait_admitted(*names)
    (by_events.root / "moved/a/b/later.cfg").write_bytes(b"abc")
    by_events.wait_admitted("moved/a/b/later.cfg")
    (by_events.root / "moved").rename(by_events.root / "again")
    by_events.wait_admitted("again/a/b/later.cfg")


def test_a_directory_that_is_renamed_in_place_is_watched_under_its_new_name(by_events: Watching) -> None:
    (by_events.root / "site").mkdir()
    by_events.put("site/r1.cfg")
    by_events.wait_admitted("site/r1.cfg")
    (by_events.root / "site").rename(by_events.root / "berlin")
    by_events.wait_admitted("berlin/r1.cfg")
    by_events.put("berlin/r2.cfg")
    (by_events.root / "berlin" / "rack").mkdir()
    by_events.put("berlin/rack/r3.cfg")
    by_events.wait_admitted("berlin/r2.cfg", "berlin/rack/r3.cfg")
    assert not by_events.events("library.warning")


def test_directories_that_take_each_others_places_confuse_nothing(tmp_path: Path) -> None:
    with watching(tmp_path, rescan_every=NEVER) as scene:
        for name in ("sent", "x", "y"):
            (scene.root / name).mkdir()
        (scene.root / "y").rename(scene.root / "sent" / "y")
        (scene.root / "x").rename(scene.root / "y")
        scene.put("y/r1.cfg")
        scene.wait_admitted("y/r1.cfg")
        (scene.root / "z").mkdir()
        (scene.root / "z").rename(scene.root / "sent" / "z")
        (scene.root / "z").mkdir()
        (scene.root / "z").rmdir()
        (scene.root / "sent" / "z").rmdir()
        scene.put("r2.cfg")
        scene.wait_admitted("r2.cfg")
        assert all(emitter.is_alive() for emitter in scene.observer.emitters)
    # and the intake has ended without a fault


def test_a_root_that_is_a_link_is_watched(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "drop").symlink_to(tmp_path / "elsewhere")
    with watching(tmp_path, rescan_every=NEVER) as scene:
        scene.put("r1.cfg")
        scene.wait_admitted("r1.cfg")
        (scene.root / "site").mkdir()
        scene.put("site/r2.cfg")
        scene.wait_admitted("site/r2.cfg")


def test_our_own_folders_are_not_watched_nor_what_leaves(tmp_path: Path) -> None:
    for name in ("sent/site", "rejected", ".hidden/deep", "site/sent"):
        (tmp_path / "drop" / name).mkdir(parents=True)
    with watching(tmp_path, rescan_every=NEVER) as scene:
        (scene.root / "sent" / "later").mkdir()
        (scene.root / "site" / "later").mkdir()
        scene.put("site/later/r1.cfg")
        scene.wait_admitted("site/later/r1.cfg")
        masks = watched()
    wanted = [scene.root, *(scene.root / name for name in ("site", "site/sent", "site/later"))]
    assert set(masks) == {directory.stat().st_ino for directory in wanted}
    assert not any(mask & InotifyConstants.IN_MOVED_FROM for mask in masks.values())


def test_directories_beyond_the_length_of_a_path_are_not_watched(tmp_path: Path) -> None:
    """Their paths would take memory by the square of the depth."""
    scene = Watching(tmp_path, rescan_every=NEVER)
    name = "d" * 250
    here = os.open(scene.root, os.O_RDONLY)
    for _ in range(100):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    scene.start()
    scene.put("r1.cfg")
    scene.wait_admitted("r1.cfg")
    assert len(watched()) == 1 + 4095 // 251
    scene.end()


def watched() -> dict[int, int]:
    """Return the inode of each directory that this process watches by inotify, and the events it asks for."""
    masks = {}
    for info in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            for line in info.read_text().splitlines():
                if line.startswith("inotify "):
                    fields = dict(field.split(":", 1) for field in line.split()[1:])
                    masks[int(fields["ino"], 16)] = int(fields["mask"], 16)
    return masks


def test_what_was_there_before_the_start_is_found(tmp_path: Path) -> None:
    scene = Watching(tmp_path, rescan_every=NEVER)
    scene.put("r1.cfg")
    scene.start()
    scene.wait_admitted("r1.cfg")
    scene.end()


def test_a_name_that_is_no_text_is_seen(by_events: Watching) -> None:
    name = os.fsencode(by_events.root) + b"/bad\xff\n.cfg"
    with open(name, "wb") as file:
        file.write(b"abc")
    by_events.wait_admitted("bad\\xff\n.cfg")


def test_what_goes_to_our_own_folders_and_hidden_ones_is_not_seen(scene: Watching) -> None:
    for name in ("sent", "rejected", "sent/deep", ".hidden", ".hidden/deep"):
        (scene.root / name).mkdir()
        scene.put(f"{name}/r1.cfg")
    (scene.base / "tree").mkdir()
    (scene.base / "tree" / "r1.cfg").write_bytes(b"abc")
    shutil.copytree(scene.base / "tree", scene.root / "sent" / "tree")
    (scene.base / "tree").rename(scene.root / ".tree")
    scene.put("seen.cfg")
    scene.wait_admitted("seen.cfg")
    scene.wait_scan()
    assert scene.admitted() == ["seen.cfg"]


def test_a_hidden_folder_is_seen_from_when_it_is_shown(by_events: Watching) -> None:
    hidden = by_events.root / ".part"
    hidden.mkdir()
    (hidden / "r1.cfg").write_bytes(b"abc")
    hidden.rename(by_events.root / "shown")
    by_events.wait_admitted("shown/r1.cfg")
    (by_events.root / "shown" / "r2.cfg").write_bytes(b"abc")
    by_events.wait_admitted("shown/r2.cfg")


def test_without_recursion_nothing_below_is_seen(tmp_path: Path) -> None:
    with watching(tmp_path, recursive=False) as scene:
        (scene.root / "below").mkdir()
        scene.put("below/r1.cfg")
        scene.put("seen.cfg")
        scene.wait_admitted("seen.cfg")
        scene.wait_scan()
        assert scene.admitted() == ["seen.cfg"]


def test_polling_finds_files_without_inotify(tmp_path: Path) -> None:
    with watching(tmp_path, observer="polling") as scene:
        assert scene.intake._sight._watcher is None
        scene.put("r1.cfg")
        (scene.root / "below").mkdir()
        scene.put("below/r2.cfg")
        scene.wait_admitted("r1.cfg", "below/r2.cfg")
        (seen,) = scene.events("drop.watched")
        assert (seen["observer"], seen["reason"]) == ("polling", "configured")
        assert not scene.events("watch.degraded")


def test_the_destinations_workers_are_woken(scene: Watching) -> None:
    scene.put("r1.cfg")
    scene.wait_admitted("r1.cfg")
    until(lambda: scene.woken, "the workers to be woken")
    assert scene.woken == [("vault",)]


# finished or not


def test_a_file_that_is_held_open_waits_until_it_is_closed(scene: Watching) -> None:
    with (scene.root / "r1.cfg").open("wb", buffering=0) as file:
        file.write(b"half")
        scene.put("other.cfg")
        scene.wait_admitted("other.cfg")
        scene.wait_scan()
        scene.wait_scan()
        assert scene.admitted() == ["other.cfg"]
        file.write(b" and half")
    scene.wait_admitted("r1.cfg")
    (event,) = (event for event in scene.events("archive.queued") if event["archive"] == "r1.cfg")
    assert event["size_bytes"] == len(b"half and half")
    assert scene.admitted() == ["other.cfg", "r1.cfg"]


def test_a_file_that_grows_is_admitted_once_and_whole(tmp_path: Path, ahead: list[float]) -> None:
    with watching(tmp_path, stable_for=timedelta(hours=1)) as scene:
        path = scene.root / "r1.cfg"
        for _ in range(4):
            with path.open("ab") as file:
                file.write(b"x" * 100)
            scene.wait_scan()
            ahead[0] += 0.7 * HOUR
            scene.wait_scan()
            assert scene.admitted() == []
        ahead[0] += 0.7 * HOUR
        scene.wait_admitted("r1.cfg")
        scene.wait_scan()
        assert [event["size_bytes"] for event in scene.events("archive.queued")] == [400]


def test_a_new_content_under_the_same_name_starts_over(scene: Watching) -> None:
    scene.put("r1.cfg", b"old")
    scene.wait_admitted("r1.cfg")
    scene.put("r1.cfg", b"newer")
    scene.wait_event("archive.queued", 2)
    (event,) = scene.events("archive.superseded")
    assert (event["archive"], event["size_bytes"]) == ("r1.cfg", 3)


def test_what_is_no_archive_is_said_once_and_with_the_reason(scene: Watching) -> None:
    (scene.root / "empty.cfg").write_bytes(b"")
    (scene.root / "readme.pdf").write_bytes(b"abc")
    (scene.root / "link.cfg").symlink_to("/etc/hostname")
    os.mkfifo(scene.root / "pipe.cfg")
    (scene.root / "r1.cfg.part").write_bytes(b"abc")
    scene.wait_event("archive.ignored", 4)
    scene.wait_scan()
    scene.wait_scan()
    assert {event["archive"]: event["reason"] for event in scene.events("archive.ignored")} == {
        "empty.cfg": "too_small",
        "readme.pdf": "not_included",
        "link.cfg": "symlink",
        "pipe.cfg": "not_a_regular_file",
    }
    assert len(scene.events("archive.ignored")) == 4
    (scene.root / "empty.cfg").write_bytes(b"no longer")
    scene.wait_admitted("empty.cfg")


# going blind


def blindness(scene: Watching) -> list[str]:
    return [event["reason"] for event in scene.events("watch.degraded")]


def test_of_rubbish_without_end_no_more_is_said_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: list[float]
) -> None:
    monkeypatch.setattr("backupd.intake.candidates._MOST_SAID", 10)
    with watching(tmp_path) as scene:
        for number in range(30):
            (scene.root / f"rubbish-{number}.pdf").write_bytes(b"no archive")
            (scene.root / f"empty-{number}.cfg").touch()
        scene.wait_event("archive.ignored", 11)
        scene.wait_scan()
        ahead[0] += 2 * HOUR
        for _ in range(3):
            scene.wait_scan()
        scene.put("r1.cfg")
        scene.wait_admitted("r1.cfg")
        reasons = [event["reason"] for event in scene.events("archive.ignored")]
        assert len(reasons) == 11
        assert reasons.count("too_many") == 1
        assert blindness(scene) == []


def test_a_root_that_is_renamed_away_and_made_anew_is_watched_again(scene: Watching) -> None:
    scene.root.rename(scene.base / "away")
    scene.wait_event("watch.degraded")
    scene.wait_event("drop.failed")
    scene.root.mkdir()
    scene.put("r1.cfg")
    scene.wait_admitted("r1.cfg")
    scene.wait_event("watch.recovered")
    scene.wait_scan()
    assert blindness(scene) == ["replaced"]
    assert len(scene.events("watch.recovered")) == len(scene.events("drop.failed")) == 1


def test_a_root_that_is_deleted_and_made_anew_at_once_is_watched_again(scene: Watching) -> None:
    scene.root.rmdir()
    scene.root.mkdir()
    scene.put("r1.cfg")
    scene.wait_admitted("r1.cfg")
    scene.wait_event("watch.recovered")
    (scene.root / "below").mkdir()
    scene.put("below/r2.cfg")
    scene.wait_admitted("below/r2.cfg")
    scene.wait_scan()
    assert blindness(scene) == ["replaced"]


def test_a_root_that_is_deleted_and_made_anew_later_is_watched_again(scene: Watching) -> None:
    shutil.rmtree(scene.root)
    scene.wait_event("drop.failed")
    scene.wait_scan()
    scene.root.mkdir()
    scene.put("r1.cfg")
    scene.wait_admitted("r1.cfg")
    scene.wait_event("watch.recovered")
    assert len(scene.events("watch.degraded")) == len(scene.events("drop.failed")) == 1


def test_a_root_that_is_polled_may_be_replaced_again_and_again(tmp_path: Path) -> None:
    with watching(tmp_path, observer="polling") as scene:
        for number in range(1, 3):
            scene.root.rename(scene.base / f"away-{number}")
            scene.root.mkdir()
            restored = scene.wait_event("watch.recovered", number)
            assert {event["observer"] for event in restored} == {"polling"}
            scene.put(f"r{number}.cfg")
            scene.wait_admitted(f"r{number}.cfg")
            assert blindness(scene) == ["replaced"] * number
            assert not scene.intake.is_degraded


def test_after_a_replacement_events_alone_bring_files_again(scene: Watching) -> None:
    scene.root.rename(scene.base / "away")
    scene.root.mkdir()
    scene.wait_event("watch.recovered")
    scene.scan_no_more()
    scene.put("r1.cfg")
    (scene.root / "below").mkdir()
    scene.put("below/r2.cfg")
    scene.wait_admitted("r1.cfg", "below/r2.cfg")


def test_a_root_that_cannot_be_read_is_said_once_and_read_as_soon_as_it_can_be() -> None:
    with a_folder_of_nobody() as base, without_rights(), watching(base) as scene:
        scene.put("r1.cfg")
        scene.wait_admitted("r1.cfg")
        scene.root.chmod(0)
        scene.wait_scan()
        scene.root.chmod(0o755)
        scene.put("r2.cfg")
        scene.wait_admitted("r2.cfg")


def test_a_root_that_is_replaced_by_one_that_cannot_be_read_is_said_once() -> None:
    with a_folder_of_nobody() as base, without_rights(), watching(base) as scene:
        scene.root.rename(base / "away")
        scene.root.mkdir()
        scene.root.chmod(0)
        (failed,) = scene.wait_event("drop.failed")
        assert failed["error"] == "Permission denied"
        scene.wait_scan()
        scene.wait_scan()
        assert len(scene.events("drop.failed")) == 1
        assert blindness(scene) == ["replaced"]
        scene.root.chmod(0o755)
        scene.put("r1.cfg")
        scene.wait_admitted("r1.cfg")
        scene.wait_event("watch.recovered")


def test_a_directory_that_cannot_be_read_is_said_once_and_hides_no_other() -> None:
    with a_folder_of_nobody() as base, without_rights(), watching(base) as scene:
        (scene.root / "closed").mkdir()
        scene.put("closed/r1.cfg")
        (scene.root / "closed").chmod(0)
        scene.wait_event("archive.ignored")
        scene.put("r2.cfg")
        scene.wait_admitted("r2.cfg")
        scene.wait_scan()
        said = [event for event in scene.events("archive.ignored") if event["archive"] == "closed"]
        assert [event["reason"] for event in said] == ["unreadable"]
        (scene.root / "closed").chmod(0o755)
        scene.wait_admitted("closed/r1.cfg")


def _emitter(observer: InotifyObserver) -> None:
    for emitter in observer.emitters:
        emitter.stop()
        emitter.join()


def _reader(observer: InotifyObserver) -> None:
    observer._inotify_fd.stop()
    observer._inotify_fd.join()


def _dispatcher(observer: InotifyObserver) -> None:
    observer.stop()
    observer.join()


@pytest.mark.parametrize("end", [_emitter, _reader, _dispatcher])
def test_a_dead_thread_of_the_watcher_is_noticed_and_it_is_made_anew(scene: Watching, end: Any) -> None:
    end(scene.observer)
    scene.put("r1.cfg")
    scene.wait_admitted("r1.cfg")
    scene.wait_event("watch.recovered")
    scene.put("r2.cfg")
    scene.wait_admitted("r2.cfg")
    scene.wait_scan()
    assert blindness(scene) == ["dead"]
    assert len(scene.events("watch.recovered")) == 1


def make_deaf(scene: Watching) -> InotifyObserver:
    """Have no event reach the intake, though every thread of the watcher lives."""
    watcher = scene.intake._sight._watcher
    assert watcher is not None
    observer = scene.observer
    for watch in set(observer._watches):
        observer.remove_handler_for_watch(watcher._handler, watch)
    return observer


def test_without_threads_for_a_watcher_it_is_said_and_files_come_by_scan(
    scene: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # the words of Python where a limit is reached

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        scene.root.rename(scene.base / "away")
        scene.root.mkdir()
        until(lambda: "refused" in blindness(scene), "that no watcher can be had")
        scene.put("by-scan.cfg")
        scene.wait_admitted("by-scan.cfg")
    scene.wait_event("watch.recovered")
    assert "limit of threads" in scene.events("watch.degraded")[-1]["hint"]
    scene.scan_no_more()
    scene.put("by-event.cfg")
    scene.wait_admitted("by-event.cfg")


def test_files_that_no_event_told_of_are_found_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.intake._SURELY_MISSED", -1.0)
    monkeypatch.setattr("backupd.intake.watch_health._SILENT", HOUR)
    with watching(tmp_path) as scene:
        deaf = make_deaf(scene)
        tree = scene.base / "tree"
        tree.mkdir()
        names = [f"tree/r{number}.cfg" for number in range(3)]
        for name in names:
            (scene.base / name).write_bytes(b"abc")
        tree.rename(scene.root / "tree")  # the same scan finds all of them
        scene.wait_admitted(*names)
        scene.wait_event("watch.recovered")
        assert scene.observer is not deaf
        scene.scan_no_more()
        scene.put("later.cfg")
        scene.wait_admitted("later.cfg")
        assert blindness(scene) == ["missed"]
        assert len(scene.events("watch.recovered")) == 1


def test_a_quiet_folder_whose_watcher_is_deaf_is_told_from_one_that_is_only_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("backupd.intake.watch_health.time", SimpleNamespace(monotonic=lambda: now[0]))
    with watching(tmp_path) as scene:
        for _ in range(10):
            scene.wait_scan()
            until(lambda: scene.intake._sight._asked is None, "a sign of life")
        assert blindness(scene) == []
        assert not scene.intake.is_degraded

        deaf = make_deaf(scene)
        scene.wait_scan()
        until(lambda: scene.intake._sight._asked is not None, "it to be asked for")
        now[0] += HOUR
        scene.wait_event("watch.recovered")
        assert scene.observer is not deaf
        assert blindness(scene) == ["silent"]
        scene.scan_no_more()
        scene.put("later.cfg")
        scene.wait_admitted("later.cfg")


def test_a_folder_with_much_to_tell_is_not_taken_for_a_blind_watcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign of life may wait behind thousands of events, or be lost in an overflow: they are signs too."""
    now = [100.0]
    monkeypatch.setattr("backupd.intake.watch_health.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("backupd.intake.watcher.Watcher.request_sign_of_life", lambda _watcher: True)
    with watching(tmp_path, rescan_every=NEVER) as scene:
        scene.put("r1.cfg")
        scene.wait_admitted("r1.cfg")
        now[0] += 3600
        scene.put("r2.cfg")  # by its admission the watcher was judged by the new time
        scene.wait_admitted("r2.cfg")
        assert blindness(scene) == []


def test_a_watch_that_the_kernel_gave_up_is_noticed_by_the_next_scan(scene: Watching) -> None:
    reader = scene.observer._inotify_fd
    assert reader is not None
    for watch in [*reader._watch_for_wd]:
        inotify_rm_watch(reader._inotify_fd, watch)
    scene.wait_event("watch.recovered")
    assert blindness(scene) == ["removed"]
    scene.scan_no_more()
    scene.put("later.cfg")
    scene.wait_admitted("later.cfg")


def test_looking_for_a_sign_of_life_opens_nobodys_files(scene: Watching) -> None:
    """Whoever opens a file meanwhile is not taken for a sign, nor for an archive that was written."""
    path = scene.put("r1.cfg")
    scene.wait_admitted("r1.cfg")
    before = path.stat(), scene.root.stat()
    for _ in range(200):
        path.read_bytes()
    for _ in range(5):
        scene.wait_scan()
    assert (path.stat().st_ctime_ns, scene.root.stat().st_mtime_ns) == (
        before[0].st_ctime_ns,
        before[1].st_mtime_ns,
    )
    assert scene.admitted() == ["r1.cfg"]
    assert blindness(scene) == []


def test_files_that_an_event_told_of_prove_no_blindness(tmp_path: Path, ahead: list[float]) -> None:
    with watching(tmp_path) as scene:
        for number in range(300):
            scene.put(f"r{number}.cfg")
        (scene.root / "empty.cfg").touch()
        (scene.root / "other.pdf").touch()
        with (scene.root / "open.cfg").open("wb", buffering=0) as file:
            file.write(b"abc")
            scene.wait_admitted("r299.cfg")
            scene.wait_event("archive.ignored", 2)
            scene.wait_scan()
            ahead[0] += 2 * HOUR
            scene.wait_scan()
        scene.wait_admitted("open.cfg")
        assert blindness(scene) == []


class UnwillingLedger(SqliteLedger):
    """A ledger that can't be written for a while."""

    failing = True

    def enqueue(
        self, sightings: Sequence[FileCandidate], destinations: Sequence[str], now: datetime
    ) -> EnqueueResult:
        if self.failing:
            raise LedgerError("the ledger can't be written: database or disk is full", "check the disk")
        return super().enqueue(sightings, destinations, now)


def test_what_the_ledger_did_not_take_is_admitted_later_and_is_no_blindness(
    tmp_path: Path, ahead: list[float]
) -> None:
    with watching(tmp_path, UnwillingLedger) as scene:
        assert isinstance(scene.ledger, UnwillingLedger)
        scene.put("r1.cfg")
        scene.wait_event("ledger.failed")
        ahead[0] += 2 * HOUR
        scene.wait_scan()
        assert len(scene.events("ledger.failed")) == 1
        scene.ledger.failing = False
        scene.wait_admitted("r1.cfg")
        assert blindness(scene) == []


def test_after_an_overflow_of_the_kernels_queue_every_file_is_admitted(by_events: Watching) -> None:
    scene = by_events
    (scene.root / "below").mkdir()
    room = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if room > 50_000:
        pytest.skip("the kernel's queue is too long to be filled in a test")
    count = max(20_000, room + 1000)
    with scene.observer._inotify_fd._lock:  # the reader stops reading
        for number in range(count):
            with open(scene.root / f"r{number}.cfg", "wb", buffering=0) as file:
                file.write(b"x")
    until(lambda: scene.pending() == count, f"{count} files to be admitted")
    until(lambda: blindness(scene) and len(blindness(scene)) == len(scene.events("watch.recovered")), "sight")
    assert set(blindness(scene)) == {"overflow"}
    assert len(set(scene.admitted())) == len(scene.admitted()) == count
    scene.put("below/later.cfg")
    scene.wait_admitted("below/later.cfg")


def test_watches_that_are_being_made_anew_are_not_taken_for_gone(
    by_events: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan that comes while watchdog mends what an overflow may have cost waits for that."""
    watcher = by_events.intake._sight._watcher
    assert watcher is not None
    (watches,) = watcher._all_watches()
    assert watches is not None
    add_all = watches._add_all_callbacks
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(watches.ask()))

    def add_all_later(path: bytes) -> None:
        asking.start()
        asking.join(0.5)  # it has to wait for us
        add_all(path)

    monkeypatch.setattr(watches, "_add_all_callbacks", add_all_later)
    watches.on_queue_overflow()
    asking.join(PATIENCE)
    assert answers == [True]


def test_a_hundred_files_a_second_never_look_like_blindness(scene: Watching) -> None:
    """As they come, are delivered and moved away."""
    for number in range(200):
        path = scene.put(f"r{number}.cfg")
        if number % 10 == 0:
            scene.wait_admitted(path.name)
            for delivery in scene.ledger.claim("vault", datetime.now(UTC), limit=100):
                (settled,) = scene.ledger.record([finished(delivery, delivered())], NOW)
                os.unlink(scene.root / os.fsdecode(delivery.archive.relpath))
                scene.ledger.record_dispositions([DispositionResult(settled.archive.id, None)], [], NOW)
    scene.wait_admitted("r199.cfg")
    scene.wait_scan()
    assert blindness(scene) == []
    assert len(scene.admitted()) == len(set(scene.admitted())) == 200


def test_a_stop_ends_every_wait_at_once(by_events: Watching) -> None:
    by_events._stop.set()
    by_events.intake.wake()
    by_events._thread.join(PATIENCE)  # the next scan is an hour away
    assert not by_events._thread.is_alive()
