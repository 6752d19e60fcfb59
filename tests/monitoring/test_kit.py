"""The rules, the dashboard and the page name nothing that is not there."""

from __future__ import annotations

import json
import re

from backupd.telemetry.events import CATALOGUE, KEYS
from tests.monitoring.tools import KIT, defined, run, used
from tests.programs import require


def test_the_rules_are_valid_and_do_as_their_tests_say() -> None:
    promtool = require("promtool")
    said = run(promtool, "check", "rules", str(KIT / "backupd.rules.yaml"))
    assert "SUCCESS" in said
    assert "SUCCESS" in run(promtool, "test", "rules", str(KIT / "backupd.rules.test.yaml"))


def test_rules_and_dashboard_use_only_metrics_that_are_made() -> None:
    rules = (KIT / "backupd.rules.yaml").read_text("utf-8")
    panels = json.loads((KIT / "backupd.dashboard.json").read_text("utf-8"))["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert len(used(rules)) > 10
    assert len(used(queries)) > 10
    assert used(rules) - defined() == set()
    assert used(queries) - defined() == set()
    assert defined() - used(rules + queries) <= {
        "backupd_lines_total",
        "backupd_archives_admitted_total",
        "backupd_archives_delivered_bytes_total",
        "backupd_deliveries_total",
        "backupd_destination_pauses_total",
        "backupd_start_timestamp_seconds",
    }


def test_each_alert_is_tested_and_on_the_page() -> None:
    rules = set(re.findall(r"alert: (\w+)", (KIT / "backupd.rules.yaml").read_text("utf-8")))
    tests = (KIT / "backupd.rules.test.yaml").read_text("utf-8")
    page = (KIT / "README.md").read_text("utf-8")
    assert rules
    assert {rule for rule in rules if rule not in tests or f"`{rule}`" not in page} == set()


def test_program_and_page_name_only_events_and_keys_of_the_catalogue() -> None:
    program = (KIT / "backupd.mtail").read_text("utf-8")
    page = (KIT / "README.md").read_text("utf-8")
    named = set(re.findall(r'\$event == "([^"]+)"', program))
    named |= set(re.findall(r"BACKUPD_EVENT=([a-z.]+)", page)) | set(re.findall(r'event="([a-z.]+)"', page))
    assert len(named) > 10
    assert named - set(CATALOGUE) == set()
    keys = set(re.findall(r',"(\w+)":', program))
    keys |= {key.lower() for key in re.findall(r"BACKUPD_([A-Z_]+)=", page)}
    assert keys - set(KEYS) == set()


def test_lnav_knows_each_key() -> None:
    values = json.loads((KIT / "backupd.lnav.json").read_text("utf-8"))["backupd_log"]["value"]
    without_a_column = {"timestamp", "level", "drop"}  # the last is a word of SQL's
    assert set(KEYS) - set(values) <= without_a_column
