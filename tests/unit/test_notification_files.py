"""The files with the URLs of notifications, the keys of their tables, and the recipes in the documents."""

from __future__ import annotations

import os
import re
from pathlib import Path

import apprise
import pytest

from backupd.config import notification_files
from backupd.config.notification_files import notification_problems, read_urls
from backupd.config.render import effective_toml
from backupd.core.errors import ConfigError
from tests.documents import DOCS
from tests.unit.config_files import a_file, faults_in, read

RECIPES = re.findall(
    r"^\|[^|]+\| `([a-z]+://[^`]+)` \|$", (DOCS / "operations.md").read_text("utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("url", RECIPES, ids=lambda url: url.partition(":")[0])
def test_apprise_knows_each_url_in_the_documents(url: str) -> None:
    assert apprise.Apprise.instantiate(url) is not None


def test_the_documents_have_recipes() -> None:
    assert len(RECIPES) >= 7


def test_comments_and_blank_lines_are_no_urls(tmp_path: Path) -> None:
    file = tmp_path / "urls"
    file.write_text("# mail\n\n  mailto://host  \n#json://x\njson://host/#fragment\n")

    assert read_urls(file) == ["mailto://host", "json://host/#fragment"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "has no URL"),
        (b"# only a comment\n", "has no URL"),
        (b"mailto://host\ngeheim\n", "line 2 is not a URL for Apprise"),
        (b"\xff", "is not UTF-8"),
        (b"json://host/" + b"x" * 70_000, "is larger than 64 KiB"),
    ],
    ids=["empty", "comment", "no URL", "bytes", "large"],
)
def test_a_file_that_cannot_be_used_is_refused_without_its_content(
    tmp_path: Path, content: bytes, error: str
) -> None:
    file = tmp_path / "urls"
    file.write_bytes(content)

    with pytest.raises(ConfigError, match=error) as refusal:
        read_urls(file)
    assert "geheim" not in str(refusal.value)


def test_problems_of_a_target_prevent_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "urls"
    file.write_text("json://host")
    file.chmod(0o644)
    config = read(a_file(top='on_event = ["/no/hook"]', rest=f'[notify.ops]\nurl_file = "{file}"'))
    monkeypatch.setattr(notification_files, "has_apprise", lambda: False)

    missing, mode, hook = notification_problems(config)

    assert "pip install 'backupd[notify]'" in missing.hint
    assert (mode.where, mode.fatal) == ("notify.ops.url_file", False)
    assert hook.where == "on_event"
    assert not any(problem.fatal and problem.prevents_start for problem in (missing, mode, hook))


def test_a_credential_of_systemd_can_be_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "urls").write_text("json://host")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    assert read(a_file(rest='[notify.ops]\nurl_file = "urls"')).notify["ops"].url_file == tmp_path / "urls"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (a_file(rest="[notify.ops]"), "notify.ops.url_file: required, but missing"),
        (
            a_file(rest='[notify.ops]\nurl_file = "/urls"\nevents = []'),
            "notify.ops.events: expected at least one, got a list",
        ),
        (
            a_file(rest='[heartbeat]\nping_url = "http://hc.example.net/geheim"'),
            "heartbeat.ping_url: expected https; plain http is for loopback addresses only",
        ),
        (
            a_file(rest='[heartbeat]\nping_url = "ftp://hc.example.net/geheim"'),
            "heartbeat.ping_url: expected a URL such as https://hc-ping.com/UUID",
        ),
        (
            a_file(rest='[heartbeat]\nping_url = "https://a:geheim@hc.example.net/"'),
            "heartbeat.ping_url: expected a URL without a user name or password",
        ),
        (
            a_file(top='on_event = ["hook"]'),
            'on_event[0]: expected the absolute path of a program, got "hook"',
        ),
        (a_file(top='on_events = ["archive.rejected"]'), 'on_events: expected "on_event" to be set too'),
        (
            a_file(top='on_event = ["/hook"]\non_events = ["*"]'),
            'on_events[0]: expected the name of an event such as "archive.rejected", got "*"',
        ),
    ],
    ids=["no file", "no events", "plain", "scheme", "user", "relative", "no hook", "no name"],
)
def test_a_wrong_value_is_a_fault(text: str, fault: str) -> None:
    assert faults_in(text) == (fault,)


def test_the_path_of_the_ping_url_is_hidden() -> None:
    shown = effective_toml(
        read(a_file(rest='[heartbeat]\nping_url = "https://hc.example.net/a/geheim?x=geheim"'))
    )

    assert "geheim" not in shown
    assert read(shown).heartbeat.ping_url == "https://hc.example.net/***"


def test_a_fifo_is_refused_without_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "urls")
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_urls(tmp_path / "urls")
