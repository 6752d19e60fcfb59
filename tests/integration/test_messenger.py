"""The messenger follows its configuration, files and ledger; the hook runner drops what is too much."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from backupd.config.models import Config
from backupd.core.circuit import CircuitState
from backupd.core.notifications import NotificationState
from backupd.core.snapshot import DaemonProblem, DestinationSnapshot, Snapshot
from backupd.daemon.hook_runner import MAX_QUEUED, HookRunner
from backupd.daemon.messenger import Messenger
from backupd.daemon.monitor import Monitor
from backupd.ledger.port import Ledger
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry import events
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.notification_servers import Webhook, a_webhook
from tests.stage import until
from tests.unit.config_files import a_file, read


class Problems:
    """The part of a `Monitor` that the messenger uses."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def report(self, subject: str, error: str, _hint: str = "") -> None:
        self.found[subject] = error

    def solve(self, subject: str) -> None:
        self.found.pop(subject, None)


class Office:
    """A messenger with its ledger, log and problems; each configuration has URL files below `base`."""

    def __init__(self, base: Path, ledger: Ledger) -> None:
        self.base = base
        self.ledger = ledger
        self.problems = Problems()
        self.log_path = base / "log"
        self.log = EventLog(
            LineWriter(os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)), log_format="json"
        )

    def configure(self, **urls: list[str]) -> Config:
        tables = []
        for name, lines in urls.items():
            file = self.base / f"{name}.urls"
            file.write_text("\n".join(lines))
            file.chmod(0o600)
            tables.append(f'[notify.{name}]\nurl_file = "{file}"\nevery = "1s"\n')
        return read(a_file(rest="\n".join(tables)))

    def events(self, name: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        return [line for line in lines if line["event"] == name]

    @contextmanager
    def running(self, config: Config) -> Iterator[Messenger]:
        messenger, stop = (
            Messenger(config, self.ledger, cast("Monitor", self.problems), self.log),
            threading.Event(),
        )
        thread = threading.Thread(target=messenger.run, args=(stop,))
        thread.start()
        try:
            yield messenger
        finally:
            stop.set()
            messenger.wake()
            thread.join()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    (tmp_path / "state").mkdir()
    ledger = SqliteLedger(open_ledger(tmp_path / "state").connection)
    yield Office(tmp_path, ledger)
    ledger.close()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with a_webhook() as server:
        yield server


def a_snapshot(*problems: DaemonProblem, is_paused: bool = False) -> Snapshot:
    now = datetime.now(UTC)
    state = CircuitState.PAUSED if is_paused else CircuitState.WORKING
    vault = DestinationSnapshot("vault", circuit=state, reason="connect_failed")
    return Snapshot(
        now, "host", "1", 1, now - timedelta(hours=1), timedelta(minutes=1), is_ready=True,
        destinations=(vault,), daemon_problems=problems,
    )  # fmt: skip


def about(webhook: Webhook, path: str) -> Callable[[], list[str]]:
    return lambda: [body["title"] for at, body in webhook.requests if at == f"/{path}"]


def test_a_url_that_is_added_to_the_file_gets_messages_after_the_next_one(
    office: Office, webhook: Webhook
) -> None:
    config = office.configure(ops=[webhook.url("one")])
    with office.running(config) as messenger:
        messenger.on_snapshot(a_snapshot(is_paused=True))
        until(about(webhook, "one"), "the message for the first URL")
        office.configure(ops=[webhook.url("one"), webhook.url("two")])
        messenger.on_snapshot(a_snapshot())
        until(lambda: len(about(webhook, "one")()) == 2, "the all-clear")
        messenger.on_snapshot(a_snapshot(is_paused=True))
        until(about(webhook, "two"), "the message for the second URL")

    assert office.ledger.notification_states().keys() == {"ops#1", "ops#2"}


def test_a_target_that_is_removed_is_forgotten_with_its_problem(office: Office, webhook: Webhook) -> None:
    webhook.status = 500
    config = office.configure(ops=[webhook.url("ops")], boss=[webhook.url("boss")])
    with office.running(config) as messenger:
        messenger.on_snapshot(a_snapshot(is_paused=True))
        until(lambda: len(office.problems.found) == 2, "the problems of both")
        assert office.problems.found.keys() == {"notify.ops", "notify.boss"}
        messenger.configure(office.configure(ops=[webhook.url("ops")]))
        until(lambda: len(office.problems.found) == 1, "the end of one problem")

    assert office.ledger.notification_states().keys() == {"ops#1"}


def test_a_target_that_failed_before_the_start_is_a_problem_until_it_works(
    office: Office, webhook: Webhook
) -> None:
    office.ledger.save_notification_state("ops#1", NotificationState().failed(datetime.now(UTC)))
    with office.running(office.configure(ops=[webhook.url("ops")])) as messenger:
        until(lambda: office.problems.found, "the problem")
        messenger.on_snapshot(a_snapshot())
        until(lambda: not office.problems.found, "the end of the problem")

    assert about(webhook, "ops")()[0].endswith("notifications arrive again")


def test_the_failure_of_one_target_is_a_message_to_the_other(office: Office, webhook: Webhook) -> None:
    config = office.configure(ops=[webhook.url("ops")], boss=[webhook.url("boss")])
    problem = DaemonProblem("notify.ops", datetime.now(UTC), "refused")
    with office.running(config) as messenger:
        messenger.on_snapshot(a_snapshot(problem))
        until(about(webhook, "boss"), "the message")

    assert about(webhook, "boss")()[0].endswith("problem of notify.ops")
    assert about(webhook, "ops")() == []


def test_events_that_are_counted_before_a_stop_are_sent_after_the_next_start(
    office: Office, webhook: Webhook
) -> None:
    config = office.configure(ops=[webhook.url("ops")])
    with office.running(config) as messenger:
        for number in range(3):
            values = {"archive": f"core-{number}.cfg", "drop": "switches", "error": "HTTP 400"}
            messenger.on_event(events.ARCHIVE_REJECTED, values)
    with office.running(config) as messenger:
        messenger.on_snapshot(a_snapshot())
        until(about(webhook, "ops"), "the message")

    assert about(webhook, "ops")()[0].endswith("3 archives rejected")


def test_more_events_than_the_hook_can_take_are_dropped_and_counted(office: Office) -> None:
    hook = office.base / "hook"
    hook.write_text(f"#!/bin/sh\nexec cat >> {office.base}/got\n")
    hook.chmod(0o755)
    runner = HookRunner(read(a_file(top=f'on_event = ["{hook}"]')), office.log)
    for _ in range(MAX_QUEUED + 7):
        runner.on_event(events.DAEMON_READY, {})
    stop = threading.Event()
    thread = threading.Thread(target=runner.run, args=(stop,))
    thread.start()
    try:
        until((office.base / "got").exists, "the first event")
    finally:
        stop.set()
        runner.wake()
        thread.join()

    [failed] = office.events("hook.failed")
    assert failed["error"] == "7 events were not passed on, because it is too slow"
