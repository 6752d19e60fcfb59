"""The short part of the campaign of random responses: 20,000 cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz import KINDS, fuzz

pytestmark = pytest.mark.long

CASES = {"HTTP/1.1": 4000, "HTTP/2": 2200, "token endpoint": 500, "query_url": 1700, "proxy": 1500}


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_no_random_response_is_a_false_success_or_harms_the_next_archive(
    tmp_path: Path, kind: str, half: int
) -> None:
    tally = fuzz(kind, 20261201 + half, CASES[kind] // 2, tmp_path)
    assert not tally.faults, tally.faults[:5]
    assert tally.outcomes.total() == CASES[kind] // 2
