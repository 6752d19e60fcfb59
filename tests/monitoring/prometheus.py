"""A real Prometheus that scrapes a daemon every second, with the rules of the kit on a shorter time scale."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.monitoring.tools import KIT
from tests.programs import require
from tests.stage import TIMEOUT, until

_SHORT = {"1m": "2s", "5m": "3s", "10m": "3s", "15m": "15s", "1h": "15s"}
"""The durations of the rules, and those of the test."""


def short_rules() -> str:
    """Return the rules with shorter durations, and lower limits for the backlog and the heartbeat."""
    rules = (KIT / "backupd.rules.yaml").read_text("utf-8")
    rules = re.sub(r"(for: |\[|offset )(1m|5m|10m|15m|1h)\b", lambda m: m[1] + _SHORT[m[2]], rules)
    for before, after in (("[1d]), 60)", "[1d]), 12)"), ("seconds > 3600", "seconds > 10")):
        assert before in rules
        rules = rules.replace(before, after)
    return rules


@dataclass
class AlertTimes:
    """The times at which an alert was pending, firing and no more so, in seconds since the start."""

    labels: dict[str, str]
    states: list[tuple[float, str]] = field(default_factory=list)

    def first(self, state: str) -> float | None:
        """Return when it got a state first."""
        return next((at for at, found in self.states if found == state), None)

    @property
    def course(self) -> list[str]:
        """Return its states in their order."""
        return [state for _, state in self.states]


class Prometheus:
    """The API of a Prometheus; `started` is the time at which the test began."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self.started = time.time()

    def get(self, path: str, **parameters: object) -> Any:
        """Return the data of a response of the API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=TIMEOUT) as response:
            return json.load(response)["data"]

    def has_scraped(self) -> bool:
        """Return whether there are metrics of a daemon."""
        return bool(self.get("query", query="backupd_heartbeat_timestamp_seconds")["result"])

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        alerts = self.get("alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    def wait_for(self, *names: str) -> None:
        """Wait until these alerts fire and no others."""
        until(lambda: self.firing() == set(names), f"{names} to fire, not {self.firing()}")

    def timeline(self) -> list[AlertTimes]:
        """Return all alerts since the start, in the order in which they fired."""
        found: dict[str, AlertTimes] = {}
        samples: dict[str, dict[float, str]] = {}
        end = time.time()
        for series in self.get("query_range", query="ALERTS", start=self.started, end=end, step="1s")[
            "result"
        ]:
            labels = {name: value for name, value in series["metric"].items() if name != "__name__"}
            state = labels.pop("alertstate")
            key = json.dumps(labels, sort_keys=True)
            found.setdefault(key, AlertTimes(labels))
            samples.setdefault(key, {}).update({at: state for at, _ in series["values"]})
        for key, times in found.items():
            last, previous = "", 0.0
            for at, state in sorted(samples[key].items()):
                if last and at - previous > 1.5:
                    times.states.append((previous + 1 - self.started, "ended"))
                    last = ""
                if state != last:
                    times.states.append((at - self.started, state))
                last, previous = state, at
            if end - previous > 1.5:
                times.states.append((previous + 1 - self.started, "ended"))
        return sorted(found.values(), key=lambda times: times.states[0][0])


@contextmanager
def running_prometheus(base: Path, port: int, target: int) -> Iterator[Prometheus]:
    """Run a Prometheus on a port that scrapes a port of a daemon."""
    program = require("prometheus")
    base.mkdir()
    config = base / "prometheus.yml"
    config.write_text(
        f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: [rules*.yaml]
scrape_configs:
  - job_name: backupd
    static_configs: [{{targets: ["127.0.0.1:{target}"]}}]
""",
        "utf-8",
    )
    log = base / "prometheus.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={base / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=stream,
            stderr=subprocess.STDOUT,
        )

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text("utf-8")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=TIMEOUT):
                return True
        except OSError:
            return False

    try:
        until(is_ready, "Prometheus")
        prometheus = Prometheus(port)
        until(prometheus.has_scraped, "the first scrape")
        (base / "rules.yaml").write_text(short_rules(), "utf-8")  # later, else no backupd has been seen
        process.send_signal(signal.SIGHUP)
        until(lambda: prometheus.get("rules")["groups"], "the rules")
        yield prometheus
    finally:
        process.kill()
        process.wait()
