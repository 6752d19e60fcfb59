"""A ledger as that of a site with some devices after some weeks, for screenshots and tests of the page."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from backupd.config.models import Config
from backupd.core.certificate_life import CertificateLimits, Validity
from backupd.core.circuit import CircuitState
from backupd.core.devices import DeviceExpectation, overdue_by
from backupd.core.names import as_text
from backupd.core.policy import Reason, rule_of
from backupd.core.snapshot import (
    CertificateSnapshot,
    DestinationSnapshot,
    DropSnapshot,
    OperatorPause,
    OverdueDevice,
    ProblemSnapshot,
    Snapshot,
    Upload,
)
from backupd.ledger.port import Backlog, DispositionResult, FileCandidate, QueueState, TrackedDevice
from backupd.ledger.sqlite.connection import LOCK_NAME, open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from tests.factories import a_claim_result, a_fingerprint, delivered, rejected

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
KIB = 1024
DAILY = timedelta(hours=26)
SWITCHES = [
    *(f"core-switch-{n}" for n in (1, 2)),
    *(f"access-{floor}-{n}" for floor in "abc" for n in (1, 2, 3)),
]
FIREWALLS = ["fw-branch-north", "fw-branch-south", "fw-edge-1", "fw-edge-2"]
DESTINATIONS = ("vault", "offsite")
DROPS = ("switches", "firewalls", "wireless", "people")


@dataclass(frozen=True, slots=True)
class Sent:
    """An archive that a device sends, and whether each destination accepts it; None while it is pending."""

    at: datetime
    drop: str
    device: str
    name: str
    size: int
    accepted: tuple[bool | None, ...]


def a_config(base: Path, drops: Sequence[str], every: timedelta = DAILY) -> Config:
    """Return a configuration with these drops, whose devices are the first directory of a path."""
    hours = f"{every // HOUR}h"
    by_device = {"label_pattern": "(?P<device>[^/]+)/.*", "expect": {"every": hours, "by": "{device}"}}
    return Config.model_validate(
        {
            "state_dir": base,
            "drop": {name: {"path": f"/srv/backups/{name}", **by_device} for name in drops},
            "destination": {name: {"url": f"https://{name}.example.net/v1/upload"} for name in DESTINATIONS},
        }
    )


def fill(ledger: SqliteLedger, archives: Sequence[Sent]) -> None:
    """Queue archives at their times, oldest first, and record their outcomes."""
    for sent in archives:
        path = f"{sent.device}/{sent.name}".lstrip("/").encode()
        tracked = TrackedDevice(sent.device, 0.5) if sent.drop != "people" else None
        candidate = FileCandidate(sent.drop, path, a_fingerprint(size=sent.size), tracked)
        ledger.enqueue([candidate], DESTINATIONS, sent.at)
        for destination, is_accepted in zip(DESTINATIONS, sent.accepted, strict=True):
            if is_accepted is None:
                continue
            outcome = delivered(path) if is_accepted else rejected()
            done = sent.at + timedelta(minutes=2)
            claims = ledger.claim(destination, done)
            result = ledger.record([a_claim_result(claims[-1], outcome, now=done)], done)
            stewardship = ledger.stewardship((sent.drop,))
            moved = [
                DispositionResult(each.archive.id, b"%s/%s" % (each.state.encode(), path))
                for each in result.completed
            ]
            ledger.record_dispositions(moved, [], stewardship, done)


@contextmanager
def a_showcase(base: Path, now: datetime) -> Iterator[Config]:
    """Create the ledger of a site at `now` below `base`, as if its daemon was running, until the end."""
    config = a_config(base, DROPS)
    with closing(SqliteLedger(open_ledger(base).connection)) as ledger:
        start = now - 45 * DAY
        ledger.set_expectations(
            {
                "switches": DeviceExpectation(DAILY, "{device}", tuple(SWITCHES)),
                "firewalls": DeviceExpectation(DAILY, "{device}", tuple(FIREWALLS)),
                "wireless": DeviceExpectation(8 * HOUR),
            },
            start,
        )
        fill(ledger, _archives(now))
        ledger.save_snapshot(_snapshot(ledger, now))
        with open(base / LOCK_NAME, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(str(os.getpid()))
            lock.flush()
            yield config


def _archives(now: datetime) -> list[Sent]:
    archives = []
    for back in range(40, -1, -1):
        midnight = (now - back * DAY).replace(hour=0, minute=0)
        for number, device in enumerate(SWITCHES):
            archives += _switch_backup(device, back, midnight + HOUR + number * timedelta(minutes=19))
        for number, device in enumerate(FIREWALLS):
            archives += _firewall_backup(device, back, midnight + 5 * HOUR + number * timedelta(minutes=25))
        for hour in (0, 6, 12, 18):
            at = midnight + hour * HOUR + timedelta(minutes=30)
            size = 3100 * KIB + 977 * (back * 7 % 19 - hour)
            accepted = (True, None if back == 0 and hour > 0 else True)
            archives.append(Sent(at, "wireless", "", f"controller-{at:%Y%m%dT%H%M}.tgz", size, accepted))
        if back % 9 == 4:
            at = midnight + 10 * HOUR
            archives.append(Sent(at, "people", "", f"site-plan-{at:%B}.zip", 31_000 * KIB, (True, True)))
    return sorted((sent for sent in archives if sent.at <= now), key=lambda sent: sent.at)


def _switch_backup(device: str, back: int, at: datetime) -> list[Sent]:
    if device == "access-b-3" and back < 4:
        return []
    size = 180 * KIB + len(device) * 977 + back * 31
    if device == "core-switch-2" and back == 12:
        size //= 6
    if device == "access-c-2" and back == 9:
        at += 8 * HOUR
    accepted = (True, None if back == 0 and at.hour > 2 else True)
    return [Sent(at, "switches", device, f"{device}-{at:%Y%m%d}.tar.gz", size, accepted)]


def _firewall_backup(device: str, back: int, at: datetime) -> list[Sent]:
    if device == "fw-branch-south" and back in (17, 18):
        return []
    accepted = (device != "fw-edge-2" or back != 6, None if back == 0 else True)
    return [Sent(at, "firewalls", device, f"{device}-{at:%Y%m%d}.conf.gz", 2400 * KIB + back * 977, accepted)]


def _snapshot(ledger: SqliteLedger, now: datetime) -> Snapshot:
    queues = ledger.queue_state(DROPS, DESTINATIONS)
    problem = ProblemSnapshot(
        "people", "still_changing", 1, now - 3 * HOUR, "video-of-rack.mp4",
        "a writer has had the file open for 3 h",
        "wait for the copy to end, or find the writer with `fuser /srv/backups/people/video-of-rack.mp4`",
    )  # fmt: skip
    upload = Upload(
        "0f3a", "people", "as-built-drawings.zip", "vault", 1, 412_000 * KIB, 268_000 * KIB,
        now - timedelta(seconds=70), 3_900 * KIB,
    )  # fmt: skip
    ends = now.replace(hour=18, minute=0, second=0)
    held = {"wireless": OperatorPause("drop", "wireless", now - HOUR, ends, "anna", "controller upgrade")}
    return Snapshot(
        now - timedelta(seconds=8),
        "gateway-1",
        "0.2.0",
        os.getpid(),
        now - 11 * DAY,
        timedelta(minutes=1),
        is_ready=True,
        drops=tuple(_drops(queues, held)),
        destinations=tuple(_destinations(queues, now)),
        uploads=(upload,),
        rejected=queues.quarantined,
        problems=(problem,),
        certificates=tuple(_certificates(now)),
        devices=len(SWITCHES) + len(FIREWALLS),
        overdue=tuple(
            OverdueDevice(device.drop, device.name, device.last_at, now - late)
            for device in ledger.possibly_overdue(now)
            if (late := overdue_by(device, now)) is not None
        ),
    )


def _drops(queues: QueueState, held: Mapping[str, OperatorPause]) -> Iterator[DropSnapshot]:
    for name in DROPS:
        backlog, newest = queues.drops.get(name, Backlog(0, 0, None)), queues.newest[name]
        yield DropSnapshot(
            name,
            f"/srv/backups/{name}",
            backlog.pending,
            backlog.pending_bytes,
            backlog.oldest,
            as_text(newest.relpath),
            newest.queued_at,
            "inotify",
            "ext4",
            held=held.get(name),
        )


def _destinations(queues: QueueState, now: datetime) -> Iterator[DestinationSnapshot]:
    for name in DESTINATIONS:
        backlog = queues.destinations.get(name, Backlog(0, 0, None))
        destination = DestinationSnapshot(
            name,
            f"https://{name}.example.net/v1/upload",
            backlog.pending,
            backlog.pending_bytes,
            backlog.oldest,
            queues.rejected.get(name, 0),
            queues.last_delivered.get(name),
            CircuitState.WORKING,
        )
        if name == "offsite":
            destination = replace(
                destination,
                circuit=CircuitState.PAUSED,
                reason=Reason.CONNECT,
                error="connection to offsite.example.net:443 timed out after 10 s",
                hint=rule_of(Reason.CONNECT).hint,
                since=now - timedelta(hours=10, minutes=40),
                until=now + timedelta(minutes=3),
            )
        yield destination


def _certificates(now: datetime) -> Iterator[CertificateSnapshot]:
    limits = CertificateLimits()
    for destination, role, path, days, lifetime in (
        ("vault", "client", "/etc/backupd/tls/client.pem", 9, 365),
        ("vault", "server", "vault.example.net:443", 61, 90),
        ("offsite", "client", "/etc/backupd/tls/offsite.pem", 212, 365),
    ):
        ends = now + days * DAY + 5 * HOUR
        life = limits.life(Validity(ends - lifetime * DAY, ends), now)
        yield CertificateSnapshot(destination, role, path, ends, life)


def fill_large(base: Path, now: datetime, devices: int, days: int) -> Config:
    """Create the ledger of a site with many devices that send a backup a day; one in fifty is missing."""
    config = a_config(base, ["switches"])
    names = [f"branch-{number % 97:02}-switch-{number:04}" for number in range(devices)]
    with closing(SqliteLedger(open_ledger(base).connection)) as ledger:
        start = now - days * DAY
        ledger.set_expectations({"switches": DeviceExpectation(DAILY, "{device}", tuple(names))}, start)
        for day in range(days):
            at = start + day * DAY + timedelta(hours=12)
            candidates = [
                FileCandidate(
                    "switches", f"{name}/{at:%Y%m%d}.cfg".encode(), a_fingerprint(), TrackedDevice(name)
                )
                for number, name in enumerate(names)
                if (number * 31 + day * 17) % 50
            ]
            ledger.enqueue(candidates, ("vault",), at)
            claims = ledger.claim("vault", at, limit=len(candidates))
            result = ledger.record([a_claim_result(claim, delivered(), now=at) for claim in claims], at)
            moved = [
                DispositionResult(each.archive.id, b"sent/%d" % each.archive.id) for each in result.completed
            ]
            ledger.record_dispositions(moved, [], ledger.stewardship(("switches",)), at)
    return config
