"""The contract of `History`: what commands find, and the changes that they make while a daemon is running."""

from __future__ import annotations

import re
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from backupd.core.devices import DeviceExpectation
from backupd.core.errors import LedgerError, UsageError
from backupd.core.model import Archive, Delivery, DeliveryState, Outcome
from backupd.ledger.history import DeliveryRecord, DeviceRecord, History, Search, Selector
from backupd.ledger.port import DispositionResult, FileCandidate, Ledger, TrackedDevice
from tests.contract.bench import Bench
from tests.factories import (
    NOW,
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


def queue(ledger: Ledger, *paths: bytes, drop: str = "switches", to: tuple[str, ...] = ("vault",)) -> None:
    ledger.enqueue([a_candidate(path, drop=drop) for path in paths], to, NOW)


def end(ledger: Ledger, *outcomes: Outcome, to: str = "vault") -> Delivery:
    """Claim the next delivery, and record these outcomes."""
    (delivery,) = ledger.claim(to, LATER)
    ledger.record([a_claim_result(delivery, *outcomes, now=LATER)], LATER)
    return delivery


def quarantine(ledger: Ledger, name: bytes, to: bytes, *, drop: str = "switches") -> Archive:
    queue(ledger, name, drop=drop)
    archive = end(ledger, rejected()).archive
    move(ledger, archive, to)
    return archive


def move(ledger: Ledger, archive: Archive, to: bytes | None, *, missing: bool = False) -> None:
    record_dispositions(ledger, [DispositionResult(archive.id, to, missing=missing)], [], LATER)


def paths(history: History, search: Search, limit: int = 99) -> list[bytes]:
    return [record.archive.relpath for record in history.find(search, limit)]


def selected(history: History, *selectors: Selector) -> list[DeliveryRecord]:
    return history.find(Search(selectors=selectors), 99)


# searches


def test_a_search_without_criteria_finds_all_deliveries_the_newest_archives_first(
    ledger: Ledger, history: History
) -> None:
    assert history.find(Search(), 9) == []
    queue(ledger, b"r1", b"r2", b"r3", to=("vault", "annex"))
    found = history.find(Search(), 99)
    assert [(record.archive.relpath, record.destination) for record in found] == [
        (path, name) for path in (b"r3", b"r2", b"r1") for name in ("annex", "vault")
    ]
    assert history.find(Search(), 3) == found[:3]


@pytest.mark.parametrize("state", list(DeliveryState))
def test_a_search_by_state_finds_those_in_that_state(
    ledger: Ledger, history: History, state: DeliveryState
) -> None:
    queue(ledger, *(state.value.encode() for state in DeliveryState))
    by_path = {claimed.archive.relpath: claimed for claimed in ledger.claim("vault", LATER, limit=9)}
    outcomes: dict[bytes, Outcome] = {
        b"pending": deferred(),
        b"delivered": delivered(),
        b"rejected": rejected(),
        b"superseded": superseded(),
        b"retried": rejected(),
    }
    ledger.record([a_claim_result(by_path[path], one) for path, one in outcomes.items()], LATER)
    move(ledger, by_path[b"retried"].archive, b"rejected/retried")
    with history.mark_retried(by_path[b"retried"].archive.id):
        pass
    assert paths(history, Search(state)) == [state.value.encode()]
    assert paths(history, Search(state, drop="nowhere")) == []


def test_a_search_by_drop_destination_and_time_combines_them(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1", to=("vault", "annex"))
    queue(ledger, b"f1", drop="firewalls")
    ledger.enqueue([a_candidate(b"r2")], ["vault"], LATER)
    assert paths(history, Search(drop="firewalls")) == [b"f1"]
    assert paths(history, Search(destination="annex")) == [b"r1"]
    assert paths(history, Search(since=LATER)) == [b"r2"]
    assert paths(history, Search(until=LATER, destination="vault")) == [b"f1", b"r1"]
    assert paths(history, Search(DeliveryState.PENDING, "switches", "vault", NOW, LATER)) == [b"r1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("*.cfg", [b"north/R1.cfg", b"north/\xff.cfg", b"r2.CFG"]),
        ("r?.*", [b"north/R1.cfg", b"r2.CFG", b"r3.txt"]),
        ("NORTH/*", [b"north/R1.cfg", b"north/\xff.cfg"]),
        ("north/r[12].cfg", [b"north/R1.cfg"]),
        ("north", []),
        ("%", []),
    ],
)
def test_a_search_by_name_matches_the_name_or_path_without_regard_to_case(
    ledger: Ledger, history: History, name: str, expected: list[bytes]
) -> None:
    queue(ledger, b"north/R1.cfg", b"north/\xff.cfg", b"r2.CFG", b"r3.txt")
    assert sorted(paths(history, Search(name=name))) == expected
    assert len(paths(history, Search(name="*"), limit=2)) == 2


def test_a_search_by_labels_uses_the_pattern_of_the_drop(ledger: Ledger, history: History) -> None:
    queue(ledger, b"north/sw1.cfg", b"south/sw1.cfg", b"sw1.cfg")
    queue(ledger, b"fw1-north.cfg", drop="firewalls")
    queue(ledger, b"north/x.cfg", drop="other")
    patterns = {
        "switches": re.compile(r"(?P<site>\w+)/(?P<device>\w+)\.cfg"),
        "firewalls": re.compile(r"(?P<device>\w+)-(?P<site>\w+)\.cfg"),
    }
    north = Search(labels={"site": "north"}, label_patterns=patterns)
    assert paths(history, north) == [b"fw1-north.cfg", b"north/sw1.cfg"]
    both = Search(labels={"site": "north", "device": "sw1"}, label_patterns=patterns)
    assert paths(history, both) == [b"north/sw1.cfg"]
    assert paths(history, Search(labels={"site": "north"})) == []


# single records


def test_a_selector_finds_deliveries_by_the_start_of_their_ids(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1", b"r2")
    first, second = history.find(Search(), 2)
    length = next(n for n in range(1, 37) if first.id[:n] != second.id[:n])
    assert selected(history, Selector(first.id)) == [first]
    assert selected(history, Selector(second.id[:length])) == [second]
    assert selected(history, Selector(second.id), Selector(first.id)) == [first, second]
    assert history.find(Search(drop="firewalls", selectors=[Selector(first.id)]), 9) == []
    for prefix in ("", "none", "\ud800", "0\0"):
        assert selected(history, Selector(prefix)) == []


def test_a_selector_finds_all_deliveries_of_an_archive_by_its_number(
    ledger: Ledger, history: History
) -> None:
    queue(ledger, b"r1", to=("vault", "annex"))
    queue(ledger, b"r2")
    _, annex, vault = history.find(Search(), 9)
    assert selected(history, Selector(archive_id=vault.archive.id)) == [annex, vault]
    assert selected(history, Selector(archive_id=0)) == []


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (Selector(path=b"r1.cfg"), [b"r1.cfg", b"north/r1.cfg", b"r1.cfg"]),
        (Selector(path=b"north/r1.cfg"), [b"north/r1.cfg"]),
        (Selector(path=b"1.cfg"), []),
        (Selector(path=b"r1.cfg", drop="firewalls"), [b"r1.cfg"]),
        (Selector(path=b"sent/odd-\xff.cfg"), [b"odd-\xff.cfg"]),
        (Selector(path=b"odd-\xff.cfg"), [b"odd-\xff.cfg"]),
        (Selector(path=b"sent/odd-\xff.cfg", drop="switches"), [b"odd-\xff.cfg"]),
        (Selector(path=b"sent/odd-\xff.cfg", drop="firewalls"), []),
    ],
)
def test_a_selector_finds_deliveries_by_the_end_of_a_path(
    ledger: Ledger, history: History, selector: Selector, expected: list[bytes]
) -> None:
    queue(ledger, b"odd-\xff.cfg")
    move(ledger, end(ledger, delivered()).archive, b"sent/odd-\xff.cfg")
    queue(ledger, b"r1.cfg", b"north/r1.cfg", b"r1.cfg.old")
    queue(ledger, b"r1.cfg", drop="firewalls")
    assert sorted(r.archive.relpath for r in selected(history, selector)) == sorted(expected)


def test_a_selector_finds_deliveries_by_the_start_of_a_digest(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1", b"r2")
    ended = end(ledger, delivered())
    text = str(a_digest())
    for digest in (text, text[:15], a_digest().hex, a_digest().hex[:8]):
        assert [r.archive for r in selected(history, Selector(digest=digest))] == [ended.archive]
    for digest in (f"sha1:{a_digest().hex}", a_digest().hex[1:], f"{text}0", "%"):
        assert selected(history, Selector(digest=digest)) == []


def test_a_delivery_and_its_attempts_are_shown_with_their_outcomes(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1", to=("vault", "annex"))
    ended = end(ledger, deferred(), delivered(body="ok"))
    records = history.deliveries_of(ended.archive.id)
    assert [record.destination for record in records] == ["annex", "vault"]
    waiting, record = records
    assert (waiting.state, waiting.due_at, waiting.attempts) == (DeliveryState.PENDING, NOW, 0)
    assert (record.state, record.due_at, record.ended_at) == (DeliveryState.DELIVERED, None, LATER)
    assert (record.attempts, record.digest, record.verified) == (2, str(a_digest()), True)
    assert (record.http_status, record.receipt, record.reason, record.error) == (201, "ok", None, None)
    assert record.archive == ended.archive
    first, second = history.attempts(record.id)
    assert (first.number, first.outcome, first.reason, first.error) == (
        1, "deferred", "connect_failed", "did not work"
    )  # fmt: skip
    assert (second.number, second.outcome, second.http_status, second.sent_bytes) == (2, "delivered", 201, 3)
    assert (first.started_at, first.duration_s) == (LATER, 0.25)
    assert history.attempts(waiting.id) == []
    assert history.deliveries_of(ended.archive.id + 1) == []


def test_an_archive_is_shown_with_the_disposition_of_its_file(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1")
    archive = end(ledger, delivered()).archive
    record = history.archive(archive.id)
    assert (record.archive, record.state, record.digest) == (archive, "delivered", str(a_digest()))
    assert (record.disposition, record.disposed_to, record.disposed_at) == ("due", None, None)
    move(ledger, archive, b"sent/r1")
    record = history.archive(archive.id)
    assert (record.disposition, record.disposed_to, record.disposed_at) == ("done", b"sent/r1", LATER)
    assert not record.missing
    with pytest.raises(UsageError, match="no archive has the id"):
        history.archive(archive.id + 1)


def test_the_files_that_are_not_queued_again_are_listed_with_their_states(
    ledger: Ledger, history: History
) -> None:
    assert history.files("switches") == []
    queue(ledger, b"kept", b"moved", b"waits")
    queue(ledger, b"other", drop="firewalls")
    kept, moved = end(ledger, delivered()).archive, end(ledger, delivered()).archive
    record_dispositions(ledger, [DispositionResult(kept.id, None, kept_in_place=True)], [], LATER)
    move(ledger, moved, b"sent/moved")
    found = [(archive.relpath, state) for archive, state in history.files("switches")]
    assert found == [(b"kept", DeliveryState.DELIVERED), (b"waits", DeliveryState.PENDING)]


def test_a_missing_file_is_shown_as_such(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1")
    archive = end(ledger, delivered()).archive
    move(ledger, archive, None, missing=True)
    assert history.archive(archive.id).missing


# queues


def test_destinations_with_open_deliveries_are_listed(ledger: Ledger, history: History) -> None:
    assert history.destinations_pending() == []
    queue(ledger, b"r1", to=("vault", "annex", "third"))
    end(ledger, delivered(), to="third")
    ledger.claim("annex", LATER)
    assert history.destinations_pending() == ["annex", "vault"]


# changes


def test_a_pending_delivery_becomes_due_now(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1", b"r2")
    waiting, ended = end(ledger, deferred()), end(ledger, delivered())
    ledger.bring_forward("vault", ledger.now() + timedelta(days=1))
    assert history.retry_now(waiting.id)
    due = ledger.next_due("vault")
    assert due is not None
    assert due <= ledger.now()
    assert not history.retry_now(ended.id)
    assert not history.retry_now("none")


def test_a_retried_archive_is_no_longer_in_quarantine(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1")
    archive = end(ledger, rejected()).archive
    move(ledger, archive, b"rejected/r1")
    with pytest.raises(ZeroDivisionError), history.mark_retried(archive.id):
        _ = 1 / 0
    assert ledger.count_quarantined() == 1
    with history.mark_retried(archive.id):
        pass
    assert ledger.count_quarantined() == 0
    record = history.archive(archive.id)
    assert (record.state, record.disposed_to, record.missing) == ("retried", None, False)
    [delivery] = history.deliveries_of(archive.id)
    assert (delivery.state, delivery.reason) == (DeliveryState.RETRIED, "archive_refused")
    assert paths(history, Search(DeliveryState.REJECTED)) == []


def test_a_rejected_archive_with_a_missing_file_stays_rejected(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1")
    archive = end(ledger, rejected()).archive
    assert paths(history, Search(DeliveryState.REJECTED)) == [b"r1"]
    move(ledger, archive, None, missing=True)
    assert history.archive(archive.id).state == "rejected"
    assert paths(history, Search(DeliveryState.REJECTED)) == [b"r1"]
    assert paths(history, Search(DeliveryState.RETRIED)) == []


def test_the_daemon_waits_while_an_archive_is_retried(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1")
    archive = end(ledger, rejected()).archive
    move(ledger, archive, b"rejected/r1")
    waiting = threading.Thread(target=lambda: move(ledger, archive, b"rejected/r1"))
    with history.mark_retried(archive.id):
        waiting.start()
        assert history.archive(archive.id).disposed_to is None
    waiting.join()
    assert history.archive(archive.id).disposed_to == b"rejected/r1"


def test_devices_are_listed_and_forgotten(bench: Bench) -> None:
    ledger, history = bench.ledger, bench.history()
    hour = timedelta(hours=1)
    for drop in ("switches", "firewalls"):
        ledger.set_expectations(
            {"switches": DeviceExpectation(hour, "{stem}", ("sw2",)), "firewalls": DeviceExpectation(hour)},
            NOW,
        )
        candidate = FileCandidate(drop, b"sw1.cfg", a_fingerprint(), TrackedDevice("sw1"))
        ledger.enqueue([candidate], ["vault"], NOW)
    late = NOW + 2 * hour
    assert history.devices(NOW) == [
        DeviceRecord("firewalls", "", None, 0, False, hour),
        DeviceRecord("firewalls", "sw1", NOW, 1, False, hour),
        DeviceRecord("switches", "sw1", NOW, 1, False, hour),
        DeviceRecord("switches", "sw2", None, 0, False, hour),
    ]
    assert all(device.overdue for device in history.devices(late))
    assert history.forget_device("sw1", "switches", late) == [("switches", False)]
    assert history.forget_device("sw2", None, late) == [("switches", True)]
    assert history.forget_device("none", None, late) == []
    assert [(d.drop, d.device, d.overdue) for d in history.devices(late)] == [
        ("firewalls", "", True),
        ("firewalls", "sw1", True),
        ("switches", "sw2", False),
    ]


def test_without_a_daemon_there_is_no_process_id(history: History) -> None:
    assert history.daemon_pid() is None


def test_a_closed_history_raises_an_error(history: History) -> None:
    history.close()
    with pytest.raises(LedgerError):
        history.find(Search(), 1)


@pytest.mark.parametrize("protocol", [Ledger, History])
def test_each_method_of_the_port_is_called_in_the_contract(protocol: type) -> None:
    source = "\n".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    methods = [name for name in dir(protocol) if not name.startswith("_")]
    assert [name for name in methods if not re.search(rf"\.{name}\b", source)] == []


def test_a_rejected_archive_that_replaces_another_one_in_quarantine_is_counted_alone(
    ledger: Ledger, history: History
) -> None:
    """The first one was removed by hand: a move never overwrites a file."""
    first = quarantine(ledger, b"a.cfg", b"rejected/a.cfg")
    quarantine(ledger, b"a.cfg", b"rejected/a.cfg", drop="firewalls")
    quarantine(ledger, b"b.cfg", b"rejected/b.cfg")
    second = quarantine(ledger, b"a.cfg", b"rejected/a.cfg")

    assert ledger.count_quarantined() == 3
    assert ledger.queue_state([], ["vault"]).rejected == {"vault": 3}
    assert history.archive(first.id).disposed_to is None
    assert history.archive(second.id).disposed_to == b"rejected/a.cfg"
