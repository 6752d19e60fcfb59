"""A delivery that is struck at any of its steps ends well: one case of each kind, drawn by chance."""

from __future__ import annotations

import errno
import random
from pathlib import Path

from tests.faults import crash
from tests.faults.delivery import DELETED, KEPT, MOVED, REJECTED, Ground
from tests.faults.shim import Manner
from tests.faults.stepping import STEPS
from tests.privileges import needs_root

SEED = random.randrange(1_000_000)


def assert_held(tally: crash.Tally, seed: int) -> None:
    assert tally.broken == [], f"seed {seed}: {tally.broken}"


def test_a_kill_and_an_error_at_each_step_lose_nothing(tmp_path: Path) -> None:
    tally = crash.run_some(Ground(tmp_path, MOVED), SEED)

    assert_held(tally, SEED)
    assert {step for step, column in tally.tried if column == "killed"} == set(STEPS)
    assert tally.cases >= 2 * len(STEPS)  # of the answer nothing is local; three steps use the network


def test_no_error_of_a_look_at_a_file_ends_the_daemon(tmp_path: Path) -> None:
    tally, ground = crash.Tally(), Ground(tmp_path, MOVED)
    with ground.open():
        for at in range(1, 8):  # more than there are
            crash.strike(ground, crash.Strike(0, at, Manner.FAIL, errno.EIO), tally)

    assert_held(tally, 0)
    assert not tally.gave_up
    assert tally.cases >= 4


def test_what_comes_after_the_outcome_loses_nothing_however_it_ends(tmp_path: Path) -> None:
    """In one of the ways in which it can, by chance: the long part tries all of them."""
    ending = random.Random(SEED).choice([DELETED, KEPT, REJECTED])
    tally = crash.run_some(Ground(tmp_path, ending), SEED)

    assert_held(tally, SEED)
    assert tally.cases >= 2


@needs_root
def test_a_power_cut_at_each_step_loses_nothing(tmp_path: Path) -> None:
    tally = crash.run_some(Ground(tmp_path, MOVED, can_lose_power=True), SEED)

    assert_held(tally, SEED)
    assert {step for step, _ in tally.tried} == set(STEPS)


@needs_root
def test_what_was_deleted_right_before_the_power_cut_is_known_on_a_disk_of_another_number(
    tmp_path: Path,
) -> None:
    """An empty folder on another device looks like a place to mount on."""
    tally, ground = crash.Tally(), Ground(tmp_path, DELETED, can_lose_power=True)
    with ground.open():
        step = STEPS.index("disposition committed")
        last = len(crash.by_step(crash.recorded(ground), ground)[step])
        for at in (last - 1, last - 2):
            crash.strike(ground, crash.Strike(step, at, Manner.CUT_POWER), tally)

    assert_held(tally, 0)
    assert tally.cases
