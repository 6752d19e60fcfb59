"""The alarms of a state, and the output line and the exit code of a monitoring plugin."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from backupd.core.certificate_life import CertificateLife, CertificateLimits
from backupd.core.circuit import CircuitState
from backupd.core.drop_problem import FOLDER_FAILED
from backupd.core.health import AlarmKind, HealthLevel, HealthLimits, alarms, plugin_line
from backupd.core.policy import Reason
from backupd.core.snapshot import (
    CertificateSnapshot,
    DaemonProblem,
    DestinationSnapshot,
    DropSnapshot,
    OperatorPause,
    OverdueDevice,
    ProblemSnapshot,
    Snapshot,
)
from tests.factories import NOW, a_snapshot

HOUR = timedelta(hours=1)
LIMITS = HealthLimits(HOUR, 6 * HOUR)


def a_destination(name: str = "vault", **fields: Any) -> DestinationSnapshot:
    return DestinationSnapshot(name, **{"circuit": CircuitState.WORKING, **fields})


def waiting(age: timedelta, **fields: Any) -> Snapshot:
    """Return a state with an archive that has waited for so long."""
    return a_snapshot(destinations=(a_destination(pending=1, pending_bytes=10, oldest=NOW - age, **fields),))


def paused(age: timedelta, **fields: Any) -> Snapshot:
    fields = {"reason": Reason.CONNECT, "error": "refused", "since": NOW - age, **fields}
    return a_snapshot(destinations=(a_destination(circuit=CircuitState.PAUSED, **fields),))


def a_certificate(days: float, name: str = "vault", role: str = "client") -> CertificateSnapshot:
    left = timedelta(days=days)
    return CertificateSnapshot(name, role, "/c.pem", NOW + left, CertificateLife(left, CertificateLimits()))


def certified(*certificates: CertificateSnapshot, **fields: Any) -> Snapshot:
    return a_snapshot(certificates=certificates, **fields)


def a_problem(reason: str, files: int = 1) -> ProblemSnapshot:
    return ProblemSnapshot("switches", reason, files, NOW, "r1", "Permission denied", "chmod it")


def an_overdue_device(number: int = 1) -> OverdueDevice:
    return OverdueDevice("switches", f"r{number}", None, NOW - HOUR)


@pytest.mark.parametrize(
    ("snapshot", "level", "words"),
    [
        (a_snapshot(), HealthLevel.OK, "OK - 0 pending, none rejected"),
        (waiting(HOUR / 2), HealthLevel.OK, "OK - 1 pending"),
        (waiting(HOUR), HealthLevel.WARNING, "the oldest pending archive has waited for 1 h"),
        (waiting(6 * HOUR), HealthLevel.CRITICAL, "the oldest pending archive has waited for 6 h"),
        (waiting(72 * HOUR), HealthLevel.CRITICAL, "archive has waited for 3 d"),
        (
            a_snapshot(problems=(a_problem("unreadable", 5),)),
            HealthLevel.WARNING,
            "WARNING - 5 files of switches: unreadable",
        ),
        (
            a_snapshot(problems=(a_problem("unreadable"), a_problem(FOLDER_FAILED))),
            HealthLevel.CRITICAL,
            "CRITICAL - the folder of the drop switches cannot be used: Permission denied; 1 file of",
        ),
        (paused(HOUR / 60), HealthLevel.WARNING, "vault has been paused for 1 min"),
        (paused(6 * HOUR), HealthLevel.CRITICAL, "vault has been paused for 6 h"),
        (
            paused(HOUR / 60, reason=Reason.LOCAL_FILES),
            HealthLevel.CRITICAL,
            "its CA, certificate or key cannot be used (`backupd check`)",
        ),
        (a_snapshot(rejected=2), HealthLevel.WARNING, "WARNING - 2 archives rejected"),
        (certified(a_certificate(14)), HealthLevel.OK, "OK"),
        (certified(a_certificate(13.9)), HealthLevel.WARNING, "certificate of vault expires in 13 days"),
        (certified(a_certificate(2)), HealthLevel.CRITICAL, "the certificate of vault expires in 2 days"),
        (certified(a_certificate(-1)), HealthLevel.CRITICAL, "the certificate of vault has expired"),
        (
            certified(a_certificate(2, role="server")),
            HealthLevel.CRITICAL,
            "the server certificate of vault expires in 2 days",
        ),
        (a_snapshot(overdue=(an_overdue_device(),)), HealthLevel.WARNING, "overdue: r1 (switches)"),
        (
            a_snapshot(overdue=tuple(map(an_overdue_device, range(12)))),
            HealthLevel.WARNING,
            "r9 (switches) and 2 more",
        ),
        (
            certified(a_certificate(1, "v"), rejected=1),
            HealthLevel.CRITICAL,
            "v expires in 24 h; 1 archive rejected",
        ),
        (
            a_snapshot(daemon_problems=(DaemonProblem("configuration", NOW, "refused"),)),
            HealthLevel.WARNING,
            "WARNING - configuration: refused",
        ),
    ],
)
def test_the_worst_problem_comes_first_and_sets_the_exit_code(
    snapshot: Snapshot, level: HealthLevel, words: str
) -> None:
    found, line = plugin_line(snapshot, alarms(snapshot, NOW, LIMITS), NOW, LIMITS)
    assert found is level
    assert line.startswith(level.name + " - ")
    assert words in line


def test_a_daemon_that_does_not_run_is_critical() -> None:
    snapshot = a_snapshot(rejected=1)
    found = alarms(snapshot, NOW + 9 * HOUR, LIMITS, is_running=False)
    level, line = plugin_line(snapshot, found, NOW, LIMITS)
    assert (level, line.partition(" |")[0]) == (2, "CRITICAL - the daemon is not running; 1 archive rejected")


def test_a_running_daemon_with_an_old_state_hangs() -> None:
    assert alarms(a_snapshot(), NOW + timedelta(minutes=3), LIMITS) == []
    [alarm] = alarms(a_snapshot(), NOW + timedelta(minutes=4), LIMITS)
    assert alarm.level is HealthLevel.CRITICAL
    assert alarm.text == "the daemon hangs: its last state is 4 min old"
    rare = a_snapshot(heartbeat_every=timedelta(days=1))
    assert alarms(rare, NOW + timedelta(minutes=15), LIMITS) == []
    assert [alarm.subject for alarm in alarms(rare, NOW + timedelta(minutes=16), LIMITS)] == ["hung"]
    [alarm] = alarms(None, NOW, LIMITS)
    assert (alarm.level, alarm.text) == (HealthLevel.CRITICAL, "the daemon hangs: it has no state yet")
    assert plugin_line(None, [alarm], NOW, LIMITS) == (2, f"CRITICAL - {alarm.text}")


# pauses by people


def a_hold(kind: str = "destination", name: str = "vault", *, ends: bool = True) -> OperatorPause:
    return OperatorPause(kind, name, NOW - HOUR, NOW + HOUR if ends else None, "anna", "new disks")


def test_a_hold_with_an_end_is_shown_and_no_alarm() -> None:
    snapshot = waiting(9 * HOUR, circuit=CircuitState.PAUSED, held=a_hold())
    assert alarms(snapshot, NOW, LIMITS) == []
    level, line = plugin_line(snapshot, [], NOW, LIMITS)
    assert level is HealthLevel.OK
    assert "1 pending, none rejected; vault is paused by anna until 2026-" in line
    assert ": new disks |" in line


def test_a_hold_without_an_end_is_a_warning() -> None:
    [alarm] = alarms(waiting(9 * HOUR, held=a_hold(ends=False)), NOW, LIMITS)
    assert (alarm.kind, alarm.level, alarm.text) == (
        AlarmKind.HELD, HealthLevel.WARNING, "vault is paused by anna: new disks",
    )  # fmt: skip
    assert "backupd resume vault" in alarm.hint


def test_only_archives_that_no_hold_delays_are_late() -> None:
    old, new = NOW - 9 * HOUR, NOW - HOUR / 2
    held = DropSnapshot("switches", "/s", 1, 1, old, held=a_hold("drop", "switches"))
    vault = a_destination(pending=2, oldest=old)
    free = DropSnapshot("routers", "/r", 1, 1, new)
    assert alarms(a_snapshot(drops=(held, free), destinations=(vault,)), NOW, LIMITS) == []
    late = DropSnapshot("routers", "/r", 1, 1, NOW - 2 * HOUR)
    [alarm] = alarms(a_snapshot(drops=(held, late), destinations=(vault,)), NOW, LIMITS)
    assert alarm.text == "the oldest pending archive has waited for 2 h"
    assert alarms(a_snapshot(drops=(held,), destinations=(vault,)), NOW, LIMITS) == []


def test_the_performance_data_follows_a_single_vertical_bar() -> None:
    vault = a_destination("a|b", pending=3, pending_bytes=10, oldest=NOW - 90 * HOUR / 60)
    down = a_destination("down", circuit=CircuitState.PAUSED, since=NOW - HOUR)
    snapshot = a_snapshot(
        destinations=(vault, down),
        certificates=(a_certificate(100, "x"), a_certificate(20, "y"), a_certificate(1, "z", "server")),
        overdue=(OverdueDevice("switches", "r|1", None, NOW),),
        problems=(a_problem("unreadable", 5),),
    )
    _, line = plugin_line(snapshot, alarms(snapshot, NOW, LIMITS), NOW, LIMITS)
    text, numbers = line.split("|")
    assert "r/1 (switches)" in text
    assert numbers.split() == [
        "pending=3",
        "pending_bytes=10B",
        "oldest=5400s;3600;21600",
        "rejected=0",
        "paused=1",
        "overdue=1",
        "problems=5",
        "certificate_days=20;14:;3:",
    ]
