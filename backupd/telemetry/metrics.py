"""The metrics for Prometheus: counters of events, and gauges from the last snapshot.

No label has the name of a file: their values are names of the configuration, fixed words, and overdue
devices. Each metric has the label `host`, as each line of the log has, because a file for node_exporter and a
log of several hosts have no other trace of it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.registry import Collector

from backupd.config.models import Config
from backupd.core.certificate_life import CertificateState
from backupd.core.circuit import CircuitState
from backupd.core.policy import RULES, Action
from backupd.core.snapshot import DestinationSnapshot, Snapshot
from backupd.telemetry import events
from backupd.telemetry.events import Event

Labels = tuple[str, ...]
"""The values of the labels of a series, without that of `host`."""


@dataclass(frozen=True, slots=True)
class EventCounter:
    """A counter of one event, or of all; its labels are keys of the event.

    It counts events, or adds up the values of the key `amount`.
    """

    name: str
    text: str
    event: Event | None
    labels: tuple[str, ...] = ()
    amount: str = ""


COUNTERS = (
    EventCounter("backupd_archives_queued", "Archives queued.", events.ARCHIVE_QUEUED, ("drop",)),
    EventCounter(
        "backupd_archives_delivered",
        "Archives delivered to all of their destinations.",
        events.ARCHIVE_DELIVERED,
        ("drop",),
    ),
    EventCounter(
        "backupd_archives_delivered_bytes",
        "Bytes of archives delivered to all of their destinations.",
        events.ARCHIVE_DELIVERED,
        ("drop",),
        "size_bytes",
    ),
    EventCounter(
        "backupd_archives_rejected", "Archives rejected.", events.ARCHIVE_REJECTED, ("drop", "reason")
    ),
    EventCounter(
        "backupd_archives_missing",
        "Archives removed before they were delivered.",
        events.ARCHIVE_MISSING,
        ("drop",),
    ),
    EventCounter("backupd_deliveries", "Deliveries verified.", events.DELIVERY_VERIFIED, ("destination",)),
    EventCounter(
        "backupd_delivery_bytes",
        "Bytes of verified deliveries.",
        events.DELIVERY_VERIFIED,
        ("destination",),
        "size_bytes",
    ),
    EventCounter(
        "backupd_attempts_failed",
        "Attempts to upload an archive that failed.",
        events.ATTEMPT_FAILED,
        ("destination", "reason"),
    ),
    EventCounter(
        "backupd_destination_pauses",
        "Pauses of a destination that is down or misconfigured.",
        events.DESTINATION_PAUSED,
        ("destination",),
    ),
    EventCounter("backupd_ledger_failures", "Failures of the ledger.", events.LEDGER_FAILED),
    EventCounter("backupd_daemon_failures", "Internal failures of the daemon.", events.DAEMON_FAILED),
    EventCounter("backupd_log_events", "Events by their level.", None, ("level",)),
)
_REASONS = tuple(rule.reason.value for rule in RULES)
_REJECT_REASONS = tuple(rule.reason.value for rule in RULES if rule.action is Action.REJECT)
_STATE_NUMBERS = {state: number for number, state in enumerate(CertificateState)}
"""The value of `backupd_certificate_state`: 0 valid, 1 expiring, 2 critical, 3 expired."""


class Metrics(Collector):
    """The metrics of a daemon; safe for use by several threads.

    `count` is a listener of the event log, `update` one of the monitor. `lost_lines` returns the number of
    log lines that could not be written.
    """

    def __init__(self, config: Config, host: str, version: str, lost_lines: Callable[[], int]) -> None:
        self._host = host
        self._version = version
        self._lost_lines = lost_lines
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, float]] = {counter.name: {} for counter in COUNTERS}
        self._names: dict[str, frozenset[str]] = {}
        self._snapshot: Snapshot | None = None
        self._counters: dict[str, list[EventCounter]] = {}
        for counter in COUNTERS:
            self._counters.setdefault(counter.event.name if counter.event else "", []).append(counter)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Start the series of new drops and destinations with 0, and end those of removed ones."""
        names = {"drop": frozenset(config.drop), "destination": frozenset(config.destination)}
        with self._lock:
            self._names = names
            for counter in COUNTERS:
                series = self._counts[counter.name]
                gone = [labels for labels in series if not self._is_known(counter.labels, labels)]
                for labels in gone:
                    del series[labels]
                for labels in itertools.product(*(self._values(counter, label) for label in counter.labels)):
                    series.setdefault(labels, 0)

    def count(self, event: Event, values: Mapping[str, Any]) -> None:
        """Count an event; those of drops and destinations that are not configured do not count."""
        for counter in (*self._counters.get(event.name, ()), *self._counters[""]):
            given = {"level": event.level, **values}
            labels = tuple(str(given.get(label, "")) for label in counter.labels)
            amount = values.get(counter.amount, 0) if counter.amount else 1
            with self._lock:
                if self._is_known(counter.labels, labels):
                    series = self._counts[counter.name]
                    series[labels] = series.get(labels, 0) + amount

    def update(self, snapshot: Snapshot) -> None:
        """Have the gauges show a snapshot."""
        self._snapshot = snapshot

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return the metrics in the format that an Accept header prefers, and their content type."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # the version in it is no number
            encode, content_type = choose_encoder("")
        return encode(self), content_type

    def last_exposition(self) -> bytes:
        """Return the metrics of a daemon that ends: `backupd_up` is 0 in them."""
        return generate_latest(_FinalMetrics(self))

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics of a daemon that runs."""
        yield from self.families(is_up=True)

    def families(self, *, is_up: bool) -> Iterator[Metric]:
        """Yield all metrics."""
        snapshot, now = self._snapshot, datetime.now(UTC)
        yield self._gauge("backupd_build_info", "The version.", {(self._version,): 1}, "version")
        yield self._gauge("backupd_up", "1 while the daemon runs, 0 once it was stopped.", is_up)
        yield from self._counter_families()
        lost = "Log lines that could not be written."
        yield self._counter("backupd_log_lines_lost", lost, {(): self._lost_lines()})
        cpu = "CPU time that the daemon has used."
        yield self._counter("backupd_process_cpu_seconds", cpu, {(): time.process_time()})
        if snapshot is not None:
            yield from self._of_daemon(snapshot)
            yield from self._of_drops(snapshot, now)
            yield from self._of_destinations(snapshot.destinations, now)
            yield from self._of_uploads(snapshot)
            yield from self._of_certificates(snapshot)

    def _values(self, counter: EventCounter, label: str) -> Iterable[str]:
        """Return all values that a label of a counter is known to have."""
        match label:
            case "reason":
                return _REJECT_REASONS if counter.event is events.ARCHIVE_REJECTED else _REASONS
            case "level":
                return ("debug", "info", "warning", "error")
            case _:
                return self._names[label]

    def _is_known(self, names: tuple[str, ...], labels: Labels) -> bool:
        return all(
            name not in self._names or value in self._names[name]
            for name, value in zip(names, labels, strict=True)
        )

    def _counter_families(self) -> Iterator[Metric]:
        for counter in COUNTERS:
            with self._lock:
                series = dict(self._counts[counter.name])
            yield self._counter(counter.name, counter.text, series, *counter.labels)

    def _of_daemon(self, snapshot: Snapshot) -> Iterator[Metric]:
        yield self._gauge(
            "backupd_heartbeat_timestamp_seconds",
            "Time of the last sign of life of the main loop.",
            snapshot.taken_at.timestamp(),
        )
        every = snapshot.heartbeat_every.total_seconds()
        yield self._gauge("backupd_heartbeat_interval_seconds", "`heartbeat_every`.", every)
        ready = "1 once every drop folder has been scanned since the start."
        yield self._gauge("backupd_ready", ready, snapshot.is_ready)
        yield self._gauge(
            "backupd_quarantined_archives", "Rejected archives in quarantine.", snapshot.rejected
        )
        yield self._gauge(
            "backupd_daemon_problems",
            "1 for each problem of the daemon itself.",
            {(problem.subject,): 1 for problem in snapshot.daemon_problems},
            "subject",
        )
        start = "Time of the start of the daemon."
        yield self._gauge("backupd_process_start_time_seconds", start, snapshot.started_at.timestamp())
        for name, text, value in (
            ("resident_memory_bytes", "Resident memory of the daemon.", snapshot.memory_bytes),
            ("open_fds", "Open file descriptors of the daemon.", snapshot.open_files),
            ("max_fds", "Limit of open file descriptors.", snapshot.open_files_limit),
        ):
            if value is not None:
                yield self._gauge(f"backupd_process_{name}", text, value)

    def _of_drops(self, snapshot: Snapshot, now: datetime) -> Iterator[Metric]:
        drops = [drop for drop in snapshot.drops if drop.is_configured]
        per_drop: dict[str, tuple[str, dict[Labels, float]]] = {
            "drop_pending_archives": (
                "Archives of the drop with an open delivery.",
                {(drop.name,): drop.pending for drop in drops},
            ),
            "drop_last_archive_timestamp_seconds": (
                "Time at which the last archive of the drop was queued.",
                {(drop.name,): drop.last_at.timestamp() for drop in drops if drop.last_at},
            ),
            "drop_held": (
                "1 if a person has paused the drop.",
                {(drop.name,): drop.held is not None for drop in drops},
            ),
            "watch_degraded": (
                "1 if only scans find new files of the drop.",
                {(drop.name,): bool(drop.fault) for drop in drops},
            ),
        }
        for name, (text, series) in per_drop.items():
            yield self._gauge(f"backupd_{name}", text, series, "drop")
        yield self._gauge(
            "backupd_problems",
            "Files that will not be sent, or not moved, as things are.",
            {(each.drop, each.reason): each.files for each in snapshot.problems},
            "drop",
            "reason",
        )
        yield self._gauge(
            "backupd_oldest_problem_seconds",
            "Time since the first of these problems was found.",
            {(each.drop, each.reason): _seconds(each.since, now) for each in snapshot.problems},
            "drop",
            "reason",
        )
        yield self._gauge("backupd_devices", "Known devices.", snapshot.devices)
        yield self._gauge(
            "backupd_overdue_devices", "Devices with an overdue archive.", len(snapshot.overdue)
        )
        yield self._gauge(
            "backupd_drop_overdue",
            "1 if the next archive of the device is overdue.",
            {(each.drop, each.device): 1 for each in snapshot.overdue},
            "drop",
            "device",
        )

    def _of_destinations(self, all_: Sequence[DestinationSnapshot], now: datetime) -> Iterator[Metric]:
        running = [each for each in all_ if each.circuit is not None]
        per_destination: dict[str, tuple[str, dict[Labels, float]]] = {
            "pending_deliveries": ("Open deliveries.", {(each.name,): each.pending for each in all_}),
            "pending_bytes": (
                "Bytes of the archives of open deliveries.",
                {(each.name,): each.pending_bytes for each in all_},
            ),
            "oldest_pending_seconds": (
                "Time since the oldest archive with an open delivery was queued, 0 without one.",
                {(each.name,): _seconds(each.oldest, now) for each in all_},
            ),
            "last_delivery_timestamp_seconds": (
                "Time of the last verified delivery.",
                {(each.name,): each.last_delivered.timestamp() for each in all_ if each.last_delivered},
            ),
            "destination_working": (
                "0 if the destination is down or misconfigured.",
                {(each.name,): each.circuit is CircuitState.WORKING for each in running},
            ),
            "destination_held": (
                "1 if a person has paused the destination.",
                {(each.name,): each.held is not None for each in running},
            ),
        }
        for name, (text, series) in per_destination.items():
            yield self._gauge(f"backupd_{name}", text, series, "destination")

    def _of_uploads(self, snapshot: Snapshot) -> Iterator[Metric]:
        """Yield the uploads of each configured destination, and of removed ones with an upload under way."""
        with self._lock:
            names = sorted(self._names["destination"] | {each.destination for each in snapshot.uploads})
        count: dict[Labels, float] = {(name,): 0 for name in names}
        size, sent = dict(count), dict(count)
        for each in snapshot.uploads:
            count[each.destination,] += 1
            size[each.destination,] += each.size_bytes
            sent[each.destination,] += each.sent_bytes
        for name, text, series in (
            ("uploads_in_flight", "Uploads in progress.", count),
            ("uploads_in_flight_bytes", "Bytes of the archives of uploads in progress.", size),
            ("uploads_in_flight_sent_bytes", "Bytes already sent of these.", sent),
        ):
            yield self._gauge(f"backupd_{name}", text, series, "destination")

    def _of_certificates(self, snapshot: Snapshot) -> Iterator[Metric]:
        certificates = {(each.destination, each.role): each for each in snapshot.certificates}
        yield self._gauge(
            "backupd_certificate_expiry_timestamp_seconds",
            "Time at which the certificate expires.",
            {labels: each.expires_at.timestamp() for labels, each in certificates.items()},
            "destination",
            "role",
        )
        yield self._gauge(
            "backupd_certificate_state",
            "0 valid, 1 expiring, 2 critical, 3 expired.",
            {labels: _STATE_NUMBERS[each.life.state] for labels, each in certificates.items()},
            "destination",
            "role",
        )

    def _gauge(
        self, name: str, text: str, series: Mapping[Labels, float] | float, *labels: str
    ) -> GaugeMetricFamily:
        """Return a gauge; `series` are its values by the values of `labels`, or the only value."""
        family = GaugeMetricFamily(name, text, labels=("host", *labels))
        for values, value in series.items() if isinstance(series, Mapping) else [((), series)]:
            family.add_metric((self._host, *values), float(value))
        return family

    def _counter(
        self, name: str, text: str, series: Mapping[Labels, float], *labels: str
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=("host", *labels))
        for values, value in series.items():
            family.add_metric((self._host, *values), value)
        return family


class _FinalMetrics(Collector):
    """The metrics of a daemon that ends."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families(is_up=False)


def _seconds(since: datetime | None, now: datetime) -> float:
    return max((now - since).total_seconds(), 0.0) if since else 0.0
