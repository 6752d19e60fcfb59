"""Every case of the crash matrix, and its tables: python -m tests.faults.matrix docs/reliability.md."""

from __future__ import annotations

import concurrent.futures
import errno
import sys
import tempfile
from pathlib import Path

from tests.faults.crash import ENDINGS, ERRORS, FAR_ERRORS, Tally, a_ground, all_strikes, recorded, strike
from tests.faults.delivery import name_of
from tests.faults.stepping import STEPS

BEGIN, END = "<!-- made by tests/faults/matrix.py -->\n", "<!-- end of what is made -->\n"


SHARES = 3
"""Into how many parts the cases of an ending are dealt, each with an installation of its own."""

AT_ONCE = 8


def _run(number: int, share: int, base: Path) -> Tally:
    ground, tally = a_ground(number, base / str(share)), Tally()
    with ground.open():
        for one in [*all_strikes(recorded(ground), ground)][share::SHARES]:
            strike(ground, one, tally)
    return tally


def main(document: Path) -> int:
    """Try everything, some installations at a time; put the tables in a document."""
    tallies: dict[int, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="backupd-faults-") as base:
        for share in range(SHARES):
            (Path(base) / str(share)).mkdir()
        with concurrent.futures.ProcessPoolExecutor(AT_ONCE) as pool:
            runs = {
                pool.submit(_run, number, share, Path(base)): number
                for number in range(len(ENDINGS))
                for share in range(SHARES)
            }
            for run in concurrent.futures.as_completed(runs):
                tallies.setdefault(runs[run], Tally()).add(run.result())
                print(f"{len(tallies)} endings, {sum(t.cases for t in tallies.values())} cases", flush=True)
    parts = []
    for number, tally in sorted(tallies.items()):
        name, held = name_of(*ENDINGS[number]), tally.cases - len(tally.broken)
        print(f"{name}: {tally.cases} cases, {held} held", flush=True)
        print(f"  told twice {tally.told_twice}; ended by themselves: {dict(tally.gave_up)}", flush=True)
        for one in tally.broken:
            print(f"  BROKEN {one}", flush=True)
        parts.append(
            f"**{name[0].upper()}{name[1:]}**: {tally.cases} cases, {held} held.\n\n{table_of(tally)}"
        )
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + after, encoding="utf-8")
    return 1 if any(tally.broken for tally in tallies.values()) else 0


def table_of(tally: Tally) -> str:
    """Return a Markdown table of steps and what was tried of them: held, of so many."""
    columns = ["killed", "power cut", *(errno.errorcode[e] for e in (*ERRORS, *FAR_ERRORS))]
    columns += [c for c in sorted({column for _, column in tally.tried}) if c not in columns]
    columns = [c for c in columns if any(tally.tried[step, c] for step in STEPS)]
    lines = [f"| step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for step in STEPS:
        cells = [_cell(tally, step, column) for column in columns]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(tally: Tally, step: str, column: str) -> str:
    tried, broken = tally.tried[step, column], tally.broken_at[step, column]
    return f"{tried - broken}/{tried}" if tried else ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
