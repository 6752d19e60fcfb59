"""`backupd check --dry-run` judges each file as the daemon does, and changes nothing."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from backupd.core.errors import BAD_CONFIG
from backupd.receiver.serve import RunningReceiver
from tests.stage import Stage, until

DAY = 86400


def previewed(stage: Stage) -> dict[str, dict[str, Any]]:
    """Return the files of the dry run by path."""
    done = stage.backupd("check", "--dry-run", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return {file["relpath"]: file for file in json.loads(done.stdout)["files"]}


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


def a_folder_of_everything(stage: Stage) -> None:
    """Write files of every kind, a few seconds old."""
    stage.configure(
        "https://127.0.0.1:9/",
        drop='stable_for = "0.1s"\nrecursive = false\nexclude = ["*.log"]\ninclude = ["*.cfg", "*.gz"]'
        "\nmax_size = '1 MiB'\nchecksum_file = 'auto'",
    )
    whole = gzip.compress(b"content " * 1000)
    contents = {
        "good.cfg": b"content",
        "whole.gz": whole,
        "cut.gz": whole[:-9],
        "empty.cfg": b"",
        "large.cfg": bytes(1024 * 1024 + 1),
        "notes.txt": b"x",
        "debug.log": b"x",
        "new.cfg.part": b"x",
        "old.cfg.part": b"x",
        "lone.cfg.sha256": b"x",
        "loading.cfg": b"x",
        "loading.cfg.part": b"x",
    }
    for name, content in contents.items():
        (stage.drop / name).write_bytes(content)
    (stage.drop / "folder").mkdir()
    (stage.drop / "folder" / "nested.cfg").write_bytes(b"x")
    (stage.drop / "empty-folder").mkdir()
    (stage.drop / ".hidden").mkdir()
    (stage.drop / "link.cfg").symlink_to("good.cfg")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stage.drop / "socket.cfg"))


VERDICTS = {
    "good.cfg": ("sent", ""),
    "whole.gz": ("sent", ""),
    "cut.gz": ("waits", "truncated"),
    "empty.cfg": ("not sent", "too_small"),
    "large.cfg": ("not sent", "too_large"),
    "notes.txt": ("not sent", "not_included"),
    "debug.log": ("not sent", "excluded"),
    "new.cfg.part": ("not sent", "temporary_name"),
    "old.cfg.part": ("not sent", "temporary_name"),
    "lone.cfg.sha256": ("not sent", "checksum_file"),
    "loading.cfg": ("waits", "unfinished"),
    "loading.cfg.part": ("not sent", "temporary_name"),
    "folder": ("not sent", "subfolder"),
    ".hidden": ("not sent", "temporary_name"),
    "link.cfg": ("not sent", "symlink"),
    "socket.cfg": ("not sent", "not_a_regular_file"),
}


def test_lists_each_file_with_a_verdict_a_reason_and_a_hint_and_changes_nothing(stage: Stage) -> None:
    a_folder_of_everything(stage)
    until(lambda: previewed(stage)["good.cfg"]["verdict"] == "sent", "the files to be stable")
    before = snapshot(stage.base)
    found = previewed(stage)

    assert {path: (each["verdict"], each["reason"]) for path, each in found.items()} == VERDICTS
    for each in found.values():
        assert bool(each["error"]) == bool(each["reason"])
        assert each["drop"] == "switches"
    assert found["notes.txt"]["hint"].startswith("add it to `include`")
    assert found["good.cfg"]["size_bytes"] == 7
    assert snapshot(stage.base) == before
    assert not stage.state.exists()


@pytest.mark.long
def test_the_daemon_judges_the_same_files_in_the_same_words(stage: Stage, receiver: RunningReceiver) -> None:
    a_folder_of_everything(stage)
    stage.config.write_text(
        stage.config.read_text()
        .replace("https://127.0.0.1:9/", receiver.url)
        .replace('stable_for = "0.1s"', 'stable_for = "0.1s"\ninspect_grace = "0s"\nrescan_every = "1s"', 1)
    )
    until(lambda: previewed(stage)["good.cfg"]["verdict"] == "sent", "the files to be stable")
    expected = previewed(stage)
    daemon = stage.daemon().ready()
    sent = {path for path, each in expected.items() if each["verdict"] == "sent"}
    assert sent == {"good.cfg", "whole.gz", "cut.gz"}  # the grace is over at once
    daemon.wait_for("archive.disposed", len(sent))
    ignored = {"too_small", "too_large", "not_included", "subfolder", "symlink", "not_a_regular_file"}
    foretold = {p: (e["reason"], e["error"]) for p, e in expected.items() if e["reason"] in ignored}

    def logged() -> dict[str, tuple[str, str]]:
        return {e["archive"]: (e["reason"], e["error"]) for e in daemon.events("archive.ignored")}

    until(lambda: logged().keys() >= foretold.keys(), "the problems")
    assert logged() == foretold
    assert {path.name for path in stage.archives(stage.sent)} == sent


@pytest.mark.long
def test_shows_what_is_queued_and_what_changed_just_now(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", drop='stable_for = "1h"')
    stage.put("new.cfg", b"content")
    assert previewed(stage)["new.cfg"]["reason"] == "not_stable"
    stage.configure("https://127.0.0.1:9/")
    stage.put("queued.cfg", b"content")
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.queued", 2)
    found = previewed(stage)  # beside the daemon
    assert {path: each["verdict"] for path, each in found.items()} == {
        "new.cfg": "queued",
        "queued.cfg": "queued",
    }
    assert daemon.stop() == 0
    (stage.drop / "queued.cfg").write_bytes(b"another content")
    until(lambda: previewed(stage)["queued.cfg"]["verdict"] == "sent", "the file to be stable")


@pytest.mark.long
def test_prints_a_table_and_each_reason_once(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", drop="include = ['*.cfg']\nstable_for = '0s'")
    for name in ("a.cfg", "b.txt", "c.txt"):
        (stage.drop / name).write_bytes(b"content")
    done = stage.backupd("check", "--dry-run")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0] == f"switches: {stage.drop}: 1 sent, 2 not sent"
    assert [line.split() for line in lines if line.startswith(("sent", "not sent"))] == [
        ["sent", "a.cfg", "7", "B"],
        ["not", "sent", "b.txt", "7", "B", "not_included"],
        ["not", "sent", "c.txt", "7", "B", "not_included"],
    ]
    assert lines.count("not_included: its name matches no pattern of `include`") == 1
    assert stage.backupd("check", "--dry-run", "--send").returncode == 2


@pytest.mark.long
def test_a_drop_folder_that_is_missing_is_named_and_ends_with_78(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    stage.drop.rmdir()
    done = stage.backupd("check", "--dry-run")
    assert done.returncode == BAD_CONFIG
    assert f"folder_failed: {stage.drop}: No such file or directory" in done.stdout


@pytest.mark.long
def test_judges_ten_thousand_files(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/", drop='stable_for = "0s"')
    for number in range(10_000):
        folder = stage.drop / f"site-{number % 100}"
        folder.mkdir(exist_ok=True)
        (folder / f"sw-{number}.cfg").write_bytes(b"content")
    done = stage.backupd("check", "--dry-run")
    assert done.returncode == 0
    assert done.stdout.startswith(f"switches: {stage.drop}: 10000 sent\n")
    assert os.listdir(stage.drop)
