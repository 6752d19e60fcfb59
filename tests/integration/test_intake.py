"""The intake on a real folder with real inotify: no file is missed, and each loss of events is logged."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backupd.config.models import DropConfig
from backupd.core.drop_problem import DropProblem
from backupd.core.errors import LedgerError
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DropFolder
from backupd.intake.examiner import ExaminerPool
from backupd.intake.intake import Intake
from backupd.ledger.port import DispositionResult, EnqueueResult, FileCandidate
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import NOW, a_claim_result, delivered, record_dispositions
from tests.faults.disk import a_small_disk, fill
from tests.privileges import a_folder_of_nobody, without_rights
from tests.stage import TIMEOUT, until

SHORT = timedelta(milliseconds=250)
LONG = timedelta(hours=1)
HOUR = 3600.0

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
IN_MOVED_FROM, IN_DELETE_SELF = 0x40, 0x400  # sys/inotify.h
LIBC = ctypes.CDLL(None, use_errno=True)


class RunningIntake:
    """One drop folder with a running intake, a real ledger, and a log in a file."""

    def __init__(self, base: Path, kind: type[SqliteLedger] = SqliteLedger, **config: Any) -> None:
        self.base = base
        self.root = base / "drop"
        self.root.mkdir(exist_ok=True)
        self.state = base / "state"
        self.state.mkdir(exist_ok=True)
        self.ledger = kind(open_ledger(self.state).connection)
        self.config = DropConfig(
            path=self.root,
            **{
                "include": ("*.cfg", "*.tar", "*.gz", "*.bz2", "*.xz", "*.zst", "*.zip"),
                "stable_for": timedelta(milliseconds=50),
                "rescan_every": SHORT,
                "observer": "inotify",
                **config,
            },
        )
        self.folder = DropFolder(str(self.root))
        self._log = os.open(base / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.notified: list[Sequence[str]] = []
        self._pool = ExaminerPool("switches")
        self.intake = Intake(
            Drop.of("switches", self.config, self.folder, ("vault",)),
            self.ledger,
            EventLog(LineWriter(self._log), level="debug"),
            self._pool,
            self.notified.append,
            lambda: None,
        )
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._other_threads = set(threading.enumerate())
        self._thread = threading.Thread(target=self._run)
        self._examiners = [
            threading.Thread(target=each.run, args=[self._stop]) for each in self._pool.threads
        ]

    def _run(self) -> None:
        try:
            self.intake.run(self._stop)
        except BaseException as error:  # noqa: BLE001 -- raised again by `stop`
            self._failure = error

    def start(self) -> None:
        for thread in (self._thread, *self._examiners):
            thread.start()
        assert self.intake.ready.wait(TIMEOUT)

    def stop(self) -> None:
        self._stop.set()
        self.intake.wake()
        self._pool.wake()
        for thread in (self._thread, *self._examiners):
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "the intake did not stop"
        self.ledger.close()
        self.folder.close()
        os.close(self._log)
        if self._failure is not None:
            raise self._failure

    def watcher_threads(self) -> list[threading.Thread]:
        """Return the threads that the intake has started."""
        own = {self._thread, *self._examiners, *self._other_threads}
        return [thread for thread in threading.enumerate() if thread not in own]

    def log(self) -> list[dict[str, Any]]:
        size = os.fstat(self._log).st_size
        return [json.loads(line) for line in os.pread(self._log, size, 0).split(b"\n")[:-1]]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.log() if event["event"] == name]

    def queued(self) -> list[str]:
        """Return the names of the queued archives, in order."""
        return [event["archive"] for event in self.events("archive.queued")]

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            until(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{(self.base / 'log').read_text()[-6000:]}") from None

    def pending(self) -> int:
        backlog = self.ledger.backlog()
        return backlog["vault"].pending if backlog else 0

    def wait_queued(self, *names: str) -> None:
        self._until(lambda: set(names) <= set(self.queued()), f"{names} to be queued")

    def wait_event(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        self._until(lambda: len(self.events(name)) >= count, f"{count} x {name}")
        return self.events(name)

    def problems(self) -> dict[str, int]:
        """Return the number of files with each problem."""
        return {count.reason: count.files for count in self.ledger.problem_counts()}

    def wait_problems(self, expected: dict[str, int], *, total: bool = False) -> None:
        """Wait until there are these problems; with `total`, until the sum is as expected."""

        def is_there() -> bool:
            found = self.problems()
            return found == expected or (total and sum(found.values()) == sum(expected.values()))

        try:
            self._until(is_there, f"the problems {expected}")
        except AssertionError as error:
            raise AssertionError(f"{self.problems()}: {error}") from None

    def wait_scan(self) -> None:
        """Wait until a scan that starts from now on has ended."""
        before = len(self.events("drop.scanned"))
        self.wait_event("drop.scanned", before + 2)

    def wait_found_by_event(self, folder: str = "") -> None:
        """Wait until a new archive is found by its event: no scan ends before it is queued.

        An archive that a scan finds is queued after that scan, because it has to be stable first.
        """
        numbers = itertools.count(1)

        def is_found_by_event() -> bool:
            name = f"{folder}by-event-{next(numbers)}.cfg"
            before = len(self.log())
            self.put(name)
            self.wait_queued(name)
            lines = [(event["event"], event.get("archive")) for event in self.log()[before:]]
            return ("drop.scanned", None) not in lines[: lines.index(("archive.queued", name))]

        self._until(is_found_by_event, "an archive found by its event")

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
def running_intake(
    base: Path, kind: type[SqliteLedger] = SqliteLedger, **config: Any
) -> Iterator[RunningIntake]:
    scene = RunningIntake(base, kind, **config)
    try:
        scene.start()
        yield scene
    finally:
        scene.stop()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[RunningIntake]:
    """A drop folder that is scanned every quarter of a second."""
    with running_intake(tmp_path) as scene:
        yield scene


@pytest.fixture
def clock_ahead(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds by which the clock of the intake is ahead; a test may change them."""
    seconds = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + seconds[0], time=lambda: time.time() + seconds[0]
    )
    monkeypatch.setattr("backupd.intake.intake.time", clock)
    monkeypatch.setattr("backupd.intake.intake._EVENT_TIMEOUT", HOUR)
    return seconds


@pytest.fixture
def events_only(tmp_path: Path) -> Iterator[RunningIntake]:
    """A drop folder that is scanned once, at the start; later files are found only by events."""
    with running_intake(tmp_path, rescan_every=LONG) as scene:
        yield scene


# which files are found


def test_files_that_arrive_in_any_way_are_found_by_events(events_only: RunningIntake) -> None:
    root = events_only.root
    (root / "written.cfg").write_bytes(b"abc")
    events_only.put("moved-in.cfg")
    (root / "renamed.cfg.part").write_bytes(b"abc")
    (root / "renamed.cfg.part").rename(root / "renamed.cfg")
    (events_only.base / "source").write_bytes(b"abc")
    os.link(events_only.base / "source", root / "linked.cfg")
    fd = os.open(root, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"abc")
    # with a directory's descriptor Python calls linkat(2), which follows this link
    os.link(f"/proc/self/fd/{fd}", root / "unnamed.cfg", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)
    events_only.wait_queued("written.cfg", "moved-in.cfg", "renamed.cfg", "linked.cfg", "unnamed.cfg")
    assert len(events_only.queued()) == 5


def test_whole_trees_are_found_by_events(events_only: RunningIntake) -> None:
    tree = events_only.base / "tree"
    for name in ("a/r1.cfg", "a/b/r2.cfg"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"abc")
    shutil.copytree(tree, events_only.root / "copied")
    tree.rename(events_only.root / "moved")
    names = [f"{top}/{name}" for top in ("copied", "moved") for name in ("a/r1.cfg", "a/b/r2.cfg")]
    events_only.wait_queued(*names)
    (events_only.root / "moved/a/b/later.cfg").write_bytes(b"abc")
    events_only.wait_queued("moved/a/b/later.cfg")
    (events_only.root / "moved").rename(events_only.root / "again")
    events_only.wait_queued("again/a/b/later.cfg")


def test_a_directory_that_is_renamed_in_place_is_watched_under_its_new_name(
    events_only: RunningIntake,
) -> None:
    (events_only.root / "site").mkdir()
    events_only.put("site/r1.cfg")
    events_only.wait_queued("site/r1.cfg")
    (events_only.root / "site").rename(events_only.root / "berlin")
    events_only.wait_queued("berlin/r1.cfg")
    events_only.put("berlin/r2.cfg")
    (events_only.root / "berlin" / "rack").mkdir()
    events_only.put("berlin/rack/r3.cfg")
    events_only.wait_queued("berlin/r2.cfg", "berlin/rack/r3.cfg")
    assert not events_only.events("library.warning")


def test_directories_that_swap_places_are_watched_under_their_new_names(tmp_path: Path) -> None:
    with running_intake(tmp_path, rescan_every=LONG) as scene:
        for name in ("sent", "x", "y"):
            (scene.root / name).mkdir()
        (scene.root / "y").rename(scene.root / "sent" / "y")
        (scene.root / "x").rename(scene.root / "y")
        scene.put("y/r1.cfg")
        scene.wait_queued("y/r1.cfg")
        (scene.root / "z").mkdir()
        (scene.root / "z").rename(scene.root / "sent" / "z")
        (scene.root / "z").mkdir()
        (scene.root / "z").rmdir()
        (scene.root / "sent" / "z").rmdir()
        scene.put("r2.cfg")
        scene.wait_queued("r2.cfg")
    # and the intake has ended without an exception


def test_a_drop_folder_that_is_a_link_is_watched(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "drop").symlink_to(tmp_path / "elsewhere")
    with running_intake(tmp_path, rescan_every=LONG) as scene:
        scene.put("r1.cfg")
        scene.wait_queued("r1.cfg")
        (scene.root / "site").mkdir()
        scene.put("site/r2.cfg")
        scene.wait_queued("site/r2.cfg")


def test_neither_own_folders_nor_moves_out_of_the_folder_are_watched(tmp_path: Path) -> None:
    for name in ("sent/site", "rejected", ".hidden/deep", "site/sent"):
        (tmp_path / "drop" / name).mkdir(parents=True)
    with running_intake(tmp_path, rescan_every=LONG) as scene:
        (scene.root / "sent" / "later").mkdir()
        (scene.root / "site" / "later").mkdir()
        scene.put("site/later/r1.cfg")
        scene.wait_queued("site/later/r1.cfg")
        masks = watched_inodes()
    wanted = [scene.root, *(scene.root / name for name in ("site", "site/sent", "site/later"))]
    assert set(masks) == {directory.stat().st_ino for directory in wanted}
    assert not any(mask & IN_MOVED_FROM for mask in masks.values())


def test_directories_beyond_the_length_of_a_path_are_not_watched(tmp_path: Path) -> None:
    """The memory for their paths would grow with the square of the depth."""
    scene = RunningIntake(tmp_path, rescan_every=LONG)
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
    scene.wait_queued("r1.cfg")
    assert len(watched_inodes()) == 1 + 4095 // 251
    scene.stop()


def inotify_watches() -> list[dict[str, int]]:
    """Return the inotify watches of this process: descriptor `fd`, `wd`, inode `ino`, event `mask`."""
    watches = []
    for info in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            for line in info.read_text().splitlines():
                if line.startswith("inotify "):
                    fields = dict(field.split(":", 1) for field in line.split()[1:])
                    watch = {name: int(fields[name], 16) for name in ("wd", "ino", "mask")}
                    watches.append({"fd": int(info.name), **watch})
    return watches


def watched_inodes() -> dict[int, int]:
    """Return the inodes of the directories that this process watches by inotify, with their event masks."""
    return {watch["ino"]: watch["mask"] for watch in inotify_watches()}


def silence(directory: Path) -> None:
    """Have the kernel report no arrivals in a watched directory, although it stays watched."""
    (watch,) = (watch for watch in inotify_watches() if watch["ino"] == directory.stat().st_ino)
    wd = LIBC.inotify_add_watch(watch["fd"], os.fsencode(directory), IN_DELETE_SELF)
    assert wd == watch["wd"]


def test_a_file_from_before_the_start_is_found(tmp_path: Path) -> None:
    scene = RunningIntake(tmp_path, rescan_every=LONG)
    scene.put("r1.cfg")
    scene.start()
    scene.wait_queued("r1.cfg")
    scene.stop()


def test_a_name_that_is_not_valid_utf_8_is_queued(events_only: RunningIntake) -> None:
    root = os.fsencode(events_only.root)
    os.mkdir(root + b"/r\xe4ck")
    for name in (b"/bad\xff\n.cfg", b"/r\xe4ck/r1.cfg", b"/r\xe4ck/\xed\xb2\x80.cfg"):
        with open(root + name, "wb") as file:
            file.write(b"abc")
    events_only.wait_queued("bad\\xff\n.cfg", "r\\xe4ck/r1.cfg", "r\\xe4ck/\\xed\\xb2\\x80.cfg")


def test_a_file_with_the_name_of_an_own_folder_is_found_by_its_event(tmp_path: Path) -> None:
    with running_intake(tmp_path, rescan_every=LONG, sent_dir="sent.cfg") as scene:
        scene.put("sent.cfg")
        scene.wait_problems({"own_name": 1})


def test_a_watched_folder_takes_one_thread_and_one_inotify_instance(events_only: RunningIntake) -> None:
    (events_only.root / "site").mkdir()
    events_only.put("site/r1.cfg")
    events_only.wait_queued("site/r1.cfg")
    assert len(events_only.watcher_threads()) == 1
    assert len({watch["fd"] for watch in inotify_watches()}) == 1


def test_files_in_own_and_hidden_folders_are_not_queued(scene: RunningIntake) -> None:
    for name in ("sent", "rejected", "sent/deep", ".hidden", ".hidden/deep"):
        (scene.root / name).mkdir()
        scene.put(f"{name}/r1.cfg")
    (scene.base / "tree").mkdir()
    (scene.base / "tree" / "r1.cfg").write_bytes(b"abc")
    shutil.copytree(scene.base / "tree", scene.root / "sent" / "tree")
    (scene.base / "tree").rename(scene.root / ".tree")
    scene.put("seen.cfg")
    scene.wait_queued("seen.cfg")
    scene.wait_scan()
    assert scene.queued() == ["seen.cfg"]


def test_a_hidden_folder_is_scanned_once_it_is_renamed_to_a_visible_name(events_only: RunningIntake) -> None:
    hidden = events_only.root / ".part"
    hidden.mkdir()
    (hidden / "r1.cfg").write_bytes(b"abc")
    hidden.rename(events_only.root / "shown")
    events_only.wait_queued("shown/r1.cfg")
    (events_only.root / "shown" / "r2.cfg").write_bytes(b"abc")
    events_only.wait_queued("shown/r2.cfg")


def test_without_recursion_no_file_in_a_subfolder_is_queued(tmp_path: Path) -> None:
    with running_intake(tmp_path, recursive=False) as scene:
        (scene.root / "below").mkdir()
        scene.put("below/r1.cfg")
        scene.put("seen.cfg")
        scene.wait_queued("seen.cfg")
        scene.wait_scan()
        assert scene.queued() == ["seen.cfg"]


def test_without_recursion_each_subfolder_with_files_is_a_problem(tmp_path: Path) -> None:
    own: dict[str, Any] = {"sent_dir": "done/sent", "rejected_dir": "rejected", "exclude": ("old",)}
    with running_intake(tmp_path, recursive=False, **own) as scene:
        for name in ("empty", "done/sent", "rejected", "old", ".ssh", "set1.tmp", "below"):
            (scene.root / name).mkdir(parents=True)
            if name != "empty":
                scene.put(f"{name}/r1.cfg")
        scene.wait_problems({"subfolder": 1})
        (problem,) = scene.ledger.problems()
        assert (problem.relpath, problem.hint.split(" to ")[0]) == (b"below", "set `recursive = true`")
        scene.wait_scan()
        assert scene.problems() == {"subfolder": 1}
        (scene.root / "below" / "r1.cfg").rename(scene.root / "r1.cfg")
        scene.wait_problems({})
        scene.wait_queued("r1.cfg")


def test_polling_finds_files_without_inotify(tmp_path: Path) -> None:
    with running_intake(tmp_path, observer="polling") as scene:
        assert watched_inodes() == {}
        assert scene.watcher_threads() == []
        scene.put("r1.cfg")
        (scene.root / "below").mkdir()
        scene.put("below/r2.cfg")
        scene.wait_queued("r1.cfg", "below/r2.cfg")
        (event,) = scene.events("drop.watched")
        assert (event["observer"], event["reason"]) == ("polling", "configured")
        assert not scene.events("watch.degraded")


def test_the_workers_of_the_destinations_are_notified(scene: RunningIntake) -> None:
    scene.put("r1.cfg")
    scene.wait_queued("r1.cfg")
    until(lambda: scene.notified, "the workers to be notified")
    assert scene.notified == [("vault",)]


# which files are finished


def test_a_file_that_is_open_for_writing_waits_until_it_is_closed(scene: RunningIntake) -> None:
    with (scene.root / "r1.cfg").open("wb", buffering=0) as file:
        file.write(b"half")
        scene.put("other.cfg")
        scene.wait_queued("other.cfg")
        scene.wait_scan()
        scene.wait_scan()
        assert scene.queued() == ["other.cfg"]
        file.write(b" and half")
    scene.wait_queued("r1.cfg")
    (event,) = (event for event in scene.events("archive.queued") if event["archive"] == "r1.cfg")
    assert event["size_bytes"] == len(b"half and half")
    assert scene.queued() == ["other.cfg", "r1.cfg"]


def test_a_growing_file_is_queued_once_and_whole(tmp_path: Path, clock_ahead: list[float]) -> None:
    with running_intake(tmp_path, stable_for=timedelta(hours=1)) as scene:
        path = scene.root / "r1.cfg"
        for _ in range(4):
            with path.open("ab") as file:
                file.write(b"x" * 100)
            scene.wait_scan()
            clock_ahead[0] += 0.7 * HOUR
            scene.wait_scan()
            assert scene.queued() == []
        clock_ahead[0] += 0.7 * HOUR
        scene.wait_queued("r1.cfg")
        scene.wait_scan()
        assert [event["size_bytes"] for event in scene.events("archive.queued")] == [400]


def test_new_content_under_the_same_name_supersedes_the_old_one(scene: RunningIntake) -> None:
    scene.put("r1.cfg", b"old")
    scene.wait_queued("r1.cfg")
    scene.put("r1.cfg", b"newer")
    scene.wait_event("archive.queued", 2)
    (event,) = scene.events("archive.superseded")
    assert (event["archive"], event["size_bytes"]) == ("r1.cfg", 3)


def test_an_ineligible_file_is_logged_once_with_its_reason(scene: RunningIntake) -> None:
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
    scene.wait_queued("empty.cfg")


# problems


def test_a_file_with_the_name_of_sent_dir_is_a_problem(tmp_path: Path) -> None:
    with running_intake(tmp_path, include=("*",)) as scene:
        (scene.root / "sent").write_bytes(b"in the way")
        scene.wait_problems({"own_name": 1})
        (scene.root / "sent").rename(scene.root / "r1.cfg")
        scene.wait_queued("r1.cfg")
        scene.wait_problems({})


def test_a_problem_ends_with_its_file(scene: RunningIntake) -> None:
    (scene.root / "readme.pdf").write_bytes(b"abc")
    (scene.root / "empty.cfg").touch()
    (scene.root / "link.cfg").symlink_to("/etc/hostname")
    scene.wait_problems({"not_included": 1, "too_small": 1, "symlink": 1})
    (scene.root / "readme.pdf").rename(scene.root / "r1.cfg")
    (scene.root / "empty.cfg").write_bytes(b"no longer")
    (scene.root / "link.cfg").unlink()
    scene.wait_problems({})
    scene.wait_queued("r1.cfg", "empty.cfg")


def test_a_problem_has_the_path_size_and_remedy_of_its_file(scene: RunningIntake) -> None:
    (scene.root / "site").mkdir()
    (scene.root / "site" / "readme.pdf").write_bytes(b"abc")
    scene.wait_problems({"not_included": 1})
    (problem,) = scene.ledger.problems("switches")
    assert (problem.relpath, problem.size_bytes) == (b"site/readme.pdf", 3)
    assert problem.error == "its name matches no pattern of `include`"
    assert "`include`" in problem.hint
    assert datetime.now(UTC) - problem.since < timedelta(minutes=10)


def test_a_temporary_name_is_a_problem_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_intake(tmp_path) as scene:
        temporary = scene.root / ".r2.cfg.Xy12"
        temporary.write_bytes(b"abc")
        os.utime(temporary, (0, 0))  # by a copy that keeps times
        scene.wait_scan()
        assert scene.problems() == {}
        now = time.time() + 86401
        monkeypatch.setattr("backupd.intake.unfinished_files.time", SimpleNamespace(time=lambda: now))
        scene.wait_problems({"temporary_name": 1})
        temporary.rename(scene.root / "r2.cfg")
        scene.wait_problems({})
        scene.wait_queued("r2.cfg")


def test_a_folder_with_a_temporary_name_is_taken_once_it_is_renamed(events_only: RunningIntake) -> None:
    """It is a set of files under construction, which must not be taken apart."""
    scene = events_only
    for name in ("set1.tmp", ".set2.Xy12", "set3.partial"):
        (scene.root / name / "site").mkdir(parents=True)
        (scene.root / name / "site" / "r1.cfg").write_bytes(b"abc")
    scene.wait_found_by_event()
    assert not [name for name in scene.queued() if "site" in name]
    for number, name in enumerate(("set1.tmp", ".set2.Xy12", "set3.partial")):
        (scene.root / name).rename(scene.root / f"set{number}")
        scene.wait_queued(f"set{number}/site/r1.cfg")


def test_a_folder_that_keeps_its_temporary_name_for_a_day_is_a_problem(
    scene: RunningIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scene.root / "set1.tmp").mkdir()
    scene.put("set1.tmp/r1.cfg")
    scene.wait_scan()
    assert scene.problems() == {}
    now = time.time() + 86401
    monkeypatch.setattr("backupd.intake.unfinished_files.time", SimpleNamespace(time=lambda: now))
    scene.wait_problems({"temporary_name": 1})
    (scene.root / "set1.tmp").rename(scene.root / "set1")
    scene.wait_problems({})
    scene.wait_queued("set1/r1.cfg")


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "~snapshot", "lost+found", ".git", "site/@eaDir"])
def test_folders_of_file_servers_are_ignored(scene: RunningIntake, name: str) -> None:
    (scene.root / name).mkdir(parents=True)
    scene.put(f"{name}/r1.cfg")
    scene.put("r2.cfg")
    scene.wait_queued("r2.cfg")
    scene.wait_scan()
    assert scene.queued() == ["r2.cfg"]
    assert scene.problems() == {}


def test_a_folder_that_is_excluded_is_not_entered(tmp_path: Path) -> None:
    with running_intake(tmp_path, exclude=("old", "site/new")) as scene:
        for name in ("old", "site/old", "site/new", "new"):
            (scene.root / name).mkdir(parents=True)
            scene.put(f"{name}/r1.cfg")
        scene.wait_queued("new/r1.cfg")
        scene.wait_scan()
        assert scene.queued() == ["new/r1.cfg"]


@pytest.mark.parametrize("suffix", ["part", "filepart", "aria2", "aria2__temp", "lftp-pget-status", "st"])
def test_a_file_with_a_companion_of_a_download_waits_until_the_companion_is_gone(
    events_only: RunningIntake, suffix: str
) -> None:
    scene = events_only
    companion = scene.root / f"r1.cfg.{suffix}"
    companion.write_bytes(b"the parts that have arrived")
    scene.put("r1.cfg", b"half of it")
    scene.wait_found_by_event()
    assert "r1.cfg" not in scene.queued()
    companion.unlink()
    scene.wait_queued("r1.cfg")


def test_a_file_with_a_companion_that_is_a_day_old_is_queued_and_listed_as_suspicious(
    scene: RunningIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scene.root / "r1.cfg.filepart").write_bytes(b"of an upload that broke off")
    scene.put("r1.cfg")
    scene.wait_scan()
    assert scene.queued() == []
    now = time.time() + 86401
    monkeypatch.setattr("backupd.intake.unfinished_files.time", SimpleNamespace(time=lambda: now))
    scene.wait_queued("r1.cfg")
    scene.wait_problems({"suspicious": 1, "temporary_name": 1})
    (event,) = scene.events("archive.suspicious")
    assert "companion" in event["error"]


def test_only_a_regular_file_is_a_companion(scene: RunningIntake) -> None:
    (scene.root / "r1.cfg.part").mkdir()
    (scene.root / "r2.cfg.part").symlink_to("/etc/hostname")
    scene.put("r1.cfg")
    scene.put("r2.cfg")
    scene.wait_queued("r1.cfg", "r2.cfg")
    assert "suspicious" not in scene.problems()


def test_a_temporary_name_with_a_time_in_the_future_is_a_problem(scene: RunningIntake) -> None:
    (scene.root / "r1.cfg.part").write_bytes(b"abc")
    in_two_days = time.time() + 48 * HOUR
    os.utime(scene.root / "r1.cfg.part", (in_two_days, in_two_days))
    scene.wait_problems({"temporary_name": 1})


def test_a_companion_with_an_ambiguous_name_is_no_archive_beside_its_file(tmp_path: Path) -> None:
    with running_intake(tmp_path, include=("*",)) as scene:
        (scene.root / "r1.cfg.st").write_bytes(b"the parts that have arrived")
        (scene.root / "r1.cfg").write_bytes(b"half of it")
        (scene.root / "pump.st").write_bytes(b"PROGRAM pump")
        scene.wait_queued("pump.st")
        scene.wait_scan()
        assert scene.queued() == ["pump.st"]


def test_a_companion_with_an_ambiguous_name_is_an_archive_beside_a_folder(tmp_path: Path) -> None:
    with running_intake(tmp_path, include=("*",)) as scene:
        (scene.root / "pump").mkdir()
        scene.put("pump.st")
        scene.wait_queued("pump.st")


@pytest.mark.root
def test_files_wait_while_the_filesystem_has_no_room(tmp_path: Path) -> None:
    with a_small_disk(tmp_path / "drop"), running_intake(tmp_path) as scene:
        filler = scene.root / "filler.tmp"
        filler.write_bytes(bytes(512 * 1024))
        fill(scene.root / "r1.cfg")
        scene.wait_problems({"no_room": 1})
        assert scene.queued() == []
        filler.unlink()
        scene.wait_queued("r1.cfg")
        scene.wait_problems({})


@pytest.mark.root
def test_a_file_that_stays_as_it_is_on_a_full_disk_is_queued_and_listed_as_suspicious(tmp_path: Path) -> None:
    grace = timedelta(seconds=1)
    with a_small_disk(tmp_path / "drop"), running_intake(tmp_path, inspect_grace=grace) as scene:
        fill(scene.root / "r1.cfg")
        scene.wait_queued("r1.cfg")
        scene.wait_problems({"suspicious": 1})
        (event,) = scene.events("archive.suspicious")
        assert "no room left" in event["error"]


@pytest.mark.root
def test_a_file_that_waits_for_room_is_not_unfinished_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.unfinished_files._UNFINISHED_PROBLEM_AFTER", 1.0)
    with a_small_disk(tmp_path / "drop"), running_intake(tmp_path) as scene:
        fill(scene.root / "r1.cfg")
        scene.wait_problems({"no_room": 1})
        before = scene.ledger.problems()
        seen_at = time.monotonic()
        while time.monotonic() < seen_at + 2:
            scene.wait_scan()
        assert scene.ledger.problems() == before
        assert len(scene.events("archive.waiting")) == 1


def test_problems_of_a_file_that_alternate_are_logged_once_and_keep_their_ages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.unfinished_files._UNFINISHED_PROBLEM_AFTER", 0.1)
    checks: dict[str, Any] = {"checksum_file": "required", "inspect_grace": timedelta(0)}
    with running_intake(tmp_path, **checks) as scene:
        scene.put("r1.cfg")
        scene.wait_problems({"checksum_missing": 1})
        before = scene.ledger.problems()
        (scene.root / "r1.cfg.part").write_bytes(b"the parts that have arrived")
        for _ in range(3):
            scene.wait_problems({"unfinished": 1})
            scene.wait_problems({"checksum_missing": 1})
        assert scene.ledger.problems() == before
        reasons = [event["reason"] for event in scene.events("archive.waiting")]
        assert reasons == ["checksum_missing", "unfinished"]


@pytest.mark.root
@pytest.mark.parametrize("days", [-2, 2])
def test_a_file_with_an_old_or_wrong_time_does_not_wait_for_room(tmp_path: Path, days: int) -> None:
    with a_small_disk(tmp_path / "drop"):
        written_at = time.time() + days * 24 * HOUR
        (tmp_path / "drop" / "r1.cfg").write_bytes(b"abc")
        os.utime(tmp_path / "drop" / "r1.cfg", (written_at, written_at))
        fill(tmp_path / "drop" / "filler.tmp")
        with running_intake(tmp_path, inspect_grace=LONG) as scene:
            scene.wait_queued("r1.cfg")
            scene.wait_problems({"suspicious": 1})
            assert scene.events("archive.waiting") == []


@pytest.mark.root
def test_a_file_on_a_read_only_filesystem_needs_no_room(tmp_path: Path) -> None:
    with a_small_disk(tmp_path / "drop"):
        (tmp_path / "drop" / "r1.cfg").write_bytes(b"abc")
        fill(tmp_path / "drop" / "filler.tmp")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "drop"], check=True)
        with running_intake(tmp_path) as scene:
            scene.wait_queued("r1.cfg")
            scene.wait_scan()
            assert scene.problems() == {}


def test_a_name_that_exists_for_a_moment_is_no_problem(tmp_path: Path) -> None:
    with running_intake(tmp_path, stable_for=timedelta(milliseconds=300), rescan_every=LONG) as scene:
        for number in range(50):
            temporary = scene.root / f"upload.{number}-Xy"
            temporary.write_bytes(b"abc")
            temporary.rename(scene.root / f"r{number}.cfg")
        scene.wait_queued(*(f"r{number}.cfg" for number in range(50)))
        assert scene.events("archive.ignored") == []
        assert scene.problems() == {}


def test_a_problem_keeps_its_age_across_a_restart_and_ends_if_its_file_is_gone(tmp_path: Path) -> None:
    with running_intake(tmp_path) as scene:
        for name in ("one.pdf", "two.pdf"):
            (scene.root / name).write_bytes(b"abc")
        scene.wait_problems({"not_included": 2})
        before = {problem.relpath: problem for problem in scene.ledger.problems()}
    (tmp_path / "drop" / "two.pdf").unlink()
    with running_intake(tmp_path) as scene:
        scene.wait_problems({"not_included": 1})
        assert scene.ledger.problems() == [before[b"one.pdf"]]


def test_problems_of_dispositions_are_not_those_of_the_intake(scene: RunningIntake) -> None:
    not_moved = DropProblem(
        "switches", b"r1.cfg", "not_moved", datetime.now(UTC), "Permission denied", "chmod it"
    )
    scene.ledger.save_problems([not_moved], [])
    (scene.root / "one.pdf").write_bytes(b"abc")
    scene.wait_problems({"not_moved": 1, "not_included": 1})
    (scene.root / "one.pdf").unlink()
    scene.wait_problems({"not_moved": 1})


def test_a_folder_that_cannot_be_read_is_a_problem_and_its_files_keep_theirs() -> None:
    with a_folder_of_nobody() as base, without_rights(), running_intake(base) as scene:
        (scene.root / "one.pdf").write_bytes(b"abc")
        scene.wait_problems({"not_included": 1})
        scene.root.chmod(0)
        scene.wait_problems({"not_included": 1, "folder_failed": 1})
        (folder,) = [p for p in scene.ledger.problems() if p.reason == "folder_failed"]
        assert (folder.relpath, folder.error) == (b"", "Permission denied")
        scene.root.chmod(0o755)
        scene.wait_problems({"not_included": 1})


def test_a_directory_that_cannot_be_read_is_a_problem() -> None:
    with a_folder_of_nobody() as base, without_rights(), running_intake(base) as scene:
        (scene.root / "closed").mkdir()
        (scene.root / "closed").chmod(0)
        scene.wait_problems({"unreadable": 1})
        (scene.root / "closed").chmod(0o755)
        scene.wait_problems({})


def test_problems_that_the_ledger_refused_are_saved_later(tmp_path: Path) -> None:
    with running_intake(tmp_path, RefusingLedger) as scene:
        assert isinstance(scene.ledger, RefusingLedger)
        (scene.root / "one.pdf").write_bytes(b"abc")
        scene.wait_event("ledger.failed")
        scene.ledger.failing = False
        scene.wait_problems({"not_included": 1})


# lost events


def exchange(one: Path, other: Path) -> None:
    """Let two paths change places in one step, so that neither is missing in between."""
    assert LIBC.renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE) == 0


def degraded_reasons(scene: RunningIntake) -> list[str]:
    return [event["reason"] for event in scene.events("watch.degraded")]


def test_problems_beyond_the_limit_are_counted_and_listed_once_others_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock_ahead: list[float]
) -> None:
    monkeypatch.setattr("backupd.intake.problem_list._MAX_LISTED", 10)
    with running_intake(tmp_path) as scene:
        for number in range(15):
            (scene.root / f"other-{number}.pdf").write_bytes(b"no archive")
            (scene.root / f"empty-{number}.cfg").touch()
        scene.wait_problems({"not_included": 5, "too_small": 5, "not_listed": 20}, total=True)
        clock_ahead[0] += 2 * HOUR
        for _ in range(3):
            scene.wait_scan()
        assert len(scene.events("archive.ignored")) == 10
        assert degraded_reasons(scene) == []  # no event of a file that is not listed counts as lost
        for path in scene.root.glob("other-*"):
            path.unlink()
        scene.wait_problems({"too_small": 10, "not_listed": 5})
        for path in scene.root.glob("empty-*"):
            path.unlink()
        scene.wait_problems({})


def test_a_folder_that_is_renamed_and_recreated_is_watched_again(scene: RunningIntake) -> None:
    scene.root.rename(scene.base / "away")
    scene.wait_event("watch.degraded")
    scene.wait_event("drop.failed")
    scene.root.mkdir()
    scene.put("r1.cfg")
    scene.wait_queued("r1.cfg")
    scene.wait_event("watch.recovered")
    scene.wait_scan()
    assert degraded_reasons(scene) == ["replaced"]
    assert len(scene.events("watch.recovered")) == len(scene.events("drop.failed")) == 1


def test_a_folder_that_is_deleted_and_recreated_at_once_is_watched_again(scene: RunningIntake) -> None:
    scene.root.rmdir()
    scene.root.mkdir()
    scene.put("r1.cfg")
    scene.wait_queued("r1.cfg")
    scene.wait_event("watch.recovered")
    (scene.root / "below").mkdir()
    scene.put("below/r2.cfg")
    scene.wait_queued("below/r2.cfg")
    scene.wait_scan()
    assert degraded_reasons(scene) == ["replaced"]


def test_a_folder_that_is_deleted_and_recreated_later_is_watched_again(scene: RunningIntake) -> None:
    shutil.rmtree(scene.root)
    scene.wait_event("drop.failed")
    scene.wait_scan()
    scene.root.mkdir()
    scene.put("r1.cfg")
    scene.wait_queued("r1.cfg")
    scene.wait_event("watch.recovered")
    assert len(scene.events("watch.degraded")) == len(scene.events("drop.failed")) == 1


def test_a_renamed_folder_is_noticed_without_a_rescan(events_only: RunningIntake) -> None:
    events_only.root.rename(events_only.base / "away")
    events_only.wait_event("watch.degraded")
    assert degraded_reasons(events_only) == ["replaced"]


def test_a_polled_folder_recovers_from_each_replacement(tmp_path: Path) -> None:
    with running_intake(tmp_path, observer="polling") as scene:
        for number in range(1, 3):
            scene.root.rename(scene.base / f"away-{number}")
            scene.root.mkdir()
            restored = scene.wait_event("watch.recovered", number)
            assert {event["observer"] for event in restored} == {"polling"}
            scene.put(f"r{number}.cfg")
            scene.wait_queued(f"r{number}.cfg")
            assert degraded_reasons(scene) == ["replaced"] * number
            assert not scene.intake.is_degraded


def test_after_a_replacement_files_are_found_by_events_again(scene: RunningIntake) -> None:
    scene.root.rename(scene.base / "away")
    scene.root.mkdir()
    scene.wait_event("watch.recovered")
    scene.wait_found_by_event()
    (scene.root / "below").mkdir()
    scene.wait_found_by_event("below/")


def test_a_folder_that_was_unreadable_is_read_once_it_can_be() -> None:
    with a_folder_of_nobody() as base, without_rights(), running_intake(base) as scene:
        scene.put("r1.cfg")
        scene.wait_queued("r1.cfg")
        scene.root.chmod(0)
        scene.wait_scan()
        scene.root.chmod(0o755)
        scene.put("r2.cfg")
        scene.wait_queued("r2.cfg")


def test_an_unreadable_replacement_of_the_folder_is_logged_once() -> None:
    with a_folder_of_nobody() as base, without_rights(), running_intake(base) as scene:
        (base / "other").mkdir(mode=0)
        exchange(scene.root, base / "other")
        (failed,) = scene.wait_event("drop.failed")
        assert failed["error"] == "Permission denied"
        scene.wait_scan()
        scene.wait_scan()
        assert len(scene.events("drop.failed")) == 1
        assert degraded_reasons(scene) == ["replaced"]
        scene.root.chmod(0o755)
        scene.put("r1.cfg")
        scene.wait_queued("r1.cfg")
        scene.wait_event("watch.recovered")


def test_an_unreadable_directory_is_logged_once_and_hides_no_other_file() -> None:
    with a_folder_of_nobody() as base, without_rights(), running_intake(base) as scene:
        (scene.root / "closed").mkdir()
        scene.put("closed/r1.cfg")
        (scene.root / "closed").chmod(0)
        scene.wait_event("archive.ignored")
        scene.put("r2.cfg")
        scene.wait_queued("r2.cfg")
        scene.wait_scan()
        logged = [event for event in scene.events("archive.ignored") if event["archive"] == "closed"]
        assert [event["reason"] for event in logged] == ["unreadable"]
        (scene.root / "closed").chmod(0o755)
        scene.wait_queued("closed/r1.cfg")


def test_a_directory_that_becomes_readable_is_watched_at_once() -> None:
    """As when `rsync -a` or `cp -rp` fills a directory before it sets its mode."""
    with a_folder_of_nobody() as base, without_rights(), running_intake(base, rescan_every=LONG) as scene:
        (scene.root / "closed").mkdir(mode=0o300)
        scene.put("closed/r1.cfg")
        scene.wait_event("archive.ignored")
        (scene.root / "closed").chmod(0o755)
        scene.wait_queued("closed/r1.cfg")
        scene.wait_found_by_event("closed/")
        assert degraded_reasons(scene) == []
        assert scene.ledger.problems() == []


def test_a_directory_that_cannot_be_read_for_a_while_is_watched_by_the_next_scan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file that arrived in it meanwhile is not taken for one with a lost event."""
    with a_folder_of_nobody() as base, without_rights(), running_intake(base) as scene:
        with monkeypatch.context() as patched:
            patched.setattr("backupd.intake.intake._EVENT_TIMEOUT", -1.0)
            (scene.root / "closed").mkdir(mode=0o300)  # files can be put into it
            scene.put("closed/r1.cfg")
            scene.wait_event("archive.ignored")
            scene.wait_scan()
            (scene.root / "closed").chmod(0o755)
            scene.wait_queued("closed/r1.cfg")
        scene.wait_found_by_event("closed/")
        assert degraded_reasons(scene) == []


def end_thread(scene: RunningIntake, thread: threading.Thread) -> None:
    """End a thread as an unhandled exception would, at its next event."""
    assert thread.ident is not None
    exception = ctypes.py_object(SystemExit)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), exception) == 1
    numbers = itertools.count(1)

    def has_ended() -> bool:
        (scene.root / f"wake-{next(numbers)}.pdf").touch()
        return not thread.is_alive()

    until(has_ended, "the thread to end")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the test ends one
def test_a_watcher_with_a_dead_thread_is_restarted(scene: RunningIntake) -> None:
    before = scene.watcher_threads()
    end_thread(scene, before[0])
    scene.put("r1.cfg")
    scene.wait_queued("r1.cfg")
    scene.wait_event("watch.recovered")
    assert len(scene.watcher_threads()) == len(before)
    scene.wait_found_by_event()
    assert degraded_reasons(scene) == ["dead"]
    assert len(scene.events("watch.recovered")) == 1


def test_without_threads_for_a_watcher_files_are_found_by_scans(
    scene: RunningIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # Python's message if a limit is reached

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        scene.root.rename(scene.base / "away")
        scene.root.mkdir()
        until(lambda: "refused" in degraded_reasons(scene), "the watcher to be refused")
        scene.put("by-scan.cfg")
        scene.wait_queued("by-scan.cfg")
    scene.wait_event("watch.recovered")
    assert "limit of threads" in scene.events("watch.degraded")[-1]["hint"]
    scene.wait_found_by_event()


def test_files_without_an_event_are_found_and_logged_as_one_loss(
    scene: RunningIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scene.root / "site").mkdir()
    scene.wait_found_by_event("site/")
    silence(scene.root / "site")
    with monkeypatch.context() as patched:
        patched.setattr("backupd.intake.intake._EVENT_TIMEOUT", -1.0)
        tree = scene.base / "tree"
        tree.mkdir()
        names = [f"tree/r{number}.cfg" for number in range(3)]
        for name in names:
            (scene.base / name).write_bytes(b"abc")
        tree.rename(scene.root / "site" / "tree")  # the same scan finds all of them
        scene.wait_queued(*(f"site/{name}" for name in names))
        scene.wait_event("watch.recovered")
    scene.wait_found_by_event("site/tree/")
    assert degraded_reasons(scene) == ["event_lost"]
    assert len(scene.events("watch.recovered")) == 1


def test_a_watch_that_the_kernel_removed_is_detected_by_the_next_scan(scene: RunningIntake) -> None:
    for watch in inotify_watches():
        assert LIBC.inotify_rm_watch(watch["fd"], watch["wd"]) == 0
    scene.wait_event("watch.recovered")
    assert degraded_reasons(scene) == ["removed"]
    scene.wait_found_by_event()


def test_a_quiet_folder_is_not_taken_for_a_broken_watcher(scene: RunningIntake) -> None:
    """Not even if many files in it are read meanwhile."""
    path = scene.put("r1.cfg")
    scene.wait_queued("r1.cfg")
    before = path.stat(), scene.root.stat()
    for _ in range(200):
        path.read_bytes()
    for _ in range(5):
        scene.wait_scan()
    assert (path.stat().st_ctime_ns, scene.root.stat().st_mtime_ns) == (
        before[0].st_ctime_ns,
        before[1].st_mtime_ns,
    )
    assert scene.queued() == ["r1.cfg"]
    assert degraded_reasons(scene) == []


def test_events_that_arrived_are_not_taken_for_lost(tmp_path: Path, clock_ahead: list[float]) -> None:
    with running_intake(tmp_path) as scene:
        for number in range(300):
            scene.put(f"r{number}.cfg")
        (scene.root / "empty.cfg").touch()
        (scene.root / "other.pdf").touch()
        with (scene.root / "open.cfg").open("wb", buffering=0) as file:
            file.write(b"abc")
            scene.wait_queued("r299.cfg")
            scene.wait_event("archive.ignored", 2)
            scene.wait_scan()
            clock_ahead[0] += 2 * HOUR
            scene.wait_scan()
        scene.wait_queued("open.cfg")
        assert degraded_reasons(scene) == []


def test_companions_with_an_ambiguous_name_are_not_taken_for_lost_events(
    tmp_path: Path, clock_ahead: list[float]
) -> None:
    with running_intake(tmp_path, include=("*",)) as scene:
        (scene.root / "r1.cfg").write_bytes(b"half of it")
        (scene.root / "r1.cfg.st").write_bytes(b"the parts that have arrived")
        scene.wait_found_by_event()
        clock_ahead[0] += 2 * HOUR
        scene.wait_scan()
        assert degraded_reasons(scene) == []
        (scene.root / "r1.cfg").rename(tmp_path / "r1.cfg")
        scene.wait_queued("r1.cfg.st")
        assert degraded_reasons(scene) == []


class RefusingLedger(SqliteLedger):
    """A ledger that refuses writes while `failing` is set."""

    failing = True

    def enqueue(
        self, candidates: Sequence[FileCandidate], destinations: Sequence[str], now: datetime
    ) -> EnqueueResult:
        if self.failing:
            raise LedgerError("the ledger can't be written: database or disk is full", "check the disk")
        return super().enqueue(candidates, destinations, now)

    def save_problems(self, found: Sequence[DropProblem], solved: Sequence[DropProblem]) -> None:
        if self.failing:
            raise LedgerError("the ledger can't be written: database or disk is full", "check the disk")
        super().save_problems(found, solved)


def test_files_that_the_ledger_refused_are_queued_later_and_their_events_not_taken_for_lost(
    tmp_path: Path, clock_ahead: list[float]
) -> None:
    with running_intake(tmp_path, RefusingLedger) as scene:
        assert isinstance(scene.ledger, RefusingLedger)
        scene.put("r1.cfg")
        scene.wait_event("ledger.failed")
        clock_ahead[0] += 2 * HOUR
        scene.wait_scan()
        assert len(scene.events("ledger.failed")) == 1
        scene.ledger.failing = False
        scene.wait_queued("r1.cfg")
        assert degraded_reasons(scene) == []


def test_events_of_a_hundred_files_per_second_are_not_taken_for_lost(scene: RunningIntake) -> None:
    """While they arrive, are delivered and are moved out of the folder."""
    for number in range(200):
        path = scene.put(f"r{number}.cfg")
        if number % 10 == 0:
            scene.wait_queued(path.name)
            for delivery in scene.ledger.claim("vault", datetime.now(UTC), limit=100):
                (completed,) = scene.ledger.record([a_claim_result(delivery, delivered())], NOW).completed
                os.unlink(scene.root / os.fsdecode(delivery.archive.relpath))
                record_dispositions(scene.ledger, [DispositionResult(completed.archive.id, None)], [], NOW)
    scene.wait_queued("r199.cfg")
    scene.wait_scan()
    assert degraded_reasons(scene) == []
    assert len(scene.queued()) == len(set(scene.queued())) == 200


def test_a_stop_ends_a_wait_at_once(events_only: RunningIntake) -> None:
    events_only._stop.set()
    events_only.intake.wake()
    events_only._thread.join(TIMEOUT)  # the next scan is an hour away
    assert not events_only._thread.is_alive()
