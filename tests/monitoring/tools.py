"""Runs mtail, promtool and lnav on logs of backupd."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import backupd
from backupd.core.snapshot import Snapshot
from backupd.telemetry.metrics import Metrics
from tests.programs import require
from tests.unit.config_files import SMALLEST, read

KIT = Path(backupd.__file__).parent.parent / "docs" / "monitoring"


def metrics_of(log: Path, base: Path) -> dict[str, float]:
    """Return the values that mtail computes from a log, by names of metrics with labels other than `host`."""
    programs = base / "mtail"
    programs.mkdir(exist_ok=True)
    shutil.copy(KIT / "backupd.mtail", programs)
    read = (
        "--one_shot",
        "--one_shot_format=prometheus",
        "--logtostderr",
        f"--progs={programs}",
        f"--logs={log}",
    )
    output = run(require("mtail"), *read)
    found = re.findall(r"^(backupd_\w+)\{(.*)\} (\S+)$", output, re.MULTILINE)
    return {f"{name}{{{_without_origin(labels)}}}": float(value) for name, labels, value in found}


def _without_origin(labels: str) -> str:
    return re.sub(r'\b(prog|host)="[^"]*",?', "", labels).rstrip(",")


def lnav(log: Path, base: Path, *commands: str) -> Any:
    """Run commands of lnav on a log and return the JSON that it prints."""
    formats = base / "lnav" / "formats" / "backupd"
    formats.mkdir(parents=True, exist_ok=True)
    shutil.copy(KIT / "backupd.lnav.json", formats)
    words = [word for command in (*commands, ":write-json-to -") for word in ("-c", command)]
    return json.loads(run(require("lnav"), "-n", "-I", str(base / "lnav"), *words, str(log), home=base))


def run(*words: str, home: Path | None = None, stdin: bytes = b"") -> str:
    """Run a program, assert that its exit code is 0, and return its output."""
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(home or "/nonexistent"), "TERM": "dumb", "TZ": "UTC"}
    done = subprocess.run(words, input=stdin, capture_output=True, check=False, env=environ, timeout=120)
    output, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, f"{words}: {output}{errors}"
    return output


def defined() -> set[str]:
    """Return the names of the metrics that the mtail program defines."""
    return set(
        re.findall(r"^(?:counter|gauge) (\w+)", (KIT / "backupd.mtail").read_text("utf-8"), re.MULTILINE)
    )


def exposed() -> set[str]:
    """Return the names of the metrics that the daemon exposes itself."""
    metrics = Metrics(read(SMALLEST), "backup1", "1.0", lambda: 0)
    now = datetime.now(UTC)
    snapshot = Snapshot(
        now, "backup1", "1.0", 1, now, timedelta(minutes=1), True, memory_bytes=1, open_files=1,
        open_files_limit=1,
    )  # fmt: skip
    metrics.update(snapshot)
    return set(re.findall(r"^# TYPE (\w+)", metrics.exposition()[0].decode(), re.MULTILINE))


def used(text: str) -> set[str]:
    """Return the names of metrics in a text."""
    return set(re.findall(r"\bbackupd_\w+", text))
