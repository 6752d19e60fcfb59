"""The circuit of a destination: paused after a failure, then probed by one delivery."""

from dataclasses import replace
from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from backupd.core.backoff import Backoff
from backupd.core.circuit import Circuit, CircuitState
from backupd.core.policy import Reason
from tests.factories import NOW, SECOND

BACKOFF = Backoff(10 * SECOND, timedelta(minutes=5))


def paused(
    circuit: Circuit,
    now: datetime = NOW,
    retry_after: timedelta | None = None,
    reason: Reason = Reason.CONNECT,
) -> Circuit:
    return circuit.record_failure(reason, now, BACKOFF, 1 - 1e-12, retry_after)


def probing() -> Circuit:
    circuit = paused(Circuit()).try_acquire(NOW + timedelta(hours=1))
    assert circuit is not None
    return circuit


def test_a_working_circuit_lets_every_delivery_through() -> None:
    circuit = Circuit()
    assert circuit.try_acquire(NOW) is circuit
    assert circuit.wait_time(NOW) == timedelta(0)


def test_a_failure_of_the_destination_pauses_the_circuit() -> None:
    circuit = paused(Circuit(), reason=Reason.SERVER_ERROR)
    assert (circuit.state, circuit.failures, circuit.reason, circuit.since) == (
        CircuitState.PAUSED,
        1,
        Reason.SERVER_ERROR,
        NOW,
    )
    assert circuit.try_acquire(NOW + 9 * SECOND) is None
    assert circuit.wait_time(NOW + 9 * SECOND) == SECOND
    assert circuit.wait_time(NOW + timedelta(hours=1)) == timedelta(0)


def test_after_the_pause_a_single_delivery_probes_the_destination() -> None:
    circuit = paused(Circuit()).try_acquire(NOW + 10 * SECOND)
    assert circuit is not None
    assert circuit.state is CircuitState.PROBING
    assert circuit.try_acquire(NOW + timedelta(days=1)) is None
    assert circuit.wait_time(NOW + timedelta(days=1)) is None


def test_a_probe_that_goes_on_lets_others_through_until_one_of_them_fails() -> None:
    circuit = replace(probing(), takes_bytes=True)
    assert circuit.try_acquire(NOW) is circuit
    assert circuit.wait_time(NOW) == timedelta(0)
    assert circuit.released(NOW) is circuit
    failed = paused(circuit, NOW + timedelta(hours=1))
    assert (failed.state, failed.failures, failed.takes_bytes) == (CircuitState.PAUSED, 2, False)
    assert circuit.record_success() == Circuit()


def test_a_failed_probe_pauses_the_circuit_for_longer() -> None:
    later = NOW + timedelta(hours=1)
    circuit = paused(probing(), later)
    assert (circuit.state, circuit.failures, circuit.since) == (CircuitState.PAUSED, 2, NOW)
    assert circuit.until == later + 20 * SECOND


def test_any_response_of_the_destination_ends_the_pause() -> None:
    assert probing().record_success() == Circuit()
    assert paused(Circuit()).record_success() == Circuit()


def test_after_a_probe_without_a_result_the_next_delivery_probes_at_once() -> None:
    circuit = probing().released(NOW)
    assert circuit.try_acquire(NOW) == probing_at(NOW)


def probing_at(until: datetime) -> Circuit:
    circuit = probing()
    return Circuit(CircuitState.PROBING, until, circuit.failures, circuit.reason, circuit.since)


def test_an_attempt_without_a_result_changes_only_a_probing_circuit() -> None:
    first = paused(Circuit())
    assert first.released(NOW) is first
    assert Circuit().released(NOW) == Circuit()


def test_uploads_that_were_running_do_not_lengthen_the_pause() -> None:
    first = paused(Circuit())
    assert paused(first, NOW + SECOND) is first


def test_uploads_that_were_running_can_bring_a_longer_retry_after() -> None:
    first = paused(Circuit())
    longer = paused(first, NOW + SECOND, timedelta(minutes=30))
    assert longer.until == NOW + SECOND + timedelta(minutes=30)
    assert longer.failures == 1
    assert paused(longer, NOW + SECOND, SECOND).until == longer.until


def test_a_retry_after_longer_than_the_backoff_applies() -> None:
    assert paused(Circuit(), retry_after=timedelta(minutes=2)).until == NOW + timedelta(minutes=2)
    until = paused(Circuit(), retry_after=SECOND).until
    assert until is not None
    assert until > NOW + 9 * SECOND


ACTIONS = st.tuples(
    st.sampled_from(["acquire", "fail", "succeed", "release"]),
    st.timedeltas(timedelta(0), timedelta(minutes=10)),
    st.one_of(st.none(), st.timedeltas(timedelta(0), timedelta(hours=1))),
    st.floats(0, 1, exclude_max=True),
)


@given(st.lists(ACTIONS, max_size=50))
def test_any_sequence_of_results_leaves_a_valid_circuit_that_lets_a_delivery_through_again(
    actions: list[tuple[str, timedelta, timedelta | None, float]],
) -> None:
    circuit, now = Circuit(), NOW
    for action, pause, retry_after, chance in actions:
        now += pause
        before = circuit
        match action:
            case "acquire":
                circuit = circuit.try_acquire(now) or circuit
            case "fail":
                circuit = circuit.record_failure(Reason.CONNECT, now, BACKOFF, chance, retry_after)
                assert circuit.state is CircuitState.PAUSED
                assert circuit.failures - before.failures == (before.state is not CircuitState.PAUSED)
                assert before.until is None or (circuit.until is not None and circuit.until >= before.until)
            case "succeed":
                circuit = circuit.record_success()
                assert circuit.state is CircuitState.WORKING
            case _:
                circuit = circuit.released(now)
        if circuit.state is CircuitState.WORKING:
            assert circuit == Circuit()
        else:
            assert circuit.failures > 0
            assert circuit.until is not None
            assert circuit.since is not None
            assert circuit.since <= now
        wait = circuit.wait_time(now)
        assert (circuit.try_acquire(now) is not None) == (wait == timedelta(0))
        if wait is not None:
            assert wait <= timedelta(hours=1)
            assert circuit.try_acquire(now + wait) is not None
