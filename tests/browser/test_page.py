"""The page in headless Chromium: wide and on a phone, light and dark, and without scripts."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backupd.ledger.factory import open_history
from backupd.page.document import render_page
from backupd.page.page_data import PageData, collect_page_data
from tests.browser import Visit, Visited, visit
from tests.showcase import a_showcase, fill_large
from tests.unit.test_page import HOSTILE, everything

NOW = datetime(2026, 12, 1, 14, 2, 19, tzinfo=UTC)
WINDOWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("browser")]


def visit_all(base: Path, data: PageData, *, javascript: bool = True) -> list[Visited]:
    """Open a page in each kind of window."""
    file = base / "page.html"
    file.write_text(render_page(data), "utf-8")
    (base / "browser").mkdir()
    visits = (Visit(file.as_uri(), width, scheme, javascript) for width, scheme in WINDOWS)
    return visit(base / "browser", *visits)


@pytest.fixture
def showcase(tmp_path: Path) -> PageData:
    (tmp_path / "state").mkdir()
    with a_showcase(tmp_path / "state", NOW) as config, closing(open_history(config)) as history:
        return collect_page_data(history, config, NOW)


def test_the_page_is_accessible_and_fits_each_window(tmp_path: Path, showcase: PageData) -> None:
    for visited in visit_all(tmp_path, showcase):
        assert visited.violations == []
        assert visited.messages == []  # nothing was loaded, and the policy blocked nothing
        assert visited.overflow <= 0
        assert "missing since 28 Nov" in visited.text


def test_a_phone_shows_the_newest_day_beside_the_names(tmp_path: Path, showcase: PageData) -> None:
    wide, _, phone, _ = visit_all(tmp_path, showcase)

    assert wide.facts == {"scrolls": False, "newestDayIsVisible": True, "nameIsVisible": True}
    assert phone.facts == {"scrolls": True, "newestDayIsVisible": True, "nameIsVisible": True}


def test_the_page_needs_no_script(tmp_path: Path, showcase: PageData) -> None:
    with_scripts, without = (
        visit_all(folder, showcase, javascript=javascript)
        for folder, javascript in ((tmp_path / "with", True), (tmp_path / "without", False))
        if not folder.mkdir()  # type: ignore[func-returns-value]
    )
    assert [each.text for each in without] == [each.text for each in with_scripts]


def test_hostile_names_run_nothing_and_break_no_layout(tmp_path: Path) -> None:
    for visited in visit_all(tmp_path, everything(HOSTILE + "x" * 300)):
        assert visited.violations == []
        assert visited.messages == []
        assert visited.overflow <= 0


def test_a_page_without_a_daemon_and_one_of_a_large_site_are_accessible(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    config = fill_large(tmp_path / "state", NOW, devices=150, days=40)
    with closing(open_history(config)) as history:
        large = collect_page_data(history, config, NOW)
    for name, data in (("none", PageData(NOW, is_running=False)), ("large", large)):
        (tmp_path / name).mkdir()
        for visited in visit_all(tmp_path / name, data):
            assert visited.violations == []
            assert visited.overflow <= 0
