"""The contract of the ledger for archives that follow the folders of their drops, or are given up."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from backupd.core.devices import DeviceExpectation
from backupd.core.folder_place import FolderPlace
from backupd.core.model import DeliveryState, Outcome
from backupd.ledger.history import History, Search
from backupd.ledger.port import DispositionResult, DropBacklog, Ledger, TrackedDevice
from tests.contract.bench import Bench
from tests.factories import NOW, a_candidate, a_claim_result, delivered, record_dispositions, rejected

LATER = NOW + timedelta(hours=1)
A, B = FolderPlace("/a", (1 << 64) - 2, 11), FolderPlace("/b", 8, (1 << 64) - 1)
LEFT = "switches:/a"


def queue(ledger: Ledger, *names: bytes, drop: str = "switches", to: tuple[str, ...] = ("vault",)) -> None:
    ledger.enqueue([a_candidate(name, drop=drop) for name in names], to, NOW)


def states(history: History) -> dict[tuple[bytes, str], tuple[str, str]]:
    """Return drop and state of each delivery, by path and destination."""
    return {(d.archive.relpath, d.destination): (d.archive.drop, d.state) for d in history.find(Search(), 99)}


def test_all_archives_and_devices_follow_a_renamed_drop(ledger: Ledger, history: History) -> None:
    ledger.assign_folders({"switches": A, "routers": B})
    ledger.set_expectations({"switches": DeviceExpectation(every=timedelta(days=1), by="{stem}")}, NOW)
    queue(ledger, b"r1.cfg")
    (delivery,) = ledger.claim("vault", LATER)
    ledger.record([a_claim_result(delivery, delivered(), now=LATER)], LATER)
    record_dispositions(ledger, [DispositionResult(delivery.archive.id, b"sent/r1.cfg")], [], LATER)
    tracked = replace(a_candidate(b"r2.cfg"), tracked=TrackedDevice("r2"))
    ledger.enqueue([tracked], ["vault"], NOW)

    assert ledger.assign_folders({"core": A, "routers": B}) == {}

    assert set(states(history).values()) == {("core", "delivered"), ("core", "pending")}
    assert [(d.drop, d.device) for d in history.devices(NOW)] == [("core", "r2")]
    assert ledger.pending_drops() == history.pending_drops() == {"core": DropBacklog(1, NOW, "/a")}
    assert ledger.known_since("core").added
    assert not ledger.known_since("switches").added


def test_archives_follow_two_drops_that_swap_their_names(ledger: Ledger, history: History) -> None:
    ledger.assign_folders({"switches": A, "routers": B})
    queue(ledger, b"a.cfg")
    queue(ledger, b"b.cfg", drop="routers")

    ledger.assign_folders({"switches": B, "routers": A})

    assert states(history) == {
        (b"a.cfg", "vault"): ("routers", "pending"),
        (b"b.cfg", "vault"): ("switches", "pending"),
    }


def test_waiting_archives_stay_with_the_folder_that_a_drop_has_left(ledger: Ledger, history: History) -> None:
    ledger.assign_folders({"switches": A})
    queue(ledger, b"delivered.cfg", b"rejected.cfg", b"due.cfg", b"pending.cfg")
    first, second, third = (ledger.claim("vault", LATER)[0] for _ in range(3))
    outcomes: tuple[Outcome, ...] = (delivered(), rejected(), delivered())
    results = [
        a_claim_result(*each, now=LATER) for each in zip((first, second, third), outcomes, strict=True)
    ]
    ledger.record(results, LATER)
    moved = [
        DispositionResult(first.archive.id, b"sent/delivered.cfg"),
        DispositionResult(second.archive.id, b"rejected/rejected.cfg"),
    ]
    record_dispositions(ledger, moved, [], LATER)

    assert ledger.assign_folders({"switches": B}) == {LEFT: A}

    assert {path: drop for (path, _), (drop, _) in states(history).items()} == {
        b"delivered.cfg": "switches",
        b"rejected.cfg": LEFT,
        b"due.cfg": LEFT,
        b"pending.cfg": LEFT,
    }
    assert ledger.pending_drops() == {LEFT: DropBacklog(2, NOW, "/a")}
    assert ledger.assign_folders({"switches": A}) == {}
    assert {drop for drop, _ in states(history).values()} == {"switches"}


def test_a_claim_in_a_folder_that_a_drop_has_left_is_released(bench: Bench, ledger: Ledger) -> None:
    """Its worker would look for the file in the new folder."""
    ledger.assign_folders({"switches": A})
    queue(ledger, b"a.cfg")
    (stale,) = ledger.claim("vault", LATER)

    ledger.assign_folders({"switches": B})

    result = a_claim_result(stale, delivered(), now=LATER)
    assert ledger.record([result], LATER).lost == (result,)
    (again,) = ledger.claim("vault", LATER)
    assert (again.id, again.archive.drop) == (stale.id, LEFT)


def test_a_claim_of_a_renamed_drop_is_kept(ledger: Ledger) -> None:
    ledger.assign_folders({"switches": A})
    queue(ledger, b"a.cfg")
    (delivery,) = ledger.claim("vault", LATER)

    ledger.assign_folders({"core": A})

    (completed,) = ledger.record([a_claim_result(delivery, delivered(), now=LATER)], LATER).completed
    assert completed.archive.drop == "core"


def test_a_copy_in_the_new_folder_is_the_archive_that_waits_in_the_old_one(ledger: Ledger) -> None:
    ledger.assign_folders({"switches": A})
    candidate = a_candidate(b"a.cfg")
    ledger.enqueue([candidate], ["vault"], NOW)
    ledger.assign_folders({"switches": B})
    old = candidate.fingerprint
    copy = replace(candidate, fingerprint=replace(old, inode=old.inode + 1, ctime_ns=old.ctime_ns + 1))
    other = replace(candidate, fingerprint=replace(old, mtime_ns=old.mtime_ns + 1))

    assert len(ledger.enqueue([other], ["vault"], NOW).queued) == 1
    assert ledger.enqueue([copy], ["vault"], NOW).queued == ()

    assert ledger.pending_drops() == {"switches": DropBacklog(1, NOW, "/b")}
    (delivery,) = ledger.claim("vault", LATER)
    assert (delivery.archive.drop, delivery.archive.fingerprint) == ("switches", copy.fingerprint)


def test_a_folder_that_cannot_be_reached_is_known_by_its_path(ledger: Ledger, history: History) -> None:
    ledger.assign_folders({"switches": A})
    queue(ledger, b"a.cfg")
    ledger.assign_folders({"switches": FolderPlace("/a")})
    ledger.assign_folders({"core": FolderPlace("/moved", A.filesystem, A.inode)})
    assert states(history) == {(b"a.cfg", "vault"): ("core", "pending")}


@pytest.mark.parametrize("outcome", [delivered(), rejected()])
def test_an_archive_with_other_deliveries_goes_on_without_a_removed_destination(
    ledger: Ledger, history: History, outcome: Outcome
) -> None:
    queue(ledger, b"a.cfg", to=("vault", "gone"))
    (delivery,) = ledger.claim("vault", LATER)
    ledger.record([a_claim_result(delivery, outcome, now=LATER)], LATER)

    assert history.give_up_destination("gone", LATER) == 1

    (completed,) = ledger.pending_dispositions()
    assert [each.destination for each in completed.results] == ["vault"]
    assert history.give_up_destination("gone", LATER) == 0


def test_an_archive_for_a_removed_destination_alone_loses_its_entry(ledger: Ledger, history: History) -> None:
    queue(ledger, b"a.cfg", to=("gone",))
    before = ledger.known_since("switches")
    assert before.added

    assert history.give_up_destination("gone", LATER) == 1

    assert ledger.known_since("switches", before.cursor).removed
    assert states(history) == {(b"a.cfg", "gone"): ("switches", DeliveryState.SUPERSEDED)}
    assert len(ledger.enqueue([a_candidate(b"a.cfg")], ["vault"], LATER).queued) == 1


def test_all_that_waits_in_a_removed_drop_is_given_up(ledger: Ledger, history: History) -> None:
    queue(ledger, b"due.cfg", b"pending.cfg")
    queue(ledger, b"other.cfg", drop="routers")
    (delivery,) = ledger.claim("vault", LATER)
    ledger.record([a_claim_result(delivery, delivered(), now=LATER)], LATER)

    assert history.give_up_drop("switches", LATER) == 2

    assert list(ledger.pending_drops()) == ["routers"]
    assert ledger.pending_dispositions() == []
    assert not ledger.known_since("switches").added
