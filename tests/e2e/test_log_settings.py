"""The log of a start that fails, and changes of the `log` table by a reload."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from backupd.ledger.sqlite.connection import FILE_NAME
from backupd.receiver.serve import RunningReceiver
from tests.e2e.test_commands import in_a_terminal
from tests.stage import TIMEOUT, Daemon, Stage, until

UNREACHABLE_URL = "https://127.0.0.1:9/upload"


def a_missing_file(stage: Stage) -> str:
    return f"{stage.config}: no such file"


def an_invalid_value(stage: Stage) -> str:
    stage.configure(UNREACHABLE_URL, top='heartbeat_every = "soon"')
    return 'heartbeat_every: expected a duration such as "2s", got "soon"'


def an_unusable_state_dir(stage: Stage) -> str:
    stage.configure(UNREACHABLE_URL)
    stage.state.write_text("")
    return str(stage.state)


def a_folder_as_ledger(stage: Stage) -> str:
    stage.configure(UNREACHABLE_URL)
    (stage.state / FILE_NAME).mkdir(parents=True)
    return str(stage.state)


def another_daemon(stage: Stage) -> str:
    stage.configure(UNREACHABLE_URL)
    first = stage.daemon().ready()
    return f"another backupd (process {first.pid}) uses it"


@pytest.mark.parametrize(
    "trouble",
    [
        a_missing_file,
        an_invalid_value,
        an_unusable_state_dir,
        a_folder_as_ledger,
        another_daemon,
    ],
    ids=lambda trouble: trouble.__name__,
)
def test_a_start_that_fails_is_an_event_and_a_text(stage: Stage, trouble: Callable[[Stage], str]) -> None:
    words = trouble(stage)
    done = stage.backupd("run")
    (line,) = done.stdout.splitlines()
    event = json.loads(line)
    assert done.returncode == 78
    assert (event["event"], event["level"]) == ("daemon.start_failed", "error")
    assert words in event["error"]
    assert event["config"] == str(stage.config)
    assert done.stderr.startswith(f"backupd: {event['error']}\n")


def test_a_failed_start_is_logged_once_where_both_outputs_are_one_file(stage: Stage) -> None:
    stage.configure(UNREACHABLE_URL, top='heartbeat_every = "soon"\nshutdown_grace = "later"')
    daemon = stage.daemon()
    assert daemon.process.wait(TIMEOUT) == 78
    (event,) = daemon.events()
    assert event["event"] == "daemon.start_failed"
    assert event["message"].startswith(f"backupd could not start: {stage.config} can't be used: ")
    assert 'got "soon"; shutdown_grace: ' in event["message"]


def test_a_failed_start_is_only_a_text_on_a_terminal(stage: Stage) -> None:
    code, text = in_a_terminal(stage, "run")
    assert code == 78
    assert text.startswith(f"backupd: {stage.config}: no such file")
    assert "start_failed" not in text
    assert text.count("no such file") == 1


def test_a_failed_start_has_the_format_of_the_environment_until_the_configuration_is_known(
    stage: Stage,
) -> None:
    done = stage.backupd("run", environ={"BACKUPD_LOG__FORMAT": "ecs"})
    assert json.loads(done.stdout)["event.action"] == "daemon.start_failed"
    stage.configure(UNREACHABLE_URL, top='log.format = "ecs"')
    stage.state.write_text("")
    assert json.loads(stage.backupd("run").stdout)["event.action"] == "daemon.start_failed"


def test_a_wrong_option_is_a_failed_start_with_its_own_exit_code(stage: Stage) -> None:
    done = stage.backupd("run", "--log-level", "loud")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"].endswith("got 'loud'")


def reload(daemon: Daemon, stage: Stage, receiver: RunningReceiver, log: str) -> None:
    stage.configure(receiver.url, drop='rescan_every = "1s"', top=f'heartbeat_every = "0.1s"\nlog = {log}')
    daemon.process.send_signal(signal.SIGHUP)


def test_a_reload_changes_the_level_and_the_format(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='rescan_every = "1s"', top='heartbeat_every = "0.1s"')
    daemon = stage.daemon().ready()
    reload(daemon, stage, receiver, '{level = "debug", format = "json"}')
    daemon.wait_for("config.reloaded")
    stage.put("r1.cfg", b"abc")
    daemon.wait_for("drop.scanned")
    reload(daemon, stage, receiver, '{level = "info", format = "ecs"}')
    until(lambda: '"event.action":"daemon.heartbeat"' in daemon.text(), "a heartbeat in ECS")
    reload(daemon, stage, receiver, '{level = "info", format = "console"}')
    until(lambda: " daemon.heartbeat     heartbeat: " in daemon.text(), "a heartbeat for people")
    assert "\x1b" not in daemon.text()  # a file has no colours
    reload(daemon, stage, receiver, '{level = "info", format = "ecs"}')
    until(lambda: daemon.text().count('"event.action":"config.reloaded"') == 2, "ECS again")
    assert daemon.stop() == 0
    assert json.loads(daemon.text().splitlines()[-1])["event.action"] == "daemon.stopped"
    stage.log.unlink()  # its lines have other formats than that of the catalogue


def test_an_option_overrides_the_level_of_a_reload(stage: Stage, receiver: RunningReceiver) -> None:
    wrapper = stage.base / "with_level.py"
    wrapper.write_text(
        "import sys\nfrom backupd.cli import main\nsys.argv += ['--log-level', 'debug']\nmain()\n"
    )
    stage.configure(receiver.url, top='heartbeat_every = "0.1s"')
    daemon = stage.daemon({"PYTHONPATH": str(Path(wrapper).parent)}, program="with_level").ready()
    assert daemon.events("drop.scanned")
    reload(daemon, stage, receiver, '{level = "error"}')
    daemon.wait_for("config.reloaded")
    daemon.wait_for("daemon.heartbeat", count=3)
