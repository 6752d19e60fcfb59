"""When a file is stable."""

from hypothesis import given
from hypothesis import strategies as st

from backupd.core.model import Fingerprint
from backupd.core.stability import Stability, StabilityTracker
from tests.factories import a_digest, a_fingerprint

WAITING, STABLE, TOUCHED = Stability.WAITING, Stability.STABLE, Stability.TOUCHED


def test_a_file_is_stable_once_it_is_unchanged_for_stable_for() -> None:
    tracker = StabilityTracker(2.0)
    fingerprint = a_fingerprint()
    assert tracker.observe(b"a", fingerprint, 10.0) is WAITING
    assert tracker.observe(b"a", fingerprint, 11.9) is WAITING
    assert tracker.observe(b"a", fingerprint, 12.0) is STABLE
    assert b"a" not in tracker


def test_a_change_restarts_the_wait() -> None:
    tracker = StabilityTracker(2.0)
    tracker.observe(b"a", a_fingerprint(inode=1, size=3), 10.0)
    grown = a_fingerprint(inode=1, size=4)
    assert tracker.observe(b"a", grown, 12.0) is WAITING
    assert tracker.observe(b"a", grown, 13.9) is WAITING
    assert tracker.observe(b"a", grown, 14.0) is STABLE


def test_a_change_of_metadata_alone_does_not_restart_the_wait() -> None:
    tracker = StabilityTracker(2.0)
    tracker.observe(b"a", a_fingerprint(inode=1, ctime_ns=1), 10.0)
    assert tracker.observe(b"a", a_fingerprint(inode=2, ctime_ns=2), 11.9) is WAITING
    assert tracker.observe(b"a", a_fingerprint(inode=2, ctime_ns=2), 12.0) is TOUCHED
    assert b"a" not in tracker


def test_a_touched_file_is_held_with_its_digest_and_stable_if_it_is_not_touched_again() -> None:
    tracker, fingerprint = StabilityTracker(2.0), a_fingerprint(inode=1)
    tracker.hold(b"a", fingerprint, 10.0, a_digest())
    assert tracker.observe(b"a", fingerprint, 11.0) is WAITING
    assert tracker.digest_of(b"a") == a_digest()
    assert tracker.observe(b"a", fingerprint, 12.0) is STABLE
    assert tracker.digest_of(b"a") is None


def test_without_a_delay_a_file_is_stable_at_once() -> None:
    tracker = StabilityTracker(0.0)
    assert tracker.observe(b"a", a_fingerprint(), 10.0) is STABLE
    assert len(tracker) == 0


def test_a_held_file_waits_even_without_a_delay() -> None:
    tracker = StabilityTracker(0.0)
    fingerprint = a_fingerprint()
    tracker.hold(b"a", fingerprint, 10.0)
    assert tracker.observe(b"a", fingerprint, 10.4) is WAITING
    assert tracker.next_due() == 10.5
    assert tracker.observe(b"a", fingerprint, 10.5) is STABLE


def test_a_held_file_waits_for_the_delay_if_that_is_longer() -> None:
    tracker = StabilityTracker(3.0)
    tracker.hold(b"a", a_fingerprint(), 10.0)
    assert tracker.next_due() == 13.0


def test_a_held_file_that_changes_restarts_the_wait() -> None:
    tracker = StabilityTracker(2.0)
    tracker.hold(b"a", a_fingerprint(), 10.0)
    assert tracker.observe(b"a", a_fingerprint(), 12.0) is WAITING
    assert tracker.next_due() == 14.0


def test_a_held_file_does_not_delay_one_that_is_due_earlier() -> None:
    tracker = StabilityTracker(0.1)
    tracker.hold(b"held", a_fingerprint(), 10.0)
    tracker.observe(b"other", a_fingerprint(), 10.0)
    assert tracker.due(10.2) == [b"other"]
    assert tracker.next_due() == 10.1


def test_a_forgotten_file_is_no_longer_due() -> None:
    tracker = StabilityTracker(2.0)
    tracker.observe(b"a", a_fingerprint(), 10.0)
    tracker.hold(b"b", a_fingerprint(), 10.0)
    for relpath in (b"a", b"b", b"never seen"):
        tracker.forget(relpath)
    assert len(tracker) == 0
    assert tracker.next_due() is None
    assert tracker.due(100.0) == []


FILES = st.sampled_from([b"a", b"b", b"c", b"d"])
FINGERPRINTS = st.sampled_from([a_fingerprint(inode=1, size=size) for size in (1, 2)])
STEPS = st.tuples(
    st.sampled_from(["observe", "hold", "forget"]),
    FILES,
    FINGERPRINTS,
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)


@given(st.sampled_from([0.0, 0.1, 0.5, 2.0]), st.lists(STEPS, max_size=40))
def test_exactly_the_files_past_their_time_are_due(
    stable_for: float, steps: list[tuple[str, bytes, Fingerprint, float]]
) -> None:
    tracker = StabilityTracker(stable_for)
    expected: dict[bytes, tuple[Fingerprint, float]] = {}
    now = 100.0
    for action, relpath, fingerprint, pause in steps:
        now += pause
        if action == "hold":
            tracker.hold(relpath, fingerprint, now)
            expected[relpath] = (fingerprint, now + max(stable_for, 0.5))
        elif action == "forget":
            tracker.forget(relpath)
            expected.pop(relpath, None)
        else:
            known = expected.get(relpath)
            unchanged = known is not None and known[0] == fingerprint
            ready = (known is not None and unchanged and now >= known[1]) or (
                not unchanged and stable_for <= 0
            )
            assert (tracker.observe(relpath, fingerprint, now) is STABLE) == ready
            if ready:
                expected.pop(relpath, None)
            elif not unchanged:
                expected[relpath] = (fingerprint, now + stable_for)
        assert set(tracker.due(now)) == {name for name, (_, due) in expected.items() if due <= now}
        assert tracker.next_due() == min((due for _, due in expected.values()), default=None)
        assert len(tracker) == len(expected)
        assert all((name in tracker) == (name in expected) for name in (b"a", b"b", b"c", b"d"))
