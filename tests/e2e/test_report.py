"""`backupd report` as a process on the ledger of a daemon."""

from __future__ import annotations

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.stage import Stage


@pytest.fixture
def delivered(stage: Stage, receiver: RunningReceiver) -> Stage:
    """An installation that has delivered an archive, without a running daemon."""
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    stage.put("core-1.cfg", b"hostname core-1")
    daemon.wait_for("archive.disposed")
    assert daemon.stop() == 0
    return stage


@pytest.mark.long
def test_the_report_is_written_without_a_daemon_and_states_that(delivered: Stage) -> None:
    path = delivered.base / "page.html"
    done = delivered.backupd("report", "--html", str(path))
    page = path.read_text("utf-8")

    assert (done.returncode, done.stdout) == (0, "")
    assert "the daemon is not running" in page
    assert "core-1.cfg" in page
    assert "verified by vault" in page
    assert page.endswith("</html>\n")


@pytest.mark.long
def test_the_report_of_some_days_goes_to_standard_output(delivered: Stage) -> None:
    done = delivered.backupd("report", "--html", "-", "--days", "5")

    assert done.returncode == 0
    assert done.stdout.startswith("<!doctype html>")
    assert "Backups of the last 5 days" in done.stdout


@pytest.mark.long
def test_the_report_of_a_running_daemon_has_no_problem(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    stage.daemon().ready()
    stage.await_snapshot()

    assert "All good" in stage.backupd("report", "--html", "-").stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--html", "/proc/none/page.html"], "can't be created (No such file or directory)"),
        (["--html", "-", "--days", "0"], "--days"),
        ([], "--html"),
    ],
    ids=["no folder", "no days", "no file"],
)
def test_wrong_arguments_are_refused(delivered: Stage, arguments: list[str], words: str) -> None:
    done = delivered.backupd("report", *arguments)

    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
