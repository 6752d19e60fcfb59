from hypothesis import given
from hypothesis import strategies as st

from backupd.core.model import Fingerprint
from backupd.core.stability import StabilityTracker
from tests.factories import a_fingerprint


def test_a_file_is_stable_once_it_stayed_unchanged_for_long_enough() -> None:
    tracker = StabilityTracker(2.0)
    looks = a_fingerprint()
    assert not tracker.observe(b"a", looks, 10.0)
    assert not tracker.observe(b"a", looks, 11.9)
    assert tracker.observe(b"a", looks, 12.0)
    assert b"a" not in tracker


def test_a_change_begins_the_wait_anew() -> None:
    tracker = StabilityTracker(2.0)
    tracker.observe(b"a", a_fingerprint(inode=1, size=3), 10.0)
    grown = a_fingerprint(inode=1, size=4)
    assert not tracker.observe(b"a", grown, 12.0)
    assert not tracker.observe(b"a", grown, 13.9)
    assert tracker.observe(b"a", grown, 14.0)


def test_a_rewrite_that_puts_size_and_time_back_begins_the_wait_anew() -> None:
    tracker = StabilityTracker(2.0)
    tracker.observe(b"a", a_fingerprint(inode=1, ctime_ns=1), 10.0)
    assert not tracker.observe(b"a", a_fingerprint(inode=1, ctime_ns=2), 12.0)


def test_without_a_delay_a_file_is_stable_at_once() -> None:
    tracker = StabilityTracker(0.0)
    assert tracker.observe(b"a", a_fingerprint(), 10.0)
    assert len(tracker) == 0


def test_a_held_file_waits_even_without_a_delay() -> None:
    tracker = StabilityTracker(0.0)
    looks = a_fingerprint()
    tracker.hold(b"a", looks, 10.0)
    assert not tracker.observe(b"a", looks, 10.4)
    assert tracker.next_due() == 10.5
    assert tracker.observe(b"a", looks, 10.5)


def test_a_held_file_waits_for_the_delay_where_that_is_longer() -> None:
    tracker = StabilityTracker(3.0)
    tracker.hold(b"a", a_fingerprint(), 10.0)
    assert tracker.next_due() == 13.0


def test_a_held_file_that_changes_begins_the_wait_anew() -> None:
    tracker = StabilityTracker(2.0)
    tracker.hold(b"a", a_fingerprint(), 10.0)
    assert not tracker.observe(b"a", a_fingerprint(), 12.0)
    assert tracker.next_due() == 14.0


def test_a_held_file_does_not_keep_back_one_that_is_ready_before_it() -> None:
    tracker = StabilityTracker(0.1)
    tracker.hold(b"held", a_fingerprint(), 10.0)
    tracker.observe(b"other", a_fingerprint(), 10.0)
    assert tracker.due(10.2) == [b"other"]
    assert tracker.next_due() == 10.1


def test_what_is_forgotten_is_no_longer_due() -> None:
    tracker = StabilityTracker(2.0)
    tracker.observe(b"a", a_fingerprint(), 10.0)
    tracker.hold(b"b", a_fingerprint(), 10.0)
    for relpath in (b"a", b"b", b"never seen"):
        tracker.forget(relpath)
    assert len(tracker) == 0
    assert tracker.next_due() is None
    assert tracker.due(100.0) == []


FILES = st.sampled_from([b"a", b"b", b"c", b"d"])
LOOKS = st.sampled_from([a_fingerprint(inode=1, size=size) for size in (1, 2)])
STEPS = st.tuples(
    st.sampled_from(["look", "hold", "forget"]), FILES, LOOKS, st.sampled_from([0.0, 0.05, 0.3, 1.0])
)


@given(st.sampled_from([0.0, 0.1, 0.5, 2.0]), st.lists(STEPS, max_size=40))
def test_due_are_all_whose_time_has_come_and_no_others(
    stable_for: float, steps: list[tuple[str, bytes, Fingerprint, float]]
) -> None:
    tracker = StabilityTracker(stable_for)
    expected: dict[bytes, tuple[Fingerprint, float]] = {}
    now = 100.0
    for action, relpath, looks, pause in steps:
        now += pause
        if action == "hold":
            tracker.hold(relpath, looks, now)
            expected[relpath] = (looks, now + max(stable_for, 0.5))
        elif action == "forget":
            tracker.forget(relpath)
            expected.pop(relpath, None)
        else:
            known = expected.get(relpath)
            unchanged = known is not None and known[0] == looks
            ready = (known is not None and unchanged and now >= known[1]) or (
                not unchanged and stable_for <= 0
            )
            assert tracker.observe(relpath, looks, now) == ready
            if ready:
                expected.pop(relpath, None)
            elif not unchanged:
                expected[relpath] = (looks, now + stable_for)
        assert set(tracker.due(now)) == {name for name, (_, due) in expected.items() if due <= now}
        assert tracker.next_due() == min((due for _, due in expected.values()), default=None)
        assert len(tracker) == len(expected)
        assert all((name in tracker) == (name in expected) for name in (b"a", b"b", b"c", b"d"))
