"""A day in the life of drop folders: all writers at once, broken uploads, and a mount that dies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from types import FrameType

from backupd.core.drop_problem import NOT_MOVED
from backupd.core.eligibility import COMPANION_SUFFIXES
from backupd.core.filesystems import default_stable_for
from backupd.core.mountinfo import MountEntry
from backupd.core.names import RECEIPT_NAME
from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.faults import file_servers
from tests.faults.accounts import (
    STUMP_REASONS,
    Arrived,
    Contents,
    SentFile,
    Upload,
    UploadState,
    Violation,
    compare,
    may_be_left,
)
from tests.faults.campaign import CampaignOptions, Report
from tests.faults.file_servers import FileServers, Mount, try_mount
from tests.faults.writers import DIRECT, Client, Place, Transfer, Writer, all_writers, touches
from tests.stage import Daemon, Stage

DROPS = ("local", "tmpfs", "sshfs", "rclone", "xfs", "btrfs")
_SUBFOLDERS = ("", "edge", "core/rack-2")

_RESCAN_EVERY = 5.0
_CHECK_TIMEOUT = 10.0
_AS_USUAL = ("nice", "-n", str(-os.nice(0)))
"""Runs a command with the usual priority, as a monitoring system does, if the campaign has another one."""

NOTICED_WITHIN = 15.0
"""Seconds after which `status --check` knows that a mount died or came back; it is polled every 5 s."""

_FULL_TIMES = 480.0
"""Seconds of a campaign from which on rclone caches for as long as it does by default."""

_SHORT_CACHE = 20.0
"""Seconds for which rclone caches in a shorter campaign."""

_MARGIN = 30.0
"""Seconds by which a busy host may do anything later."""

_MAX_SHOWN = 20
"""Violations with the ledger's view; each takes a command."""


@dataclass(slots=True)
class DayTally:
    """The uploads so far, and the truth about the mount that dies."""

    uploads: list[Upload] = field(default_factory=list)
    stumps: list[tuple[float, Upload]] = field(default_factory=list)
    """The uploads that are never completed, with the time at which they were left."""
    touched: Counter[str] = field(default_factory=Counter)
    recent: deque[Upload] = field(default_factory=lambda: deque(maxlen=60))
    """The uploads that were finished last."""
    deaths: list[tuple[float, float]] = field(default_factory=list)
    """The times at which the mount died and was back, infinite until then."""
    broken: list[str] = field(default_factory=list)
    """What `status --check` said that is not true."""
    checks: Counter[str] = field(default_factory=Counter)
    slowest_check: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)
    """The last error of each writer that failed unexpectedly."""


@dataclass(slots=True)
class Author:
    """Has one writer write one file after the other, and break some off; `run` is the body of a thread.

    However slow the host is, it writes one whole file, and breaks off one.
    """

    writer: Writer
    place: Place
    contents: Contents
    drops: Sequence[str]
    tally: DayTally
    chance: random.Random
    stop: threading.Event
    pause: float
    _due: list[tuple[float, Upload, Writer]] = field(default_factory=list)
    """The uploads that are to be completed, with the time and the writer for it."""

    def run(self) -> None:
        drops = [drop for drop in self.drops if self.writer.drops is None or drop in self.writer.drops]
        turns = cycle(self.chance.sample(drops, len(drops)))
        self._start(next(turns), is_broken_off=False)
        self._start(next(turns), is_broken_off=True)
        while not self.stop.wait(self.pause * (0.2 + 1.6 * self.chance.random())):
            now = time.monotonic()
            due = [entry for entry in self._due if entry[0] <= now]
            if due:
                self._complete(*due[0])
            else:
                self._start(next(turns), is_broken_off=self.chance.random() < 0.25)
        while self._due:
            _, upload, writer = self._due.pop()
            if upload.failed < 20:
                self._write(upload, writer)

    def _start(self, drop: str, *, is_broken_off: bool) -> None:
        """Write a new file, or leave a part of one."""
        may_fail = drop in self.place.mounts and self.writer.name == "its own mount"
        detectable = may_fail or (is_broken_off and not self.writer.hides) or self.chance.random() < 0.4
        detectable = detectable or self.writer.name == "writer that reopens"
        size = self.chance.choice((60_000, 400_000)) if is_broken_off else None
        upload = self.contents.make(drop, self.writer.name, detectable=detectable, size=size)
        folder = (self.place.folder(drop) / upload.names[0]).parent
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
        self.tally.uploads.append(upload)
        self._write(upload, self.writer, is_broken_off=is_broken_off)

    def _complete(self, due: float, upload: Upload, writer: Writer) -> None:
        self._due.remove((due, upload, writer))
        self._write(upload, writer)

    def _write(self, upload: Upload, writer: Writer, *, is_broken_off: bool = False) -> None:
        if is_broken_off:
            upload.broken_off += 1
        is_complete = False
        if writer is DIRECT:
            self._remove_companions(upload)
        try:
            is_complete = writer.write(Transfer(upload, self.place, self.chance, is_broken_off))
        except OSError as error:
            self.tally.errors[writer.name] = str(error)
        if is_complete:
            upload.state = UploadState.FINISHED
            self.tally.recent.append(upload)
        elif is_broken_off and (self.chance.random() < 0.4 or not self.tally.stumps):
            upload.state = UploadState.STUMP
            self.tally.stumps.append((time.monotonic(), upload))
        else:
            if not is_broken_off:
                upload.failed += 1
                if isinstance(writer, Client) and writer.last_error:
                    self.tally.errors[writer.name] = writer.last_error
            upload.state = UploadState.BROKEN_OFF
            repeats = is_broken_off and writer.name not in ("overlay view", "its own mount")
            again = writer if repeats and (writer.hides or self.chance.random() < 0.6) else DIRECT
            due = time.monotonic() + self.chance.choice((0.5, 10.0, 60.0))
            self._due.append((due, upload, again))

    def _remove_companions(self, upload: Upload) -> None:
        """Remove what another writer has left beside a file, and would remove if it completed the file."""
        path = self.place.folder(upload.drop) / upload.names[0]
        for suffix in COMPANION_SUFFIXES:
            path.with_name(path.name + suffix.decode()).unlink(missing_ok=True)


@dataclass(slots=True)
class Day:
    """An installation with several drops, and everything that writes into them."""

    base: Path
    chance: random.Random
    seconds: float
    drops: Sequence[str]
    only: Collection[str] | None = None
    """The names of the writers; None for all."""
    pause: float = 2.0
    """Seconds between two files of a writer, on average."""
    grace: float = 20.0
    """The `inspect_grace` of the drops in seconds."""
    missing: dict[str, str] = field(default_factory=dict)
    tally: DayTally = field(default_factory=DayTally)
    dying: Mount | None = None
    mounts: dict[str, Path] = field(default_factory=dict)
    views: dict[str, Path] = field(default_factory=dict)

    @property
    def site(self) -> Path:
        return self.base / "site"

    @property
    def rclone_cache(self) -> float:
        """The seconds for which the mount of rclone caches."""
        return 300.0 if self.seconds >= _FULL_TIMES else _SHORT_CACHE

    def known_after(self, drop: str) -> float:
        """Return the seconds after which a stump is a problem: caches, a scan, `stable_for`, a hold."""
        match drop:
            case "sshfs":
                waits = 20.0 + default_stable_for([MountEntry(b"", "fuse.sshfs", "")])
            case "rclone":
                waits = self.rclone_cache + self.rclone_cache + 5.0
            case _:
                waits = default_stable_for()
        return waits + 2 * _RESCAN_EVERY + self.grace + _MARGIN

    def path_of(self, drop: str) -> Path:
        """Return the drop folder as the daemon sees it."""
        return self.mounts.get(drop, self.site / drop / "drop")

    def mount_all(self, stack: ExitStack, servers: FileServers) -> None:
        """Mount the filesystems of the drops and the views; drops that can't be mounted are left out."""
        for drop in self.drops:
            at = self.site / drop
            at.mkdir()
            self._mount_local(stack, drop, at)
            for folder in ("aside", *(f"drop/{sub}" for sub in _SUBFOLDERS)):
                (at / folder).mkdir(parents=True, exist_ok=True)
                (at / folder).chmod(0o777)
            self._mount_remote(stack, servers, drop, at / "drop")
        self.drops = [drop for drop in self.drops if drop not in self.missing]
        view, local = self.base / "views", self.site / "local" / "drop"
        makes: dict[str, Callable[[], Mount]] = {
            "sshfs": lambda: file_servers.sshfs(servers, self.site, view / "sshfs"),
            "bindfs": lambda: file_servers.bindfs(self.site, view / "bindfs"),
            "overlay": lambda: file_servers.overlay(local, self.base / "overlay", view / "overlay"),
        }
        for name, make in makes.items():
            if self.only is not None and f"{name} view" not in self.only:
                continue
            if self._mount(stack, f"{name} view", make) is not None:
                self.views[name] = view / name

    def _mount_local(self, stack: ExitStack, drop: str, at: Path) -> None:
        """Mount the filesystem of a drop on which the file servers write."""
        image = self.base / f"{drop}.img"
        if drop == "tmpfs":
            self._mount(stack, drop, lambda: file_servers.tmpfs(at))
        elif drop in ("xfs", "btrfs"):
            self._mount(stack, drop, lambda: file_servers.loop(drop, at, image, 2 << 30))

    def _mount_remote(self, stack: ExitStack, servers: FileServers, drop: str, source: Path) -> None:
        """Mount the drop folder for the daemon, where it is on another host."""
        at = self.base / "mounted" / drop
        options = ["--dir-cache-time", f"{_SHORT_CACHE:g}s"] if self.rclone_cache == _SHORT_CACHE else []
        if drop == "sshfs":
            mount = self._mount(stack, drop, lambda: file_servers.sshfs(servers, source, at))
            self.dying = mount
        elif drop == "rclone":
            mount = self._mount(stack, drop, lambda: file_servers.rclone(source, at, *options))
        else:
            return
        if mount is not None:
            self.mounts[drop] = at

    def _mount(self, stack: ExitStack, name: str, make: Callable[[], Mount]) -> Mount | None:
        mount = try_mount(self.missing, name, make)
        if mount is not None:
            stack.callback(mount.unmount)
        return mount

    def configure(self, stage: Stage, url: str) -> None:
        """Write the configuration: short times, but the default of `stable_for` on each filesystem."""
        drops = ""
        for drop in self.drops:
            drops += f'[drop.{drop}]\npath = "{self.path_of(drop)}"\nrescan_every = "{_RESCAN_EVERY:g}s"\n'
            drops += f'inspect_grace = "{self.grace:g}s"\n'
            if drop == "rclone" and self.rclone_cache == _SHORT_CACHE:
                drops += f'stable_for = "{_SHORT_CACHE + 5:g}s"\n'
        stage.config.write_text(
            f'state_dir = "{stage.state}"\nheartbeat_every = "5s"\n{drops}'
            f'[destination.vault]\nurl = "{url}"\nca = "{stage.pki.ca_pem}"\n'
            f'cert = "{stage.pki.client_cert}"\nkey = "{stage.pki.client_key}"\n',
            encoding="utf-8",
        )

    def check(self, stage: Stage) -> None:
        """Run `status --check`, and compare what it prints with the truth."""
        started = time.monotonic()
        try:
            done = subprocess.run(
                [*_AS_USUAL, sys.executable, "-m", "backupd", "status", "--check"],
                capture_output=True,
                text=True,
                timeout=_CHECK_TIMEOUT,
                check=False,
                env={**os.environ, "BACKUPD_CONFIG": str(stage.config)},
            )
        except subprocess.TimeoutExpired:
            self.tally.broken.append(f"status --check took longer than {_CHECK_TIMEOUT:g} s")
            return
        ended = time.monotonic()
        self.tally.slowest_check = max(self.tally.slowest_check, ended - started)
        self.tally.checks[done.stdout.split(" ", 1)[0] or "nothing"] += 1
        overdue = [
            upload
            for left_at, upload in self.tally.stumps
            if left_at + self.known_after(upload.drop) < started and self._is_left(upload)
        ]
        for text in untrue(done.stdout, started, ended, self.tally.deaths, overdue):
            self.tally.broken.append(f"status --check: {text}: {done.stdout.strip()[:400]}")

    def _is_left(self, upload: Upload) -> bool:
        """Return whether a stump is in the drop folder or was delivered: some servers remove theirs."""
        folder = self.site / upload.drop / "drop"
        return any((folder / sub / upload.names[0]).exists() for sub in ("", "sent"))

    def left(self) -> list[tuple[str, str]]:
        """Return the files in the drop folders, as the file servers see them."""
        return [
            (drop, path)
            for drop in self.drops
            for path in _files(self.site / drop / "drop")
            if path.split("/", 1)[0] not in ("sent", "rejected")
        ]

    def arrived(self, stage: Stage) -> Arrived:
        """Return what has arrived, and what the daemon reports."""
        problems = json.loads(stage.backupd("list", "--problems", "--json", "--limit", "1000000").stdout)
        log = [json.loads(line) for line in stage.log.read_text("utf-8").splitlines() if line.startswith("{")]
        delivered: dict[str, set[tuple[str, str]]] = {}
        with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
            for drop, path, digest in ledger.execute(
                "SELECT drop_name, relpath, delivery.digest FROM archive"
                " JOIN delivery ON archive_id = archive.id WHERE delivery.state = 'delivered'"
            ):
                delivered.setdefault(str(digest).removeprefix("sha256:"), set()).add(
                    (drop, os.fsdecode(path))
                )
        rejected = [
            (drop, path) for drop in self.drops for path in _files(self.site / drop / "drop" / "rejected")
        ]
        return Arrived(
            Counter(_digest(path) for path in (stage.store / "archives").iterdir()),
            delivered,
            {(problem["drop"], problem["relpath"]): problem["reason"] for problem in problems},
            {(line["drop"], line["archive"]) for line in log if line["event"] == "archive.suspicious"},
            {(line["drop"], line["archive"]) for line in log if line["event"] == "archive.missing"},
            [sent for drop in self.drops for sent in _sent(drop, self.site / drop / "drop" / "sent")],
            rejected,
            self.left(),
        )

    def is_settled(self, stage: Stage) -> bool:
        """Return whether all that was finished is stored, and nothing waits in the drop folders."""
        with contextlib.closing(sqlite3.connect(stage.store / "index.sqlite", timeout=60)) as index:
            stored = {row[0] for row in index.execute("SELECT sha256 FROM archive")}
        if any(upload.is_complete and upload.digest not in stored for upload in self.tally.uploads):
            return False
        with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=60)) as ledger:
            pending = ledger.execute(
                "SELECT count(*) FROM archive WHERE state = 'pending' OR disposition = 'due'"
            ).fetchone()
            problems: dict[tuple[str, str], set[str]] = {}
            for drop, path, reason in ledger.execute("SELECT drop_name, relpath, reason FROM problem"):
                problems.setdefault((drop, os.fsdecode(path)), set()).add(reason)
        left = self.left()
        kept = [file for file, reasons in problems.items() if "too_small" in reasons]
        complete = [(u.drop, name) for u in self.tally.uploads if u.is_complete for name in u.names]
        return (
            not pending[0]
            and all(may_be_left(*file, left, kept) for file in left)
            and not any(file in problems for file in complete)
        )

    def start_writers(self, servers: FileServers, stop: threading.Event) -> list[threading.Thread]:
        """Start a thread for each writer, and one that changes metadata."""
        place = Place(self.site, self.views, self.mounts)
        folder = self.base / "contents"
        folder.mkdir(exist_ok=True)
        contents = Contents(folder, random.Random(self.chance.random()))
        threads = []
        for writer in all_writers(servers, place, self.missing):
            if self.only is None or writer.name in self.only:
                chance = random.Random(self.chance.random())
                author = Author(writer, place, contents, self.drops, self.tally, chance, stop, self.pause)
                threads.append(threading.Thread(target=author.run, name=writer.name, daemon=True))
        chance = random.Random(self.chance.random())
        touching = (self.tally, place, chance, stop, self.pause / 2)
        threads.append(threading.Thread(target=_touch, args=touching, name="touch", daemon=True))
        for thread in threads:
            thread.start()
        return threads

    def have_mount_die(self, began: float) -> None:
        """Wait for the end of the day, while the mount dies twice and is mounted again."""
        for at in (0.1, 0.6):
            time.sleep(max(0.0, began + at * self.seconds - time.monotonic()))
            if self.dying is not None:
                died = time.monotonic()
                self.dying.die()
                self.tally.deaths.append((died, float("inf")))
                time.sleep(min(30.0, 0.4 * self.seconds))
                self.dying.remount()
                self.tally.deaths[-1] = (died, time.monotonic())
        time.sleep(max(0.0, began + self.seconds - time.monotonic()))

    def settle(self, stage: Stage, daemon: Daemon) -> float:
        """Wait until nothing is pending, with a generous limit; return the seconds that it took."""
        began = time.monotonic()
        limit = began + 300 + 2 * max(self.known_after(drop) for drop in self.drops)
        while not self.is_settled(stage) and time.monotonic() < limit and daemon.process.poll() is None:
            time.sleep(2)
        time.sleep(2 * _RESCAN_EVERY)  # a scan and a heartbeat, which may add problems
        return time.monotonic() - began

    def figures(self, daemon: Daemon, arrived: Arrived, waited: float) -> dict[str, str]:
        """Return the figures of the report."""
        uploads = self.tally.uploads
        finished = [upload for upload in uploads if upload.is_complete]
        log = Counter(line["event"] for line in daemon.events())
        interesting = (
            "drop.failed",
            "watch.degraded",
            "archive.missing",
            "archive.superseded",
            "attempt.failed",
        )
        return {
            "left out": "; ".join(f"{name}: {why}" for name, why in self.missing.items()) or "nothing",
            "finished per drop": _counts(Counter(upload.drop for upload in finished)),
            "finished per tool": _counts(Counter(upload.tool for upload in finished)),
            "broken off": (
                f"{sum(u.broken_off > 0 for u in uploads)}, of these completed later or in full"
                f" {sum(u.broken_off > 0 for u in finished)}, stumps {len(uploads) - len(finished)}"
            ),
            "failed for another reason and repeated": (
                f"{_counts(Counter(u.tool for u in uploads if u.failed))} {self.tally.errors or ''}"
            ),
            "changed metadata": _counts(self.tally.touched),
            "problems": _counts(Counter(arrived.problems.values())),
            "stored": f"{arrived.stored.total()} files with {len(arrived.stored)} contents",
            "deaths of the mount": ", ".join(f"for {back - died:.0f} s" for died, back in self.tally.deaths),
            "checks": f"{_counts(self.tally.checks)}, the slowest took {self.tally.slowest_check:.1f} s",
            "settled after": f"{waited:.0f} s",
            "log": _counts(Counter({event: log[event] for event in interesting})),
        }

    def show(self, stage: Stage, violation: Violation) -> str:
        """Return what the ledger has about the file of a violation."""
        with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=60)) as ledger:
            rows = ledger.execute(
                "SELECT id FROM archive WHERE drop_name = ? AND relpath = ? ORDER BY id",
                (violation.drop, os.fsencode(violation.path.removeprefix("sent/"))),
            ).fetchall()
        shown = [" ".join(stage.backupd("show", f"@{row[0]}").stdout.split()) for row in rows]
        return " / ".join(shown) or "not in the ledger"


def untrue(
    line: str,
    started: float,
    ended: float,
    deaths: Sequence[tuple[float, float]],
    overdue: Sequence[Upload],
    dying: str = "sshfs",
) -> Iterator[str]:
    """Yield what a line of `status --check` says that is not true, or does not say.

    `deaths` are the times at which the folder of the drop `dying` died and was back. `overdue` are stumps
    that are known for longer than documented.
    """
    level, _, text = line.partition(" - ")
    unusable = set(re.findall(r"the folder of the drop (\S+) cannot be used", text))
    must_fail = any(died + NOTICED_WITHIN <= started and ended <= back for died, back in deaths)
    may_fail = any(died <= ended and started <= back + NOTICED_WITHIN for died, back in deaths)
    if must_fail and (level != "CRITICAL" or dying not in unusable):
        yield "the mount is dead, and it is not critical"
    for drop in sorted(unusable - ({dying} if may_fail else set())):
        yield f"the drop {drop} works"
    if overdue and level == "OK":
        yield f"{len(overdue)} stumps are known, such as {overdue[0]}"
    if level not in ("OK", "WARNING", "CRITICAL"):
        yield "it does not know"
    if level == "OK":
        return
    for part in text.partition(" | ")[0].split("; "):
        found = re.fullmatch(r"\d+ files? of (\S+): (.+)", part)
        problem = (found[2].replace(" ", "_"), found[1]) if found else None
        is_folder = "cannot be used" in part
        is_stump = problem is not None and problem[0] in STUMP_REASONS
        # rclone shows names that are gone for as long as it caches them, and fails to open them with EIO
        is_gone = problem == ("unreadable", "rclone")
        # an archive that was delivered just before the mount died
        is_held = problem == (NOT_MOVED, dying) and may_fail
        if not (is_folder or is_stump or is_gone or is_held):
            yield f"there is no reason for {part!r}"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"


def _files(folder: Path) -> Iterator[str]:
    """Yield the paths of the files below a folder, relative to it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield os.path.relpath(os.path.join(parent, name), folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sent(drop: str, folder: Path) -> Iterator[SentFile]:
    """Yield the archives in `sent/` with the digests in their receipt files."""
    paths = [*_files(folder)]
    receipts: dict[str, str] = {}
    for path in paths:
        if RECEIPT_NAME.search(path.encode()):
            receipt = json.loads((folder / path).read_text("utf-8"))
            digest = str(receipt["digest"]).removeprefix("sha256:")
            receipts[RECEIPT_NAME.sub(b"", path.encode()).decode()] = digest
    for path in paths:
        if not RECEIPT_NAME.search(path.encode()):
            yield SentFile(drop, f"sent/{path}", _digest(folder / path), receipts.get(path))


def _touch(tally: DayTally, place: Place, chance: random.Random, stop: threading.Event, pause: float) -> None:
    """Change the metadata of files that were just finished, until `stop` is set."""
    while not stop.wait(pause * chance.random()):
        with contextlib.suppress(OSError, IndexError):  # it was moved to sent/ meanwhile
            upload = chance.choice(tally.recent)
            for kind in touches(chance, upload, place):
                tally.touched[kind] += 1


def run(day: Day) -> Report:
    """Run the writers and the daemon for the time of a day, wait until all has arrived, and compare."""
    report, tally = Report(), day.tally
    day.site.mkdir(parents=True)
    stage = Stage(day.base)
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    with ExitStack() as stack:
        servers = stack.enter_context(FileServers(day.base / "servers", day.site))
        day.missing |= servers.missing
        day.mount_all(stack, servers)
        receiver = stack.enter_context(RunningReceiver(stage.store, tls))
        stack.callback(stage.end)
        day.configure(stage, receiver.url)
        daemon = stage.daemon().ready()
        stop, settled = threading.Event(), threading.Event()
        threads = day.start_writers(servers, stop)
        checker = threading.Thread(target=_check_until, args=(day, stage, settled), daemon=True)
        checker.start()
        stack.callback(settled.set)
        stack.callback(stop.set)
        began = time.monotonic()
        day.have_mount_die(began)
        stop.set()
        for thread in threads:
            thread.join()
        waited = day.settle(stage, daemon)
        settled.set()
        checker.join()
        arrived = day.arrived(stage)
        report.broken += [
            f"{violation}; ledger: {day.show(stage, violation)}" if number < _MAX_SHOWN else str(violation)
            for number, violation in enumerate(compare(tally.uploads, arrived))
        ]
        report.broken += tally.broken
        report.broken += [f"daemon.failed: {line['error']}" for line in daemon.events("daemon.failed")]
        audit = stage.backupd("audit")
        report.broken += [f"audit: {audit.stdout[:400]}"] * (audit.returncode != 0)
        report.figures.update(day.figures(daemon, arrived, waited))
        report.tried = len(tally.uploads) + tally.checks.total()
        if daemon.stop() != 0:
            report.broken.append(f"the daemon ended with {daemon.process.returncode}")
    return report


def _check_until(day: Day, stage: Stage, settled: threading.Event) -> None:
    while not settled.wait(min(15.0, day.seconds / 12)):
        day.check(stage)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that all mounts and processes are ended


def campaign(options: CampaignOptions) -> Report:
    """Run a day of all writers and filesystems that this host has."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        seconds = options.deadline - time.monotonic()
        report = run(Day(options.base / "day", random.Random(options.seed), seconds, DROPS))
        if report.broken:
            kept = Path(tempfile.gettempdir(), f"backupd-day-{options.seed}.log")
            shutil.copy(options.base / "day" / "daemon.log", kept)
            report.figures["log of the daemon"] = str(kept)
        return report
    finally:
        signal.signal(signal.SIGTERM, before)
