"""`python -m tests.bench`: measure, show a table, write JSON."""

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

from tests.bench import far, large, resting, small
from tests.bench.ends import Nginx, missing
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
}
KEYS = [key for keys in GROUPS for key in keys]


def main() -> int:
    """Run the rows asked for; 1 if one of them broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each competitor (5)")
    parser.add_argument("--rows", default=",".join(KEYS), help="which, as P1,P2 (all)")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--dir", type=Path, help="folder to work in, on the filesystem to measure")
    parser.add_argument("--idle-seconds", type=float, default=300.0, help="length of P6 (300)")
    parser.add_argument("--short", action="store_true", help="small sizes, one run, nothing judged")
    options = parser.parse_args()
    rows = [key.strip().upper() for key in options.rows.split(",")]
    if unknown := set(rows) - set(KEYS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if why := missing("nginx"):
        print(f"skipped: {why}, and every row needs it")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so clear up
    base = Path(tempfile.mkdtemp(prefix="backupd-bench-", dir=options.dir))
    try:
        measured = _measure(base, options, rows)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return 1 if any(row.broken for row in measured) else 0


def _measure(base: Path, options: argparse.Namespace, wanted: list[str]) -> list[Row]:
    about = machine()
    pki = Pki(base / "pki")
    nginx = Nginx(base / "nginx", pki)
    about["nginx drains by"] = nginx.drains
    for name, value in about.items():
        print(f"{name}: {value}")
    runs = 1 if options.short else options.runs
    setting = Setting(base, runs, options.short, options.idle_seconds, pki, nginx)
    measured: list[Row] = []
    try:
        for keys, measure in GROUPS.items():
            if not set(keys) & set(wanted):
                continue
            start = time.monotonic()
            rows = _guarded(keys, measure, setting)
            print(f"\n-- {', '.join(keys)}: {time.monotonic() - start:.0f} s")
            for row in rows:
                if row.key in wanted:
                    print(row, flush=True)
                    measured.append(row)
    finally:
        nginx.stop()
        if options.json:
            report = {
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": about,
                "runs": runs,
                "short": options.short,
                "rows": [row.as_json() for row in measured],
            }
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    return measured


def _guarded(keys: tuple[str, ...], measure: Callable[[Setting], list[Row]], setting: Setting) -> list[Row]:
    try:
        return measure(setting)
    except Exception as error:  # noqa: BLE001 -- told in the table; the other rows go on
        what = str(error).replace(str(setting.base), "…")
        return [Row(key, "", [], [], broken=f"{type(error).__name__}: {what}") for key in keys]


if __name__ == "__main__":
    sys.exit(main())
