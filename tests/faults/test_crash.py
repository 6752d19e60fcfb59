"""A delivery completes after a fault at any of its steps: random cases of each kind."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from tests.faults import crash
from tests.faults.delivery import DELETED, KEPT, MOVED, REJECTED, Harness
from tests.faults.shim import Mode
from tests.faults.stepping import STEPS

pytestmark = pytest.mark.long

SEED = random.randrange(1_000_000)


def assert_held(tally: crash.CrashTally, seed: int) -> None:
    assert tally.broken == [], f"seed {seed}: {tally.broken}"


def test_a_kill_and_an_error_at_each_step_lose_no_archive(tmp_path: Path) -> None:
    tally = crash.run_sample(Harness(tmp_path, MOVED), SEED)

    assert_held(tally, SEED)
    assert {step for step, column in tally.tried if column == "killed"} == set(STEPS)
    assert tally.cases >= 2 * len(STEPS)  # the response has no call on a file; three steps use the network


def test_an_error_while_examining_a_new_file_does_not_end_the_daemon(tmp_path: Path) -> None:
    tally, harness = crash.CrashTally(), Harness(tmp_path, MOVED)
    with harness.open():
        for at in range(1, 8):  # more than the step has calls
            crash.run_case(harness, crash.Injection(0, at, Mode.FAIL, errno.EIO), tally)

    assert_held(tally, 0)
    assert not tally.daemon_exits
    assert tally.cases >= 4


def test_each_disposition_survives_a_kill_and_an_error_at_each_step(tmp_path: Path) -> None:
    """One disposition at random; the long part runs all of them."""
    scenario = random.Random(SEED).choice([DELETED, KEPT, REJECTED])
    tally = crash.run_sample(Harness(tmp_path, scenario), SEED)

    assert_held(tally, SEED)
    assert tally.cases >= 2


@pytest.mark.root
def test_a_power_cut_at_each_step_loses_no_archive(tmp_path: Path) -> None:
    tally = crash.run_sample(Harness(tmp_path, MOVED, can_lose_power=True), SEED)

    assert_held(tally, SEED)
    assert {step for step, _ in tally.tried} == set(STEPS)


@pytest.mark.root
def test_an_archive_deleted_right_before_a_power_cut_is_recorded_under_another_device_number(
    tmp_path: Path,
) -> None:
    """An empty folder on another device looks like an unmounted mount point."""
    tally, harness = crash.CrashTally(), Harness(tmp_path, DELETED, can_lose_power=True)
    with harness.open():
        step = STEPS.index("disposition committed")
        last = len(crash.calls_by_step(crash.record_calls(harness), harness)[step])
        for at in (last - 1, last - 2):
            crash.run_case(harness, crash.Injection(step, at, Mode.CUT_POWER), tally)

    assert_held(tally, 0)
    assert tally.cases
