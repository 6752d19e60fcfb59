from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from backupd.core.backoff import Backoff
from backupd.core.circuit import Circuit, CircuitState
from backupd.core.policy import Reason
from tests.factories import NOW, SECOND

BACKOFF = Backoff(10 * SECOND, timedelta(minutes=5))


def shut(
    gate: Circuit, now: datetime = NOW, asked: timedelta | None = None, reason: Reason = Reason.CONNECT
) -> Circuit:
    return gate.record_failure(reason, now, BACKOFF, 1 - 1e-12, asked)


def probing() -> Circuit:
    gate = shut(Circuit()).try_acquire(NOW + timedelta(hours=1))
    assert gate is not None
    return gate


def test_an_open_gate_lets_everything_through() -> None:
    gate = Circuit()
    assert gate.try_acquire(NOW) is gate
    assert gate.wait_time(NOW) == timedelta(0)


def test_a_fault_of_the_destination_shuts_it_for_a_while() -> None:
    gate = shut(Circuit(), reason=Reason.SERVER_ERROR)
    assert (gate.state, gate.failures, gate.reason, gate.since) == (
        CircuitState.PAUSED,
        1,
        Reason.SERVER_ERROR,
        NOW,
    )
    assert gate.try_acquire(NOW + 9 * SECOND) is None
    assert gate.wait_time(NOW + 9 * SECOND) == SECOND
    assert gate.wait_time(NOW + timedelta(hours=1)) == timedelta(0)


def test_after_the_pause_a_single_delivery_probes() -> None:
    gate = shut(Circuit()).try_acquire(NOW + 10 * SECOND)
    assert gate is not None
    assert gate.state is CircuitState.PROBING
    assert gate.try_acquire(NOW + timedelta(days=1)) is None
    assert gate.wait_time(NOW + timedelta(days=1)) is None


def test_a_probe_that_fails_shuts_it_for_longer() -> None:
    later = NOW + timedelta(hours=1)
    gate = shut(probing(), later)
    assert (gate.state, gate.failures, gate.since) == (CircuitState.PAUSED, 2, NOW)
    assert gate.until == later + 20 * SECOND


def test_an_answer_opens_it_whatever_it_was() -> None:
    assert probing().record_success() == Circuit()
    assert shut(Circuit()).record_success() == Circuit()


def test_a_probe_that_tells_nothing_lets_the_next_one_through() -> None:
    gate = probing().released(NOW)
    assert gate.try_acquire(NOW) == probing_at(NOW)


def probing_at(until: datetime) -> Circuit:
    gate = probing()
    return Circuit(CircuitState.PROBING, until, gate.failures, gate.reason, gate.since)


def test_what_tells_nothing_changes_no_gate_but_a_probing_one() -> None:
    paused = shut(Circuit())
    assert paused.released(NOW) is paused
    assert Circuit().released(NOW) == Circuit()


def test_uploads_that_were_under_way_do_not_lengthen_the_pause() -> None:
    paused = shut(Circuit())
    assert shut(paused, NOW + SECOND) is paused


def test_uploads_that_were_under_way_may_bring_a_longer_retry_after() -> None:
    paused = shut(Circuit())
    asked = shut(paused, NOW + SECOND, timedelta(minutes=30))
    assert asked.until == NOW + SECOND + timedelta(minutes=30)
    assert asked.failures == 1
    assert shut(asked, NOW + SECOND, SECOND).until == asked.until


def test_retry_after_is_kept_where_it_is_longer_than_the_back_off() -> None:
    assert shut(Circuit(), asked=timedelta(minutes=2)).until == NOW + timedelta(minutes=2)
    until = shut(Circuit(), asked=SECOND).until
    assert until is not None
    assert until > NOW + 9 * SECOND


ACTIONS = st.tuples(
    st.sampled_from(["enter", "fail", "answer", "leave"]),
    st.timedeltas(timedelta(0), timedelta(minutes=10)),
    st.one_of(st.none(), st.timedeltas(timedelta(0), timedelta(hours=1))),
    st.floats(0, 1, exclude_max=True),
)


@given(st.lists(ACTIONS, max_size=50))
def test_whatever_happens_the_gate_is_in_order_and_opens_again(
    actions: list[tuple[str, timedelta, timedelta | None, float]],
) -> None:
    gate, now = Circuit(), NOW
    for action, pause, asked, chance in actions:
        now += pause
        before = gate
        match action:
            case "enter":
                gate = gate.try_acquire(now) or gate
            case "fail":
                gate = gate.record_failure(Reason.CONNECT, now, BACKOFF, chance, asked)
                assert gate.state is CircuitState.PAUSED
                assert gate.failures - before.failures == (before.state is not CircuitState.PAUSED)
                assert before.until is None or (gate.until is not None and gate.until >= before.until)
            case "answer":
                gate = gate.record_success()
                assert gate.state is CircuitState.WORKING
            case _:
                gate = gate.released(now)
        if gate.state is CircuitState.WORKING:
            assert gate == Circuit()
        else:
            assert gate.failures > 0
            assert gate.until is not None
            assert gate.since is not None
            assert gate.since <= now
        wait = gate.wait_time(now)
        assert (gate.try_acquire(now) is not None) == (wait == timedelta(0))
        if wait is not None:
            assert wait <= timedelta(hours=1)
            assert gate.try_acquire(now + wait) is not None
