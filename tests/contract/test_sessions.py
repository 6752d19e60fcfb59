"""The contract of `Ledger` on several hosts: sessions, claims, and calls at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from backupd.core.model import Delivery, DeliveryState
from backupd.ledger.history import Search
from backupd.ledger.port import DispositionResult, Ledger
from tests.contract.bench import Bench
from tests.factories import NOW, a_candidate, a_claim_result, deferred, delivered

LATER = NOW + timedelta(hours=1)
BOTH = ("vault", "annex")


def enqueue(ledger: Ledger, count: int, to: Sequence[str] = ("vault",)) -> None:
    ledger.enqueue([a_candidate(b"r%d" % number) for number in range(count)], to, NOW)


def claim(ledger: Ledger) -> Delivery:
    (delivery,) = ledger.claim("vault", LATER)
    return delivery


def at_once(*works: Callable[[], None]) -> None:
    """Run functions in threads that start together; raise the first exception of one."""
    barrier = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait()
            work()
        except BaseException as error:  # noqa: BLE001 -- a thread's failure is the test's
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_each_session_has_a_number_of_its_own(bench: Bench) -> None:
    sessions = [bench.ledger, bench.another_host(), bench.crash(), bench.another_host()]
    assert len({ledger.session for ledger in sessions}) == 4


def test_each_claim_of_a_delivery_has_another_token(ledger: Ledger) -> None:
    enqueue(ledger, 1)
    claims = []
    for _ in range(3):
        delivery = claim(ledger)
        assert delivery.claim.session == ledger.session
        claims.append(delivery.claim)
        ledger.release([delivery])
    assert len(set(claims)) == 3


# lost claims


def test_the_result_of_a_claim_that_was_released_is_refused(ledger: Ledger) -> None:
    enqueue(ledger, 1)
    delivery = claim(ledger)
    ledger.release([delivery])
    result = a_claim_result(delivery, delivered())
    recorded = ledger.record([result], LATER)
    assert (recorded.completed, recorded.lost) == ((), (result,))
    again = claim(ledger)
    assert (again.id, again.attempts) == (delivery.id, 0)
    assert ledger.record([result], LATER).lost == (result,)  # the delivery is claimed, but by another claim


def test_a_host_cannot_overwrite_the_outcome_of_the_one_that_took_over(bench: Bench) -> None:
    """A daemon that was frozen wakes up after another one has delivered its archive."""
    frozen, other = bench.ledger, bench.another_host()
    enqueue(frozen, 1)
    old = a_claim_result(claim(frozen), deferred())
    bench.crash()
    assert other.reap() == 1
    new = a_claim_result(claim(other), delivered())
    assert frozen.record([old], LATER).lost == (old,)
    (completed,) = other.record([new], LATER).completed
    assert completed.state is DeliveryState.DELIVERED
    assert frozen.record([old], LATER).lost == (old,)
    assert frozen.pending_dispositions() == [completed]
    (record,) = bench.history().deliveries_of(completed.archive.id)
    assert (record.state, record.attempts, record.reason) == (DeliveryState.DELIVERED, 1, None)
    assert [attempt.outcome for attempt in bench.history().attempts(record.id)] == ["delivered"]


def test_a_refused_result_leaves_the_others_of_its_batch(bench: Bench) -> None:
    enqueue(bench.ledger, 3)
    first, second, third = (a_claim_result(claim(bench.ledger), delivered()) for _ in range(3))
    bench.ledger.release([second.delivery])
    recorded = bench.ledger.record([first, second, third], LATER)
    assert [one.archive for one in recorded.completed] == [first.delivery.archive, third.delivery.archive]
    assert recorded.lost == (second,)


def test_a_result_that_was_recorded_before_is_not_lost(ledger: Ledger) -> None:
    """A commit may take effect although its answer is lost; the recorder repeats it then."""
    enqueue(ledger, 2)
    ended, waiting = a_claim_result(claim(ledger), delivered()), a_claim_result(claim(ledger), deferred())
    assert len(ledger.record([ended, waiting], LATER).completed) == 1
    again = ledger.record([ended, waiting], LATER)
    assert (again.completed, again.lost) == ((), ())


# release and reap


def test_a_release_leaves_claims_that_were_made_since(bench: Bench) -> None:
    other = bench.another_host()
    enqueue(bench.ledger, 1)
    old = claim(bench.ledger)
    bench.ledger.release([old])
    claim(other)
    bench.ledger.release([old])
    assert not bench.ledger.claim("vault", LATER)


def test_a_session_releases_its_own_claims_only(bench: Bench) -> None:
    other = bench.another_host()
    enqueue(bench.ledger, 3)
    own = {claim(bench.ledger).id, claim(bench.ledger).id}
    claim(other)
    bench.ledger.release_own()
    assert {one.id for one in other.claim("vault", LATER, limit=9)} == own


def test_only_the_claims_of_sessions_that_are_over_are_reaped(bench: Bench) -> None:
    other = bench.another_host()
    enqueue(bench.ledger, 3)
    dead = claim(bench.ledger)
    held = claim(other)
    next_run = bench.crash()
    own = claim(next_run)
    for ledger in (next_run, other):
        ledger.renew()
    assert other.reap() == 1
    assert next_run.reap() == 0
    assert claim(other).id == dead.id
    results = (a_claim_result(held, delivered()), a_claim_result(own, delivered()))
    assert (other.record(results[:1], LATER).lost, next_run.record(results[1:], LATER).lost) == ((), ())


# stewards


def test_a_session_takes_care_of_the_folders_of_its_drops(ledger: Ledger) -> None:
    terms = ledger.stewardship(["switches", "firewalls"])
    assert terms.keys() == {"switches", "firewalls"}
    assert ledger.stewardship(["switches"]) == {"switches": terms["switches"]}
    assert not ledger.stewardship([])


def test_only_the_steward_of_a_folder_records_dispositions(ledger: Ledger) -> None:
    enqueue(ledger, 2)
    results = [a_claim_result(claim(ledger), delivered()) for _ in range(2)]
    completed = ledger.record(results, LATER).completed
    done, failed = [DispositionResult(completed[0].archive.id, b"sent/r0")], [completed[1].archive.id]
    term = ledger.stewardship(["switches"])["switches"]
    for others in ({}, {"firewalls": term}, {"switches": term - 1}):
        ledger.record_dispositions(done, failed, others, LATER)
        assert ledger.pending_dispositions() == [*completed]
    ledger.record_dispositions(done, failed, {"switches": term}, LATER)
    assert [(one.archive.id, one.already_logged) for one in ledger.pending_dispositions()] == [
        (failed[0], True)
    ]


# hosts and the clock


def test_an_archive_has_the_host_that_queued_it(bench: Bench) -> None:
    """Its name is a placeholder of headers and URLs, which must not depend on the host that delivers."""
    other = bench.another_host()
    enqueue(bench.ledger, 1)
    assert claim(other).archive.host == "one"
    (record,) = bench.history().find(Search(), 9)
    assert record.archive.host == "one"


def test_the_clock_of_the_ledger_is_the_same_on_all_hosts(bench: Bench) -> None:
    other = bench.another_host()
    times = [bench.ledger.now(), other.now(), bench.ledger.now()]
    assert times == sorted(times)
    assert abs(times[0] - datetime.now(UTC)) < timedelta(minutes=1)


# at the same moment


def test_two_hosts_never_claim_the_same_delivery(bench: Bench) -> None:
    enqueue(bench.ledger, 200)
    claimed: list[str] = []

    def work(ledger: Ledger) -> None:
        while found := ledger.claim("vault", LATER, limit=3):
            claimed.extend(delivery.id for delivery in found)

    other = bench.another_host()
    at_once(lambda: work(bench.ledger), lambda: work(other))
    assert len(claimed) == len(set(claimed)) == 200


def test_a_file_that_two_hosts_find_is_queued_once(bench: Bench) -> None:
    candidates = [a_candidate(b"r%d" % number) for number in range(100)]
    queued: list[bytes] = []

    def work(ledger: Ledger, order: int) -> None:
        for candidate in candidates[::order]:
            queued.extend(archive.relpath for archive in ledger.enqueue([candidate], BOTH, NOW).queued)

    other = bench.another_host()
    at_once(lambda: work(bench.ledger, 1), lambda: work(other, -1))
    assert sorted(queued) == sorted(candidate.relpath for candidate in candidates)
    assert {backlog.pending for backlog in bench.ledger.backlog().values()} == {100}


def test_two_hosts_that_end_the_last_deliveries_of_archives_complete_each_once(bench: Bench) -> None:
    count = 50
    enqueue(bench.ledger, count, BOTH)
    completed: list[int] = []

    def work(ledger: Ledger, destination: str) -> None:
        for _ in range(count):
            (delivery,) = ledger.claim(destination, LATER)
            recorded = ledger.record([a_claim_result(delivery, delivered())], LATER)
            assert recorded.lost == ()
            completed.extend(one.archive.id for one in recorded.completed)

    other = bench.another_host()
    at_once(lambda: work(bench.ledger, "vault"), lambda: work(other, "annex"))
    assert len(completed) == len(set(completed)) == count
    assert bench.ledger.count_pending_dispositions() == count
