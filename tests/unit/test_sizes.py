import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.devices import SizeAnomaly, median, relative_change, size_anomaly


@pytest.mark.parametrize(
    ("sizes", "middle"), [([5], 5), ([9, 1], 5), ([9, 1, 2], 2), ([4, 1, 3, 2], 2), ([0, 0, 0], 0)]
)
def test_the_median_is_the_middle_one(sizes: list[int], middle: int) -> None:
    assert median(sizes) == middle


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=10))
def test_no_more_than_half_are_on_either_side_of_the_median(sizes: list[int]) -> None:
    middle = median(sizes)
    assert sum(size < middle for size in sizes) <= len(sizes) / 2
    assert sum(size > middle for size in sizes) <= len(sizes) / 2


@pytest.mark.parametrize(
    ("size", "before", "found"),
    [
        (100, [100, 100, 100], None),
        (149, [100, 100, 100], None),
        (150, [100, 100, 100], SizeAnomaly(100, 0.5)),
        (51, [100, 100, 100], None),
        (50, [100, 100, 100], SizeAnomaly(100, -0.5)),
        (1, [100, 100], None),
        (1, [], None),
        (1000, [100, 5000, 90], SizeAnomaly(100, 9.0)),
        (0, [0, 0, 0], None),
        (1, [0, 0, 0], SizeAnomaly(0, 1.0)),
    ],
)
def test_a_size_is_unusual_if_it_differs_so_much_from_three_or_more(
    size: int, before: list[int], found: SizeAnomaly | None
) -> None:
    assert size_anomaly(size, before, 0.5) == found


def test_a_change_is_a_fraction_of_what_is_usual() -> None:
    assert [relative_change(size, 200) for size in (0, 100, 200, 500)] == [-1.0, -0.5, 0.0, 1.5]
