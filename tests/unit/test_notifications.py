"""Which messages people get, on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from backupd.core.certificate_life import CertificateLimits, Validity
from backupd.core.circuit import CircuitState
from backupd.core.drop_problem import FOLDER_FAILED, NOT_CONFIGURED
from backupd.core.notifications import (
    MAX_EXAMPLES,
    EventTally,
    Message,
    NotificationKind,
    NotificationPolicy,
    NotificationState,
    conditions,
    due,
    observe,
    own_problem,
    works_again,
)
from backupd.core.snapshot import (
    CertificateSnapshot,
    DaemonProblem,
    DestinationSnapshot,
    OperatorPause,
    OverdueDevice,
    ProblemSnapshot,
    Snapshot,
)
from tests.factories import NOW

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
EVERYTHING = NotificationPolicy(frozenset(NotificationKind), 10 * MINUTE, DAY)

QUIET = Snapshot(
    NOW,
    "backup1.example.net",
    "1.2.3",
    7,
    NOW - HOUR,
    MINUTE,
    is_ready=True,
    destinations=(DestinationSnapshot("vault", circuit=CircuitState.WORKING),),
)


def paused(name: str = "vault", **more: object) -> DestinationSnapshot:
    return replace(
        DestinationSnapshot(
            name, "https://vault", 2, 2048, NOW, circuit=CircuitState.PAUSED, reason="connect_failed",
            error="Connection refused", hint="start it", since=NOW,
        ),
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


def with_destinations(*destinations: DestinationSnapshot) -> Snapshot:
    return replace(QUIET, destinations=destinations)


def a_problem(files: int = 1, reason: str = "unreadable", drop: str = "switches") -> ProblemSnapshot:
    return ProblemSnapshot(drop, reason, files, NOW, "core-1.cfg", "Permission denied", "chmod it")


def with_problems(*problems: ProblemSnapshot) -> Snapshot:
    return replace(QUIET, problems=problems)


def a_certificate(left: timedelta, role: str = "client") -> CertificateSnapshot:
    life = CertificateLimits().life(Validity(NOW - 365 * DAY, NOW + left), NOW)
    return CertificateSnapshot("vault", role, "/etc/vault.pem", NOW + left, life)


class Person:
    """A receiver on a virtual clock; `messages` are those of the last call of `pass_time`."""

    def __init__(self, policy: NotificationPolicy = EVERYTHING, own: str = "") -> None:
        self.policy = policy
        self.own = own
        self.state = NotificationState()
        self.now = NOW
        self.snapshot = QUIET
        self.is_reachable = True

    def sees(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.state = observe(self.state, snapshot, self.policy, self.now, self.own)

    def after(self, duration: timedelta, step: timedelta = 10 * timedelta(seconds=1)) -> list[Message]:
        """Let time pass with the last snapshot, and return the messages that were sent meanwhile."""
        messages, until = [], self.now + duration
        while self.now < until:
            self.now = min(self.now + step, until)
            self.state = observe(self.state, self.snapshot, self.policy, self.now, self.own)
            for draft in due(self.state, self.snapshot, self.policy, self.now, self.own):
                messages.append(draft.message)
                if self.is_reachable:
                    self.state = draft.sent(self.state, self.now)
                else:
                    self.state = self.state.failed(self.now)
        return messages

    def counts(self, kind: NotificationKind, texts: Sequence[str]) -> None:
        for text in texts:
            self.state = self.state.count(kind, text)


def subjects(messages: Sequence[Message]) -> list[str]:
    return [message.subject.removeprefix("backupd backup1: ") for message in messages]


@pytest.mark.parametrize(
    ("snapshot", "kind", "subject", "over"),
    [
        (
            with_destinations(paused(pending=0, oldest=None)),
            NotificationKind.PAUSED,
            "vault paused (connect failed)",
            "vault works again",
        ),
        (
            with_problems(a_problem(12)),
            NotificationKind.PROBLEM,
            "12 files of switches: unreadable",
            "switches: the problem unreadable is solved",
        ),
        (
            with_problems(a_problem(reason=FOLDER_FAILED)),
            NotificationKind.PROBLEM,
            "folder of switches unusable (folder failed)",
            "switches: the problem folder failed is solved",
        ),
        (
            with_problems(a_problem(3, NOT_CONFIGURED, "destination:old")),
            NotificationKind.PROBLEM,
            "archives wait for destination:old (not configured)",
            "destination:old: the problem not configured is solved",
        ),
        (
            replace(QUIET, daemon_problems=(DaemonProblem("configuration", NOW, "unknown key", "fix it"),)),
            NotificationKind.PROBLEM,
            "problem of configuration",
            "configuration: the problem is solved",
        ),
        (
            replace(QUIET, rejected=7),
            NotificationKind.REJECTED,
            "7 archives in quarantine",
            "no archive is in quarantine any more",
        ),
        (
            replace(QUIET, overdue=(OverdueDevice("switches", "core-1", NOW - DAY, NOW),)),
            NotificationKind.OVERDUE,
            "core-1 overdue",
            "core-1 (switches): an archive arrived, or none is expected any more",
        ),
        (
            replace(QUIET, overdue=(OverdueDevice("switches", "", None, NOW),)),
            NotificationKind.OVERDUE,
            "switches overdue",
            "the drop switches: an archive arrived, or none is expected any more",
        ),
        (
            replace(QUIET, certificates=(a_certificate(5 * DAY),)),
            NotificationKind.CERTIFICATE,
            "client certificate of vault expires in 5 days",
            "the client certificate of vault was renewed",
        ),
        (
            replace(QUIET, certificates=(a_certificate(-DAY, "server"),)),
            NotificationKind.CERTIFICATE,
            "server certificate of vault has expired",
            "the server certificate of vault was renewed",
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_each_trouble_is_one_message_a_reminder_a_day_and_one_all_clear(
    snapshot: Snapshot, kind: NotificationKind, subject: str, over: str
) -> None:
    person = Person()
    person.sees(snapshot)

    assert [(m.kind, *subjects([m])) for m in person.after(HOUR)] == [(kind, subject)]
    assert subjects(person.after(DAY, MINUTE)) == [f"still {subject}"]
    assert subjects(person.after(DAY, MINUTE)) == [f"still {subject}"]

    person.sees(replace(QUIET, taken_at=person.now))
    assert [(m.kind, *subjects([m])) for m in person.after(HOUR)] == [(NotificationKind.RECOVERED, over)]
    assert person.after(2 * DAY, MINUTE) == []


def test_nothing_is_sent_about_a_quiet_daemon() -> None:
    person = Person()
    person.sees(replace(QUIET, certificates=(a_certificate(300 * DAY),)))

    assert list(conditions(person.snapshot)) == []
    assert person.after(2 * DAY, MINUTE) == []


def test_the_body_has_the_trouble_its_time_its_fix_and_the_command() -> None:
    person = Person()
    person.sees(with_destinations(paused(oldest=NOW - 2 * HOUR)))

    [message] = person.after(MINUTE)

    assert message.subject == "backupd backup1: vault paused (connect failed)"
    assert message.body.splitlines() == [
        "vault is paused: Connection refused; 2 archives (2.0 KiB) wait, the oldest for 2 h",
        "  since: 2026-03-04 05:06 UTC",
        "  fix: start it",
        "",
        "On backup1.example.net: sudo backupd status, then sudo -u backupd backupd check",
        "backupd 1.2.3, 2026-03-04 05:06 UTC",
    ]


def test_a_trouble_that_ends_within_the_first_half_minute_is_none() -> None:
    person = Person()
    person.sees(with_destinations(paused()))
    assert person.after(20 * timedelta(seconds=1)) == []
    person.sees(QUIET)

    assert person.after(DAY, MINUTE) == []


def test_a_wave_of_rejected_archives_is_one_message_with_ten_examples() -> None:
    person = Person()
    person.counts(NotificationKind.REJECTED, [f"core-{n}.cfg was rejected" for n in range(20)])
    person.after(10 * timedelta(seconds=1))
    person.counts(NotificationKind.REJECTED, [f"core-{n}.cfg was rejected" for n in range(20, 50)])
    person.sees(replace(QUIET, rejected=50))

    [message] = person.after(HOUR)

    assert subjects([message]) == ["50 archives rejected"]
    assert message.body.count("was rejected") == MAX_EXAMPLES
    assert "and 40 more" in message.body
    assert "50 archives in quarantine" in message.body


def test_one_rejected_archive_is_named_in_the_subject() -> None:
    person = Person()
    person.counts(NotificationKind.REJECTED, ["core-1.cfg was rejected by vault: HTTP 400"])

    assert subjects(person.after(MINUTE)) == ["core-1.cfg was rejected by vault: HTTP 400"]


def test_the_quarantine_is_no_news_after_the_message_about_its_archives() -> None:
    person = Person()
    person.counts(NotificationKind.REJECTED, ["core-1.cfg was rejected"])
    assert len(person.after(MINUTE)) == 1

    person.sees(replace(QUIET, rejected=1))  # the file is moved a moment later
    assert person.after(HOUR) == []
    person.sees(QUIET)
    assert subjects(person.after(MINUTE)) == ["no archive is in quarantine any more"]


def test_further_troubles_of_a_kind_wait_for_ten_minutes_and_are_one_message() -> None:
    person = Person()
    person.sees(with_destinations(paused("a")))
    assert len(person.after(MINUTE)) == 1

    person.sees(with_destinations(*map(paused, "abc")))
    assert person.after(8 * MINUTE) == []
    [message] = person.after(2 * MINUTE)
    assert subjects([message]) == ["2 destinations paused"]
    assert "Reported before, and not over (1):\n\na is paused:" in message.body
    assert "b is paused" in message.body


def test_kinds_do_not_wait_for_each_other() -> None:
    person = Person()
    person.sees(with_destinations(paused()))
    assert len(person.after(MINUTE)) == 1
    person.sees(replace(with_destinations(paused()), rejected=1))

    assert [m.kind for m in person.after(MINUTE)] == [NotificationKind.REJECTED]


def test_more_files_with_a_problem_are_news_and_fewer_are_not() -> None:
    person = Person()
    person.sees(with_problems(a_problem(5)))
    assert len(person.after(MINUTE)) == 1
    person.sees(with_problems(a_problem(2)))
    assert person.after(HOUR) == []
    person.sees(with_problems(a_problem(6)))

    assert subjects(person.after(MINUTE)) == ["6 files of switches: unreadable"]


def test_a_certificate_is_news_again_when_it_gets_critical_and_expires() -> None:
    person = Person()
    sent = []
    for days in (20, 10, 9, 2, 1, -1, -2):
        person.sees(replace(QUIET, certificates=(a_certificate(days * DAY),)))
        sent += subjects(person.after(HOUR))

    assert [subject.partition("vault ")[2] for subject in sent] == [
        "expires in 10 days",
        "expires in 2 days",
        "has expired",
    ]


def test_a_destination_that_flaps_yields_one_message_of_each_kind_in_ten_minutes() -> None:
    person = Person()
    sent: list[Message] = []
    for _ in range(30):
        person.sees(with_destinations(paused()))
        sent += person.after(MINUTE)
        person.sees(QUIET)
        sent += person.after(MINUTE)

    by_kind = {kind: sum(m.kind is kind for m in sent) for kind in NotificationKind}
    assert by_kind[NotificationKind.PAUSED] <= 6
    assert by_kind[NotificationKind.RECOVERED] <= 6
    assert sum(by_kind.values()) == len(sent)


def test_all_clears_are_collected_in_one_message() -> None:
    person = Person()
    person.sees(with_destinations(*map(paused, "abc")))
    person.after(MINUTE)
    person.sees(with_destinations(*(DestinationSnapshot(n, circuit=CircuitState.WORKING) for n in "abc")))

    [message] = person.after(HOUR)

    assert subjects([message]) == ["3 troubles over"]
    assert all(f"{name} works again" in message.body for name in "abc")


def test_an_unknown_trouble_has_no_all_clear() -> None:
    person = Person()
    person.sees(with_destinations(paused()))
    person.after(20 * timedelta(seconds=1))
    person.sees(QUIET)

    assert person.after(HOUR) == []


@pytest.mark.parametrize("kind", NotificationKind)
def test_kinds_that_a_target_does_not_have_are_not_sent(kind: NotificationKind) -> None:
    person = Person(replace(EVERYTHING, kinds=frozenset({kind})))
    person.sees(
        replace(
            with_destinations(paused()),
            problems=(a_problem(),),
            rejected=1,
            overdue=(OverdueDevice("switches", "core-1", None, NOW),),
            certificates=(a_certificate(DAY),),
        )
    )
    for each in NotificationKind:
        if each is not NotificationKind.RECOVERED:
            person.counts(each, ["an event"])
    sent = person.after(MINUTE)
    person.sees(QUIET)
    sent += person.after(DAY, MINUTE)

    expected = [] if kind is NotificationKind.RECOVERED else [kind]
    assert [message.kind for message in sent] == expected
    assert not person.state.reported
    assert not person.state.tallies


def test_a_pause_that_a_person_requested_is_no_trouble_and_no_all_clear() -> None:
    person = Person()
    held = OperatorPause("destination", "vault", NOW)
    person.sees(with_destinations(paused(held=held)))
    assert person.after(HOUR) == []

    person.sees(with_destinations(paused()))
    assert len(person.after(MINUTE)) == 1
    person.sees(with_destinations(paused(held=held)))
    assert person.after(HOUR) == []
    person.sees(QUIET)
    assert subjects(person.after(MINUTE)) == ["vault works again"]


def restarted(now: datetime, destination: DestinationSnapshot) -> Snapshot:
    return replace(with_destinations(destination), started_at=now)


def test_a_restart_repeats_no_message_and_sends_no_all_clear_too_early() -> None:
    person = Person()
    person.sees(with_destinations(paused()))
    assert len(person.after(MINUTE)) == 1
    start = person.now

    working = DestinationSnapshot("vault", circuit=CircuitState.WORKING, last_delivered=NOW)
    person.sees(restarted(start, working))  # it has not been tried yet
    assert person.after(HOUR) == []
    person.sees(restarted(start, paused()))
    assert person.after(HOUR) == []
    person.sees(restarted(start, replace(working, last_delivered=person.now)))
    assert subjects(person.after(MINUTE)) == ["vault works again"]


def test_an_outage_over_a_restart_ends_without_a_delivery_too() -> None:
    """In the same run a destination leaves its pause only if it works, as after it rejected an archive."""
    person = Person()
    person.sees(with_destinations(paused()))
    person.after(MINUTE)
    start = person.now
    person.sees(restarted(start, paused()))
    person.after(MINUTE)
    person.sees(restarted(start, DestinationSnapshot("vault", circuit=CircuitState.WORKING)))

    assert subjects(person.after(MINUTE)) == ["vault works again"]


@pytest.mark.parametrize("destinations", [(), (DestinationSnapshot("vault", pending=3),)])
def test_a_destination_that_was_removed_is_no_trouble_any_more(
    destinations: tuple[DestinationSnapshot, ...],
) -> None:
    person = Person()
    person.sees(with_destinations(paused()))
    person.after(MINUTE)
    person.sees(replace(QUIET, started_at=person.now, destinations=destinations))

    assert len(person.after(MINUTE)) == 1


def test_a_message_that_fails_is_sent_later_as_things_are_then() -> None:
    person = Person()
    person.is_reachable = False
    person.sees(with_destinations(paused()))
    assert len(person.after(MINUTE)) > 1  # each attempt
    failing_since = person.state.failing_since
    assert failing_since is not None
    person.sees(with_destinations(paused(), paused("annex")))
    person.is_reachable = True

    assert subjects(person.after(10 * MINUTE)) == ["2 destinations paused"]
    assert person.state.failing_since is None


def test_a_trouble_that_ended_before_its_message_could_be_sent_has_no_all_clear() -> None:
    person = Person()
    person.is_reachable = False
    person.sees(with_destinations(paused()))
    person.after(MINUTE)
    person.sees(QUIET)
    person.is_reachable = True
    assert person.after(HOUR) == []

    draft = works_again(person.state, QUIET, person.now)
    person.state = draft.sent(person.state, person.now)
    assert subjects([draft.message]) == ["notifications arrive again"]
    assert person.state.failing_since is None


def test_a_target_gets_no_message_that_its_own_messages_fail() -> None:
    problem = DaemonProblem(own_problem("ops"), NOW, "refused")
    snapshot = replace(QUIET, daemon_problems=(problem,))
    person, other = Person(own=own_problem("ops")), Person(own=own_problem("boss"))
    for each in (person, other):
        each.sees(snapshot)

    assert person.after(HOUR) == []
    assert subjects(other.after(HOUR)) == ["problem of notify.ops"]


def test_events_that_arrive_while_a_message_is_sent_are_in_the_next_one() -> None:
    person = Person()
    person.counts(NotificationKind.REJECTED, ["a was rejected"] * 12)
    person.after(20 * timedelta(seconds=1))
    person.now += MINUTE
    person.state = observe(person.state, QUIET, person.policy, person.now)
    [draft] = due(person.state, QUIET, person.policy, person.now)
    person.counts(NotificationKind.REJECTED, ["b was rejected"])

    person.state = draft.sent(person.state, person.now)

    assert person.state.tallies == {NotificationKind.REJECTED: EventTally(1, ())}
    assert subjects(person.after(HOUR)) == ["1 archive rejected"]


def test_a_clock_that_is_set_back_delays_no_message() -> None:
    person = Person()
    person.sees(with_destinations(paused("a")))
    person.after(MINUTE)
    person.now -= 30 * DAY
    person.sees(with_destinations(paused("a"), paused("b")))

    assert "b is paused" in person.after(2 * MINUTE)[-1].body


def test_names_and_errors_are_one_printable_line_without_markup() -> None:
    hostile = "a\r\nBcc: x@evil\n<b>\u202e@everyone <!channel>" + "x" * 2000
    person = Person()
    person.sees(
        replace(
            with_destinations(paused(error=hostile)),
            problems=(replace(a_problem(), example=hostile, error=hostile, hint=hostile),),
            overdue=(OverdueDevice("switches", hostile, None, NOW),),
        )
    )
    person.counts(NotificationKind.REJECTED, [hostile])

    for message in person.after(MINUTE):
        assert message.subject.isprintable()
        assert len(message.subject) <= 100
        assert all(line.isprintable() and len(line) < 420 for line in message.body.splitlines())
        assert not set("<>@\r\u202e") & set(message.subject + message.body)
