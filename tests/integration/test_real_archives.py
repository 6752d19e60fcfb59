"""Archives as real programs write them: whole ones are sent without delay, cut ones are held, then listed."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backupd.core.archive_formats import EMPTY, MISNAMED, NO_TAR_END, Damage, Note
from backupd.core.drop_problem import DropProblem
from backupd.core.errors import LedgerError
from backupd.core.model import DeliveryState
from backupd.dropfolder.inspect import inspect
from backupd.ledger.port import EnqueueResult
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from tests.integration.test_intake import LONG, SHORT, RunningIntake, running_intake
from tests.programs import require
from tests.stage import until

pytestmark = pytest.mark.xdist_group("real archives")  # they are made once

SHORT_GRACE = timedelta(seconds=1)

PROGRAMS = {
    "gzip": "gzip pigz bgzip busybox python3",
    "other": "bzip2 xz zstd zip gpg openssl",
    "tar": "tar bsdtar busybox git python3",
}
"""The programs that the commands below use."""

WHOLE = {
    "level-1.gz": "gzip -1 < text",
    "level-6.gz": "gzip < text",
    "level-9.gz": "gzip -9 < text",
    "with-name.gz": "gzip -c text",
    "no-name.gz": "gzip -nc text",
    "rsyncable.gz": "gzip --rsyncable < random",
    "random.gz": "gzip < random",
    "large.gz": "for n in $(seq 30); do cat random; done | gzip -1",
    "members.gz": "gzip < text; gzip < random; gzip < text",
    "with-empty-members.gz": "gzip < /dev/null; gzip < text; gzip < /dev/null",
    "padded.gz": "gzip < text; head -c 10240 /dev/zero",
    "padded-between.gz": "gzip < text; head -c 512 /dev/zero; gzip < text",
    "with-newline.gz": "gzip < text; echo",
    "pigz.gz": "pigz -p 2 -b 128 < random",
    "pigz-independent.gz": "pigz -p 2 -b 128 -i < random",
    "pigz-zopfli.gz": "pigz -11 < short",
    "bgzip.gz": "bgzip -c text",
    "bgzip-random.gz": "bgzip -c random",
    "busybox.gz": "busybox gzip -c text",
    "python.gz": "python3 -m gzip -- text; cat text.gz",
    "running-config": "gzip < text",
    "text.bz2": "bzip2 < text",
    "random.bz2": "bzip2 -1 < random",
    "members.bz2": "bzip2 < text; bzip2 < text",
    "text.xz": "xz < text",
    "random.xz": "xz -9 < random",
    "unchecked.xz": "xz --check=none < text",
    "crc32.xz": "xz --check=crc32 < text",
    "threads.xz": "xz -T 2 --block-size=100000 < random",
    "members.xz": "xz < text; xz < text",
    "padded.xz": "xz < text; head -c 10240 /dev/zero",
    "text.zst": "zstd -q < text",
    "level-19.zst": "zstd -q -19 < text",
    "unchecked.zst": "zstd -q --no-check < text",
    "threads.zst": "zstd -q -T2 < random",
    "members.zst": "zstd -q < text; zstd -q < random",
    "long.zst": "zstd -q --long=27 < random",
    "text.zip": "zip -q - text random",
    "stored.zip": "zip -q -0 - text random",
    "bzip2.zip": "zip -q -Z bzip2 - text random",
    "encrypted.zip": "zip -q -P secret - text random",
    "commented.zip": "cp template.zip $$.zip; echo a comment | zip -q -z $$.zip > log; cat $$.zip",
    "padded.zip": "cat template.zip; head -c 10240 /dev/zero",
    "file.zip": "cat template.zip",
    "of-zips.zip": "for n in 1 2 3 4; do zip -q $$-$n.zip random; done; zip -q - $$-*.zip text",
    "bsdtar.zip": "bsdtar -cf - --format=zip text random",
    "bsdtar-zip64.zip": "bsdtar -cf - --format=zip --options zip:zip64 text random",
    "gnu.tar": "tar -cf - text random folder",
    "posix.tar": "tar --format=posix -cf - text random folder",
    "ustar.tar": "tar --format=ustar -cf - text random",
    "oldgnu.tar": "tar --format=oldgnu -cf - text random folder",
    "v7.tar": "tar --format=v7 -cf - text random",
    "sparse.tar": "truncate -s 10M holes; echo end >> holes; tar -S -cf - holes text",
    "posix-sparse.tar": "truncate -s 10M holes; echo end >> holes; tar --format=posix -S -cf - holes text",
    "labelled.tar": "tar -V label -cf - text",
    "incremental.tar": "tar -g $$.snar -cf - text folder",
    "blocked.tar": "tar -b 1 -cf - text",
    "appended.tar": "cp template.tar $$; tar -rf $$ folder; cat $$",
    "bsdtar.tar": "bsdtar -cf - text random folder",
    "bsdtar-pax.tar": "bsdtar --format=pax -cf - text random folder",
    "busybox.tar": "busybox tar -cf - text random folder",
    "python.tar": "python3 -m tarfile -c $$ text random folder; cat $$",
    "git.tar": "git init -q repo; cd repo; echo 1 > a; git add a;"
    " git -c user.name=a -c user.email=a commit -qm a; git archive HEAD",
    "tar-z.tar.gz": "tar -czf - text random folder",
    "tar-z.tgz": "tar -czf - folder",
    "tar-j.tar.bz2": "tar -cjf - text folder",
    "tar-J.tar.xz": "tar -cJf - text folder",
    "tar-zstd.tar.zst": "tar -I 'zstd -q' -cf - text folder",
    "tar-pigz.tar.gz": "tar -I pigz -cf - text random folder",
    "busybox.tar.gz": "busybox tar -czf - text random folder",
    "git.tar.gz": "git init -q repo2; cd repo2; echo 1 > a; git add a;"
    " git -c user.name=a -c user.email=a commit -qm a; git archive --format=tar.gz HEAD",
    "padded.tar.gz": "tar -czf - text; head -c 10240 /dev/zero",
}
"""Commands that write a whole archive of this name to their output."""

NOTED = {
    "nothing.gz": ("gzip < /dev/null", EMPTY),
    "nothing.bz2": ("bzip2 < /dev/null", EMPTY),
    "nothing.zst": ("zstd -q < /dev/null", EMPTY),
    "nothing.tar": ("tar -cf - -T /dev/null", EMPTY),
    "nothing.tar.gz": ("tar -czf - -T /dev/null", EMPTY),
    "symmetric.tar.gz": (
        "tar -czf - text | gpg --batch --homedir . --pinentry-mode loopback --passphrase x -c",
        MISNAMED,
    ),
    "armored.zip": (
        "gpg --batch --homedir . --pinentry-mode loopback --passphrase x --armor -c < template.zip",
        MISNAMED,
    ),
    "openssl.tgz": ("tar -czf - text | openssl enc -aes-256-cbc -pbkdf2 -pass pass:x", MISNAMED),
    "plain-text.zip": ("cat text", MISNAMED),
    "page.gz": ("echo '<!DOCTYPE html><title>404 Not Found</title>'", MISNAMED),
    "gzip.tar": ("tar -czf - text", MISNAMED),
    "tar.tgz": ("tar -cf - text", MISNAMED),
    "zip.gz": ("cat template.zip", MISNAMED),
    "no-end.tar": ("tar -b 1 -cf - text | head -c -1024", NO_TAR_END),
    "no-end.tar.gz": ("tar -b 1 -cf - text | head -c -1024 | gzip", NO_TAR_END),
}
"""Commands that write an archive of this name that is unusual, but not damaged, and its note."""

CUT = [
    *("level-6.gz", "random.gz", "members.gz", "pigz.gz", "pigz-independent.gz", "bgzip-random.gz"),
    *("tar-z.tar.gz", "tar-z.tgz", "large.gz", "text.bz2", "random.bz2", "tar-j.tar.bz2", "text.xz"),
    *("random.xz", "threads.xz", "tar-J.tar.xz", "text.zst", "threads.zst", "tar-zstd.tar.zst"),
    *("text.zip", "stored.zip", "encrypted.zip", "of-zips.zip"),
    *("gnu.tar", "posix.tar", "bsdtar.tar", "sparse.tar"),
]
"""Archives of `WHOLE` that the tests cut."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all archives, made in the folder `in` beside it."""
    for program in " ".join(PROGRAMS.values()).split():
        require(program)
    base = tmp_path_factory.mktemp("archives")
    source, out = base / "in", base / "out"
    (source / "folder" / ("deep" * 30)).mkdir(parents=True)
    out.mkdir()
    chance = random.Random(1)
    text = "".join(f"interface Gi1/0/{n}\n description {chance.random()}\n" for n in range(6000))
    (source / "text").write_text(text)
    (source / "short").write_text(text[:3000])
    (source / "random").write_bytes(chance.randbytes(300_000))
    (source / "folder" / ("deep" * 30) / ("name" * 20)).write_text("hostname r1\n")
    (source / "folder" / "empty").write_text("")
    os.symlink("empty", source / "folder" / "link")
    os.link(source / "folder" / "empty", source / "folder" / "hard-link")
    commands = {"template.zip": "zip -q $$.zip text random; cat $$.zip", "template.tar": "tar -cf - text"}
    for name, command in commands.items():
        (source / name).write_bytes(output_of(command, source))
    for name, command in {**WHOLE, **{name: command for name, (command, _) in NOTED.items()}}.items():
        (out / (name if name in WHOLE else f"noted-{name}")).write_bytes(output_of(command, source))
    return out


def output_of(command: str, folder: Path) -> bytes:
    """Return the output of a shell command that runs in a folder."""
    done = subprocess.run(["sh", "-ec", command], cwd=folder, stdout=subprocess.PIPE, check=True)
    return done.stdout


def examined(content: bytes, name: str, *, full: bool) -> Damage | Note | None:
    fd = os.memfd_create("archive")
    try:
        os.truncate(fd, 0)
        with open(fd, "wb", closefd=False) as stream:
            stream.write(content)
        return inspect(fd, len(content), name.encode(), full=full, should_stop=lambda: False)
    finally:
        os.close(fd)


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_archive_has_no_finding(made: Path, name: str, full: bool) -> None:
    assert examined((made / name).read_bytes(), name, full=full) is None


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
@pytest.mark.parametrize("name", NOTED)
def test_an_unusual_archive_has_a_note(made: Path, name: str, full: bool) -> None:
    found = examined((made / f"noted-{name}").read_bytes(), name, full=full)

    assert isinstance(found, Note), found
    assert found.reason == NOTED[name][1]


def cuts(size: int) -> Iterator[int]:
    """Yield the sizes to which an archive is cut: many small ones, some in between, and many large ones."""
    yield from (1, 2, 3, 9, 10, 11, 17, 18, 19, 100, 511, 512, 1000, 4096)
    yield from (size * part // 20 for part in range(1, 20))
    yield from (size - less for less in (1, 2, 3, 4, 5, 7, 8, 9, 12, 20, 22, 100, 512))


@pytest.mark.parametrize("name", CUT)
def test_a_quick_inspection_finds_that_an_archive_is_cut(made: Path, name: str) -> None:
    content = (made / name).read_bytes()
    if name.endswith(".tar"):  # the zeros behind its end are no part of it
        content = content[: -(-len(content.rstrip(b"\0")) // 512) * 512]
    passed = {}
    for cut in sorted({cut for cut in cuts(len(content)) if cut < len(content)}):
        found = examined(content[:cut], name, full=False)
        if not isinstance(found, Damage):
            passed[cut] = found

    if name.endswith(".tar"):
        assert_read_by_gnu_tar(content, passed)
    else:
        assert passed == {}


def assert_read_by_gnu_tar(content: bytes, passed: dict[int, Note | None]) -> None:
    """Assert that GNU tar reads each cut tar that passed the inspection, and that it was noted."""
    for cut, note in passed.items():
        done = subprocess.run(["tar", "-tf", "-"], input=content[:cut], capture_output=True, check=False)
        assert done.returncode == 0, cut
        assert note is not None, cut
        assert note.reason == NO_TAR_END, cut


def test_whole_and_unusual_archives_are_queued_at_once(made: Path, tmp_path: Path) -> None:
    with running_intake(tmp_path, include=("*",), rescan_every=SHORT, inspect_grace=LONG) as scene:
        for path in made.iterdir():
            scene.put(path.name, path.read_bytes())

        scene.wait_queued(*(path.name for path in made.iterdir()))

        scene.wait_scan()
        noted = {event["archive"]: event["reason"] for event in scene.events("inspection.noted")}
        assert noted == {f"noted-{name}": reason for name, (_, reason) in NOTED.items()}
        assert not scene.events("archive.waiting")
        assert not scene.events("archive.suspicious")
        assert scene.problems() == {}


def put_cut(scene: RunningIntake, made: Path) -> list[str]:
    """Put some cut archives into the folder; return their names."""
    names = []
    for name in ("level-6.gz", "large.gz", "tar-z.tar.gz", "text.bz2", "text.xz", "text.zst", "text.zip"):
        content = (made / name).read_bytes()
        for cut in (17, len(content) // 2, len(content) - 1):
            names.append(f"{cut}-{name}")
            scene.put(names[-1], content[:cut])
    return names


def test_cut_archives_are_held_and_then_queued_and_listed(made: Path, tmp_path: Path) -> None:
    with running_intake(tmp_path, rescan_every=SHORT, inspect_grace=LONG) as scene:
        names = put_cut(scene, made)

        waiting = scene.wait_event("archive.waiting", len(names))

        assert {event["archive"] for event in waiting} == set(names)
        assert {event["reason"] for event in waiting} <= {"truncated", "damaged"}
        assert all("sent as it is" in event["hint"] for event in waiting)
        assert scene.queued() == []
        scene.wait_problems({"truncated": len(names)}, total=True)
        assert "suspicious" not in scene.problems()

    with running_intake(tmp_path, rescan_every=SHORT, inspect_grace=SHORT_GRACE) as scene:
        scene.wait_queued(*names)

        suspicious = scene.wait_event("archive.suspicious", len(names))
        assert {event["archive"] for event in suspicious} == set(names)
        scene.wait_problems({"suspicious": len(names)})
        for name in names:  # the file leaves the folder with its delivery
            (scene.root / name).unlink()
        scene.wait_scan()
        assert scene.problems() == {"suspicious": len(names)}


def test_cut_archives_are_held_and_then_rejected_if_configured(made: Path, tmp_path: Path) -> None:
    with running_intake(
        tmp_path, rescan_every=SHORT, inspect_grace=SHORT_GRACE, on_suspicious="reject"
    ) as scene:
        names = put_cut(scene, made)

        until(lambda: scene.ledger.count_pending_dispositions() == len(names), "all to be rejected")

        assert {one.state for one in scene.ledger.pending_dispositions()} == {DeliveryState.REJECTED}
        assert scene.queued() == []
        scene.wait_problems({})


def test_a_held_archive_that_is_completed_is_queued_without_a_problem(made: Path, tmp_path: Path) -> None:
    content = (made / "tar-z.tar.gz").read_bytes()
    with running_intake(tmp_path, rescan_every=SHORT, inspect_grace=LONG) as scene:
        path = scene.put("r1.tar.gz", content[:5000])
        scene.wait_event("archive.waiting")

        with path.open("ab") as stream:
            stream.write(content[5000:])

        scene.wait_queued("r1.tar.gz")
        scene.wait_problems({})
        assert not scene.events("archive.suspicious")


def hold_cut_archive(made: Path, tmp_path: Path) -> DropProblem:
    """Run an intake that holds the cut archive `r1.gz` until it is a problem; return the problem."""
    with running_intake(tmp_path, rescan_every=SHORT, inspect_grace=LONG) as scene:
        scene.put("r1.gz", (made / "level-6.gz").read_bytes()[:-1])
        scene.wait_problems({"truncated": 1})
        (problem,) = scene.ledger.problems()
        return problem


def test_the_grace_of_a_held_archive_goes_on_after_a_restart(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_cut_archive(made, tmp_path)
    later = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + LONG.total_seconds())
    monkeypatch.setattr("backupd.intake.examiner.time", later)

    with running_intake(tmp_path, rescan_every=SHORT, inspect_grace=LONG) as scene:
        scene.wait_queued("r1.gz")

        scene.wait_problems({"suspicious": 1})


def test_the_grace_of_a_held_archive_begins_again_if_it_was_changed_while_the_daemon_was_stopped(
    made: Path, tmp_path: Path
) -> None:
    problem = hold_cut_archive(made, tmp_path)
    path = tmp_path / "drop" / "r1.gz"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    ledger = SqliteLedger(open_ledger(tmp_path / "state").connection)
    ledger.save_problems([replace(problem, since=problem.since - LONG)], [])
    ledger.close()

    with running_intake(tmp_path, rescan_every=SHORT, inspect_grace=LONG) as scene:
        scene.wait_event("archive.waiting", 2)  # once in each run

        assert scene.queued() == []


def test_a_held_archive_is_a_problem_long_before_the_next_rescan(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.examiner._MAX_LOG_AFTER", 0.3)
    with running_intake(tmp_path, rescan_every=LONG, inspect_grace=2 * LONG) as scene:
        scene.put("r1.gz", (made / "level-6.gz").read_bytes()[:-1])

        scene.wait_problems({"truncated": 1})


def test_a_suspicious_archive_is_listed_until_a_whole_one_of_its_name_is_queued(
    made: Path, tmp_path: Path
) -> None:
    content = (made / "tar-z.tar.gz").read_bytes()
    settings: dict[str, Any] = {"rescan_every": SHORT, "inspect_grace": timedelta(0)}
    with running_intake(tmp_path, **settings) as scene:
        for name in ("r1.tar.gz", "r2.tar.gz"):
            scene.put(name, content[:5000])
        scene.wait_queued("r1.tar.gz", "r2.tar.gz")
        scene.put("r3.tar.gz", content)
        scene.wait_queued("r3.tar.gz")
        scene.wait_scan()
        assert scene.problems() == {"suspicious": 2}

    with running_intake(tmp_path, **settings) as scene:
        scene.wait_scan()
        assert scene.problems() == {"suspicious": 2}
        scene.put("r1.tar.gz", content)
        scene.put("r2.tar.gz", content[:4000])
        until(lambda: [p.size_bytes for p in scene.ledger.problems()] == [4000], "the newer problem alone")

        (problem,) = scene.ledger.problems()
        assert problem.relpath == b"r2.tar.gz"
        assert problem.size_bytes == 4000
        assert "looks truncated: the archive ends in the middle" in problem.error


def test_only_the_latest_suspicious_archives_are_listed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.intake.problem_list._MAX_LISTED", 3)
    content = (made / "level-6.gz").read_bytes()[:-1]
    with running_intake(tmp_path, rescan_every=LONG, inspect_grace=timedelta(0)) as scene:
        for number in range(5):
            scene.put(f"r{number}.gz", content)
            scene.wait_queued(f"r{number}.gz")
        until(
            lambda: [p.relpath for p in scene.ledger.problems()] == [b"r2.gz", b"r3.gz", b"r4.gz"],
            "the last ones to be listed",
        )


class FullLedger(SqliteLedger):
    """A ledger that saves problems, but queues nothing."""

    def enqueue(self, *_: object) -> EnqueueResult:
        raise LedgerError("the disk is full", "free some space")


def test_a_suspicious_archive_is_listed_before_it_is_queued(made: Path, tmp_path: Path) -> None:
    """A crash in between must not leave one that is queued, but not listed."""
    content = (made / "level-6.gz").read_bytes()[:-1]
    with running_intake(tmp_path, FullLedger, rescan_every=LONG, inspect_grace=timedelta(0)) as scene:
        scene.put("r1.gz", content)
        scene.wait_event("ledger.failed")

        assert scene.problems() == {"suspicious": 1}


@pytest.mark.parametrize("on_suspicious", ["deliver", "reject"])
def test_a_cut_archive_that_differs_from_its_checksum_file_is_never_sent(
    made: Path, tmp_path: Path, on_suspicious: str
) -> None:
    with running_intake(
        tmp_path,
        rescan_every=SHORT,
        inspect_grace=timedelta(0),
        checksum_file="auto",
        on_suspicious=on_suspicious,
    ) as scene:
        scene.put("r1.gz.sha256", b"0" * 64)
        scene.put("r1.gz", (made / "level-6.gz").read_bytes()[:-1])

        until(scene.ledger.count_pending_dispositions, "the archive to be rejected")

        (rejected,) = scene.ledger.pending_dispositions()
        reason = "checksum_mismatch" if on_suspicious == "deliver" else "truncated"
        assert [result.reason for result in rejected.results] == [reason]
        assert scene.queued() == []
