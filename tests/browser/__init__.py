"""Headless Chromium: opens pages, checks them with axe-core, and takes screenshots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.programs import find, require
from tests.servers.documented import node_modules

PACKAGES = ("playwright-core", "axe-core")
_SCRIPT = Path(__file__).with_name("visit.mjs")


@dataclass(frozen=True, slots=True)
class Visit:
    """A page to open in a window of `width` pixels, with the `scheme` `light` or `dark`.

    `screenshot` is the PNG file to write, of the page down to the end of the element that the selector
    `until` finds.
    """

    url: str
    width: int = 1280
    scheme: str = "light"
    javascript: bool = True
    screenshot: str = ""
    until: str = "body"


@dataclass(frozen=True, slots=True)
class Visited:
    """The result of a visit.

    `violations` are those that axe-core finds, `messages` the lines of the console. `overflow` is by how many
    pixels the page is wider than the window, and `text` is what a person reads. `facts` are those of the
    matrix: whether its newest day and the names of its devices are visible.
    """

    violations: list[str]
    messages: list[str]
    overflow: int
    text: str
    facts: dict[str, Any]


def visit(folder: Path, *visits: Visit) -> list[Visited]:
    """Open pages one after the other; `folder` is an empty one. Skips the test if a program is missing."""
    node, chromium = require("node"), require("chromium")
    modules = node_modules(folder, *PACKAGES)
    order = {
        "chromium": chromium,
        "profile": str(folder / "profile"),
        "visits": [asdict(each) for each in visits],
    }
    done = subprocess.run(
        [node, str(_SCRIPT)],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "NODE_MODULES": str(modules)},
    )
    assert done.returncode == 0, done.stderr
    return [Visited(**each) for each in json.loads(done.stdout)]


def shrink(png: Path) -> None:
    """Reduce a PNG file to a palette if pngquant is installed."""
    if (pngquant := find("pngquant")) is None:
        print(f"{png} is larger than it needs to be: pngquant is not installed", file=sys.stderr)
        return
    subprocess.run([pngquant, "--force", "--strip", "--speed=1", "--ext=.png", "64", str(png)], check=True)
