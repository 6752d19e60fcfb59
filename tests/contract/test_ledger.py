"""What every ledger has to do; runs on each adapter."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backupd.core.circuit import Circuit, CircuitState
from backupd.core.errors import LedgerError
from backupd.core.model import Archive, Attempt, Delivery, DeliveryState, Fingerprint, Outcome, Superseded
from backupd.core.policy import Reason
from backupd.ledger.port import CompletedArchive, DispositionResult, FileCandidate, Ledger, content_key
from backupd.ledger.sqlite.connection import _migrate, open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from tests.factories import (
    NOW,
    SECOND,
    a_fingerprint,
    a_candidate,
    deferred,
    delivered,
    finished,
    rejected,
    superseded,
)

LATER = NOW + timedelta(hours=1)
BOTH = ("vault", "annex")


class Bench:
    """A ledger that can be opened anew, as after a crash."""

    def __init__(self, opener: Callable[[], Ledger]) -> None:
        self._opener = opener
        self.ledger = opener()

    def crash(self) -> Ledger:
        """Return the ledger as the next daemon finds it."""
        self.ledger = self._opener()
        return self.ledger


def _in_a_file(base: Path) -> Iterator[Bench]:
    opened: list[Ledger] = []

    def opener() -> Ledger:
        opened.append(SqliteLedger(open_ledger(base).connection))
        return opened[-1]

    yield Bench(opener)
    for ledger in opened:
        ledger.close()


def _in_memory(_base: Path) -> Iterator[Bench]:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys = ON")
    _migrate(connection, Path(":memory:"))
    yield Bench(lambda: SqliteLedger(connection))
    connection.close()


ADAPTERS = {"sqlite-file": _in_a_file, "sqlite-memory": _in_memory}


@pytest.fixture(params=list(ADAPTERS.values()), ids=list(ADAPTERS))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    yield from request.param(tmp_path)


@pytest.fixture
def ledger(bench: Bench) -> Ledger:
    return bench.ledger


def admit(
    ledger: Ledger,
    *sightings: FileCandidate,
    to: tuple[str, ...] = ("vault",),
    now: datetime = NOW,
) -> tuple[Archive, ...]:
    return ledger.enqueue(sightings, to, now).queued


def claim(ledger: Ledger, destination: str = "vault", now: datetime = LATER) -> Delivery:
    (delivery,) = ledger.claim(destination, now)
    return delivery


def end(
    ledger: Ledger, outcome: Outcome, destination: str = "vault", now: datetime = LATER
) -> list[CompletedArchive]:
    """Claim a delivery and record its outcome."""
    return ledger.record([finished(claim(ledger, destination), outcome, now=now)], now)


# admissions


def test_what_lies_in_a_folder_has_the_number_that_its_disk_has_now(ledger: Ledger) -> None:
    """After a boot, or a mount, the same directory may be on a device of another number."""
    folder, other, here = 2, 77, a_candidate().fingerprint.device
    admit(ledger, a_candidate(b"r1.cfg"), a_candidate(b"r2.cfg"))
    admit(ledger, replace(a_candidate(b"r3.cfg"), drop="firewalls"))
    first = claim(ledger)
    end(ledger, delivered())
    ledger.release_claims([first.id])

    def devices() -> list[int]:
        claimed = ledger.claim("vault", LATER, limit=9)
        ledger.release_claims()
        found = [*(each.archive for each in claimed), *(one.archive for one in ledger.pending_dispositions())]
        return [archive.fingerprint.device for archive in sorted(found, key=lambda archive: archive.id)]

    ledger.register_folder("switches", here, folder)
    ledger.register_folder("switches", here + 1, folder)
    assert devices() == [here + 1, here + 1, here]
    ledger.register_folder("switches", here + 2, other)  # such as the empty place to mount on
    assert devices() == [here + 1, here + 1, here]
    ledger.register_folder("switches", here + 3, folder)
    assert devices() == [here + 3, here + 3, here]
    ledger.register_folder("switches", here, 1 << 63)
    ledger.register_folder("switches", here, 1 << 63)


def test_a_new_file_becomes_a_pending_delivery_to_each_destination(ledger: Ledger) -> None:
    sighting = a_candidate(b"site/r1.tar.gz")
    (archive,) = admit(ledger, sighting, to=BOTH)
    assert (archive.drop, archive.relpath, archive.fingerprint) == (
        sighting.drop,
        sighting.relpath,
        sighting.fingerprint,
    )
    assert archive.queued_at == NOW
    deliveries = [claim(ledger, name) for name in BOTH]
    assert [delivery.destination for delivery in deliveries] == list(BOTH)
    assert [delivery.archive for delivery in deliveries] == [archive, archive]
    assert len({delivery.id for delivery in deliveries}) == 2
    assert not ledger.claim("vault", LATER)


def test_the_same_file_is_admitted_once(bench: Bench) -> None:
    sighting = a_candidate()
    assert admit(bench.ledger, sighting)
    again = bench.ledger.enqueue([sighting, sighting], ["vault"], LATER)
    assert (again.queued, again.superseded) == ((), ())
    assert admit(bench.crash(), sighting) == ()


def test_the_same_file_twice_in_one_call_is_admitted_once(ledger: Ledger) -> None:
    sighting = a_candidate()
    assert len(admit(ledger, sighting, sighting)) == 1


def test_the_same_name_in_another_drop_is_another_archive(ledger: Ledger) -> None:
    one, other = a_candidate(drop="switches"), a_candidate(drop="firewalls")
    assert len(admit(ledger, one, other)) == 2


def test_the_same_content_under_another_name_is_another_archive(ledger: Ledger) -> None:
    looks = a_fingerprint()
    assert len(admit(ledger, a_candidate(b"a", fingerprint=looks), a_candidate(b"b", fingerprint=looks))) == 2


def test_a_changed_device_number_alone_is_no_new_content(ledger: Ledger) -> None:
    admit(ledger, a_candidate(fingerprint=a_fingerprint(inode=7, device=1)))
    assert admit(ledger, a_candidate(fingerprint=a_fingerprint(inode=7, device=2))) == ()


@pytest.mark.parametrize(
    "changed",
    [
        a_fingerprint(inode=8),
        a_fingerprint(inode=7, size=4),
        a_fingerprint(inode=7, mtime_ns=1),
        a_fingerprint(inode=7, ctime_ns=1),
    ],
    ids=["inode", "size", "mtime", "ctime"],
)
def test_a_replaced_content_supersedes_the_one_that_is_pending(ledger: Ledger, changed: Fingerprint) -> None:
    (old,) = admit(ledger, a_candidate(fingerprint=a_fingerprint(inode=7)), to=BOTH)
    admission = ledger.enqueue([a_candidate(fingerprint=changed)], BOTH, LATER)
    assert admission.superseded == (old,)
    assert [archive.fingerprint for archive in admission.queued] == [changed]
    assert [claim(ledger, name).archive.fingerprint for name in BOTH] == [changed, changed]
    assert not ledger.claim("vault", LATER)
    assert ledger.pending_dispositions() == []


def test_a_replaced_content_leaves_a_claimed_delivery_to_its_worker(ledger: Ledger) -> None:
    admit(ledger, a_candidate())
    old = claim(ledger)
    admission = ledger.enqueue([a_candidate()], ["vault"], LATER)
    assert admission.superseded == ()
    assert len(admission.queued) == 1
    assert ledger.record([finished(old, superseded())], LATER) == []
    assert claim(ledger).archive == admission.queued[0]


def test_of_a_replaced_content_only_the_pending_deliveries_end(ledger: Ledger) -> None:
    (old,) = admit(ledger, a_candidate(), to=BOTH)
    held = claim(ledger, "vault")
    assert ledger.enqueue([a_candidate()], BOTH, LATER).superseded == (old,)
    assert ledger.record([finished(held, delivered())], LATER) == []  # the file is another one now
    assert ledger.pending_dispositions() == []


def test_a_content_replaced_while_its_predecessor_awaits_disposal_is_admitted(ledger: Ledger) -> None:
    old = a_candidate()
    admit(ledger, old)
    (settled,) = end(ledger, delivered())
    admission = ledger.enqueue([a_candidate()], ["vault"], LATER)
    assert (len(admission.queued), admission.superseded) == (1, ())
    assert [one.archive for one in ledger.pending_dispositions()] == [settled.archive]
    assert admit(ledger, old) == ()  # still accounted for


def test_a_rejected_sighting_is_settled_at_once_and_never_claimed(bench: Bench) -> None:
    why = rejected(Reason.TRUNCATED)
    sound, unsound = a_candidate(b"r1"), replace(a_candidate(b"r2"), rejected=why)
    admission = bench.ledger.enqueue([sound, unsound], BOTH, NOW)

    assert [archive.relpath for archive in admission.queued] == [b"r1"]
    assert [archive.relpath for archive in admission.rejected] == [b"r2"]
    for ledger in (bench.ledger, bench.crash()):
        (settled,) = ledger.pending_dispositions()
        assert settled.archive == admission.rejected[0]
        assert (settled.state, settled.already_logged) == (DeliveryState.REJECTED, False)
        assert {(e.destination, e.state, e.reason, e.error) for e in settled.results} == {
            (name, DeliveryState.REJECTED, "truncated", why.error) for name in BOTH
        }
        assert ledger.enqueue([unsound], BOTH, LATER).rejected == ()
    assert [d.archive.relpath for d in bench.ledger.claim("vault", LATER, limit=9)] == [b"r1"]


def test_a_rejected_sighting_supersedes_the_content_that_it_replaces(ledger: Ledger) -> None:
    (old,) = admit(ledger, a_candidate(), to=BOTH)
    admission = ledger.enqueue([replace(a_candidate(), rejected=rejected())], BOTH, LATER)

    assert admission.superseded == (old,)
    assert ledger.claim("vault", LATER) == []
    ledger.record_dispositions([DispositionResult(admission.rejected[0].id, b"rejected/r1")], [], LATER)
    assert ledger.known_files("switches").content_keys == frozenset()


def test_known_are_the_files_of_a_drop_that_are_accounted_for(ledger: Ledger) -> None:
    sighting = a_candidate(b"r1")
    admit(ledger, sighting, a_candidate(b"r2", drop="firewalls"))
    known = ledger.known_files("switches")
    assert known.content_keys == {content_key(b"r1", sighting.fingerprint)}
    assert known.paths == {hash(b"r1")}
    assert ledger.known_files("nowhere").content_keys == frozenset()


def test_known_below_a_directory_are_the_files_in_it_and_no_others(ledger: Ledger) -> None:
    paths = [b"a", b"a-b/x", b"a/x", b"a/y/z", b"a0", b"a0/x", b"b/a/x", b"a/\xff"]
    ledger.enqueue([a_candidate(path) for path in paths], BOTH, NOW)

    known = ledger.known_files("switches", b"a")

    assert known.paths == {hash(path) for path in (b"a/x", b"a/y/z", b"a/\xff")}
    assert len(known.content_keys) == 3


def test_a_superseded_content_is_no_longer_known(ledger: Ledger) -> None:
    admit(ledger, a_candidate(b"r1"))
    new = a_candidate(b"r1")
    admit(ledger, new)
    assert ledger.known_files("switches").content_keys == {content_key(b"r1", new.fingerprint)}


@pytest.mark.parametrize(
    "relpath",
    [
        b'bad\xff\n".tar.gz',
        b"\x80/\xfe.cfg",
        "Zürich/大.cfg".encode(),
        b"x" * 4000,
        b"';--",
        os.fsencode("a\udc80"),
    ],
)
def test_a_path_is_read_back_as_the_same_bytes(bench: Bench, relpath: bytes) -> None:
    admit(bench.ledger, a_candidate(relpath))
    ledger = bench.crash()
    delivery = claim(ledger)
    assert delivery.archive.relpath == relpath
    (settled,) = ledger.record([finished(delivery, delivered())], LATER)
    assert settled.archive.relpath == relpath
    ledger.record_dispositions([DispositionResult(settled.archive.id, b"sent/" + relpath)], [], LATER)
    assert bench.crash().pending_dispositions() == []


@pytest.mark.parametrize(
    "looks",
    [
        Fingerprint((1 << 64) - 1, (1 << 64) - 1, (1 << 63) - 1, 253_402_300_800 * 10**9, 1 << 80),
        Fingerprint(0, 0, 0, -1, -(1 << 80)),
        Fingerprint(1, 1 << 63, 1, (1 << 63) - 1, -(1 << 63)),
    ],
    ids=["largest", "smallest", "at the edge"],
)
def test_a_fingerprint_is_read_back_as_the_same_numbers(bench: Bench, looks: Fingerprint) -> None:
    sighting = a_candidate(fingerprint=looks)
    admit(bench.ledger, sighting)
    ledger = bench.crash()
    assert admit(ledger, sighting) == ()
    assert ledger.known_files("switches").content_keys == {content_key(sighting.relpath, looks)}
    assert claim(ledger).archive.fingerprint == looks


# claims


def test_what_has_been_due_for_longest_is_claimed_first(ledger: Ledger) -> None:
    for minutes, name in ((3, b"third"), (1, b"first"), (2, b"second")):
        admit(ledger, a_candidate(name), now=NOW + timedelta(minutes=minutes))
    assert [claim(ledger).archive.relpath for _ in range(3)] == [b"first", b"second", b"third"]


def test_nothing_is_claimed_before_it_is_due(ledger: Ledger) -> None:
    admit(ledger, a_candidate())
    step = finished(claim(ledger), deferred(), now=LATER)
    ledger.record([step], LATER)
    due = step.transition.due_at
    assert due is not None
    assert ledger.next_due("vault") == due
    assert not ledger.claim("vault", due - timedelta(microseconds=1))
    assert claim(ledger, now=due).id == step.delivery.id


def test_a_claim_is_one_of_its_own_destination(ledger: Ledger) -> None:
    admit(ledger, a_candidate(), to=("annex",))
    assert not ledger.claim("vault", LATER)
    assert ledger.next_due("vault") is None
    assert claim(ledger, "annex").destination == "annex"


def test_what_is_claimed_is_not_due(ledger: Ledger) -> None:
    admit(ledger, a_candidate())
    assert ledger.next_due("vault") == NOW
    claim(ledger)
    assert ledger.next_due("vault") is None


def test_small_ones_are_claimed_a_few_at_a_time_and_in_order(ledger: Ledger) -> None:
    names = [b"r%d" % number for number in range(5)]
    admit(ledger, *(a_candidate(name) for name in names))
    claimed = ledger.claim("vault", LATER, limit=3) + ledger.claim("vault", LATER, limit=3)
    assert [delivery.archive.relpath for delivery in claimed] == names
    assert not ledger.claim("vault", LATER, limit=3)


def test_a_large_one_is_claimed_alone(ledger: Ledger) -> None:
    large = a_candidate(b"large", fingerprint=a_fingerprint(size=1 << 30))
    admit(ledger, large, a_candidate(b"r1"), a_candidate(b"r2"))
    first, *others = ledger.claim("vault", LATER, limit=3)
    assert (first.archive.relpath, others) == (b"large", [])
    assert len(ledger.claim("vault", LATER, limit=3)) == 2


def test_threads_never_claim_the_same(ledger: Ledger) -> None:
    admit(ledger, *(a_candidate(b"r%d" % number) for number in range(200)))
    by_thread: list[list[str]] = [[], [], []]
    together = threading.Barrier(len(by_thread))

    def work(mine: list[str]) -> None:
        together.wait()
        while claimed := ledger.claim("vault", LATER, limit=3):
            mine += [delivery.id for delivery in claimed]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in by_thread]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [ident for mine in by_thread for ident in mine]
    assert len(ids) == len(set(ids)) == 200


def test_a_delivery_remembers_what_it_went_through(bench: Bench) -> None:
    admit(bench.ledger, a_candidate())
    first = claim(bench.ledger)
    assert (first.attempts, first.archive_failures, first.destination_failures) == (0, 0, 0)
    bench.ledger.record([finished(first, deferred(Reason.CONNECT), deferred(Reason.UNREADABLE))], NOW)
    again = claim(bench.crash())
    assert (again.id, again.attempts, again.archive_failures, again.destination_failures) == (
        first.id,
        2,
        1,
        0,
    )


def test_claims_that_nobody_holds_are_released(bench: Bench) -> None:
    admit(bench.ledger, a_candidate(b"r1"), a_candidate(b"r2"), a_candidate(b"r3"))
    held = {claim(bench.ledger).id, claim(bench.ledger).id}
    ledger = bench.crash()
    assert ledger.release_claims() == 2
    assert ledger.release_claims() == 0
    assert held < {claim(ledger).id for _ in range(3)}


# records


def test_a_delivered_archive_is_settled(ledger: Ledger) -> None:
    (archive,) = admit(ledger, a_candidate())
    outcome = delivered(b"abc", body='{"id": "17"}')
    (settled,) = end(ledger, outcome)
    assert (settled.archive, settled.state, settled.already_logged) == (archive, DeliveryState.DELIVERED, False)
    assert settled.digest == str(outcome.digest)
    (ending,) = settled.results
    assert (ending.destination, ending.state, ending.ended_at) == ("vault", DeliveryState.DELIVERED, LATER)
    assert (ending.digest, ending.verified, ending.http_status) == (str(outcome.digest), True, 201)
    assert (ending.reason, ending.error, ending.receipt) == (None, None, '{"id": "17"}')


def test_a_rejected_archive_is_settled_with_the_reason(ledger: Ledger) -> None:
    admit(ledger, a_candidate())
    (settled,) = end(ledger, rejected(Reason.TOO_LARGE))
    assert (settled.state, settled.digest) == (DeliveryState.REJECTED, None)
    (ending,) = settled.results
    assert (ending.reason, ending.error, ending.http_status) == ("too_large", "not wanted", 422)
    assert (ending.verified, ending.receipt) == (None, None)


def test_a_deferred_archive_is_not_settled(ledger: Ledger) -> None:
    admit(ledger, a_candidate())
    assert end(ledger, deferred()) == []
    assert ledger.pending_dispositions() == []


def test_an_archive_with_a_delivery_still_pending_is_not_settled(ledger: Ledger) -> None:
    admit(ledger, a_candidate(), to=BOTH)
    assert end(ledger, delivered(), "vault") == []
    assert ledger.pending_dispositions() == []
    (settled,) = end(ledger, delivered(), "annex")
    assert [ending.destination for ending in settled.results] == ["annex", "vault"]


def test_an_archive_with_a_delivery_still_claimed_is_not_settled(ledger: Ledger) -> None:
    admit(ledger, a_candidate(), to=BOTH)
    claim(ledger, "annex")
    assert end(ledger, delivered(), "vault") == []


@pytest.mark.parametrize("first", BOTH)
def test_an_archive_that_one_destination_rejects_is_rejected(ledger: Ledger, first: str) -> None:
    admit(ledger, a_candidate(), to=BOTH)
    outcomes: dict[str, Outcome] = {"vault": delivered(), "annex": rejected()}
    assert end(ledger, outcomes.pop(first), first) == []
    ((name, last),) = outcomes.items()
    (settled,) = end(ledger, last, name)
    assert settled.state is DeliveryState.REJECTED
    assert settled.digest is not None
    assert [ending.state for ending in settled.results] == [DeliveryState.REJECTED, DeliveryState.DELIVERED]


def test_both_deliveries_recorded_at_once_settle_an_archive_once(ledger: Ledger) -> None:
    admit(ledger, a_candidate(), to=BOTH)
    both = [finished(claim(ledger, name), delivered()) for name in BOTH]
    assert len(ledger.record(both, LATER)) == 1


def test_many_are_settled_in_the_order_in_which_they_ended(ledger: Ledger) -> None:
    admit(ledger, *(a_candidate(b"r%d" % number) for number in range(3)))
    claims = [claim(ledger) for _ in range(3)][::-1]
    settled = ledger.record([finished(one, delivered()) for one in claims], LATER)
    assert [one.archive for one in settled] == [one.archive for one in claims]


def test_a_superseded_delivery_leaves_nothing_to_dispose_of(ledger: Ledger) -> None:
    sighting = a_candidate()
    admit(ledger, sighting)
    assert end(ledger, superseded()) == []
    assert ledger.pending_dispositions() == []
    assert ledger.known_files("switches").paths == frozenset()
    assert len(admit(ledger, sighting)) == 1  # whatever is there now starts over


def test_a_file_that_is_gone_is_admitted_again_when_it_comes_back(ledger: Ledger) -> None:
    sighting = a_candidate()
    admit(ledger, sighting)
    end(ledger, Superseded("the file is gone", missing=True))
    assert len(admit(ledger, sighting)) == 1


def test_a_superseded_delivery_outweighs_one_that_was_delivered(ledger: Ledger) -> None:
    admit(ledger, a_candidate(), to=BOTH)
    assert end(ledger, delivered(), "vault") == []
    assert end(ledger, superseded(), "annex") == []
    assert ledger.pending_dispositions() == []


def test_a_record_made_twice_settles_once(ledger: Ledger) -> None:
    admit(ledger, a_candidate())
    once = finished(claim(ledger), delivered())
    assert len(ledger.record([once], LATER)) == 1
    assert ledger.record([once], LATER) == []
    assert len(ledger.pending_dispositions()) == 1


def test_nothing_to_record_is_nothing_settled(ledger: Ledger) -> None:
    assert ledger.record([], NOW) == []
    assert ledger.enqueue([], BOTH, NOW).queued == ()
    ledger.record_dispositions([], [], NOW)


def test_a_text_that_is_no_valid_unicode_does_not_keep_an_outcome_from_being_recorded(ledger: Ledger) -> None:
    admit(ledger, a_candidate(b"r1"), a_candidate(b"r2"))
    (settled,) = end(ledger, delivered(body="bad\udcff\0"))
    assert settled.results[0].receipt == "bad\\udcff\0"
    claimed = claim(ledger)
    broken = Superseded("bad\udcff")
    assert ledger.record([finished(claimed, broken)], LATER) == []


def test_every_attempt_is_kept_without_limit_of_time(bench: Bench) -> None:
    admit(bench.ledger, a_candidate())
    delivery = claim(bench.ledger)
    attempts = tuple(
        Attempt(datetime(1970, 1, 1, tzinfo=UTC), timedelta(days=number), 1 << 40, deferred())
        for number in range(3)
    )
    whole = finished(delivery, deferred())
    bench.ledger.record([type(whole)(delivery, attempts, whole.transition)], LATER)
    assert claim(bench.crash(), now=LATER + timedelta(hours=1)).attempts == 3


# dispositions


def test_what_was_settled_and_not_disposed_of_is_found_after_a_crash(bench: Bench) -> None:
    admit(bench.ledger, a_candidate(b"r1"), a_candidate(b"r2"), a_candidate(b"r3"))
    settled = end(bench.ledger, delivered()) + end(bench.ledger, rejected())
    assert bench.crash().pending_dispositions() == settled


def test_what_was_disposed_of_is_not_found_again(bench: Bench) -> None:
    sighting = a_candidate()
    admit(bench.ledger, sighting)
    (settled,) = end(bench.ledger, delivered())
    bench.ledger.record_dispositions([DispositionResult(settled.archive.id, b"sent/r1")], [], LATER)
    ledger = bench.crash()
    assert ledger.pending_dispositions() == []
    assert ledger.known_files("switches").paths == frozenset()


def test_a_file_put_back_after_its_disposal_starts_over(ledger: Ledger) -> None:
    sighting = a_candidate()
    admit(ledger, sighting)
    (settled,) = end(ledger, delivered())
    ledger.record_dispositions([DispositionResult(settled.archive.id, b"sent/r1")], [], LATER)
    (again,) = admit(ledger, sighting)
    assert again.id != settled.archive.id


def gone(ledger: Ledger, sighting: FileCandidate, outcome: Outcome) -> Archive:
    """Have a delivery end, and its file be gone when it is to be disposed of."""
    admit(ledger, sighting)
    (settled,) = end(ledger, outcome)
    ledger.record_dispositions([DispositionResult(settled.archive.id, None, missing=True)], [], LATER)
    return settled.archive


def test_what_was_delivered_and_gone_is_due_once_it_is_back_and_not_sent_again(bench: Bench) -> None:
    sighting = a_candidate()
    archive = gone(bench.ledger, sighting, delivered())
    assert bench.ledger.known_files("switches").paths == frozenset()
    told = bench.ledger.enqueue([sighting], ["vault"], LATER)
    assert (told.queued, told.reappeared) == ((), True)
    ledger = bench.crash()
    (settled,) = ledger.pending_dispositions()
    assert (settled.archive, settled.already_logged) == (archive, True)
    assert not ledger.enqueue([sighting], ["vault"], LATER).reappeared
    ledger.record_dispositions([DispositionResult(archive.id, b"sent/r1")], [], LATER)
    assert len(admit(ledger, sighting)) == 1  # who brings it back from there wants it sent


def test_what_was_gone_and_comes_back_changed_or_was_never_delivered_is_sent(ledger: Ledger) -> None:
    gone(ledger, a_candidate(b"r1"), delivered())
    changed = replace(a_candidate(b"r1"), fingerprint=replace(a_fingerprint(), ctime_ns=1))
    assert len(admit(ledger, changed)) == 1
    gone(ledger, a_candidate(b"r2"), rejected())
    assert len(admit(ledger, a_candidate(b"r2"))) == 1


def test_a_file_that_stays_in_place_stays_accounted_for(bench: Bench) -> None:
    sighting = a_candidate()
    admit(bench.ledger, sighting)
    (settled,) = end(bench.ledger, delivered())
    bench.ledger.record_dispositions([DispositionResult(settled.archive.id, None, kept_in_place=True)], [], LATER)
    ledger = bench.crash()
    assert ledger.pending_dispositions() == []
    assert content_key(sighting.relpath, sighting.fingerprint) in ledger.known_files("switches").content_keys
    assert admit(ledger, sighting) == ()


def test_a_file_that_stays_in_place_and_changes_starts_over(ledger: Ledger) -> None:
    admit(ledger, a_candidate())
    (settled,) = end(ledger, delivered())
    ledger.record_dispositions([DispositionResult(settled.archive.id, None, kept_in_place=True)], [], LATER)
    new = a_candidate()
    assert len(admit(ledger, new)) == 1
    assert ledger.known_files("switches").content_keys == {content_key(new.relpath, new.fingerprint)}


def test_what_could_not_be_disposed_of_stays_due_and_counts_as_announced(bench: Bench) -> None:
    admit(bench.ledger, a_candidate(b"r1"), a_candidate(b"r2"))
    one, other = end(bench.ledger, delivered()) + end(bench.ledger, delivered())
    bench.ledger.record_dispositions(
        [DispositionResult(one.archive.id, b"sent/r1")], [other.archive.id], LATER
    )
    (left,) = bench.crash().pending_dispositions()
    assert (left.archive, left.already_logged) == (other.archive, True)


# what others ask


def test_the_backlog_is_what_is_pending_and_claimed_by_destination(ledger: Ledger) -> None:
    admit(ledger, a_candidate(b"r1", fingerprint=a_fingerprint(size=10)), to=BOTH)
    admit(ledger, a_candidate(b"r2", fingerprint=a_fingerprint(size=5)), now=NOW + SECOND)
    admit(ledger, a_candidate(b"r3", fingerprint=a_fingerprint(size=7)), now=NOW + 2 * SECOND)
    end(ledger, delivered(), "vault")
    claim(ledger, "vault")
    backlog = ledger.backlog()
    assert {name: (b.pending, b.pending_bytes, b.oldest) for name, b in backlog.items()} == {
        "annex": (1, 10, NOW),
        "vault": (2, 12, NOW + SECOND),
    }


def test_without_deliveries_there_is_no_backlog(ledger: Ledger) -> None:
    assert ledger.backlog() == {}


def test_what_is_in_quarantine_is_counted_by_archives(ledger: Ledger) -> None:
    admit(ledger, a_candidate(b"r1"), to=BOTH)
    admit(ledger, a_candidate(b"r2"), now=NOW + SECOND)
    admit(ledger, a_candidate(b"r3"), now=NOW + 2 * SECOND)
    end(ledger, rejected(), "annex")
    settled = [one for _ in range(3) for one in end(ledger, rejected())]
    assert ledger.count_quarantined() == 0
    r1, r2, r3 = (DispositionResult(one.archive.id, b"rejected/" + one.archive.relpath) for one in settled)
    ledger.record_dispositions([r1, r2, DispositionResult(r3.archive_id, None)], [], LATER)
    assert ledger.count_quarantined() == 2


def test_a_gate_can_be_noted_again_and_again(ledger: Ledger) -> None:
    ledger.save_circuit("vault", Circuit(), None)
    paused = Circuit(CircuitState.PAUSED, LATER, 3, Reason.CONNECT, NOW)
    ledger.save_circuit("vault", paused, "connection refused")
    ledger.save_circuit("vault", paused, "no Unicode: \ud800\udcff")
    ledger.save_circuit("vault", Circuit(), None)


def test_a_closed_ledger_takes_nothing(ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(LedgerError):
        ledger.enqueue([a_candidate()], ["vault"], NOW)
    with pytest.raises(LedgerError):
        ledger.backlog()


def test_many_threads_admit_claim_and_record_at_the_same_time(ledger: Ledger) -> None:
    faults: list[BaseException] = []
    settled: list[list[CompletedArchive]] = [[], [], [], []]

    def work(number: int) -> None:
        try:
            for turn in range(25):
                admit(ledger, a_candidate(b"%d-%d" % (number, turn)))
                ledger.known_files("switches")
                (delivery,) = ledger.claim("vault", LATER)
                ended = ledger.record([finished(delivery, delivered())], LATER)
                settled[number] += ended
                ledger.record_dispositions(
                    [DispositionResult(one.archive.id, b"sent/x") for one in ended], [], LATER
                )
        except BaseException as error:  # noqa: BLE001 -- a thread's failure is the test's
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len({one.archive.id for mine in settled for one in mine}) == 100
    assert ledger.pending_dispositions() == []


def test_what_is_to_be_disposed_of_comes_a_page_at_a_time(ledger: Ledger) -> None:
    ledger.enqueue([a_candidate(b"r%d" % number) for number in range(5)], ["vault"], NOW)
    claimed = ledger.claim("vault", NOW, limit=5)
    settled = ledger.record([finished(one, delivered()) for one in claimed], NOW)
    settled.sort(key=lambda one: one.archive.id)
    assert ledger.count_pending_dispositions() == 5
    assert ledger.pending_dispositions(limit=2) == settled[:2]
    assert ledger.pending_dispositions(settled[1].archive.id, 2) == settled[2:4]
    assert ledger.pending_dispositions(settled[3].archive.id, 2) == settled[4:]
    ledger.record_dispositions([DispositionResult(one.archive.id, None) for one in settled[:3]], [], NOW)
    assert ledger.pending_dispositions() == settled[3:]
    assert ledger.count_pending_dispositions() == 2
