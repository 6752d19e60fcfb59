"""The short part of the campaign of lasting troubles: all of them at the same time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.troubles import SECONDS, costs, too_much
from tests.privileges import IS_ROOT
from tests.programs import do_without

pytestmark = pytest.mark.long


@pytest.mark.timeout(1800)
def test_a_trouble_costs_little_while_it_lasts_and_ends_without_a_trace(tmp_path: Path) -> None:
    if not IS_ROOT or shutil.which("mkfs.ext4", path="/sbin:/usr/sbin:/bin:/usr/bin") is None:
        do_without("needs root, and mkfs.ext4")
    found = costs([1, 100], tmp_path, SECONDS)
    faults = {case: (too_much(cost), str(cost)) for case, cost in found.items()}
    assert not {case: fault for case, fault in faults.items() if fault[0]}
