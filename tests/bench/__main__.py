"""Measure, print a table, and write JSON: `python -m tests.bench`."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import far, large, page, resting, scraped, small
from tests.bench.programs import Nginx, missing
from tests.bench.setting import Setting
from tests.bench.table import Row, machine
from tests.pki import Pki

GROUPS: dict[tuple[str, ...], Callable[[Setting], list[Row]]] = {
    ("P1", "P7"): large.one_large,
    ("P2",): small.many,
    ("P3",): large.memory,
    ("P4",): small.soon,
    ("P5",): small.waiting,
    ("P6",): resting.idle,
    ("P8",): large.at_once,
    ("P9",): far.far,
    ("P10",): resting.start,
    ("P11", "P12"): scraped.metrics,
    ("P13",): page.page,
}
KEYS = [key for keys in GROUPS for key in keys]


def main() -> int:
    """Measure the selected rows; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each program (5)")
    parser.add_argument("--rows", default=",".join(KEYS), help="rows to measure, such as P1,P2 (all)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--dir", type=Path, help="work in this folder, on the filesystem to measure")
    parser.add_argument("--idle-seconds", type=float, default=300.0, help="duration of P6 (300)")
    parser.add_argument("--short", action="store_true", help="small sizes, one run, no goal is checked")
    options = parser.parse_args()
    rows = [key.strip().upper() for key in options.rows.split(",")]
    if unknown := set(rows) - set(KEYS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if reason := missing("nginx"):
        print(f"skipped: {reason}, and every row needs it")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so remove the folder
    base = Path(tempfile.mkdtemp(prefix="backupd-bench-", dir=options.dir))
    try:
        measured = _measure(base, options, rows)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return 1 if any(row.broken for row in measured) else 0


def _measure(base: Path, options: argparse.Namespace, selected: list[str]) -> list[Row]:
    properties = machine()
    pki = Pki(base / "pki")
    nginx = Nginx(base / "nginx", pki)
    properties["nginx reads the body with"] = nginx.body_reader
    for name, value in properties.items():
        print(f"{name}: {value}")
    runs = 1 if options.short else options.runs
    setting = Setting(base, runs, options.short, options.idle_seconds, pki, nginx)
    measured: list[Row] = []
    try:
        for keys, measure in GROUPS.items():
            if not set(keys) & set(selected):
                continue
            start = time.monotonic()
            rows = _guarded(keys, measure, setting)
            print(f"\n-- {', '.join(keys)}: {time.monotonic() - start:.0f} s")
            for row in rows:
                if row.key in selected:
                    print(row, flush=True)
                    measured.append(row)
    finally:
        nginx.stop()
        if options.json:
            report = {
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": properties,
                "runs": runs,
                "short": options.short,
                "rows": [row.as_json() for row in measured],
            }
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    return measured


def _guarded(keys: tuple[str, ...], measure: Callable[[Setting], list[Row]], setting: Setting) -> list[Row]:
    try:
        return measure(setting)
    except Exception as error:  # noqa: BLE001 -- printed in the table; the other rows continue
        description = str(error).replace(str(setting.base), "…")
        return [Row(key, "", [], [], broken=f"{type(error).__name__}: {description}") for key in keys]


if __name__ == "__main__":
    sys.exit(main())
