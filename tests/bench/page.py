"""P13: the page of a large site."""

from __future__ import annotations

import time
from contextlib import closing
from datetime import UTC, datetime

from backupd.ledger.factory import open_history
from backupd.page.document import render_page
from backupd.page.page_data import DAYS, collect_page_data
from tests.bench.setting import Setting
from tests.bench.table import Figures, Goal, Race, Row
from tests.showcase import fill_large


def page(setting: Setting) -> list[Row]:
    """P13: time to read the ledger and to render the page, and its size."""
    devices = 50 if setting.short else 1000
    folder, now = setting.folder(), datetime.now(UTC)
    folder.mkdir()
    config = fill_large(folder, now, devices, DAYS + 10)

    def render() -> Figures:
        start = time.perf_counter()
        with closing(open_history(config)) as history:
            text = render_page(collect_page_data(history, config, now))
        return {"s": time.perf_counter() - start, "kB": len(text.encode()) / 1000}

    race = Race(setting.runs, {"backupd": render})
    checked = not setting.short
    return [
        Row(
            "P13",
            f"the page of {devices} devices with a backup on each of {DAYS} days, but one in fifty",
            race.columns("s") + race.columns("kB"),
            [
                Goal("s", race.median("backupd", "s"), at_most=0.2, checked=checked),
                Goal("kB", race.median("backupd", "kB"), at_most=300, checked=checked),
            ],
        )
    ]
