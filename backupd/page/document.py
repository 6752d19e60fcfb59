"""Renders the page: one HTML document, with its style and its drawings in it, and without any script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from importlib import resources
from itertools import groupby
from urllib.parse import quote

from backupd import __version__
from backupd.core.certificate_life import CertificateState
from backupd.core.health import Alarm, AlarmKind, HealthLevel, hold_text
from backupd.core.model import DeliveryState
from backupd.core.names import as_text
from backupd.core.snapshot import CertificateSnapshot, DestinationSnapshot, HourThroughput, Snapshot, Upload
from backupd.core.units import human_duration
from backupd.ledger.history import DeliveryRecord
from backupd.page.markup import counted, remedy, size_text, text, time_tag
from backupd.page.matrix_section import matrix_section
from backupd.page.page_data import HOURS, PageData, first_hour

STYLE = resources.files("backupd.page").joinpath("page.css").read_text("utf-8")

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    + "'"
)
"""Allows the style of the page and its icon, and nothing else."""

_LEVELS = {
    HealthLevel.OK: ("ok", "ok", "#3f9d70"),
    HealthLevel.WARNING: ("warn", "warning", "#d49a2a"),
    HealthLevel.CRITICAL: ("bad", "critical", "#cf3a34"),
    HealthLevel.UNKNOWN: ("warn", "unknown", "#d49a2a"),
}
"""The class, the word and the colour of the icon of each level."""

_DELIVERY_CLASSES = {
    DeliveryState.DELIVERED: "ok",
    DeliveryState.REJECTED: "bad",
    DeliveryState.PENDING: "warn",
    DeliveryState.CLAIMED: "warn",
}
_CERTIFICATE_CLASSES = {
    CertificateState.VALID: "ok",
    CertificateState.EXPIRING: "warn",
    CertificateState.CRITICAL: "bad",
    CertificateState.EXPIRED: "bad",
}
_BAR_HEIGHT = 40


def render_page(data: PageData) -> str:
    """Return the page as HTML."""
    return "".join(_parts(data))


def _parts(data: PageData) -> Iterator[str]:
    level = max((alarm.level for alarm in data.alarms), default=HealthLevel.OK)
    host = data.snapshot.host if data.snapshot else ""
    yield "<!doctype html>\n<html lang=en><head><meta charset=utf-8>\n"
    yield f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">\n'
    yield '<meta name=viewport content="width=device-width,initial-scale=1">\n'
    yield '<meta name=color-scheme content="light dark"><meta name=robots content=noindex>\n'
    yield f"<title>{_verdict(data)}: backupd{f' on {text(host)}' if host else ''}</title>\n"
    yield f'<link rel=icon href="{_icon(level)}">\n'
    yield f"<style>{STYLE}</style></head>\n<body>\n"
    yield from _header(data, level)
    yield "<main>\n"
    yield from _alarms(data)
    if data.snapshot is not None:
        yield from _uploads(data.snapshot, data.now)
        yield from _destinations(data.snapshot, data)
    if data.ledger_error:
        yield f"<section><h2>Backups</h2><p>The ledger can't be read: {text(data.ledger_error)}."
        yield " Devices and archives are shown once it can.</p></section>\n"
    else:
        yield from matrix_section(data.rows, data.calendar)
        yield from _archives(data)
    if data.snapshot is not None:
        yield from _certificates(data.snapshot, data.now)
    zone = text(f"{data.now.astimezone():%Z}")
    yield f"</main>\n<footer><p>Made by backupd {__version__} at {time_tag(data.now, data.now)}."
    yield f" Times are in {zone}.</p></footer></body></html>\n"


def _pill(mark: str, word: str) -> str:
    return f"<span class='pill {mark}'>{word}</span>"


def _icon(level: HealthLevel) -> str:
    circle = f"<circle cx='8' cy='8' r='7' fill='{_LEVELS[level][2]}'/>"
    drawing = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>{circle}</svg>"
    return f"data:image/svg+xml,{quote(drawing)}"


def _verdict(data: PageData) -> str:
    if data.alarms:
        return counted(len(data.alarms), "problem")
    return "All good"


def _header(data: PageData, level: HealthLevel) -> Iterator[str]:
    mark, _, _ = _LEVELS[level]
    sign = "M9 16.5l5 5 9-10" if level is HealthLevel.OK else "M16 9v8m0 5.5v.5"
    yield "<header><div class=verdict><svg width=32 height=32 aria-hidden=true>"
    yield f'<circle class={mark} cx=16 cy=16 r=15 /><path class=tick d="{sign}"/></svg>'
    yield f"<h1>{_verdict(data)}</h1></div>\n<ul class=facts>"
    snapshot = data.snapshot
    if snapshot is None:
        yield "<li>no daemon has used this ledger yet</ul></header>\n"
        return
    state = f"running since {time_tag(snapshot.started_at, data.now)}"
    if not data.is_running:
        state = _pill("bad", "not running")
    elif snapshot.is_outdated(data.now):
        state = _pill("bad", "hangs")
    elif not snapshot.is_ready:
        state += ", the first scan is not complete"
    age = human_duration(snapshot.age(data.now))
    yield f"<li><strong>{text(snapshot.host)}</strong><li>backupd {text(snapshot.version)}<li>{state}"
    yield f"<li>state of {time_tag(snapshot.taken_at, data.now)}, {age} old"
    yield f"<li>{snapshot.pending:,} pending, {size_text(snapshot.pending_bytes)}</ul></header>\n"


def _alarms(data: PageData) -> Iterator[str]:
    yield "<section><h2 id=problems>What is wrong</h2>\n"
    notes = list(_notes(data.snapshot)) if data.snapshot else []
    if not data.alarms:
        yield "<p class=quiet>Nothing needs a person.</p>\n"
    if data.alarms or notes:
        yield "<ul class=alarms>\n"
    for alarm in data.alarms:
        mark, word, _ = _LEVELS[alarm.level]
        since = f" <small>since {time_tag(alarm.since, data.now)}</small>" if alarm.since else ""
        yield f"<li class={mark}><p>{_pill(mark, word)}<b>{text(alarm.text)}</b>{since}</p>"
        if detail := _detail(alarm, data.snapshot):
            yield f"<p class=quiet>{detail}</p>"
        if alarm.hint:
            yield f"<p>{remedy(alarm.hint)}</p>"
        yield "</li>\n"
    for note, hint in notes:
        yield f"<li class=note><p>{_pill('', 'note')}<b>{text(note)}</b></p><p>{remedy(hint)}</p></li>\n"
    yield "</ul></section>\n" if data.alarms or notes else "</section>\n"


def _notes(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Yield a text and a hint for each state that is no alarm, but explains what a person sees."""
    for pause in snapshot.holds:
        if pause.until is not None:  # one without an end is an alarm
            yield hold_text(pause), f"`backupd resume {pause.name}` ends it"
    for drop in snapshot.drops:
        if drop.fault:
            yield (
                f"{drop.name}: events are missing ({drop.fault}); scans find new files",
                "see `backupd check`",
            )


def _detail(alarm: Alarm, snapshot: Snapshot | None) -> str:
    """Return the error behind an alarm as HTML, empty if its text has it or there is none."""
    if snapshot is None:
        return ""
    if alarm.kind is AlarmKind.PAUSED:
        return next((text(d.error) for d in snapshot.destinations if d.name == alarm.subject and d.error), "")
    if alarm.kind is AlarmKind.PROBLEM:
        for problem in snapshot.problems:
            if alarm.subject == f"{problem.drop}: {problem.reason}" and not problem.is_critical:
                return f"<bdi>{text(problem.example)}</bdi>: {remedy(problem.error)}"
    return ""


def _uploads(snapshot: Snapshot, now: datetime) -> Iterator[str]:
    if not snapshot.uploads:
        return
    yield "<section><h2 id=uploads>Uploads under way</h2><div class=cards>\n"
    for number, upload in enumerate(snapshot.uploads):
        yield _upload(upload, number, now)
    yield "</div></section>\n"


def _upload(upload: Upload, number: int, now: datetime) -> str:
    left = upload.seconds_left
    rest = f", {human_duration(left)} left" if left is not None else ""
    size = max(upload.size_bytes, 1)
    share = min(upload.sent_bytes * 100 // size, 100)
    return (
        f"<div class=card><h3 id=upload-{number}><bdi>{text(upload.archive)}</bdi></h3>"
        f"<progress max=100 value={share} aria-labelledby=upload-{number}>{share} %</progress>"
        f"<p class=quiet>{share} % of {size_text(upload.size_bytes)} to {text(upload.destination)},"
        f" {size_text(upload.bytes_per_s)}/s{rest}; attempt {upload.attempt},"
        f" since {time_tag(upload.started_at, now)}</p></div>\n"
    )


def _destinations(snapshot: Snapshot, data: PageData) -> Iterator[str]:
    yield "<section><h2 id=destinations>Destinations</h2><div class=cards>\n"
    for destination in snapshot.destinations:
        yield from _destination(destination, data)
    yield "</div></section>\n"


def _destination(destination: DestinationSnapshot, data: PageData) -> Iterator[str]:
    now = data.now
    hours = [hour for hour in data.throughput if hour.destination == destination.name]
    delivered, size = sum(h.delivered for h in hours), sum(h.delivered_bytes for h in hours)
    mark, state = _circuit(destination)
    yield f"<div class=card><div class=top><h3>{text(destination.name)}</h3>"
    yield f"{_pill(mark, state)}</div>"
    yield f"<p class=quiet>{text(destination.address)}</p>"
    if destination.held is not None:
        yield f"<p>{text(hold_text(destination.held))}</p>"
    elif destination.is_paused and destination.until is not None:
        when = f"at {time_tag(destination.until, now)}" if destination.until > now else "at any moment"
        yield f"<p>next retry {when}</p>"
    oldest = (
        f"<small class=quiet>oldest {human_duration(now - destination.oldest)}</small>"
        if destination.oldest
        else ""
    )
    yield f"<dl><div><dt>pending<dd>{destination.pending:,}"
    yield f" <small class=quiet>{size_text(destination.pending_bytes)}</small> {oldest}</div>"
    yield f"<div><dt>delivered, {HOURS} h<dd>{delivered:,} <small class=quiet>{size_text(size)}</small></div>"
    yield f"<div><dt>rejected<dd>{destination.rejected:,}</div></dl>"
    yield from _bars(hours, now)
    yield "</div>\n"


def _circuit(destination: DestinationSnapshot) -> tuple[str, str]:
    """Return the class and the word for the state of a destination."""
    if destination.held is not None:
        return "warn", "held"
    if destination.circuit is None:
        return "warn", "removed"
    return "bad" if destination.is_paused else "ok", str(destination.circuit)


def _bars(hours: list[HourThroughput], now: datetime) -> Iterator[str]:
    """Yield a bar chart of the bytes that were delivered in each hour."""
    first = first_hour(now)
    most = max((hour.delivered_bytes for hour in hours), default=0)
    yield f'<figure><svg class=bars viewBox="0 0 {HOURS * 10} {_BAR_HEIGHT + 2}" preserveAspectRatio=none'
    yield ' role=img aria-label="bytes delivered in each of the last hours">'
    for hour in hours:
        position = (hour.hour - first) // timedelta(hours=1)
        height = max(round(hour.delivered_bytes * _BAR_HEIGHT / max(most, 1), 1), 1.5)
        begin = hour.hour.astimezone()
        title = f"{begin:%H:%M}: {counted(hour.delivered, 'archive')}, {size_text(hour.delivered_bytes)}"
        yield f"<rect x={position * 10 + 1} y={_BAR_HEIGHT - height:g} width=8 height={height:g}>"
        yield f"<title>{title}</title></rect>"
    yield f'<path d="M0 {_BAR_HEIGHT + 0.5}H{HOURS * 10}"/></svg>'
    peak = f"most in an hour: {size_text(most)}" if most else "nothing delivered"
    yield f"<figcaption><span>{first.astimezone():%H:%M}</span><span>{peak}</span><span>now</span>"
    yield "</figcaption></figure>"


def _archives(data: PageData) -> Iterator[str]:
    yield "<section><h2 id=archives>Last archives</h2>\n"
    if not data.archives:
        yield "<p class=quiet>None yet.</p></section>\n"
        return
    caption = "The last archives with their deliveries, newest first"
    yield _table_head(caption, "archive", "queued", "size", "deliveries", "receipt")
    for _, deliveries in groupby(data.archives, key=lambda record: record.archive.id):
        yield _archive(list(deliveries), data.now)
    yield "</table></section>\n"


def _table_head(caption: str, *headings: str) -> str:
    """Return the begin of a table; its roles are named because a narrow window shows the rows as blocks."""
    cells = "".join(f"<th scope=col role=columnheader>{heading}" for heading in headings)
    return (
        f"<table class=stack role=table><caption class=hidden>{caption}</caption>\n"
        f"<thead role=rowgroup><tr role=row>{cells}</thead><tbody role=rowgroup>\n"
    )


def _table_row(first: str, *others: str) -> str:
    cells = "".join(f"<td role=cell>{other}" for other in others)
    return f"<tr role=row><th scope=row role=rowheader>{first}{cells}\n"


def _archive(deliveries: list[DeliveryRecord], now: datetime) -> str:
    archive = deliveries[0].archive
    return _table_row(
        f"<bdi>{text(as_text(archive.relpath))}</bdi> <small>{text(archive.drop)}</small>",
        time_tag(archive.queued_at, now),
        size_text(archive.fingerprint.size),
        " ".join(map(_delivery, deliveries)),
        _receipt(deliveries),
    )


def _delivery(record: DeliveryRecord) -> str:
    state = "uploading" if record.state is DeliveryState.CLAIMED else str(record.state)
    reason = f" <small>{text(record.reason)}</small>" if record.reason else ""
    pill = _pill(_DELIVERY_CLASSES.get(record.state, ""), f"{text(record.destination)}: {state}")
    return f"<span class=delivery>{pill}{reason}</span>"


def _receipt(deliveries: list[DeliveryRecord]) -> str:
    """Return the digest of an archive as HTML, with the destinations that returned it in their receipts."""
    delivered = [record for record in deliveries if record.state is DeliveryState.DELIVERED]
    digest = next((record.digest for record in delivered if record.digest), None)
    if digest is None:
        return "-"
    algorithm, _, value = digest.partition(":")
    shown = f"{value[:16]}…" if len(value) > 16 else value
    verified = ", ".join(text(record.destination) for record in delivered if record.verified)
    by = f"verified by {verified}" if verified else "no receipt has a digest"
    note = f"<small class=quiet>{text(algorithm)}, {by}</small>"
    return f'<code title="{text(digest)}">{text(shown)}</code> {note}'


def _certificates(snapshot: Snapshot, now: datetime) -> Iterator[str]:
    if not snapshot.certificates:
        return
    yield "<section><h2 id=certificates>Certificates</h2>\n"
    caption = "Certificates, the first to expire first"
    yield _table_head(caption, "destination", "certificate", "expires", "left")
    for certificate in sorted(snapshot.certificates, key=lambda each: each.expires_at):
        yield _certificate(certificate, now)
    yield "</table></section>\n"


def _certificate(certificate: CertificateSnapshot, now: datetime) -> str:
    life = certificate.life
    left = "expired" if life.state is CertificateState.EXPIRED else str(life)
    return _table_row(
        text(certificate.destination),
        f"{text(certificate.role)} <small class=quiet>{text(certificate.path)}</small>",
        time_tag(certificate.expires_at, now),
        _pill(_CERTIFICATE_CLASSES[life.state], left),
    )
