"""The page as text: its content, its size, and text from outside in it."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from backupd.core.certificate_life import CertificateLimits, Validity
from backupd.core.circuit import CircuitState
from backupd.core.device_matrix import DayState, DeviceRow
from backupd.core.health import HealthLimits, alarms
from backupd.core.model import DeliveryState
from backupd.core.policy import Reason
from backupd.core.snapshot import (
    CertificateSnapshot,
    DaemonProblem,
    DestinationSnapshot,
    DropSnapshot,
    HourThroughput,
    OperatorPause,
    OverdueDevice,
    ProblemSnapshot,
    Snapshot,
    Upload,
)
from backupd.ledger.history import DeliveryRecord
from backupd.page.document import CONTENT_SECURITY_POLICY, STYLE, render_page
from backupd.page.markup import remedy, text, time_tag
from backupd.page.matrix_section import MAX_ROWS
from backupd.page.page_data import PageData, local_days, page_data_without_ledger
from tests.factories import NOW, a_digest, a_snapshot, an_archive

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
HOSTILE = "</script></style><script>alert(1)</script>\"'&\x1b[31m\u202egpj.exe\n\x00`"
DEFAULT = object()


class Reader(HTMLParser):
    """Reads the elements and the text of a page, apart from its style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self._in_style = False
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.pieces.append(data)


def a_page(snapshot: Any = DEFAULT, *, is_running: bool = True, **fields: Any) -> PageData:
    state: Snapshot | None = a_snapshot() if snapshot is DEFAULT else snapshot
    found = alarms(state, NOW, HealthLimits(), is_running=is_running)
    return replace(PageData(NOW, state, is_running, found, calendar=local_days(NOW, 30)), **fields)


def shown(data: PageData) -> str:
    """Return the text that a person reads."""
    return Reader(render_page(data)).text


def a_record(state: DeliveryState = DeliveryState.DELIVERED, **fields: Any) -> DeliveryRecord:
    digest = str(a_digest()) if state is DeliveryState.DELIVERED else None
    record = DeliveryRecord(
        "d-1", an_archive(), "vault", state, None, NOW, 1, None, None, digest, True, 201, None, None
    )
    return replace(record, **fields)


def a_row(
    states: str, device: str = "sw1", drop: str = "switches", unusual: tuple[int, ...] = ()
) -> DeviceRow:
    letters = {"d": DayState.DELIVERED, "l": DayState.LATE, "w": DayState.WAITING, "r": DayState.REJECTED,
               "m": DayState.MISSING, "-": DayState.NONE}  # fmt: skip
    return DeviceRow(drop, device, tuple(letters[letter] for letter in states.rjust(30, "d")), unusual)


def everything(name: str) -> PageData:
    """Return a page on which each text from outside is `name`."""
    limits = CertificateLimits()
    life = limits.life(Validity(NOW - DAY, NOW + HOUR), NOW)
    snapshot = a_snapshot(
        host=name,
        version=name,
        destinations=(
            DestinationSnapshot(
                name,
                name,
                3,
                9,
                NOW - 7 * HOUR,
                1,
                NOW,
                CircuitState.PAUSED,
                name,
                name,
                name,
                NOW - HOUR,
                NOW,
            ),
            DestinationSnapshot(name, name, held=OperatorPause("destination", name, NOW, None, name, name)),
        ),
        uploads=(Upload("d-1", name, name, name, 2, 1000, 100, NOW - HOUR, 10),),
        rejected=1,
        problems=(ProblemSnapshot(name, "still_changing", 2, NOW, name, name, name),),
        certificates=(CertificateSnapshot(name, "client", name, NOW + HOUR, life),),
        overdue=(OverdueDevice(name, name, None, NOW - HOUR),),
        daemon_problems=(DaemonProblem(name, NOW, name, name),),
    )
    archive = an_archive(name.encode(), drop=name)
    return a_page(
        snapshot,
        rows=[a_row("mrwl-", device=name, drop=name, unusual=(3,))],
        archives=[a_record(archive=archive, destination=name, reason=name, digest=name)],
    )


def test_text_from_outside_stays_text() -> None:
    page = render_page(everything(HOSTILE))
    reader, harmless = Reader(page), Reader(render_page(everything("name")))

    assert [tag for tag, _ in reader.elements if tag not in ("code", "b")] == [
        tag for tag, _ in harmless.elements if tag not in ("code", "b")
    ]
    assert "alert(1)" in reader.text
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", page)


def test_the_page_has_no_script_and_loads_nothing() -> None:
    reader = Reader(render_page(everything("name")))

    assert not {tag for tag, _ in reader.elements} & {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "img",
        "base",
    }
    references = [
        value
        for _, attributes in reader.elements
        for key, value in attributes.items()
        if key in ("href", "src", "style", "srcset") or key.startswith("on")
    ]
    assert [str(value).partition(",")[0] for value in references] == ["data:image/svg+xml"]
    assert "@import" not in STYLE
    assert set(re.findall(r"url\(([^)]*)\)", STYLE)) == {
        "#delivered", "#late", "#waiting", "#missing", "#rejected", "#none"
    }  # fmt: skip


def test_the_policy_allows_the_style_of_the_page_and_no_other() -> None:
    page = render_page(a_page())

    assert f'content="{CONTENT_SECURITY_POLICY}"' in page
    assert "'unsafe" not in CONTENT_SECURITY_POLICY
    assert f"<style>{STYLE}</style>" in page


def test_a_page_of_a_healthy_daemon_has_no_problem() -> None:
    page = shown(a_page())

    assert "All good" in page
    assert "host-1" in page
    assert "running since" in page
    assert "Nothing needs a person." in page


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (a_page(is_running=False), "not running"),
        (a_page(a_snapshot(taken_at=NOW - HOUR)), "hangs"),
        (a_page(a_snapshot(is_ready=False)), "the first scan is not complete"),
        (a_page(None), "no daemon has used this ledger yet"),
    ],
    ids=["stopped", "hung", "starting", "new"],
)
def test_the_state_of_the_daemon_is_shown(data: PageData, words: str) -> None:
    assert words in shown(data)


def test_problems_come_first_with_their_cause_and_remedy() -> None:
    vault = DestinationSnapshot(
        "vault", circuit=CircuitState.PAUSED, reason=Reason.CONNECT, error="refused by 192.0.2.1",
        hint="check the firewall", since=NOW - 8 * HOUR, until=NOW + HOUR,
    )  # fmt: skip
    problem = ProblemSnapshot("people", "still_changing", 1, NOW, "a.zip", "open for 3 h", "wait")
    page = shown(a_page(a_snapshot(destinations=(vault,), problems=(problem,))))

    words = [
        "2 problems", "critical", "paused for 8 h", "refused by 192.0.2.1", "check the firewall",
        "warning", "1 file of people: still changing", "a.zip : open for 3 h", "wait",
        "Destinations", "next retry at",
    ]  # fmt: skip
    positions = [page.index(word) for word in words]
    assert positions == sorted(positions)


def test_a_pause_with_an_end_and_missing_events_are_notes_and_no_problems() -> None:
    pause = OperatorPause("drop", "switches", NOW, NOW + HOUR, "anna", "new disks")
    drops = (
        DropSnapshot("switches", "/srv/switches", held=pause),
        DropSnapshot("people", "/srv/people", fault="too many watches"),
    )
    page = shown(a_page(a_snapshot(drops=drops)))

    assert "All good" in page
    assert "note the drop switches is paused by anna until" in page
    assert "backupd resume switches" in page
    assert "people: events are missing (too many watches); scans find new files" in page


def test_an_upload_shows_its_progress() -> None:
    upload = Upload("d-1", "switches", "large.zip", "vault", 1, 2048, 512, NOW - HOUR, 512)
    page = render_page(a_page(a_snapshot(uploads=(upload,))))

    assert "25 % of 2.0\u00a0KiB to vault, 512\u00a0B/s, 3 s left" in page
    assert ("progress", {"max": "100", "value": "25", "aria-labelledby": "upload-0"}) in Reader(page).elements


def test_an_upload_without_any_byte_has_no_time_left() -> None:
    upload = Upload("d-1", "switches", "empty.zip", "vault", 1, 0, 0, NOW, 0)
    assert "0 % of 0 B to vault, 0 B/s; attempt 1" in shown(a_page(a_snapshot(uploads=(upload,))))


def test_a_destination_shows_its_backlog_and_the_last_24_hours() -> None:
    hour = NOW.replace(minute=0, second=0, microsecond=0)
    vault = DestinationSnapshot("vault", "https://vault/", 3, 2048, NOW - HOUR, 1, NOW, CircuitState.WORKING)
    data = a_page(
        a_snapshot(destinations=(vault, DestinationSnapshot("removed"))),
        throughput=[
            HourThroughput("vault", hour - 2 * HOUR, 2, 1024),
            HourThroughput("vault", hour, 1, 3072),
            HourThroughput("other", hour, 9, 9),
        ],
    )
    page = shown(data)

    assert "pending 3 2.0 KiB oldest 1 h delivered, 24 h 3 4.0 KiB rejected 1" in page
    assert "2 archives, 1.0 KiB" in page
    assert "most in an hour: 3.0 KiB" in page
    assert "removed" in page
    assert "nothing delivered" in page


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ("", "30/30"),
        ("mmm", "27/30, missing since {first}"),
        ("m" * 30, "0/30, missing"),
        ("mdl", "29/30, 1 missing"),
        ("rmmd", "27/30, 2 missing, 1 rejected"),
        ("-----", "25/25"),
    ],
    ids=["all", "missing now", "never", "a gap", "rejected", "not expected"],
)
def test_a_row_of_the_matrix_has_its_counts(states: str, words: str) -> None:
    data = a_page(rows=[a_row(states)])
    first = datetime.fromisoformat(data.calendar[27].name)
    assert words.format(first=f"{first.day} {first:%b}") in shown(data)


def test_each_exception_in_the_matrix_has_a_mark_and_a_title() -> None:
    data = a_page(rows=[a_row("mmdrdwdl", unusual=(2,))])
    page = render_page(data)
    days = [
        f"{datetime.fromisoformat(day.name).day} {datetime.fromisoformat(day.name):%b}"
        for day in data.calendar
    ]

    for title in (
        f"{days[22]} to {days[23]}: missing",
        f"{days[25]}: rejected",
        f"{days[27]}: arrived, not delivered yet",
        f"{days[29]}: delivered, later than expected",
        f"{days[2]}: an archive of unusual size",
    ):
        assert f"<title>{title}</title>" in page


def test_a_drop_without_devices_is_one_row_and_unknown_devices_another() -> None:
    page = shown(
        a_page(rows=[a_row("", device="", drop="people"), a_row("", device="x"), a_row("", device="")])
    )

    assert "people 30/30" in page
    assert "switches 2 devices x 30/30 other files 30/30" in page


def test_a_site_without_archives_has_a_page() -> None:
    page = shown(a_page())

    assert "No archive has arrived yet" in page
    assert "None yet." in page


def test_the_state_is_shown_while_the_ledger_cannot_be_read() -> None:
    snapshot = a_snapshot(destinations=(DestinationSnapshot("vault", circuit=CircuitState.WORKING),))
    page = shown(page_data_without_ledger(snapshot, "disk I/O error", NOW))

    assert "host-1" in page
    assert "vault working" in page
    assert "The ledger can't be read: disk I/O error." in page
    assert "Last archives" not in page


def test_devices_without_a_gap_are_left_out_of_a_very_long_matrix() -> None:
    rows = [a_row("", device=f"sw{number}") for number in range(MAX_ROWS + 3)]
    assert "3 more devices are not shown" in shown(a_page(rows=rows))


def test_an_archive_shows_all_of_its_deliveries_and_its_digest() -> None:
    data = a_page(
        archives=[
            a_record(destination="annex", state=DeliveryState.CLAIMED, digest=None),
            a_record(
                destination="offsite", state=DeliveryState.REJECTED, digest=None, reason="archive_refused"
            ),
            a_record(),
            a_record(archive=replace(an_archive(b"other"), id=2), state=DeliveryState.PENDING, digest=None),
        ]
    )
    page = shown(data)

    assert "annex: uploading offsite: rejected archive_refused vault: delivered" in page
    assert f"{a_digest().hex[:16]}… sha256, verified by vault" in page
    assert page.count("router-1.tar.gz") == 1
    assert "vault: pending -" in page
    assert "no receipt has a digest" in shown(a_page(archives=[a_record(verified=False, digest="md5:1f")]))


def test_certificates_show_when_they_expire() -> None:
    limits = CertificateLimits()
    certificates = tuple(
        CertificateSnapshot(
            name, "client", "/c.pem", NOW + left, limits.life(Validity(NOW - DAY, NOW + left), NOW)
        )
        for name, left in (("vault", 400 * DAY), ("annex", -DAY / 2))
    )
    page = shown(a_page(a_snapshot(certificates=certificates)))

    table = page[page.rindex("Certificates") :]
    assert table.index("annex") < table.index("expired") < table.index("vault") < table.index("400 days")


def test_times_have_the_date_that_is_needed() -> None:
    local = NOW.astimezone()

    assert time_tag(None, NOW) == "-"
    assert time_tag(NOW, NOW) == f'<time datetime="2026-03-04T05:06:07Z">{local:%H:%M}</time>'
    assert f"{(local - 2 * DAY).day} {local - 2 * DAY:%b %H:%M}" in time_tag(NOW - 2 * DAY, NOW)
    assert "Mar 2025" in time_tag(NOW - 365 * DAY, NOW)


def test_a_command_in_a_hint_is_code() -> None:
    assert remedy("run `a <b>` now") == "run <code>a &lt;b&gt;</code> now"
    assert remedy("an odd ` quote") == "an odd ` quote"


def test_a_long_text_is_cut() -> None:
    assert len(text("x" * 9999)) < 600


def test_the_calendar_ends_today() -> None:
    days = local_days(NOW, 3)

    assert [day.name for day in days] == [f"{NOW.astimezone() - n * DAY:%Y-%m-%d}" for n in (2, 1, 0)]
    assert all(day.ends == following.begins for day, following in pairwise(days))
    assert days[-1].begins <= NOW < days[-1].ends


def test_a_key_in_the_cause_of_a_problem_is_code() -> None:
    problem = ProblemSnapshot("people", "too_small", 1, NOW, "a.cfg", "it is smaller than `min_size`", "x")
    page = render_page(a_page(a_snapshot(problems=(problem,))))
    assert "it is smaller than <code>min_size</code>" in page
