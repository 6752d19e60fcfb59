"""The monitoring files: rules, dashboard and page use only metrics, events and keys that exist."""

from __future__ import annotations

import json
import re

from backupd.telemetry.docs import lnav_format
from backupd.telemetry.events import CATALOGUE, KEYS
from backupd.telemetry.metrics import Metrics
from tests.monitoring.tools import KIT, defined, exposed, run, used
from tests.programs import require
from tests.unit.config_files import SMALLEST, read


def test_the_alert_rules_are_valid_and_pass_their_tests() -> None:
    promtool = require("promtool")
    assert "SUCCESS" in run(promtool, "check", "rules", str(KIT / "backupd.rules.yaml"))
    assert "SUCCESS" in run(promtool, "test", "rules", str(KIT / "backupd.rules.test.yaml"))


def test_rules_and_dashboard_use_only_metrics_that_exist() -> None:
    rules = (KIT / "backupd.rules.yaml").read_text("utf-8")
    panels = json.loads((KIT / "backupd.dashboard.json").read_text("utf-8"))["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert len(used(rules)) > 10
    assert len(used(queries)) > 10
    assert used(rules) - exposed() == set()
    assert used(queries) - exposed() == set()
    assert used(rules + queries) - defined() == {"backupd_daemon_problems"}  # it is not in the log


def test_the_metrics_of_the_mtail_program_have_the_names_of_those_of_the_daemon() -> None:
    assert len(defined()) > 30
    assert defined() - exposed() == set()


def test_each_panel_has_instance_and_host() -> None:
    panels = json.loads((KIT / "backupd.dashboard.json").read_text("utf-8"))["panels"]
    for target in (target for panel in panels for target in panel["targets"]):
        metrics = re.findall(r"backupd_\w+(\{[^}]*\})?", target["expr"])
        assert set(metrics) == {'{instance=~"$instance", host=~"$host"}'}, target["expr"]
        assert "{{host}}" in target["legendFormat"]


def test_the_names_and_types_of_the_metrics_follow_the_conventions() -> None:
    metrics = Metrics(read(SMALLEST), "backup1", "1.0", lambda: 0)
    run(require("promtool"), "check", "metrics", stdin=metrics.exposition()[0])


def test_each_alert_has_a_test_and_is_on_the_page() -> None:
    rules = set(re.findall(r"alert: (\w+)", (KIT / "backupd.rules.yaml").read_text("utf-8")))
    tests = (KIT / "backupd.rules.test.yaml").read_text("utf-8")
    page = (KIT / "README.md").read_text("utf-8")
    assert rules
    assert {rule for rule in rules if rule not in tests or f"`{rule}`" not in page} == set()


def test_mtail_program_and_page_use_only_events_and_keys_of_the_catalogue() -> None:
    program = (KIT / "backupd.mtail").read_text("utf-8")
    page = (KIT / "README.md").read_text("utf-8")
    named = set(re.findall(r'\$event == "([^"]+)"', program))
    named |= set(re.findall(r"BACKUPD_EVENT=([a-z.]+)", page)) | set(re.findall(r'event="([a-z.]+)"', page))
    assert len(named) > 10
    assert named - set(CATALOGUE) == set()
    keys = set(re.findall(r',"(\w+)":', program))
    keys |= {key.lower() for key in re.findall(r"BACKUPD_([A-Z_]+)=", page)}
    assert keys - set(KEYS) == set()


def test_the_format_for_lnav_is_generated_and_has_each_key() -> None:
    text = (KIT / "backupd.lnav.json").read_text("utf-8")
    assert text == lnav_format(), (
        "python -m backupd.telemetry.docs --lnav > docs/monitoring/backupd.lnav.json"
    )
    columns = json.loads(text)["backupd_log"]["value"]
    assert set(KEYS) - set(columns) == {
        "timestamp",
        "level",
        "message",
        "drop",
    }  # the last is a keyword of SQL
    assert set(columns) <= set(KEYS)


def test_each_metric_is_on_the_page_and_the_page_names_no_other() -> None:
    page = (KIT / "README.md").read_text("utf-8")
    assert used(page) - {"backupd_log"} == exposed()
