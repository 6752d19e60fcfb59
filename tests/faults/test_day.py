"""The campaign of a day: its accounts are right, and a short one with a few writers loses nothing."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.accounts import Arrived, SentFile, Upload, UploadState, compare
from tests.faults.day import NOTICED_WITHIN, Day, run, untrue
from tests.programs import require

FINISHED = Upload("local", "cp", ["sw1.cfg"], Path("1"), "digest-1", 10, False, UploadState.FINISHED)
STUMP = Upload("local", "scp", ["sw2.cfg.gz"], Path("2"), "digest-2", 10, True, UploadState.STUMP, 1)
RIGHT = Arrived(
    stored=Counter(["digest-1", "part of 2"]),
    delivered={"digest-1": {("local", "sw1.cfg")}, "part of 2": {("local", "sw2.cfg.gz")}},
    problems={("local", "sw2.cfg.gz"): "suspicious"},
    suspicious={("local", "sw2.cfg.gz")},
    missing=set(),
    sent=[
        SentFile("local", "sent/sw1.cfg", "digest-1", "digest-1"),
        SentFile("local", "sent/sw2.cfg.gz", "part of 2", "part of 2"),
    ],
    rejected=[],
    left=[("local", ".in.sw3.cfg."), ("local", "sw4.cfg"), ("local", "sw4.cfg.aria2")],
)


def faults(arrived: Arrived, *uploads: Upload) -> list[str]:
    return [violation.text for violation in compare(uploads or (FINISHED, STUMP), arrived)]


def test_accounts_that_are_right_have_no_violation() -> None:
    assert faults(RIGHT) == []


@pytest.mark.parametrize(
    ("arrived", "text"),
    [
        (replace(RIGHT, stored=Counter(["part of 2"])), "it was finished, and the receiver does not have it"),
        (
            replace(RIGHT, stored=RIGHT.stored + Counter(["digest-1"])),
            "the receiver has 2 copies for 1 names",
        ),
        (replace(RIGHT, stored=RIGHT.stored + Counter(["x"])), "the receiver has a content that the ledger"),
        (replace(RIGHT, problems={}), "its stump was delivered and is no listed problem"),
        (replace(RIGHT, problems={}, stored=Counter(["digest-1"])), "its stump is no listed problem"),
        (replace(RIGHT, problems={**RIGHT.problems, ("local", "sw1.cfg"): "damaged"}), "listed as damaged"),
        (replace(RIGHT, missing={("local", "sw1.cfg")}), "it was logged as missing, and nobody removed it"),
        (replace(RIGHT, rejected=[("local", "rejected/sw1.cfg")]), "it was rejected"),
        (replace(RIGHT, left=[("local", "sw1.cfg")]), "it is still in the drop folder, and is no problem"),
        (replace(RIGHT, sent=[SentFile("local", "sent/a", "digest-1", None)]), "without a receipt file"),
        (replace(RIGHT, sent=[SentFile("local", "sent/a", "x", "digest-1")]), "states another digest"),
        (replace(RIGHT, sent=[SentFile("local", "sent/a", "x", "x")]), "the receiver does not have it"),
    ],
)
def test_each_wrong_account_is_a_violation(arrived: Arrived, text: str) -> None:
    assert any(text in fault for fault in faults(arrived))


def test_unfinished_content_may_only_arrive_of_an_upload_that_was_broken_off() -> None:
    delivered = {**RIGHT.delivered, "half of 1": {("local", "sw1.cfg")}}
    arrived = replace(RIGHT, stored=RIGHT.stored + Counter(["half of 1"]), delivered=delivered)

    assert faults(arrived) == ["it was delivered with unfinished content"]
    assert faults(arrived, replace(FINISHED, broken_off=1), STUMP) == []
    assert faults(arrived, replace(FINISHED, broken_off=1, is_detectable=True), STUMP) == [
        "its stump was delivered and never a problem"
    ]


OK = "OK - 0 pending, none rejected | pending=0"
STUMPS = "WARNING - 2 files of local: suspicious; 1 file of tmpfs: too small | pending=0"
DEAD = "CRITICAL - the folder of the drop sshfs cannot be used: gone; 2 files of local: suspicious | x=1"
LONG_DEAD = [(100.0 - NOTICED_WITHIN, 200.0)]


@pytest.mark.parametrize(
    ("line", "deaths", "overdue", "is_true"),
    [
        (OK, [], [], True),
        (OK, [], [STUMP], False),
        (STUMPS, [], [STUMP], True),
        (DEAD, [], [], False),
        (DEAD, LONG_DEAD, [], True),
        (DEAD.replace("sshfs", "tmpfs"), LONG_DEAD, [], False),
        (DEAD.replace("2 files of local: suspicious", "1 file of sshfs: not moved"), LONG_DEAD, [], True),
        (DEAD.replace("2 files of local: suspicious", "1 file of local: not moved"), LONG_DEAD, [], False),
        ("WARNING - 1 file of sshfs: not moved | x=1", [], [], False),
        (STUMPS, LONG_DEAD, [], False),
        (OK, [(99.0, 200.0)], [], True),
        ("CRITICAL - the daemon is not running | x=1", [], [], False),
        ("WARNING - 1 file of local: unreadable | x=1", [], [], False),
        ("UNKNOWN - the ledger is locked (wait)", [], [], False),
    ],
)
def test_a_status_that_is_not_true_is_found(
    line: str, deaths: list[tuple[float, float]], overdue: list[Upload], *, is_true: bool
) -> None:
    assert (list(untrue(line, 100.0, 101.0, deaths, overdue)) == []) is is_true


@pytest.mark.long
@pytest.mark.root
def test_a_short_day_loses_nothing(tmp_path: Path) -> None:
    for program in ("sshd", "curl", "rsync", "rclone", "bindfs"):
        require(program)
    writers = (
        "sftp",
        "sftp, renamed",
        "scp",
        "rsync over ssh",
        "rsync daemon",
        "rclone copy",
        "cp",
        "mv",
        "slow writer",
        "writer that reopens",
        "bindfs view",
    )
    chance = random.Random(1)
    report = run(Day(tmp_path / "day", chance, 5, ("local", "tmpfs"), writers, pause=1.0, grace=5.0))

    assert not report.broken, "\n".join(report.broken)
    assert "stumps 0" not in report.figures["broken off"]
    assert all(f"{writer} " in report.figures["finished per tool"] for writer in writers)
