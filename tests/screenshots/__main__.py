"""Write the pictures in docs/screenshots: `python -m tests.screenshots [NAME…]`.

Each function below writes the pictures of one name. Those of the page show the site of `tests.showcase` at a
fixed time, so that a picture changes only if the program does. `log` takes five minutes. Needs node, npm,
chromium, pngquant and the fonts Inter and DejaVu Sans Mono.
"""

from __future__ import annotations

import argparse
import gzip
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
from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.browser import Visit, shrink, visit
from tests.documents import DOCS
from tests.pki import in_days
from tests.screenshots.terminal_picture import draw
from tests.showcase import a_showcase
from tests.stage import Stage
from tests.terminal import CTRL_C, Terminal

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


def status(base: Path) -> None:
    """Write the output of `backupd status` at 80 columns."""
    toml = base / "backupd.toml"
    with a_showcase(base, datetime.now(UTC)) as config:
        drops = "".join(f'[drop.{name}]\npath = "{drop.path}"\n' for name, drop in config.drop.items())
        destinations = "".join(
            f'[destination.{name}]\nurl = "{destination.address}"\n'
            for name, destination in config.destination.items()
        )
        toml.write_text(f'state_dir = "{base}"\n{drops}{destinations}')
        with Terminal(toml, ["status"], lines=60) as terminal:
            terminal.wait()
    draw(base, terminal.screen, TARGET / "status-80.png", "sudo backupd status")


def push(base: Path) -> None:
    """Write the output of `backupd push` for three files."""
    names = ["core-switch-1.tar.gz", "fw-edge-2.conf.gz", "ise-01.gpg"]
    (base / "stage").mkdir()
    stage = Stage(base / "stage")
    with RunningReceiver(stage.store, _tls_of(stage)) as receiver:
        stage.configure(receiver.url, destination='bandwidth = "8MB/s"')
        files = []
        for number, name in enumerate(names, 1):
            files.append(base / name)
            files[-1].write_bytes(bytes(number * 4_000_000))
        with Terminal(stage, ["push", *map(str, files)], lines=30) as terminal:
            terminal.wait()
    draw(base, terminal.screen, TARGET / "push-80.png", f"backupd push {' '.join(names)}")


def log(base: Path) -> None:
    """Write five minutes of the console log of `backupd run`; takes as long."""
    (base / "stage").mkdir()
    stage = Stage(base / "stage")
    port = stage.a_free_port()
    stage.configure(
        f"https://127.0.0.1:{port}/v1/upload",
        drop='include = ["*.gz"]\nrescan_every = "10s"',
        destination='retry.initial = "20s"',
    )
    pair = stage.pki.issue_client("client", not_after=in_days(89.5))
    stage.pki.client_cert.write_bytes(pair.cert.read_bytes())
    stage.pki.client_key.write_bytes(pair.key.read_bytes())
    with Terminal(stage, ["run"], columns=120, lines=90) as terminal:
        until = time.monotonic() + 300

        def wait(seconds: float) -> None:
            end = min(time.monotonic() + seconds, until)
            while (now := time.monotonic()) < end:
                terminal.until(lambda: time.monotonic() >= min(now + 60, end), "the time")

        wait(20)
        stage.put("core-switch-1.conf.gz", gzip.compress(os.urandom(300_000)))  # while the server is down
        wait(15)
        with RunningReceiver(stage.store, _tls_of(stage), port=port):
            wait(60)
            stage.put("notes.pdf", b"no backup")
            stage.put("fw-edge-2.conf.gz", gzip.compress(os.urandom(2_000_000)))
            wait(300)
            terminal.press(CTRL_C)
            terminal.wait()
    draw(base, terminal.screen, TARGET / "log-120.png", "backupd run")


def _tls_of(stage: Stage) -> ServerTls:
    return ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)


PICTURES: dict[str, Callable[[Path], None]] = {"page": page, "status": status, "push": push, "log": log}
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
