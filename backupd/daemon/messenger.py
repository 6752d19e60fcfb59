"""Sends notifications: a thread that follows the snapshots and events, and never delays anything else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from backupd.config.models import Config, NotifyConfig
from backupd.config.notification_files import INSTALL_HINT, has_apprise, read_urls
from backupd.core.errors import ConfigError, LedgerError
from backupd.core.notifications import (
    Draft,
    NotificationKind,
    NotificationPolicy,
    NotificationState,
    due,
    observe,
    own_problem,
    works_again,
)
from backupd.core.snapshot import Snapshot
from backupd.daemon.monitor import Monitor
from backupd.ledger.port import Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.message import render
from backupd.telemetry.sender import Envelope, send
from backupd.telemetry.thread_watchdog import ThreadWatchdog

SEVERITIES = {
    NotificationKind.PROBLEM: "failure",
    NotificationKind.REJECTED: "failure",
    NotificationKind.PAUSED: "failure",
    NotificationKind.OVERDUE: "warning",
    NotificationKind.CERTIFICATE: "warning",
    NotificationKind.RECOVERED: "success",
}
"""The type that Apprise gives to a message of each kind."""

_COUNTED = {
    events.ARCHIVE_REJECTED.name: NotificationKind.REJECTED,
    events.ARCHIVE_MISSING.name: NotificationKind.PROBLEM,
    events.DAEMON_FAILED.name: NotificationKind.PROBLEM,
    events.DAEMON_HUNG.name: NotificationKind.PROBLEM,
    events.LEDGER_RECREATED.name: NotificationKind.PROBLEM,
}
"""The events that are news by themselves; all other messages follow from the snapshots."""

_CHECK_EVERY = 1.0
"""Seconds between two checks while a message waits for its time."""

_IDLE_CHECK = 60.0
"""Seconds between two checks for reminders."""

_FIRST_RETRY, _LAST_RETRY = 5.0, 600.0
"""Seconds until a failed message is sent again; the wait doubles from the first to the last."""


@dataclass(slots=True)
class _Receiver:
    """A URL of a target, with what it knows; `saved` is the state that the ledger has."""

    target: str
    policy: NotificationPolicy
    state: NotificationState
    saved: NotificationState | None = None
    failures: int = 0
    retry_at: float = 0.0


@dataclass(slots=True)
class _Inbox:
    """What has arrived since the thread looked last: the latest snapshot, and the events to count."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    changed: threading.Event = field(default_factory=threading.Event)
    snapshot: Snapshot | None = None
    counted: list[tuple[NotificationKind, str]] = field(default_factory=list)
    targets: Mapping[str, NotifyConfig] = field(default_factory=dict)
    is_reconfigured: bool = True


class Messenger:
    """Decides and sends the messages of all targets.

    Each URL of a target is a receiver with a state of its own: one that fails or hangs has no effect on the
    others. A message that cannot be sent is decided again at its next attempt, from the state at that time.
    """

    def __init__(self, config: Config, ledger: Ledger, monitor: Monitor, log: EventLog) -> None:
        self._targets: Mapping[str, NotifyConfig] = {}
        """Those of the configuration that the thread has taken over."""
        self._ledger = ledger
        self._monitor = monitor
        self._log = log
        self._inbox = _Inbox(targets=config.notify)
        self._receivers: dict[str, _Receiver] = {}
        self._known: dict[str, NotificationState] | None = None
        """What the ledger had about receivers at the start, None if it could not be read yet."""
        self.watchdog = ThreadWatchdog("messenger")

    def configure(self, config: Config) -> None:
        """Use the targets of another configuration from now on."""
        with self._inbox.lock:
            self._inbox.targets, self._inbox.is_reconfigured = config.notify, True
        self.wake()

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Take note of a snapshot."""
        with self._inbox.lock:
            self._inbox.snapshot = snapshot
        self.wake()

    def on_event(self, event: events.Event, values: Mapping[str, Any]) -> None:
        """Take note of an event that is news by itself."""
        kind = _COUNTED.get(event.name)
        if kind is None:
            return
        text = render(event.message.partition("[; {left_out}")[0], values)
        with self._inbox.lock:
            self._inbox.counted.append((kind, text))
        self.wake()

    def wake(self) -> None:
        """Wake the thread."""
        self._inbox.changed.set()

    def run(self, stop: threading.Event) -> None:
        """Send messages until `stop` is set and `wake` called; the next run sends what is left."""
        while not stop.is_set():
            self.watchdog.alive()
            snapshot = self._take_inbox()
            if snapshot is not None and self._known is not None:
                self._step(snapshot, stop)
            self._save()
            self.watchdog.idle()
            is_waiting = self._known is None or any(map(_is_waiting, self._receivers.values()))
            self._inbox.changed.wait(_CHECK_EVERY if is_waiting else _IDLE_CHECK)
            self._inbox.changed.clear()
        self._take_inbox()
        self._save()

    def _take_inbox(self) -> Snapshot | None:
        """Bring the receivers up to date with the configuration and the events; return the last snapshot."""
        if self._known is None:
            with suppress(LedgerError):
                self._known = dict(self._ledger.notification_states())
        with self._inbox.lock:
            is_reconfigured, self._inbox.is_reconfigured = self._inbox.is_reconfigured, False
            counted, self._inbox.counted = self._inbox.counted, []
            snapshot, targets = self._inbox.snapshot, self._inbox.targets
        if self._known is None:
            with self._inbox.lock:
                self._inbox.counted = counted + self._inbox.counted
                self._inbox.is_reconfigured |= is_reconfigured
            return None
        if is_reconfigured:
            self._targets = targets
            self._add_receivers(self._known)
        for kind, text in counted:
            for receiver in self._receivers.values():
                receiver.state = receiver.state.count(kind, text)
        return snapshot

    def _add_receivers(self, known: dict[str, NotificationState]) -> None:
        """Add and remove receivers as the configuration and the files with the URLs demand it."""
        before, self._receivers = self._receivers, {}
        for name, target in self._targets.items():
            policy = NotificationPolicy(
                frozenset(map(NotificationKind, target.events)), target.every, target.remind_every
            )
            earlier = [key for key in (*before, *known) if key.rpartition("#")[0] == name]
            urls = self._urls(name)
            for number in range(1, 1 + (len(urls) or len(earlier) or 1)):
                key = f"{name}#{number}"
                state = before[key].state if key in before else known.get(key)
                saved = before[key].saved if key in before else state
                receiver = _Receiver(name, policy, state or NotificationState(), saved)
                if not urls:
                    self._note_failure(receiver)
                elif receiver.state.failing_since is not None:  # before the start as well
                    self._monitor.report(own_problem(name), "the last notification could not be sent")
                self._receivers[key] = receiver
        for key in (before.keys() | known.keys()) - self._receivers.keys():
            with suppress(LedgerError):
                self._ledger.save_notification_state(key, None)
        known.clear()
        for name in {each.target for each in before.values()} - self._targets.keys():
            self._monitor.solve(own_problem(name))

    def _urls(self, name: str) -> list[str]:
        """Return the URLs of a target; report a file that can't be used, and return none."""
        try:
            if not has_apprise():
                raise ConfigError("the library apprise is not installed", INSTALL_HINT)
            return read_urls(self._targets[name].url_file)
        except ConfigError as error:
            self._fail(name, error.message, error.hint)
            return []

    def _step(self, snapshot: Snapshot, stop: threading.Event) -> None:
        """Decide what is due, and send it."""
        now = datetime.now(UTC)
        drafts: dict[str, list[Draft]] = {}
        for key, each in self._receivers.items():
            own = own_problem(each.target)
            each.state = observe(each.state, snapshot, each.policy, now, own)
            if time.monotonic() < each.retry_at:
                continue
            if found := due(each.state, snapshot, each.policy, now, own):
                drafts[key] = found
            elif each.state.failing_since is not None:
                drafts[key] = [works_again(each.state, snapshot, now)]
        if drafts:
            self._send(drafts, stop)

    def _send(self, drafts: Mapping[str, list[Draft]], stop: threading.Event) -> None:
        """Send the drafts of each receiver, all at the same time, and note which have arrived."""
        envelopes, drafted = [], {}
        urls = {name: self._urls(name) for name in {self._receivers[key].target for key in drafts}}
        for key, of_receiver in drafts.items():
            receiver, number = self._receivers[key], int(key.rpartition("#")[2])
            if number > len(urls[receiver.target]):
                self._note_failure(receiver)
                continue
            for index, draft in enumerate(of_receiver):
                message, url = draft.message, urls[receiver.target][number - 1]
                drafted[f"{key}#{index}"] = (receiver, draft)
                severity = SEVERITIES[message.kind]
                envelopes.append(Envelope(f"{key}#{index}", url, message.subject, message.body, severity))
        errors = send(envelopes, self._cancelled(stop)) if envelopes else {}
        for key, error in sorted(errors.items(), key=lambda each: bool(each[1])):  # failures last
            self._note_result(*drafted[key], error)
        self._settle(urls)

    def _settle(self, urls: Mapping[str, list[str]]) -> None:
        """End the problem of each target without a receiver that fails; follow a changed number of URLs."""
        for name, of_target in urls.items():
            receivers = [each for each in self._receivers.values() if each.target == name]
            if of_target and len(of_target) != len(receivers):
                with self._inbox.lock:
                    self._inbox.is_reconfigured = True
            if all(each.state.failing_since is None for each in receivers):
                self._monitor.solve(own_problem(name))

    def _cancelled(self, stop: threading.Event) -> Callable[[], bool]:
        def is_cancelled() -> bool:
            self.watchdog.alive()
            return stop.is_set()

        return is_cancelled

    def _note_result(self, receiver: _Receiver, draft: Draft, error: str) -> None:
        if error:
            self._note_failure(receiver)
            hint = f"fix the URL or the service, then test it: `backupd notify --test {receiver.target}`"
            self._fail(receiver.target, error, hint)
            return
        receiver.state = draft.sent(receiver.state, datetime.now(UTC))
        receiver.failures, receiver.retry_at = 0, 0.0
        message = draft.message
        self._log.emit(events.NOTIFY_SENT, target=receiver.target, kind=message.kind, subject=message.subject)

    def _note_failure(self, receiver: _Receiver) -> None:
        receiver.state = receiver.state.failed(datetime.now(UTC))
        receiver.failures += 1
        wait = min(_FIRST_RETRY * 2 ** min(receiver.failures - 1, 16), _LAST_RETRY)
        receiver.retry_at = time.monotonic() + wait

    def _fail(self, target: str, error: str, hint: str) -> None:
        self._log.emit(events.NOTIFY_FAILED, target=target, error=error, hint=hint)
        self._monitor.report(own_problem(target), f"notifications cannot be sent: {error}", hint)

    def _save(self) -> None:
        """Save what the receivers know, where it has changed; a ledger that fails gets it the next time."""
        for key, each in self._receivers.items():
            if each.state != each.saved:
                with suppress(LedgerError):
                    self._ledger.save_notification_state(key, each.state)
                    each.saved = each.state


def _is_waiting(receiver: _Receiver) -> bool:
    state = receiver.state
    return (
        bool(state.news_since or state.tallies) or state.failing_since is not None or state != receiver.saved
    )
