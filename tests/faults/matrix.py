"""Run every case of the crash matrix and write its tables: `python -m tests.faults.matrix DOCUMENT`."""

from __future__ import annotations

import concurrent.futures
import errno
import sys
import tempfile
from pathlib import Path

from tests.faults.crash import (
    FILE_ERRORS,
    MOUNT_ERRORS,
    NETWORK_ERRORS,
    SCENARIOS,
    CrashTally,
    a_harness,
    all_injections,
    record_calls,
    run_case,
)
from tests.faults.delivery import name_of
from tests.faults.stepping import STEPS

BEGIN, END = "<!-- made by tests/faults/matrix.py -->\n", "<!-- end of the generated part -->\n"

SHARES = 3
"""Number of harnesses that share the cases of a scenario."""

PROCESSES = 8


def _run(number: int, share: int, base: Path) -> CrashTally:
    harness, tally = a_harness(number, base / str(share)), CrashTally()
    with harness.open():
        for case in [*all_injections(record_calls(harness), harness)][share::SHARES]:
            run_case(harness, case, tally)
    return tally


def main(document: Path) -> int:
    """Run every case, on some harnesses at once; write the tables and return the exit code."""
    tallies: dict[int, CrashTally] = {}
    with tempfile.TemporaryDirectory(prefix="backupd-faults-") as base:
        for share in range(SHARES):
            (Path(base) / str(share)).mkdir()
        with concurrent.futures.ProcessPoolExecutor(PROCESSES) as pool:
            runs = {
                pool.submit(_run, number, share, Path(base)): number
                for number in range(len(SCENARIOS))
                for share in range(SHARES)
            }
            for run in concurrent.futures.as_completed(runs):
                tallies.setdefault(runs[run], CrashTally()).add(run.result())
                print(f"{len(tallies)} scenarios, {sum(t.cases for t in tallies.values())} cases", flush=True)
    sections = []
    for number, tally in sorted(tallies.items()):
        name, held = name_of(*SCENARIOS[number]), tally.cases - len(tally.broken)
        print(f"{name}: {tally.cases} cases, {held} held", flush=True)
        print(
            f"  logged twice {tally.logged_twice}; daemons that ended: {dict(tally.daemon_exits)}", flush=True
        )
        for description in tally.broken:
            print(f"  BROKEN {description}", flush=True)
        sections.append(
            f"**{name[0].upper()}{name[1:]}**: {tally.cases} cases, {held} held.\n\n{table_of(tally)}"
        )
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(before + BEGIN + "\n" + "\n".join(sections) + "\n" + END + after, encoding="utf-8")
    return 1 if any(tally.broken for tally in tallies.values()) else 0


def table_of(tally: CrashTally) -> str:
    """Return a Markdown table of steps and faults; a cell shows the cases that held, of all cases."""
    columns = [
        "killed",
        "power cut",
        *(errno.errorcode[e] for e in (*FILE_ERRORS, *MOUNT_ERRORS, *NETWORK_ERRORS)),
    ]
    columns += [c for c in sorted({column for _, column in tally.tried}) if c not in columns]
    columns = [c for c in columns if any(tally.tried[step, c] for step in STEPS)]
    lines = [f"| step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for step in STEPS:
        cells = [_cell(tally, step, column) for column in columns]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(tally: CrashTally, step: str, column: str) -> str:
    tried, broken = tally.tried[step, column], tally.broken_at[step, column]
    return f"{tried - broken}/{tried}" if tried else ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
