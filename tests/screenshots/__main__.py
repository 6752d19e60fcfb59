"""Write the pictures in docs/screenshots: `python -m tests.screenshots [NAME…]`.

Each function below writes the pictures of one name. They show the site of `tests.showcase` at a fixed time,
so that a picture changes only if the program does. Needs node, npm, chromium, pngquant and the font Inter.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from backupd.ledger.factory import open_history
from backupd.page.document import render_page
from backupd.page.page_data import collect_page_data
from tests.browser import Visit, shrink, visit
from tests.documents import DOCS
from tests.showcase import a_showcase

TARGET = DOCS / "screenshots"
NOW = datetime(2026, 12, 1, 14, 2, 19, tzinfo=UTC)
MAX_BYTES = 150_000


def page(base: Path) -> None:
    """Write the page in a wide window and on a phone, each light and dark."""
    file = base / "page.html"
    with a_showcase(base, NOW) as config, closing(open_history(config)) as history:
        file.write_text(render_page(collect_page_data(history, config, NOW)), "utf-8")
    visits = [
        Visit(file.as_uri(), width, scheme, screenshot=str(TARGET / name), until=".matrix")
        for width in (1280, 390)
        for scheme in ("light", "dark")
        for name in [f"page-{width}-{scheme}.png"]
    ]
    visit(base, *visits)
    for each in visits:
        shrink(Path(each.screenshot))


PICTURES: dict[str, Callable[[Path], None]] = {"page": page}
"""The function that writes the pictures of each name; it gets an empty folder to work in."""


def main() -> int:
    """Write the pictures of the given names, or all; return 1 if one of them is too large."""
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PICTURES)} (all)")
    names = parser.parse_args().names or list(PICTURES)
    if unknown := set(names) - PICTURES.keys():
        parser.error(f"no such picture: {', '.join(sorted(unknown))}")
    os.environ["TZ"] = "UTC"
    time.tzset()
    TARGET.mkdir(exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as base:
            PICTURES[name](Path(base))
    large = [png for png in TARGET.glob("*.png") if png.stat().st_size > MAX_BYTES]
    for png in large:
        print(f"{png} has more than {MAX_BYTES} bytes", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
