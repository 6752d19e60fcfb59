"""The contract of the ledger about the state of the whole: queues, snapshots, pauses and statistics."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from backupd.core.circuit import CircuitState
from backupd.core.device_matrix import CalendarDay
from backupd.core.devices import Device, DeviceExpectation
from backupd.core.model import Archive, Outcome
from backupd.core.snapshot import (
    DaemonProblem,
    DestinationSnapshot,
    DeviceDay,
    DropSnapshot,
    HourThroughput,
    OperatorPause,
    OverdueDevice,
    ProblemSnapshot,
    Upload,
)
from backupd.ledger.history import History
from backupd.ledger.port import (
    Backlog,
    DispositionResult,
    Ledger,
    NewestArchive,
    QueueState,
    TrackedDevice,
)
from tests.contract.bench import Bench
from tests.factories import (
    NOW,
    a_candidate,
    a_claim_result,
    a_fingerprint,
    a_snapshot,
    delivered,
    record_dispositions,
    rejected,
    superseded,
)

HOUR = timedelta(hours=1)
LATER = NOW + HOUR


def queue(
    ledger: Ledger,
    *paths: bytes,
    drop: str = "switches",
    to: tuple[str, ...] = ("vault",),
    at: datetime = NOW,
) -> None:
    ledger.enqueue([a_candidate(path, drop=drop) for path in paths], to, at)


def end(ledger: Ledger, outcome: Outcome, to: str = "vault", at: datetime = LATER) -> Archive:
    (delivery,) = ledger.claim(to, at)
    ledger.record([a_claim_result(delivery, outcome, now=at)], at)
    return delivery.archive


# queues


def test_an_empty_ledger_has_empty_queues(ledger: Ledger) -> None:
    assert ledger.queue_state(["switches"], ["vault"]) == QueueState({}, {}, {}, 0, {}, {})


def test_queues_are_counted_by_drop_and_destination(ledger: Ledger) -> None:
    queue(ledger, b"r1", b"r2", to=("vault", "annex"))
    queue(ledger, b"r3", at=LATER)
    queue(ledger, b"f1", drop="firewalls")
    ledger.claim("annex", LATER)
    end(ledger, delivered())
    queues = ledger.queue_state(["switches", "firewalls", "unknown"], ["vault", "annex"])
    assert queues.destinations == {"vault": Backlog(3, 9, NOW), "annex": Backlog(2, 6, NOW)}
    assert queues.drops == {"switches": Backlog(3, 9, NOW), "firewalls": Backlog(1, 3, NOW)}
    assert queues.last_delivered == {"vault": LATER}
    assert queues.newest == {"switches": NewestArchive(b"r3", LATER), "firewalls": NewestArchive(b"f1", NOW)}


def test_an_archive_that_is_delivered_everywhere_is_in_no_queue(ledger: Ledger) -> None:
    queue(ledger, b"r1", to=("vault", "annex"))
    end(ledger, delivered())
    assert ledger.queue_state([], []).drops == {"switches": Backlog(1, 3, NOW)}
    end(ledger, delivered(), "annex")
    assert ledger.queue_state([], []).drops == {}


def test_rejected_deliveries_count_while_their_file_is_in_quarantine(ledger: Ledger) -> None:
    queue(ledger, b"r1", b"r2", to=("vault", "annex"))
    for name in ("vault", "annex"):
        first = end(ledger, rejected(), name)
    assert ledger.queue_state([], []).rejected == {}
    record_dispositions(ledger, [DispositionResult(first.id, b"rejected/r1")], [], LATER)
    queues = ledger.queue_state([], [])
    assert (queues.rejected, queues.quarantined) == ({"vault": 1, "annex": 1}, 1)


# snapshots


def test_a_snapshot_is_read_as_it_was_saved(bench: Bench) -> None:
    pause = OperatorPause("destination", "vault", NOW, LATER, "anna", "new disks")
    snapshot = a_snapshot(
        drops=(DropSnapshot("switches", "/srv", 1, 3, NOW, "\\xff/\ud800", NOW, "inotify"),),
        destinations=(
            DestinationSnapshot("vault", "https://x", 1, 3, NOW, circuit=CircuitState.PAUSED, held=pause),
        ),
        uploads=(Upload("d", "switches", "r1", "vault", 1, 3, 1, NOW, 1),),
        problems=(ProblemSnapshot("switches", "unreadable", 2, NOW, "r1", "Permission denied", "chmod it"),),
        overdue=(OverdueDevice("switches", "sw1", None, NOW),),
        daemon_problems=(DaemonProblem("configuration", NOW, "refused"),),
    )
    assert bench.history().snapshots() == []
    bench.ledger.save_snapshot(snapshot)
    [found] = bench.history().snapshots()
    assert replace(found, drops=snapshot.drops) == snapshot
    assert found.drops[0].last == "\\xff/\\ud800"
    bench.crash()
    assert bench.history().snapshots() == [found]


def test_a_snapshot_replaces_the_one_before(ledger: Ledger, history: History) -> None:
    ledger.save_snapshot(a_snapshot(rejected=1))
    ledger.save_snapshot(a_snapshot(rejected=2))
    assert [each.rejected for each in history.snapshots()] == [2]


# pauses


def test_a_pause_lasts_until_it_is_ended(ledger: Ledger, history: History) -> None:
    vault = OperatorPause("destination", "vault", NOW, LATER, "anna", "new \ud800 disks")
    switches = OperatorPause("drop", "switches", NOW)
    history.pause(replace(vault, until=None))
    history.pause(vault)
    history.pause(switches)
    kept = replace(vault, note="new \\ud800 disks")
    assert ledger.pauses() == history.pauses() == [kept, switches]
    assert history.resume("destination", "vault")
    assert not history.resume("destination", "vault")
    assert ledger.pauses() == [switches]


def test_pauses_are_deleted_at_their_end(ledger: Ledger, history: History) -> None:
    history.pause(OperatorPause("destination", "vault", NOW, LATER))
    endless = OperatorPause("drop", "switches", NOW)
    history.pause(endless)
    ledger.delete_ended_pauses(LATER - HOUR / 2)
    assert len(ledger.pauses()) == 2
    ledger.delete_ended_pauses(LATER)
    assert ledger.pauses() == [endless]


def test_changes_by_other_processes_are_noticed(bench: Bench) -> None:
    before = bench.ledger.foreign_version()
    bench.ledger.save_failure("vault", "connect_failed")
    assert bench.ledger.foreign_version() == before
    bench.history().pause(OperatorPause("drop", "switches", NOW))
    assert bench.ledger.foreign_version() != before


# statistics


def test_the_archives_of_a_device_are_counted_by_the_day(ledger: Ledger, history: History) -> None:
    def arrive(name: bytes, at: datetime, size: int = 3, device: str = "sw1") -> None:
        candidate = a_candidate(name, fingerprint=a_fingerprint(size=size))
        ledger.enqueue([replace(candidate, tracked=TrackedDevice(device, 0.5))], ["vault"], at)

    noon = NOW.astimezone().replace(hour=12, minute=0, second=0, microsecond=0)
    day = timedelta(days=1)
    for hours in range(3):
        arrive(b"r%d" % hours, noon + hours * HOUR)
    arrive(b"large", noon + day, size=100)
    arrive(b"other", noon + day, device="sw2")
    assert ledger.count_devices() == 2
    end(ledger, delivered(), at=noon + 2 * day)
    refused = end(ledger, rejected(), at=noon + 2 * day)
    record_dispositions(ledger, [DispositionResult(refused.id, b"rejected/r1")], [], noon + 2 * day)
    end(ledger, superseded(), at=noon + 2 * day)

    midnight = noon - 12 * HOUR
    first, second = (
        CalendarDay(f"{begins:%Y-%m-%d}", begins, begins + day) for begins in (midnight, midnight + day)
    )
    assert list(history.device_days(["switches", "none"], [first, second])) == [
        DeviceDay("switches", "sw1", first.name, 2, 1, 1, 0, noon, noon + HOUR),
        DeviceDay("switches", "sw1", second.name, 1, 0, 0, 1, noon + day, noon + day),
        DeviceDay("switches", "sw2", second.name, 1, 0, 0, 0, noon + day, noon + day),
    ]
    assert [each.device for each in history.device_days(["switches"], [second])] == ["sw1", "sw2"]
    assert not list(history.device_days(["none"], [first, second]))


def test_a_rejected_archive_that_was_queued_again_counts_no_more(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1")
    archive = end(ledger, rejected(), at=NOW)
    record_dispositions(ledger, [DispositionResult(archive.id, b"rejected/r1")], [], NOW)
    day = CalendarDay("today", NOW - HOUR, NOW + HOUR)
    assert [each.rejected for each in history.device_days(["switches"], [day])] == [1]
    with history.mark_retried(archive.id):
        pass
    assert not list(history.device_days(["switches"], [day]))


def test_devices_are_found_with_the_time_at_which_they_became_known(ledger: Ledger, history: History) -> None:
    ledger.set_expectations({"switches": DeviceExpectation(HOUR, "{device}", ("sw1",))}, NOW)
    assert history.tracked_devices() == [Device("switches", "sw1", NOW, every=HOUR)]


def test_the_oldest_archive_of_each_drop_is_found(ledger: Ledger, history: History) -> None:
    queue(ledger, b"r1", b"r2")
    assert history.first_queued(["switches", "none"]) == {"switches": NOW}


def test_deliveries_are_counted_by_the_hour(ledger: Ledger, history: History) -> None:
    hour = NOW.replace(minute=0, second=0, microsecond=0) + 2 * HOUR
    queue(ledger, b"r1", b"r2", b"r3", to=("vault", "annex"))
    end(ledger, delivered(), at=hour)
    end(ledger, delivered(), at=hour + HOUR / 2)
    end(ledger, delivered(), at=hour + HOUR)
    end(ledger, rejected(), "annex", at=hour)
    assert history.throughput(["vault", "annex"], hour) == [
        HourThroughput("vault", hour, 2, 6),
        HourThroughput("vault", hour + HOUR, 1, 3),
    ]
    assert [each.hour for each in history.throughput(["vault"], hour + HOUR)] == [hour + HOUR]
