"""The contract of `DeviceLedger`: devices, sizes, old history and the clock; every adapter has to pass it."""

from __future__ import annotations

from datetime import datetime, timedelta

from backupd.core.devices import Device, DeviceExpectation, overdue_and_recovered
from backupd.core.model import Archive, Outcome
from backupd.ledger.port import ClockReading, DispositionResult, FileCandidate, Ledger, TrackedDevice
from tests.contract.bench import Bench
from tests.factories import (
    NOW,
    SECOND,
    a_candidate,
    a_claim_result,
    a_fingerprint,
    deferred,
    delivered,
    record_dispositions,
    rejected,
)

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
DAILY = DeviceExpectation(DAY, "{device}")


def arrive(
    ledger: Ledger,
    device: str = "sw1",
    *,
    at: datetime = NOW,
    size: int = 100,
    alarm: float | None = None,
    drop: str = "switches",
    to: tuple[str, ...] = ("vault",),
) -> tuple[Archive, bool]:
    """Queue an archive of a device; return it, and whether its size is unusual."""
    fingerprint = a_fingerprint(size=size)
    candidate = FileCandidate(
        drop, b"%s-%d.cfg" % (device.encode(), fingerprint.inode), fingerprint, TrackedDevice(device, alarm)
    )
    result = ledger.enqueue([candidate], to, at)
    return result.queued[0], result.has_unusual_size


def overdue(ledger: Ledger, now: datetime) -> list[str]:
    return [device.name for device in overdue_and_recovered(ledger.possibly_overdue(now), now)[0]]


def alarm(ledger: Ledger, now: datetime) -> tuple[list[str], list[str]]:
    """Record the alarms as a heartbeat does; return the overdue and the recovered devices."""
    late, recovered = overdue_and_recovered(ledger.possibly_overdue(now), now)
    ledger.record_alarms(late, recovered)
    return [device.name for device in late], [device.name for device in recovered]


# devices


def test_a_device_is_known_from_its_first_archive(bench: Bench) -> None:
    bench.ledger.set_expectations({"switches": DAILY}, NOW)
    arrive(bench.ledger, "sw1")
    arrive(bench.ledger, "sw1", at=NOW + HOUR)
    arrive(bench.ledger, "sw2")
    for ledger in (bench.ledger, bench.crash()):
        assert overdue(ledger, NOW + DAY) == []
        assert overdue(ledger, NOW + DAY + SECOND) == ["sw2"]
        found = ledger.possibly_overdue(NOW + 2 * DAY)
        assert found == [
            Device("switches", "sw1", NOW, NOW + HOUR, 2, DAY),
            Device("switches", "sw2", NOW, NOW, 1, DAY),
        ]


def test_a_listed_device_is_overdue_if_it_never_sent_an_archive(bench: Bench) -> None:
    listed = {"switches": DeviceExpectation(DAY, "{device}", ("sw1", "sw2"))}
    bench.ledger.set_expectations(listed, NOW)
    bench.crash().set_expectations(listed, NOW + HOUR)  # it is known since the first time
    arrive(bench.ledger, "sw2", at=NOW + HOUR)
    assert bench.ledger.possibly_overdue(NOW + DAY + SECOND) == [Device("switches", "sw1", NOW, None, 0, DAY)]


def test_without_a_template_the_drop_as_a_whole_is_expected(ledger: Ledger) -> None:
    ledger.set_expectations({"switches": DeviceExpectation(DAY)}, NOW)
    assert overdue(ledger, NOW + DAY + SECOND) == [""]
    arrive(ledger, "", at=NOW + DAY)
    assert overdue(ledger, NOW + DAY + SECOND) == []


def test_the_same_name_in_two_drops_is_two_devices(ledger: Ledger) -> None:
    ledger.set_expectations({"switches": DAILY, "firewalls": DeviceExpectation(HOUR, "{device}")}, NOW)
    arrive(ledger, drop="switches")
    arrive(ledger, drop="firewalls")
    assert [d.drop for d in ledger.possibly_overdue(NOW + 2 * HOUR)] == ["firewalls"]


def test_an_alarm_survives_a_crash_and_its_end_is_reported_once(bench: Bench) -> None:
    bench.ledger.set_expectations({"switches": DAILY}, NOW)
    arrive(bench.ledger)
    late = NOW + 2 * DAY
    assert alarm(bench.ledger, late) == (["sw1"], [])
    ledger = bench.crash()
    ledger.set_expectations({"switches": DAILY}, late)
    assert alarm(ledger, late) == (["sw1"], [])
    arrive(ledger, at=late)
    ledger = bench.crash()
    # without `record_alarms`, the recovery is returned again
    assert overdue_and_recovered(ledger.possibly_overdue(late), late)[1]
    assert alarm(ledger, late) == ([], ["sw1"])
    assert alarm(ledger, late) == ([], [])


def test_a_device_that_is_no_longer_listed_and_never_sent_an_archive_is_forgotten(ledger: Ledger) -> None:
    ledger.set_expectations({"switches": DeviceExpectation(DAY, "{device}", ("sw1", "sw2", "sw3"))}, NOW)
    arrive(ledger, "sw1")
    ledger.record_alarms([d for d in ledger.possibly_overdue(NOW + 2 * DAY) if d.name == "sw3"], [])
    ledger.set_expectations({"switches": DAILY}, NOW)
    assert alarm(ledger, NOW + 2 * DAY) == (["sw1"], ["sw3"])


def test_devices_are_forgotten_when_the_template_of_their_names_changes(ledger: Ledger) -> None:
    ledger.set_expectations({"switches": DAILY}, NOW)
    arrive(ledger, "sw1")
    alarm(ledger, NOW + 2 * DAY)
    arrive(ledger, "sw2")
    ledger.set_expectations({"switches": DeviceExpectation(DAY, "{site}/{device}")}, NOW)
    assert alarm(ledger, NOW + 9 * DAY) == ([], ["sw1"])
    assert ledger.possibly_overdue(NOW + 9 * DAY) == []


def test_a_device_without_an_expectation_is_no_longer_overdue(ledger: Ledger) -> None:
    ledger.set_expectations({"switches": DAILY}, NOW)
    arrive(ledger)
    alarm(ledger, NOW + 2 * DAY)
    ledger.set_expectations({}, NOW + 2 * DAY)
    assert alarm(ledger, NOW + 2 * DAY) == ([], ["sw1"])
    ledger.set_expectations({"switches": DAILY}, NOW + 3 * DAY)  # the device is still known
    assert alarm(ledger, NOW + 3 * DAY) == (["sw1"], [])


def test_a_clock_that_was_ahead_does_not_keep_a_device_from_becoming_overdue(ledger: Ledger) -> None:
    ledger.set_expectations({"switches": DAILY}, NOW)
    arrive(ledger, at=NOW + 9000 * DAY)
    ledger.set_expectations({"switches": DAILY}, NOW)
    assert overdue(ledger, NOW + 2 * DAY) == ["sw1"]


def test_devices_of_archives_before_the_ledger_are_learned_once(bench: Bench) -> None:
    bench.ledger.set_expectations({"switches": DeviceExpectation(DAY, "{device}", ("sw1", "sw3"))}, NOW)
    arrive(bench.ledger, "sw2", at=NOW)
    assert not bench.ledger.knows_devices("switches")
    past = [
        Device("switches", "sw1", NOW - 9 * DAY, NOW - 2 * DAY, 7),
        Device("switches", "sw2", NOW - 9 * DAY, NOW - 5 * DAY, 7),
        Device("switches", "sw4", NOW - 9 * DAY, NOW - 3 * DAY, 1),
    ]
    bench.ledger.learn_devices("switches", past)
    assert bench.ledger.knows_devices("switches")
    assert not bench.ledger.knows_devices("firewalls")
    found = bench.ledger.possibly_overdue(NOW + 2 * DAY)
    assert [(d.name, d.last_at, d.archives) for d in found] == [
        ("sw1", NOW - 2 * DAY, 7),
        ("sw2", NOW, 7),
        ("sw3", None, 0),
        ("sw4", NOW - 3 * DAY, 1),
    ]
    assert overdue(bench.ledger, NOW) == ["sw1", "sw4"]


# sizes


def test_an_unusual_size_is_returned_until_it_is_marked_as_reported(bench: Bench) -> None:
    for _ in range(3):
        assert not arrive(bench.ledger, size=100, alarm=0.5)[1]
    archive, unusual = arrive(bench.ledger, size=20, alarm=0.5)
    assert unusual
    ledger = bench.crash()
    (one,) = ledger.unusual_archives()
    assert (one.archive_id, one.drop, one.relpath) == (archive.id, "switches", archive.relpath)
    assert (one.device, one.size_bytes, one.median_size_bytes) == ("sw1", 20, 100)
    ledger.mark_reported([one])
    assert bench.crash().unusual_archives() == []


def test_a_size_is_compared_with_those_of_the_same_device(ledger: Ledger) -> None:
    for _ in range(3):
        arrive(ledger, "sw1", size=100, alarm=0.5)
        arrive(ledger, "sw2", size=9000, alarm=0.5)
    assert not arrive(ledger, "sw2", size=9100, alarm=0.5)[1]
    assert arrive(ledger, "sw1", size=9000, alarm=0.5)[1]


def test_only_the_last_ten_sizes_count(ledger: Ledger) -> None:
    for size in [100] * 20 + [900] * 6:
        arrive(ledger, size=size, alarm=0.5)
    ledger.mark_reported(ledger.unusual_archives())
    assert not arrive(ledger, size=900, alarm=0.5)[1]
    assert ledger.unusual_archives() == []


def test_without_a_size_alarm_sizes_are_only_recorded(ledger: Ledger) -> None:
    for size in (1, 1, 1, 1, 10**9):
        assert not arrive(ledger, size=size)[1]
    assert arrive(ledger, size=10**9, alarm=0.5)[1]  # the sizes were recorded


# old history

OLD = NOW - 500 * DAY
LIMIT = NOW - 400 * DAY


def dispose(
    ledger: Ledger,
    *,
    at: datetime = OLD,
    outcome: Outcome | None = None,
    to: bytes | None = b"sent/x",
    kept_in_place: bool = False,
) -> Archive:
    """Queue an archive, end its delivery, and dispose of its file."""
    archive, _ = arrive(ledger, at=at)
    (delivery,) = ledger.claim("vault", at)
    ledger.record([a_claim_result(delivery, outcome or delivered(), now=at)], at)
    record_dispositions(ledger, [DispositionResult(archive.id, to, kept_in_place)], [], at)
    return archive


def test_old_archives_are_pruned_up_to_the_limit(bench: Bench) -> None:
    for _ in range(5):
        dispose(bench.ledger)
    dispose(bench.ledger, at=LIMIT)
    assert [bench.ledger.prune(LIMIT, 2) for _ in range(4)] == [2, 2, 1, 0]
    assert bench.crash().prune(LIMIT, 2) == 0


def test_an_old_superseded_archive_is_pruned(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.enqueue([a_candidate(b"r1")], ["vault"], OLD)
    assert ledger.prune(LIMIT, 9) == 1


def test_open_quarantined_and_kept_archives_are_never_pruned(ledger: Ledger) -> None:
    rejected_one = dispose(ledger, outcome=rejected(), to=b"rejected/x")
    dispose(ledger, to=None, kept_in_place=True)  # on_delivered = "keep"
    due, _ = arrive(ledger, at=OLD)
    (delivery,) = ledger.claim("vault", OLD)
    ledger.record([a_claim_result(delivery, delivered())], OLD)
    deferred_one, _ = arrive(ledger, at=OLD)
    (delivery,) = ledger.claim("vault", OLD)
    ledger.record([a_claim_result(delivery, deferred())], OLD)
    arrive(ledger, at=OLD)
    assert ledger.claim("vault", OLD)
    arrive(ledger, at=OLD)
    assert ledger.prune(NOW + 9999 * DAY, 99) == 0
    assert [one.archive for one in ledger.pending_dispositions()] == [due]
    assert ledger.backlog()["vault"].pending == 3
    assert len(ledger.known_since("switches").added) == 5
    assert deferred_one in [d.archive for d in ledger.claim("vault", NOW + DAY, limit=9)]
    assert rejected_one not in [one.archive for one in ledger.pending_dispositions()]


def test_a_rejected_archive_without_a_file_is_pruned(ledger: Ledger) -> None:
    dispose(ledger, outcome=rejected(), to=None)
    dispose(ledger)
    assert ledger.prune(LIMIT, 99) == 1


def test_the_id_of_a_pruned_archive_is_not_used_again(ledger: Ledger) -> None:
    last = [dispose(ledger) for _ in range(3)][-1]
    ledger.prune(LIMIT, 99)
    assert arrive(ledger)[0].id > last.id


def test_devices_are_kept_when_their_archives_are_pruned(ledger: Ledger) -> None:
    ledger.set_expectations({"switches": DAILY}, OLD)
    dispose(ledger)
    dispose(ledger)
    assert ledger.prune(LIMIT, 99) == 1
    assert [d.archives for d in ledger.possibly_overdue(NOW)] == [2]


def test_a_saved_clock_reading_replaces_the_one_before_and_survives_a_crash(bench: Bench) -> None:
    assert bench.ledger.last_clock_reading() is None
    for reading in (
        ClockReading(NOW, 400 * DAY + SECOND, HOUR),
        ClockReading(OLD),
    ):
        bench.ledger.save_clock_reading(reading)
        for ledger in (bench.ledger, bench.crash()):
            assert ledger.last_clock_reading() == reading
