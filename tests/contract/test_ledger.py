"""The contract of `Ledger`: archives, deliveries and circuits; every adapter has to pass it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from backupd.core.errors import LedgerError
from backupd.core.model import (
    Archive,
    Attempt,
    Delivery,
    DeliveryState,
    Digest,
    Fingerprint,
    Outcome,
    Superseded,
)
from backupd.core.policy import Reason
from backupd.core.transition import Priority
from backupd.ledger.port import (
    CompletedArchive,
    Cursor,
    DispositionResult,
    FileCandidate,
    Ledger,
    RecordResult,
    UndecidedFile,
    content_key,
)
from tests.contract.bench import Bench
from tests.factories import (
    NOW,
    SECOND,
    a_candidate,
    a_claim_result,
    a_digest,
    a_fingerprint,
    deferred,
    delivered,
    record_dispositions,
    rejected,
    superseded,
)

LATER = NOW + timedelta(hours=1)
BOTH = ("vault", "annex")


def enqueue(
    ledger: Ledger,
    *candidates: FileCandidate,
    to: tuple[str, ...] = ("vault",),
    now: datetime = NOW,
) -> tuple[Archive, ...]:
    return ledger.enqueue(candidates, to, now).queued


def known(ledger: Ledger, drop: str = "switches", cursor: Cursor = ()) -> dict[int, int]:
    """Return the content keys of the files with an entry, by the hashes of their paths."""
    return dict(ledger.known_since(drop, cursor).added)


def keys(*candidates: FileCandidate) -> dict[int, int]:
    """Return the content keys of files, by the hashes of their paths."""
    return {hash(one.relpath): content_key(one.relpath, one.fingerprint) for one in candidates}


def claim(ledger: Ledger, destination: str = "vault", now: datetime = LATER) -> Delivery:
    (delivery,) = ledger.claim(destination, now)
    return delivery


def end(
    ledger: Ledger, outcome: Outcome, destination: str = "vault", now: datetime = LATER
) -> list[CompletedArchive]:
    """Claim a delivery and record its outcome."""
    return [*ledger.record([a_claim_result(claim(ledger, destination), outcome, now=now)], now).completed]


@pytest.mark.parametrize("priority", Priority)
def test_the_archives_of_excepted_drops_stay_pending(ledger: Ledger, priority: Priority) -> None:
    enqueue(ledger, a_candidate(drop="dead"), a_candidate(drop="gone"))
    (well,) = enqueue(ledger, a_candidate(drop="well"), now=NOW + timedelta(seconds=1))

    assert ledger.next_due("vault", ["dead", "gone"]) == NOW + timedelta(seconds=1)
    assert [d.archive for d in ledger.claim("vault", LATER, priority, 9, ["dead", "gone"])] == [well]

    assert ledger.next_due("vault", ["dead", "gone"]) is None
    assert ledger.next_due("vault") == NOW
    assert {d.archive.drop for d in ledger.claim("vault", LATER, priority, 9)} == {"dead", "gone"}


# enqueue


@pytest.mark.parametrize("inode", [2, 1 << 63])
def test_an_archive_keeps_the_inode_of_its_drop_folder(ledger: Ledger, inode: int) -> None:
    (archive,) = enqueue(ledger, a_candidate(folder_id=inode))
    assert archive.folder_id == inode
    assert claim(ledger).archive == archive
    ledger.release_own()
    end(ledger, delivered())
    assert [one.archive for one in ledger.pending_dispositions()] == [archive]


def test_a_new_file_becomes_a_pending_delivery_to_each_destination(ledger: Ledger) -> None:
    candidate = a_candidate(b"site/r1.tar.gz")
    (archive,) = enqueue(ledger, candidate, to=BOTH)
    assert (archive.drop, archive.relpath, archive.fingerprint) == (
        candidate.drop,
        candidate.relpath,
        candidate.fingerprint,
    )
    assert archive.queued_at == NOW
    deliveries = [claim(ledger, name) for name in BOTH]
    assert [delivery.destination for delivery in deliveries] == list(BOTH)
    assert [delivery.archive for delivery in deliveries] == [archive, archive]
    assert len({delivery.id for delivery in deliveries}) == 2
    assert not ledger.claim("vault", LATER)


def test_the_same_file_is_queued_once(bench: Bench) -> None:
    candidate = a_candidate()
    assert enqueue(bench.ledger, candidate)
    again = bench.ledger.enqueue([candidate, candidate], ["vault"], LATER)
    assert (again.queued, again.superseded) == ((), ())
    assert enqueue(bench.crash(), candidate) == ()


def test_the_same_file_twice_in_one_call_is_queued_once(ledger: Ledger) -> None:
    candidate = a_candidate()
    assert len(enqueue(ledger, candidate, candidate)) == 1


def test_the_same_name_in_another_drop_is_another_archive(ledger: Ledger) -> None:
    one, other = a_candidate(drop="switches"), a_candidate(drop="firewalls")
    assert len(enqueue(ledger, one, other)) == 2


def test_the_same_content_under_another_name_is_another_archive(ledger: Ledger) -> None:
    fingerprint = a_fingerprint()
    assert (
        len(
            enqueue(
                ledger, a_candidate(b"a", fingerprint=fingerprint), a_candidate(b"b", fingerprint=fingerprint)
            )
        )
        == 2
    )


@pytest.mark.parametrize(
    "changed",
    [
        a_fingerprint(inode=7, size=4),
        a_fingerprint(inode=7, mtime_ns=1),
    ],
    ids=["size", "mtime"],
)
def test_a_new_content_supersedes_the_pending_deliveries_of_the_old_one(
    ledger: Ledger, changed: Fingerprint
) -> None:
    (old,) = enqueue(ledger, a_candidate(fingerprint=a_fingerprint(inode=7)), to=BOTH)
    result = ledger.enqueue([a_candidate(fingerprint=changed)], BOTH, LATER)
    assert result.superseded == (old,)
    assert [archive.fingerprint for archive in result.queued] == [changed]
    assert [claim(ledger, name).archive.fingerprint for name in BOTH] == [changed, changed]
    assert not ledger.claim("vault", LATER)
    assert ledger.pending_dispositions() == []


def test_a_new_content_leaves_a_claimed_delivery_to_its_worker(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate())
    old = claim(ledger)
    result = ledger.enqueue([a_candidate()], ["vault"], LATER)
    assert result.superseded == ()
    assert len(result.queued) == 1
    assert ledger.record([a_claim_result(old, superseded())], LATER) == RecordResult()
    assert claim(ledger).archive == result.queued[0]


def test_a_new_content_ends_only_the_pending_deliveries_of_the_old_one(ledger: Ledger) -> None:
    (old,) = enqueue(ledger, a_candidate(), to=BOTH)
    held = claim(ledger, "vault")
    assert ledger.enqueue([a_candidate()], BOTH, LATER).superseded == (old,)
    result = ledger.record([a_claim_result(held, delivered())], LATER)
    assert result == RecordResult()  # the file has another content now
    assert ledger.pending_dispositions() == []


def test_a_new_content_is_queued_while_the_old_one_awaits_its_disposition(ledger: Ledger) -> None:
    old = a_candidate()
    enqueue(ledger, old)
    (completed,) = end(ledger, delivered())
    result = ledger.enqueue([a_candidate()], ["vault"], LATER)
    assert (len(result.queued), result.superseded) == (1, ())
    assert [one.archive for one in ledger.pending_dispositions()] == [completed.archive]
    assert enqueue(ledger, old) == ()  # it still has an entry


# a file whose metadata has changed


TOUCHED = [a_fingerprint(inode=7, ctime_ns=1), a_fingerprint(inode=8)]
"""Fingerprints of the file with the inode 7 after its metadata has changed."""


def before() -> FileCandidate:
    return a_candidate(fingerprint=a_fingerprint(inode=7))


def after(changed: Fingerprint, *digests: Digest) -> FileCandidate:
    return replace(a_candidate(fingerprint=changed, folder_id=9), digests=digests)


def keep(ledger: Ledger, *completed: CompletedArchive) -> None:
    done = [DispositionResult(one.archive.id, None, kept_in_place=True) for one in completed]
    record_dispositions(ledger, done, [], LATER)


@pytest.mark.parametrize("changed", TOUCHED, ids=["ctime", "inode"])
def test_a_touched_file_keeps_its_pending_deliveries_and_its_age(
    ledger: Ledger, changed: Fingerprint
) -> None:
    (archive,) = enqueue(ledger, before(), to=BOTH)
    result = ledger.enqueue([after(changed)], BOTH, LATER)

    assert (result.queued, result.superseded, result.undecided) == ((), (), ())
    expected = replace(archive, fingerprint=changed, folder_id=9)
    assert [claim(ledger, name).archive for name in BOTH] == [expected, expected]
    assert known(ledger) == keys(after(changed))


def test_a_touched_file_that_is_found_damaged_is_rejected(ledger: Ledger) -> None:
    (archive,) = enqueue(ledger, before())
    result = ledger.enqueue([replace(after(TOUCHED[0]), rejected=rejected())], ["vault"], LATER)
    assert result.superseded == (archive,)
    assert len(result.rejected) == 1


@pytest.mark.parametrize("changed", TOUCHED, ids=["ctime", "inode"])
def test_the_content_decides_whether_a_delivered_file_was_only_touched(
    bench: Bench, changed: Fingerprint
) -> None:
    enqueue(bench.ledger, before())
    keep(bench.ledger, *end(bench.ledger, delivered(b"abc")))
    ledger = bench.crash()
    cursor = ledger.known_since("switches").cursor

    result = ledger.enqueue([after(changed)], ["vault"], LATER)
    assert result.undecided == (UndecidedFile(after(changed), frozenset(["sha256"])),)
    assert not result.queued
    result = ledger.enqueue([after(changed, a_digest(b"abc"))], ["vault"], LATER)
    assert (result.queued, result.superseded, result.undecided) == ((), (), ())
    changes = ledger.known_since("switches", cursor)
    assert (changes.added, set(changes.removed)) == (keys(after(changed)), set())
    assert not ledger.claim("vault", LATER)

    again = replace(after(changed, a_digest(b"xyz")), fingerprint=replace(changed, ctime_ns=5))
    (new,) = enqueue(ledger, again)
    assert claim(ledger).archive == new


def test_a_digest_that_cannot_be_calculated_makes_a_new_delivery(ledger: Ledger) -> None:
    enqueue(ledger, before())
    keep(ledger, *end(ledger, delivered()))
    assert len(enqueue(ledger, after(TOUCHED[0], Digest("sha256", "")))) == 1


def test_the_content_decides_whether_the_retry_of_a_lost_response_may_send_it(ledger: Ledger) -> None:
    enqueue(ledger, before())
    lost = replace(deferred(), unconfirmed_digest=a_digest(b"abc"))
    ledger.record([a_claim_result(claim(ledger), lost)], NOW)

    assert ledger.enqueue([after(TOUCHED[0])], ["vault"], LATER).undecided
    assert not enqueue(ledger, after(TOUCHED[0], a_digest(b"abc")))
    assert claim(ledger).known_digests == (a_digest(b"abc"),)
    ledger.release_own()
    result = ledger.enqueue([after(TOUCHED[1], a_digest(b"xyz"))], ["vault"], LATER)
    assert len(result.superseded) == len(result.queued) == 1


def test_a_claimed_delivery_knows_the_digests_of_the_other_deliveries(ledger: Ledger) -> None:
    enqueue(ledger, before(), to=BOTH)
    assert claim(ledger, "annex").known_digests == ()
    ledger.release_own()
    end(ledger, delivered(b"abc"))
    assert claim(ledger, "annex").known_digests == (a_digest(b"abc"),)


def test_an_archive_gets_the_fingerprint_that_its_file_had_when_the_content_was_read(bench: Bench) -> None:
    enqueue(bench.ledger, before())
    cursor = bench.ledger.known_since("switches").cursor
    (completed,) = end(bench.ledger, replace(delivered(), fingerprint=TOUCHED[0]))

    assert completed.archive.fingerprint == TOUCHED[0]
    ledger = bench.crash()
    assert known(ledger) == known(ledger, cursor=cursor) == keys(after(TOUCHED[0]))
    assert [one.archive.fingerprint for one in ledger.pending_dispositions()] == [TOUCHED[0]]


def test_a_file_touched_during_its_upload_is_compared_with_the_content_that_was_sent(ledger: Ledger) -> None:
    enqueue(ledger, before())
    delivery = claim(ledger)
    assert not ledger.enqueue([after(TOUCHED[0])], ["vault"], LATER).queued
    (completed,) = ledger.record([a_claim_result(delivery, delivered(b"abc"))], NOW).completed

    assert completed.archive.fingerprint == before().fingerprint
    assert ledger.enqueue([after(TOUCHED[0])], ["vault"], LATER).undecided
    assert len(enqueue(ledger, after(TOUCHED[0], a_digest(b"xyz")))) == 1


@pytest.mark.parametrize("content", [b"abc", b"xyz"])
def test_two_destinations_get_the_same_content_or_the_later_delivery_is_superseded(
    ledger: Ledger, content: bytes
) -> None:
    enqueue(ledger, before(), to=BOTH)
    one, other = claim(ledger, "vault"), claim(ledger, "annex")
    ledger.record([a_claim_result(one, delivered(b"abc"))], NOW)
    late = a_claim_result(other, replace(delivered(content), fingerprint=TOUCHED[0]))
    result = ledger.record([late], NOW)

    if content == b"abc":
        assert [one.archive.fingerprint for one in result.completed] == [TOUCHED[0]]
        assert not result.superseded
        return
    assert [(one.delivery, one.transition.state) for one in result.superseded] == [
        (other, DeliveryState.SUPERSEDED)
    ]
    assert (result.completed, result.lost, known(ledger)) == ((), (), {})


def test_a_delivered_file_that_comes_back_is_the_same_with_the_same_content(ledger: Ledger) -> None:
    archive = end_with_missing_file(ledger, before(), delivered(b"abc"))
    assert ledger.enqueue([after(TOUCHED[0])], ["vault"], LATER).undecided
    assert ledger.enqueue([after(TOUCHED[0], a_digest(b"abc"))], ["vault"], LATER).reappeared
    assert [one.archive for one in ledger.pending_dispositions()] == [
        replace(archive, fingerprint=TOUCHED[0], folder_id=9)
    ]


def test_a_delivered_file_that_comes_back_with_another_content_is_queued(ledger: Ledger) -> None:
    end_with_missing_file(ledger, before(), delivered(b"abc"))
    assert len(enqueue(ledger, after(TOUCHED[0], a_digest(b"xyz")))) == 1


def test_the_end_of_an_older_content_does_not_replace_the_newer_one(ledger: Ledger) -> None:
    old, new = a_candidate(), a_candidate()
    enqueue(ledger, old)
    delivery = claim(ledger)
    enqueue(ledger, new)
    cursor = ledger.known_since("switches").cursor
    touched = replace(old.fingerprint, ctime_ns=5)
    (completed,) = ledger.record(
        [a_claim_result(delivery, replace(delivered(), fingerprint=touched))], NOW
    ).completed
    assert known(ledger, cursor=cursor) == {}
    record_dispositions(ledger, [DispositionResult(completed.archive.id, b"sent/r1")], [], LATER)
    assert not ledger.known_since("switches", cursor).removed
    assert known(ledger) == keys(new)


def test_a_rejected_candidate_is_completed_at_once_and_never_claimed(bench: Bench) -> None:
    why = rejected(Reason.TRUNCATED)
    sound, unsound = a_candidate(b"r1"), replace(a_candidate(b"r2"), rejected=why)
    result = bench.ledger.enqueue([sound, unsound], BOTH, NOW)

    assert [archive.relpath for archive in result.queued] == [b"r1"]
    assert [archive.relpath for archive in result.rejected] == [b"r2"]
    for ledger in (bench.ledger, bench.crash()):
        (completed,) = ledger.pending_dispositions()
        assert completed.archive == result.rejected[0]
        assert (completed.state, completed.already_logged) == (DeliveryState.REJECTED, False)
        assert {(e.destination, e.state, e.reason, e.error) for e in completed.results} == {
            (name, DeliveryState.REJECTED, "truncated", why.error) for name in BOTH
        }
        assert ledger.enqueue([unsound], BOTH, LATER).rejected == ()
    assert [d.archive.relpath for d in bench.ledger.claim("vault", LATER, limit=9)] == [b"r1"]


def test_a_rejected_candidate_supersedes_the_content_that_it_replaces(ledger: Ledger) -> None:
    (old,) = enqueue(ledger, a_candidate(), to=BOTH)
    result = ledger.enqueue([replace(a_candidate(), rejected=rejected())], BOTH, LATER)

    assert result.superseded == (old,)
    assert ledger.claim("vault", LATER) == []
    record_dispositions(ledger, [DispositionResult(result.rejected[0].id, b"rejected/r1")], [], LATER)
    assert known(ledger) == {}


def test_known_are_the_files_of_a_drop_with_an_entry(ledger: Ledger) -> None:
    candidate = a_candidate(b"r1")
    enqueue(ledger, candidate, a_candidate(b"r2", drop="firewalls"))
    assert known(ledger) == keys(candidate)
    assert known(ledger, "nowhere") == {}


def test_only_changes_since_the_last_call_are_returned(bench: Bench) -> None:
    ledger = bench.ledger
    first, second, third = a_candidate(b"r1"), a_candidate(b"r2"), a_candidate(b"r3")
    enqueue(ledger, first)
    changes = ledger.known_since("switches")
    assert (changes.added, set(changes.removed)) == (keys(first), set())
    enqueue(bench.another_host(), second, a_candidate(b"r2", drop="firewalls"))
    changes = ledger.known_since("switches", changes.cursor)
    assert (changes.added, set(changes.removed)) == (keys(second), set())
    changes = ledger.known_since("switches", changes.cursor)
    assert (changes.added, set(changes.removed)) == ({}, set())

    (completed,) = end(ledger, delivered())
    record_dispositions(ledger, [DispositionResult(completed.archive.id, b"sent/r1")], [], LATER)
    enqueue(ledger, third)
    changes = ledger.known_since("switches", changes.cursor)
    assert (changes.added, set(changes.removed)) == (keys(third), {hash(b"r1")})
    assert bench.crash().known_since("switches", changes.cursor).added == {}
    assert known(ledger) == keys(second, third)


def test_a_file_that_was_queued_and_disposed_of_between_two_calls_is_no_change(ledger: Ledger) -> None:
    cursor = ledger.known_since("switches").cursor
    enqueue(ledger, a_candidate(b"r1"), a_candidate(b"r2"))
    (completed,) = end(ledger, delivered())
    record_dispositions(ledger, [DispositionResult(completed.archive.id, b"sent/r1")], [], LATER)
    changes = ledger.known_since("switches", cursor)
    assert set(changes.added) == {hash(b"r2")}
    assert not set(changes.removed)


def test_a_file_that_is_missing_and_comes_back_is_a_change_each_time(ledger: Ledger) -> None:
    candidate = a_candidate()
    enqueue(ledger, candidate)
    cursor = ledger.known_since("switches").cursor
    end(ledger, Superseded("the file is gone", missing=True))
    changes = ledger.known_since("switches", cursor)
    assert (changes.added, set(changes.removed)) == ({}, {hash(candidate.relpath)})
    enqueue(ledger, candidate)
    again = ledger.known_since("switches", changes.cursor)
    assert (again.added, set(again.removed)) == (keys(candidate), set())
    both = ledger.known_since("switches", cursor)
    assert (both.added, set(both.removed)) == (keys(candidate), set())


def test_a_change_after_old_archives_were_pruned_is_returned(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(b"r1"), a_candidate(b"r2"))
    r1, r2 = end(ledger, delivered()) + end(ledger, delivered())
    done = [DispositionResult(one.archive.id, b"sent/x") for one in (r2, r1)]  # r1 changes last
    record_dispositions(ledger, done, [], LATER)
    cursor = ledger.known_since("switches").cursor
    assert ledger.prune(LATER + SECOND, 9) == 1
    candidate = a_candidate(b"r3")
    enqueue(ledger, candidate)
    assert known(ledger, cursor=cursor) == keys(candidate)


def test_a_replaced_file_is_known_with_its_new_content(ledger: Ledger) -> None:
    old, new = a_candidate(), a_candidate()
    enqueue(ledger, old)
    claim(ledger)  # so that the old content keeps its entry
    cursor = ledger.known_since("switches").cursor
    enqueue(ledger, new)
    assert known(ledger) == known(ledger, cursor=cursor) == keys(new)


def test_a_superseded_content_is_no_longer_known(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(b"r1"))
    new = a_candidate(b"r1")
    enqueue(ledger, new)
    assert known(ledger) == keys(new)


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
    enqueue(bench.ledger, a_candidate(relpath))
    ledger = bench.crash()
    delivery = claim(ledger)
    assert delivery.archive.relpath == relpath
    (completed,) = ledger.record([a_claim_result(delivery, delivered())], LATER).completed
    assert completed.archive.relpath == relpath
    record_dispositions(ledger, [DispositionResult(completed.archive.id, b"sent/" + relpath)], [], LATER)
    assert bench.crash().pending_dispositions() == []


@pytest.mark.parametrize(
    "fingerprint",
    [
        Fingerprint((1 << 64) - 1, (1 << 63) - 1, 10**20 - 1, 10**20 - 1),
        Fingerprint(0, 0, -1, 1 - 10**20),
        Fingerprint(1 << 63, 1, (1 << 63) - 1, -(1 << 63)),
    ],
    ids=["largest", "smallest", "at the edge"],
)
def test_a_fingerprint_is_read_back_as_the_same_numbers(bench: Bench, fingerprint: Fingerprint) -> None:
    candidate = a_candidate(fingerprint=fingerprint)
    enqueue(bench.ledger, candidate)
    ledger = bench.crash()
    assert enqueue(ledger, candidate) == ()
    assert known(ledger) == keys(candidate)
    assert claim(ledger).archive.fingerprint == fingerprint


# claims


def test_the_delivery_that_has_been_due_for_longest_is_claimed_first(ledger: Ledger) -> None:
    for minutes, name in ((3, b"third"), (1, b"first"), (2, b"second")):
        enqueue(ledger, a_candidate(name), now=NOW + timedelta(minutes=minutes))
    assert [claim(ledger).archive.relpath for _ in range(3)] == [b"first", b"second", b"third"]


@pytest.mark.parametrize(
    ("priority", "order"),
    [
        (Priority.OLDEST, [b"large", b"middle", b"small"]),
        (Priority.SMALLEST, [b"small", b"middle", b"large"]),
        (Priority.NEWEST, [b"middle", b"small", b"large"]),
    ],
)
def test_deliveries_are_claimed_in_the_order_of_the_priority(
    ledger: Ledger, priority: Priority, order: list[bytes]
) -> None:
    for minutes, size, name in ((0, 9, b"large"), (2, 1, b"small"), (1, 5, b"middle")):
        candidate = a_candidate(name, fingerprint=a_fingerprint(size=size))
        enqueue(ledger, candidate, now=NOW + timedelta(minutes=minutes))
    claimed = [ledger.claim("vault", LATER, priority)[0].archive.relpath for _ in order]
    assert claimed == order


def test_pending_deliveries_are_brought_forward(ledger: Ledger) -> None:
    """A wait that a clock which was wrong has made too long is limited."""
    enqueue(ledger, a_candidate(b"late"), to=BOTH, now=LATER)
    enqueue(ledger, a_candidate(b"early"), now=NOW)
    claim(ledger)
    ledger.bring_forward("vault", NOW + SECOND)
    assert (ledger.next_due("vault"), ledger.next_due("annex")) == (NOW + SECOND, LATER)
    ledger.bring_forward("vault", LATER)
    assert ledger.next_due("vault") == NOW + SECOND


def test_no_delivery_is_claimed_before_it_is_due(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate())
    step = a_claim_result(claim(ledger), deferred(), now=LATER)
    ledger.record([step], LATER)
    due = step.transition.due_at
    assert due is not None
    assert ledger.next_due("vault") == due
    assert not ledger.claim("vault", due - timedelta(microseconds=1))
    assert claim(ledger, now=due).id == step.delivery.id


def test_a_claim_returns_only_deliveries_of_its_destination(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(), to=("annex",))
    assert not ledger.claim("vault", LATER)
    assert ledger.next_due("vault") is None
    assert claim(ledger, "annex").destination == "annex"


def test_a_claimed_delivery_is_not_due(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate())
    assert ledger.next_due("vault") == NOW
    claim(ledger)
    assert ledger.next_due("vault") is None


def test_several_small_archives_are_claimed_together_and_in_order(ledger: Ledger) -> None:
    names = [b"r%d" % number for number in range(5)]
    enqueue(ledger, *(a_candidate(name) for name in names))
    claimed = ledger.claim("vault", LATER, limit=3) + ledger.claim("vault", LATER, limit=3)
    assert [delivery.archive.relpath for delivery in claimed] == names
    assert not ledger.claim("vault", LATER, limit=3)


def test_a_large_archive_is_claimed_alone(ledger: Ledger) -> None:
    large = a_candidate(b"large", fingerprint=a_fingerprint(size=1 << 30))
    enqueue(ledger, large, a_candidate(b"r1"), a_candidate(b"r2"))
    first, *others = ledger.claim("vault", LATER, limit=3)
    assert (first.archive.relpath, others) == (b"large", [])
    assert len(ledger.claim("vault", LATER, limit=3)) == 2


def test_threads_never_claim_the_same_delivery(ledger: Ledger) -> None:
    enqueue(ledger, *(a_candidate(b"r%d" % number) for number in range(200)))
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


def test_a_delivery_keeps_its_counts_of_attempts_and_failures(bench: Bench) -> None:
    enqueue(bench.ledger, a_candidate())
    first = claim(bench.ledger)
    assert (first.attempts, first.archive_failures, first.destination_failures) == (0, 0, 0)
    bench.ledger.record([a_claim_result(first, deferred(Reason.CONNECT), deferred(Reason.UNREADABLE))], NOW)
    again = claim(bench.crash())
    assert (again.id, again.attempts, again.archive_failures, again.destination_failures) == (
        first.id,
        2,
        1,
        0,
    )


def test_claims_are_released_after_a_crash(bench: Bench) -> None:
    enqueue(bench.ledger, a_candidate(b"r1"), a_candidate(b"r2"), a_candidate(b"r3"))
    held = {claim(bench.ledger).id, claim(bench.ledger).id}
    ledger = bench.crash()
    assert ledger.reap() == 2
    assert ledger.reap() == 0
    assert held < {claim(ledger).id for _ in range(3)}


# record


def test_a_delivered_archive_is_completed(ledger: Ledger) -> None:
    (archive,) = enqueue(ledger, a_candidate())
    outcome = delivered(b"abc", body='{"id": "17"}')
    (completed,) = end(ledger, outcome)
    assert (completed.archive, completed.state, completed.already_logged) == (
        archive,
        DeliveryState.DELIVERED,
        False,
    )
    assert completed.digest == str(outcome.digest)
    (delivery_result,) = completed.results
    assert (delivery_result.destination, delivery_result.state, delivery_result.ended_at) == (
        "vault",
        DeliveryState.DELIVERED,
        LATER,
    )
    assert (delivery_result.digest, delivery_result.verified, delivery_result.http_status) == (
        str(outcome.digest),
        True,
        201,
    )
    assert (delivery_result.reason, delivery_result.error, delivery_result.receipt) == (
        None,
        None,
        '{"id": "17"}',
    )


def test_a_rejected_archive_is_completed_with_its_reason(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate())
    (completed,) = end(ledger, rejected(Reason.TOO_LARGE))
    assert (completed.state, completed.digest) == (DeliveryState.REJECTED, None)
    (delivery_result,) = completed.results
    assert (delivery_result.reason, delivery_result.error, delivery_result.http_status) == (
        "too_large",
        "not wanted",
        422,
    )
    assert (delivery_result.verified, delivery_result.receipt) == (None, None)


def test_a_deferred_archive_is_not_completed(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate())
    assert end(ledger, deferred()) == []
    assert ledger.pending_dispositions() == []


def test_an_archive_with_a_pending_delivery_is_not_completed(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(), to=BOTH)
    assert end(ledger, delivered(), "vault") == []
    assert ledger.pending_dispositions() == []
    (completed,) = end(ledger, delivered(), "annex")
    assert [delivery_result.destination for delivery_result in completed.results] == ["annex", "vault"]


def test_an_archive_with_a_claimed_delivery_is_not_completed(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(), to=BOTH)
    claim(ledger, "annex")
    assert end(ledger, delivered(), "vault") == []


@pytest.mark.parametrize("first", BOTH)
def test_an_archive_that_one_destination_rejects_is_rejected(ledger: Ledger, first: str) -> None:
    enqueue(ledger, a_candidate(), to=BOTH)
    outcomes: dict[str, Outcome] = {"vault": delivered(), "annex": rejected()}
    assert end(ledger, outcomes.pop(first), first) == []
    ((name, last),) = outcomes.items()
    (completed,) = end(ledger, last, name)
    assert completed.state is DeliveryState.REJECTED
    assert completed.digest is not None
    assert [delivery_result.state for delivery_result in completed.results] == [
        DeliveryState.REJECTED,
        DeliveryState.DELIVERED,
    ]


def test_two_deliveries_recorded_together_complete_their_archive_once(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(), to=BOTH)
    both = [a_claim_result(claim(ledger, name), delivered()) for name in BOTH]
    assert len(ledger.record(both, LATER).completed) == 1


def test_archives_are_completed_in_the_order_of_the_results(ledger: Ledger) -> None:
    enqueue(ledger, *(a_candidate(b"r%d" % number) for number in range(3)))
    claims = [claim(ledger) for _ in range(3)][::-1]
    completed = ledger.record([a_claim_result(one, delivered()) for one in claims], LATER).completed
    assert [one.archive for one in completed] == [one.archive for one in claims]


def test_a_superseded_archive_needs_no_disposition(ledger: Ledger) -> None:
    candidate = a_candidate()
    enqueue(ledger, candidate)
    assert end(ledger, superseded()) == []
    assert ledger.pending_dispositions() == []
    assert known(ledger) == {}
    assert len(enqueue(ledger, candidate)) == 1  # the file in the folder is queued as a new archive


def test_a_delivery_is_known_as_missing_until_its_file_is_found(bench: Bench) -> None:
    enqueue(bench.ledger, a_candidate())
    assert not claim(bench.ledger).was_missing
    bench.ledger.release_own()
    for reason in (Reason.MISSING, Reason.CONNECT, Reason.MISSING):
        end(bench.ledger, deferred(reason))
        ledger = bench.crash()
        claimed = claim(ledger, now=LATER + timedelta(hours=1))
        assert claimed.was_missing == (reason is Reason.MISSING)
        ledger.release_own()
        ledger.bring_forward("vault", LATER)
    fingerprint = replace(claimed.archive.fingerprint, ctime_ns=1)
    assert not enqueue(ledger, a_candidate(fingerprint=fingerprint))
    assert not claim(ledger).was_missing


def test_a_missing_file_is_queued_again_when_it_comes_back(ledger: Ledger) -> None:
    candidate = a_candidate()
    enqueue(ledger, candidate)
    end(ledger, Superseded("the file is gone", missing=True))
    assert len(enqueue(ledger, candidate)) == 1


def test_an_archive_with_a_superseded_and_a_delivered_delivery_is_superseded(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(), to=BOTH)
    assert end(ledger, delivered(), "vault") == []
    assert end(ledger, superseded(), "annex") == []
    assert ledger.pending_dispositions() == []


def test_a_result_recorded_twice_completes_an_archive_once(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate())
    once = a_claim_result(claim(ledger), delivered())
    assert len(ledger.record([once], LATER).completed) == 1
    assert ledger.record([once], LATER) == RecordResult()
    assert len(ledger.pending_dispositions()) == 1


def test_empty_calls_have_no_effect(ledger: Ledger) -> None:
    assert ledger.record([], NOW) == RecordResult()
    assert ledger.enqueue([], BOTH, NOW).queued == ()
    record_dispositions(ledger, [], [], NOW)


def test_an_outcome_with_invalid_unicode_and_nul_is_recorded(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(b"r1"), a_candidate(b"r2"))
    (completed,) = end(ledger, delivered(body="bad\udcff\0"))
    assert completed.results[0].receipt == "bad\\udcff\u2400"
    claimed = claim(ledger)
    broken = Superseded("bad\udcff")
    assert ledger.record([a_claim_result(claimed, broken)], LATER) == RecordResult()


def test_attempts_of_any_time_and_duration_are_recorded(bench: Bench) -> None:
    enqueue(bench.ledger, a_candidate())
    delivery = claim(bench.ledger)
    attempts = tuple(
        Attempt(datetime(1970, 1, 1, tzinfo=UTC), timedelta(days=number), 1 << 40, deferred())
        for number in range(3)
    )
    whole = a_claim_result(delivery, deferred())
    bench.ledger.record([type(whole)(delivery, attempts, whole.transition)], LATER)
    assert claim(bench.crash(), now=LATER + timedelta(hours=1)).attempts == 3


# dispositions


def test_a_pending_disposition_is_found_after_a_crash(bench: Bench) -> None:
    enqueue(bench.ledger, a_candidate(b"r1"), a_candidate(b"r2"), a_candidate(b"r3"))
    completed = end(bench.ledger, delivered()) + end(bench.ledger, rejected())
    assert bench.crash().pending_dispositions() == completed


def test_a_recorded_disposition_is_not_pending_after_a_crash(bench: Bench) -> None:
    candidate = a_candidate()
    enqueue(bench.ledger, candidate)
    (completed,) = end(bench.ledger, delivered())
    record_dispositions(bench.ledger, [DispositionResult(completed.archive.id, b"sent/r1")], [], LATER)
    ledger = bench.crash()
    assert ledger.pending_dispositions() == []
    assert known(ledger) == {}


def test_a_file_moved_back_after_its_disposition_is_queued_again(ledger: Ledger) -> None:
    candidate = a_candidate()
    enqueue(ledger, candidate)
    (completed,) = end(ledger, delivered())
    record_dispositions(ledger, [DispositionResult(completed.archive.id, b"sent/r1")], [], LATER)
    (again,) = enqueue(ledger, candidate)
    assert again.id != completed.archive.id


def end_with_missing_file(ledger: Ledger, candidate: FileCandidate, outcome: Outcome) -> Archive:
    """End a delivery, and record that its file was missing at its disposition."""
    enqueue(ledger, candidate)
    (completed,) = end(ledger, outcome)
    record_dispositions(ledger, [DispositionResult(completed.archive.id, None, missing=True)], [], LATER)
    return completed.archive


def test_a_delivered_file_that_was_missing_and_comes_back_is_disposed_of_and_not_sent_again(
    bench: Bench,
) -> None:
    candidate = a_candidate()
    archive = end_with_missing_file(bench.ledger, candidate, delivered())
    assert known(bench.ledger) == {}
    result = bench.ledger.enqueue([candidate], ["vault"], LATER)
    assert (result.queued, result.reappeared) == ((), True)
    ledger = bench.crash()
    (completed,) = ledger.pending_dispositions()
    assert (completed.archive, completed.already_logged) == (archive, True)
    assert not ledger.enqueue([candidate], ["vault"], LATER).reappeared
    record_dispositions(ledger, [DispositionResult(archive.id, b"sent/r1")], [], LATER)
    assert len(enqueue(ledger, candidate)) == 1  # a user who moves it back from there wants it sent


def test_a_missing_file_that_comes_back_changed_or_was_not_delivered_is_queued(ledger: Ledger) -> None:
    end_with_missing_file(ledger, a_candidate(b"r1"), delivered())
    changed = a_candidate(b"r1")
    assert len(enqueue(ledger, changed)) == 1
    end_with_missing_file(ledger, a_candidate(b"r2"), rejected())
    assert len(enqueue(ledger, a_candidate(b"r2"))) == 1


def test_a_file_kept_in_place_keeps_its_entry(bench: Bench) -> None:
    candidate = a_candidate()
    enqueue(bench.ledger, candidate)
    (completed,) = end(bench.ledger, delivered())
    record_dispositions(
        bench.ledger, [DispositionResult(completed.archive.id, None, kept_in_place=True)], [], LATER
    )
    ledger = bench.crash()
    assert ledger.pending_dispositions() == []
    assert known(ledger) == keys(candidate)
    assert enqueue(ledger, candidate) == ()


def test_a_file_kept_in_place_is_queued_again_when_it_changes(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate())
    (completed,) = end(ledger, delivered())
    record_dispositions(
        ledger, [DispositionResult(completed.archive.id, None, kept_in_place=True)], [], LATER
    )
    new = a_candidate()
    assert len(enqueue(ledger, new)) == 1
    assert known(ledger) == keys(new)


def test_a_failed_disposition_stays_pending_and_counts_as_logged(bench: Bench) -> None:
    enqueue(bench.ledger, a_candidate(b"r1"), a_candidate(b"r2"))
    one, other = end(bench.ledger, delivered()) + end(bench.ledger, delivered())
    record_dispositions(
        bench.ledger, [DispositionResult(one.archive.id, b"sent/r1")], [other.archive.id], LATER
    )
    (left,) = bench.crash().pending_dispositions()
    assert (left.archive, left.already_logged) == (other.archive, True)


# queries, circuits and threads


def test_the_backlog_counts_pending_and_claimed_deliveries_by_destination(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(b"r1", fingerprint=a_fingerprint(size=10)), to=BOTH)
    enqueue(ledger, a_candidate(b"r2", fingerprint=a_fingerprint(size=5)), now=NOW + SECOND)
    enqueue(ledger, a_candidate(b"r3", fingerprint=a_fingerprint(size=7)), now=NOW + 2 * SECOND)
    end(ledger, delivered(), "vault")
    claim(ledger, "vault")
    backlog = ledger.backlog()
    assert {name: (b.pending, b.pending_bytes, b.oldest) for name, b in backlog.items()} == {
        "annex": (1, 10, NOW),
        "vault": (2, 12, NOW + SECOND),
    }


def test_the_sizes_of_sparse_files_are_added_up(bench: Bench) -> None:
    """A sum that exceeds 64 bits must not look like damage of the ledger."""
    largest = (1 << 63) - 1
    for name in (b"r1", b"r2"):
        enqueue(bench.ledger, a_candidate(name, fingerprint=a_fingerprint(size=largest)))
    assert bench.ledger.backlog()["vault"].pending_bytes >= largest
    queues = bench.ledger.queue_state(["switches"], ["vault"])
    assert queues.destinations["vault"].pending_bytes >= largest
    assert queues.drops["switches"].pending_bytes >= largest


def test_without_deliveries_there_is_no_backlog(ledger: Ledger) -> None:
    assert ledger.backlog() == {}


def test_quarantined_archives_are_counted_once_each(ledger: Ledger) -> None:
    enqueue(ledger, a_candidate(b"r1"), to=BOTH)
    enqueue(ledger, a_candidate(b"r2"), now=NOW + SECOND)
    enqueue(ledger, a_candidate(b"r3"), now=NOW + 2 * SECOND)
    end(ledger, rejected(), "annex")
    completed = [one for _ in range(3) for one in end(ledger, rejected())]
    assert ledger.count_quarantined() == 0
    r1, r2, r3 = (DispositionResult(one.archive.id, b"rejected/" + one.archive.relpath) for one in completed)
    record_dispositions(ledger, [r1, r2, DispositionResult(r3.archive_id, None)], [], LATER)
    assert ledger.count_quarantined() == 2


def test_the_reason_of_a_failure_replaces_the_one_before_and_survives_a_crash(bench: Bench) -> None:
    assert bench.ledger.saved_failure("vault") is None
    bench.ledger.save_failure("vault", Reason.CONNECT)
    bench.ledger.save_failure("vault", Reason.ALL_REFUSED)
    ledger = bench.crash()
    assert (ledger.saved_failure("vault"), ledger.saved_failure("annex")) == (Reason.ALL_REFUSED, None)
    ledger.save_failure("vault", None)
    assert ledger.saved_failure("vault") is None


def test_a_closed_ledger_raises_an_error(ledger: Ledger) -> None:
    ledger.check_storage()
    ledger.close()
    with pytest.raises(LedgerError):
        ledger.enqueue([a_candidate()], ["vault"], NOW)
    with pytest.raises(LedgerError):
        ledger.backlog()


def test_threads_enqueue_claim_and_record_at_the_same_time(ledger: Ledger) -> None:
    errors: list[BaseException] = []
    completed: list[list[CompletedArchive]] = [[], [], [], []]

    def work(number: int) -> None:
        try:
            for turn in range(25):
                enqueue(ledger, a_candidate(b"%d-%d" % (number, turn)))
                ledger.known_since("switches")
                (delivery,) = ledger.claim("vault", LATER)
                ended = ledger.record([a_claim_result(delivery, delivered())], LATER).completed
                completed[number] += ended
                record_dispositions(
                    ledger, [DispositionResult(one.archive.id, b"sent/x") for one in ended], [], LATER
                )
        except BaseException as error:  # noqa: BLE001 -- a thread's failure is the test's
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len({one.archive.id for mine in completed for one in mine}) == 100
    assert ledger.pending_dispositions() == []


def test_pending_dispositions_are_returned_in_pages(ledger: Ledger) -> None:
    ledger.enqueue([a_candidate(b"r%d" % number) for number in range(5)], ["vault"], NOW)
    claimed = ledger.claim("vault", NOW, limit=5)
    result = ledger.record([a_claim_result(one, delivered()) for one in claimed], NOW)
    completed = sorted(result.completed, key=lambda one: one.archive.id)
    assert ledger.count_pending_dispositions() == 5
    assert ledger.pending_dispositions(limit=2) == completed[:2]
    assert ledger.pending_dispositions(completed[1].archive.id, 2) == completed[2:4]
    assert ledger.pending_dispositions(completed[3].archive.id, 2) == completed[4:]
    record_dispositions(ledger, [DispositionResult(one.archive.id, None) for one in completed[:3]], [], NOW)
    assert ledger.pending_dispositions() == completed[3:]
    assert ledger.count_pending_dispositions() == 2
