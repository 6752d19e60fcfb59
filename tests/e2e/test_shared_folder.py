"""Two daemons on one drop folder: one of them uses it, and the other one says so and waits."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.stage import Daemon, Stage, until

FREQUENT = 'heartbeat_every = "1s"'


@pytest.fixture
def second_config(stage: Stage, receiver: RunningReceiver) -> Path:
    """The configuration of a second daemon with a ledger of its own and the same drop folder."""
    stage.configure(receiver.url, drop='rescan_every = "1s"', top=FREQUENT)
    config = stage.base / "second.toml"
    text = stage.config.read_text()
    config.write_text(text.replace(f'state_dir = "{stage.state}"', f'state_dir = "{stage.base}/second"'))
    return config


def second_command(stage: Stage, config: Path, *arguments: str) -> tuple[int, str]:
    done = stage.backupd(*arguments, environ={"BACKUPD_CONFIG": str(config)})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
def test_a_second_daemon_waits_until_the_first_one_has_ended(
    stage: Stage, receiver: RunningReceiver, second_config: Path
) -> None:
    first = stage.daemon().ready()
    second = Daemon(second_config, stage.base / "second.log").ready()
    try:
        (failed, *_) = second.wait_for("drop.failed")
        assert failed["error"].endswith(f"has locked the folder (process {first.pid})")
        assert f"`ps -fp {first.pid}`" in failed["hint"]
        stage.put("one.cfg", b"one")
        first.wait_for("archive.disposed", archive="one.cfg")
        code, line = second_command(stage, second_config, "status", "--check")
        assert code == 2
        assert "has locked the folder" in line
        code, text = second_command(stage, second_config, "check", "--offline")
        assert code == 78
        assert f"has locked the folder (process {first.pid})" in text
        assert stage.backupd("check", "--offline").returncode == 0
        assert not second.events("archive.queued")

        first.kill()
        second.wait_for("drop.watched")
        stage.put("two.cfg", b"two")
        second.wait_for("archive.disposed", archive="two.cfg")
        second.wait_for("drop.problem_solved", reason="folder_failed")
        assert len(stage.stored()) == 2
        assert second_command(stage, second_config, "check", "--offline")[0] == 0
        assert second.stop() == 0
    finally:
        second.kill()


@pytest.mark.long
def test_check_knows_that_a_folder_is_in_use_before_the_daemon_starts(
    stage: Stage, second_config: Path
) -> None:
    stage.daemon().ready()
    code, text = second_command(stage, second_config, "check", "--offline")
    assert code == 78
    assert "give each backupd folders of its own" in text


@pytest.mark.long
def test_a_folder_that_replaces_a_locked_one_is_locked_as_well(stage: Stage, second_config: Path) -> None:
    daemon = stage.daemon().ready()
    stage.drop.rename(stage.base / "away")
    stage.drop.mkdir()
    daemon.wait_for("watch.recovered")
    assert second_command(stage, second_config, "check", "--offline")[0] == 78
    stage.put("one.cfg", b"one")
    daemon.wait_for("archive.disposed", archive="one.cfg")
    (stage.base / "away").rename(stage.base / "other")
    assert daemon.stop() == 0


@pytest.mark.long
def test_another_program_that_locks_the_folder_is_named_until_it_ends(
    stage: Stage, second_config: Path
) -> None:
    fd = os.open(stage.drop, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        daemon = stage.daemon().ready()
        (failed, *_) = daemon.wait_for("drop.failed")
        assert f"(process {os.getpid()})" in failed["error"]
    finally:
        os.close(fd)
    stage.put("one.cfg", b"one")
    daemon.wait_for("archive.disposed")
    until(lambda: not json.loads(stage.backupd("list", "--problems", "--json").stdout), "no problem")
    assert daemon.stop() == 0
