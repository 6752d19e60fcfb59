"""Which messages people get: decided from the state of the daemon and from what they were sent before.

Each kind has at most one message in `every`, with everything that is new since the last one. A trouble that
lasts is repeated each `remind_every`, and its end is a message of the kind `recovered`, if its beginning was
one. All of it follows from a `NotificationState`, which outlives the daemon.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from backupd.core.certificate_life import CertificateLife, CertificateState
from backupd.core.drop_problem import NOT_CONFIGURED
from backupd.core.names import printable
from backupd.core.snapshot import (
    CertificateSnapshot,
    DaemonProblem,
    DestinationSnapshot,
    OverdueDevice,
    ProblemSnapshot,
    Snapshot,
)
from backupd.core.units import human_duration, human_size

MAX_EXAMPLES = 10
"""Items that a message lists; it counts the others."""

COLLECT_FOR = timedelta(seconds=30)
"""How long the first message of a kind waits for others, so that a wave of troubles is one message.

A trouble that is over by then is none, such as a connection that failed once.
"""

_MAX_SUBJECT = 100
_MAX_LINE = 400

QUARANTINE = "quarantine"


class NotificationKind(StrEnum):
    """What a message is about; the configuration has these words."""

    PROBLEM = "problem"
    REJECTED = "rejected"
    PAUSED = "paused"
    OVERDUE = "overdue"
    CERTIFICATE = "certificate"
    RECOVERED = "recovered"


@dataclass(frozen=True, slots=True)
class Condition:
    """A trouble that lasts.

    `key` identifies it; a higher `level` than before is news. `subject` is for the subject line of a message
    about it alone, `text` and `hint` are for the body, and `over` is its all-clear. A `quiet` one is news
    only before the first message of its kind, because events report it.
    """

    kind: NotificationKind
    key: str
    subject: str
    text: str
    over: str
    level: int = 0
    since: datetime | None = None
    hint: str = ""
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Reported:
    """A trouble that was part of a message; `seen_at` is when a snapshot of the running daemon had it."""

    kind: NotificationKind
    key: str
    over: str
    level: int
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class EventTally:
    """Events since the last message of their kind: their number and the first ones in words."""

    count: int = 0
    examples: tuple[str, ...] = ()

    def add(self, text: str) -> EventTally:
        """Return the tally with one more event."""
        examples = self.examples if len(self.examples) >= MAX_EXAMPLES else (*self.examples, text)
        return EventTally(self.count + 1, examples)

    def without(self, sent: EventTally) -> EventTally:
        """Return the tally of the events that arrived after `sent`, which is an earlier value of this one."""
        return EventTally(self.count - sent.count, self.examples[len(sent.examples) :])


@dataclass(frozen=True, slots=True)
class NotificationState:
    """What one receiver of messages knows, and what is to be sent.

    `sent_at` is the time of the last message of each kind, `news_since` that of the first news of a kind
    that was not sent yet. `failing_since` is when the first message in a row could not be sent.
    """

    reported: tuple[Reported, ...] = ()
    sent_at: Mapping[NotificationKind, datetime] = field(default_factory=dict)
    news_since: Mapping[NotificationKind, datetime] = field(default_factory=dict)
    tallies: Mapping[NotificationKind, EventTally] = field(default_factory=dict)
    failing_since: datetime | None = None

    def count(self, kind: NotificationKind, text: str) -> NotificationState:
        """Return the state after an event of a kind."""
        tally = self.tallies.get(kind, EventTally()).add(_cut(text))
        return replace(self, tallies={**self.tallies, kind: tally})

    def failed(self, now: datetime) -> NotificationState:
        """Return the state after a message could not be sent."""
        return replace(self, failing_since=self.failing_since or now)


@dataclass(frozen=True, slots=True)
class NotificationPolicy:
    """Which kinds a target gets, and how often."""

    kinds: frozenset[NotificationKind]
    every: timedelta
    remind_every: timedelta

    @property
    def collect_for(self) -> timedelta:
        """Return how long the first news of a kind wait for others."""
        return min(COLLECT_FOR, self.every)


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it is sent: one line of subject, and a body of plain text."""

    kind: NotificationKind
    subject: str
    body: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A message that is due, and what its receiver knows once it is sent."""

    message: Message
    reported: tuple[Reported, ...]
    over: frozenset[str]
    tally: EventTally

    def sent(self, state: NotificationState, now: datetime) -> NotificationState:
        """Return the state after the message was sent; events may have been counted in the meantime."""
        kind = self.message.kind
        new = {each.key for each in self.reported}
        reported = [each for each in state.reported if each.key not in new and each.key not in self.over]
        tallies = dict(state.tallies)
        rest = tallies.pop(kind, EventTally()).without(self.tally)
        if rest.count:
            tallies[kind] = rest
        return replace(
            state,
            reported=(*reported, *self.reported),
            sent_at={**state.sent_at, kind: now},
            news_since={other: at for other, at in state.news_since.items() if other is not kind},
            tallies=tallies,
            failing_since=None,
        )


def observe(
    state: NotificationState, snapshot: Snapshot, policy: NotificationPolicy, now: datetime, own: str = ""
) -> NotificationState:
    """Return the state after a snapshot: which kinds have news, and since when.

    `own` is the subject of the daemon's problem about the target itself.
    """
    lasting = _lasting(snapshot, policy, own)
    reported = {each.key: each for each in state.reported if each.kind in policy.kinds}
    for each in lasting:
        known = reported.get(each.key)
        if known is not None and known.seen_at < snapshot.started_at:
            reported[each.key] = replace(known, seen_at=now)
        elif known is None and each.quiet and each.kind in state.sent_at:
            reported[each.key] = _reported(each, now)
    if NotificationKind.RECOVERED not in policy.kinds:
        ended = {each.key for each in _ended(tuple(reported.values()), lasting, snapshot)}
        reported = {key: each for key, each in reported.items() if key not in ended}
    tallies = {kind: tally for kind, tally in state.tallies.items() if kind in policy.kinds}
    state = replace(state, reported=tuple(reported.values()), tallies=tallies)
    news = [kind for kind in NotificationKind if _has_news(kind, state, lasting, snapshot)]
    return replace(state, news_since={kind: state.news_since.get(kind, now) for kind in news})


def due(
    state: NotificationState, snapshot: Snapshot, policy: NotificationPolicy, now: datetime, own: str = ""
) -> list[Draft]:
    """Return the messages to send now; `state` is the result of `observe` for the same snapshot."""
    lasting = _lasting(snapshot, policy, own)
    drafts = []
    for kind in NotificationKind:
        if kind in state.news_since:  # their message has what lasts as well
            if _may_send(kind, state, policy, now):
                drafts.append(_draft(kind, state, lasting, snapshot, now))
        elif _must_remind(kind, state, lasting, policy, now):
            drafts.append(_reminder(kind, state, lasting, snapshot, now))
    return drafts


def works_again(state: NotificationState, snapshot: Snapshot, now: datetime) -> Draft:
    """Return the message that messages arrive again; to be sent while there is no other one."""
    since = state.failing_since or now
    text = f"Since {_time(since)}, notifications could not be sent here. This one has arrived."
    message = _message(NotificationKind.RECOVERED, snapshot, "notifications arrive again", [text], now)
    return Draft(message, (), frozenset(), EventTally())


def own_problem(target: str) -> str:
    """Return the subject of the daemon's problem that messages to a target cannot be sent."""
    return f"notify.{target}"


# News


def _lasting(snapshot: Snapshot, policy: NotificationPolicy, own: str) -> list[Condition]:
    own_key = f"daemon:{own}"
    return [each for each in conditions(snapshot) if each.kind in policy.kinds and each.key != own_key]


def _has_news(
    kind: NotificationKind, state: NotificationState, lasting: Sequence[Condition], snapshot: Snapshot
) -> bool:
    if kind is NotificationKind.RECOVERED:
        return any(True for _ in _ended(state.reported, lasting, snapshot))
    return kind in state.tallies or any(True for _ in _new(kind, state, lasting))


def _new(
    kind: NotificationKind, state: NotificationState, lasting: Sequence[Condition]
) -> Iterator[Condition]:
    levels = {each.key: each.level for each in state.reported}
    for each in lasting:
        if each.kind is kind and (each.key not in levels or each.level > levels[each.key]):
            yield each


def _ended(
    reported: Sequence[Reported], lasting: Sequence[Condition], snapshot: Snapshot
) -> Iterator[Reported]:
    keys = {each.key for each in lasting}
    for each in reported:
        if each.key not in keys and _is_over(each, snapshot):
            yield each


def _is_over(reported: Reported, snapshot: Snapshot) -> bool:
    """Return whether a trouble that the snapshot does not have is over.

    After a start a destination counts as working, and its certificate is not known, until it has taken an
    archive. One that a person has paused shows neither.
    """
    if reported.kind not in (NotificationKind.PAUSED, NotificationKind.CERTIFICATE):
        return True
    name = reported.key.split(":")[1]
    destination = next((each for each in snapshot.destinations if each.name == name), None)
    if destination is None or destination.circuit is None:
        return True  # it was removed from the configuration
    if destination.held is not None:
        return False
    delivered = destination.last_delivered
    return reported.seen_at >= snapshot.started_at or (delivered or reported.seen_at) >= snapshot.started_at


def _may_send(
    kind: NotificationKind, state: NotificationState, policy: NotificationPolicy, now: datetime
) -> bool:
    waited = _has_passed(state.news_since[kind], policy.collect_for, now)
    last = state.sent_at.get(kind)
    return waited and (last is None or _has_passed(last, policy.every, now))


def _must_remind(
    kind: NotificationKind,
    state: NotificationState,
    lasting: Sequence[Condition],
    policy: NotificationPolicy,
    now: datetime,
) -> bool:
    last = state.sent_at.get(kind)
    if last is None or not _has_passed(last, policy.remind_every, now):
        return False
    return any(True for _ in _repeated(kind, state, lasting))


def _repeated(
    kind: NotificationKind, state: NotificationState, lasting: Sequence[Condition]
) -> Iterator[Condition]:
    """Yield the troubles of a kind that last and were part of an earlier message."""
    known = {each.key for each in state.reported}
    yield from (each for each in lasting if each.kind is kind and each.key in known)


def _has_passed(since: datetime, duration: timedelta, now: datetime) -> bool:
    """Return whether so much time has passed; a time in the future is that of a clock that was set back."""
    return now >= since + duration or since > now


def _reported(condition: Condition, now: datetime) -> Reported:
    return Reported(condition.kind, condition.key, _cut(condition.over), condition.level, now)


# Conditions


def conditions(snapshot: Snapshot) -> Iterator[Condition]:
    """Yield every trouble in a snapshot."""
    yield from map(_of_problem, snapshot.problems)
    yield from map(_of_daemon, snapshot.daemon_problems)
    if snapshot.rejected:
        number = _number(snapshot.rejected, "archive")
        yield Condition(
            NotificationKind.REJECTED,
            QUARANTINE,
            f"{number} in quarantine",
            f"{number} in quarantine",
            "no archive is in quarantine any more",
            hint="`sudo backupd list --state rejected`, then `sudo -u backupd backupd retry ID`",
            quiet=True,
        )
    for destination in snapshot.destinations:
        if destination.is_paused and destination.held is None:
            yield _of_destination(destination, snapshot.taken_at)
    yield from map(_of_device, snapshot.overdue)
    for certificate in snapshot.certificates:
        if certificate.life.state is not CertificateState.VALID:
            yield _of_certificate(certificate)


def _of_problem(problem: ProblemSnapshot) -> Condition:
    drop, reason = problem.drop, problem.reason.replace("_", " ")
    if problem.is_critical:
        subject = f"folder of {drop} unusable ({reason})"
        text = f"the folder of the drop {drop} cannot be used: {problem.error}"
    elif problem.reason == NOT_CONFIGURED:
        subject = f"archives wait for {drop} ({reason})"
        text = f"{drop}: {problem.error}"
    else:
        example = f", such as {problem.example}" if problem.example else ""
        subject = f"{_number(problem.files, 'file')} of {drop}: {reason}"
        text = f"{subject}{example}: {problem.error}"
    return Condition(
        NotificationKind.PROBLEM,
        f"problem:{drop}:{problem.reason}",
        subject,
        text,
        f"{drop}: the problem {reason} is solved",
        problem.files,
        problem.since,
        problem.hint,
    )


def _of_daemon(problem: DaemonProblem) -> Condition:
    return Condition(
        NotificationKind.PROBLEM,
        f"daemon:{problem.subject}",
        f"problem of {problem.subject}",
        f"{problem.subject}: {problem.error}",
        f"{problem.subject}: the problem is solved",
        0,
        problem.since,
        problem.hint,
    )


def _of_destination(destination: DestinationSnapshot, now: datetime) -> Condition:
    reason = (destination.reason or "unknown").replace("_", " ")
    waiting = _number(destination.pending, "archive")
    text = f"{destination.name} is paused: {destination.error or reason}"
    if destination.oldest is not None:
        age = human_duration(max(now - destination.oldest, timedelta(0)))
        text += f"; {waiting} ({human_size(destination.pending_bytes)}) wait, the oldest for {age}"
    return Condition(
        NotificationKind.PAUSED,
        f"destination:{destination.name}",
        f"{destination.name} paused ({reason})",
        text,
        f"{destination.name} works again",
        0,
        destination.since,
        destination.hint,
    )


def _of_device(device: OverdueDevice) -> Condition:
    name = f"{device.device} ({device.drop})" if device.device else f"the drop {device.drop}"
    last = f"the last archive came at {_time(device.last_at)}" if device.last_at else "it has never sent one"
    return Condition(
        NotificationKind.OVERDUE,
        f"device:{device.drop}:{device.device}",
        f"{device.device or device.drop} overdue",
        f"{name}: no archive in time; {last}",
        f"{name}: an archive arrived, or none is expected any more",
        0,
        device.since,
        "check the backup job of the device; if it is gone: `sudo -u backupd backupd forget DEVICE`",
    )


_CERTIFICATE_LEVELS = {state: level for level, state in enumerate(CertificateState)}


def _of_certificate(certificate: CertificateSnapshot) -> Condition:
    life, role = certificate.life, certificate.role
    name = f"{role} certificate of {certificate.destination}"
    hint = "ask the operator of the destination to renew it"
    if role == "client":
        hint = f"renew {certificate.path} and its key; no restart is needed"
    return Condition(
        NotificationKind.CERTIFICATE,
        f"certificate:{certificate.destination}:{role}",
        f"{name} {_expiry(life)}",
        f"the {name} {_expiry(life)} ({_time(certificate.expires_at)})",
        f"the {name} was renewed",
        _CERTIFICATE_LEVELS[life.state],
        hint=hint,
    )


def _expiry(life: CertificateLife) -> str:
    return "has expired" if life.state is CertificateState.EXPIRED else f"expires in {life}"


# Texts

_NOUNS = {
    NotificationKind.PROBLEM: ("problem", ""),
    NotificationKind.REJECTED: ("archive", " rejected"),
    NotificationKind.PAUSED: ("destination", " paused"),
    NotificationKind.OVERDUE: ("device", " overdue"),
    NotificationKind.CERTIFICATE: ("certificate", " to renew"),
    NotificationKind.RECOVERED: ("trouble", " over"),
}

_COMMANDS = {
    NotificationKind.PROBLEM: "sudo backupd list --problems",
    NotificationKind.REJECTED: "sudo backupd list --state rejected",
    NotificationKind.PAUSED: "sudo backupd status, then sudo -u backupd backupd check",
    NotificationKind.OVERDUE: "sudo backupd status",
    NotificationKind.CERTIFICATE: "sudo -u backupd backupd check",
    NotificationKind.RECOVERED: "sudo backupd status",
}


def _draft(
    kind: NotificationKind,
    state: NotificationState,
    lasting: Sequence[Condition],
    snapshot: Snapshot,
    now: datetime,
) -> Draft:
    if kind is NotificationKind.RECOVERED:
        return _all_clear(state, lasting, snapshot, now)
    new, tally = list(_new(kind, state, lasting)), state.tallies.get(kind, EventTally())
    known = [each for each in _repeated(kind, state, lasting) if each not in new]
    items = _listed(tally.examples, tally.count)
    items += _listed([_paragraph(each) for each in new], len(new))
    if known:
        lines = [_cut(each.text) for each in known[:MAX_EXAMPLES]]
        items.append(f"Reported before, and not over ({len(known)}):")
        items += _listed(lines, len(known))
    subject = _subject(kind, tally, [*new, *([] if new or tally.count else known)])
    message = _message(kind, snapshot, subject, items, now)
    return Draft(message, tuple(_reported(each, now) for each in new), frozenset(), tally)


def _reminder(
    kind: NotificationKind,
    state: NotificationState,
    lasting: Sequence[Condition],
    snapshot: Snapshot,
    now: datetime,
) -> Draft:
    known = list(_repeated(kind, state, lasting))
    items = _listed([_paragraph(each) for each in known], len(known))
    message = _message(kind, snapshot, f"still {_subject(kind, EventTally(), known)}", items, now)
    return Draft(message, (), frozenset(), EventTally())


def _all_clear(
    state: NotificationState, lasting: Sequence[Condition], snapshot: Snapshot, now: datetime
) -> Draft:
    ended = list(_ended(state.reported, lasting, snapshot))
    kind = NotificationKind.RECOVERED
    subject = ended[0].over if len(ended) == 1 else _counted(kind, len(ended))
    items = _listed([each.over for each in ended], len(ended))
    message = _message(kind, snapshot, subject, items, now)
    return Draft(message, (), frozenset(each.key for each in ended), EventTally())


def _subject(kind: NotificationKind, tally: EventTally, shown: Sequence[Condition]) -> str:
    counted = tally.count or len(shown)
    if kind is not NotificationKind.REJECTED:
        counted = tally.count + len(shown)
    if counted == 1 and (tally.examples or shown):
        return tally.examples[0] if tally.count else shown[0].subject
    return _counted(kind, counted)


def _counted(kind: NotificationKind, count: int) -> str:
    noun, verb = _NOUNS[kind]
    return _number(count, noun) + verb


def _listed(shown: Sequence[str], count: int) -> list[str]:
    """Return the first items, and how many there are besides these."""
    rest = count - min(len(shown), MAX_EXAMPLES)
    return [*shown[:MAX_EXAMPLES], *([f"and {rest} more"] if rest else [])]


def _paragraph(condition: Condition) -> str:
    lines = [_cut(condition.text)]
    if condition.since is not None:
        lines.append(f"  since: {_time(condition.since)}")
    if condition.hint:
        lines.append(f"  fix: {_cut(condition.hint)}")
    return "\n".join(lines)


def _message(
    kind: NotificationKind, snapshot: Snapshot, subject: str, items: Iterable[str], now: datetime
) -> Message:
    last = [
        f"On {snapshot.host}: {_COMMANDS[kind]}",
        f"backupd {snapshot.version}, {_time(now)}",
    ]
    host, _, _ = snapshot.host.partition(".")
    title = _cut(f"backupd {host}: {subject}", _MAX_SUBJECT)
    return Message(kind, _harmless(title), _harmless("\n\n".join([*items, "\n".join(last)])))


_HARMLESS = str.maketrans({"<": "\u2039", ">": "\u203a", "@": "\uff20"})
"""Characters that chat programs and HTML read as tags and mentions, and similar ones."""


def _harmless(text: str) -> str:
    """Return a text that no receiver takes for HTML or a mention, whatever the names of files are."""
    return text.translate(_HARMLESS)


def _cut(text: str, length: int = _MAX_LINE) -> str:
    """Return a text as one printable line of limited length."""
    line = printable(text.replace("\n", "; "))
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _time(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
