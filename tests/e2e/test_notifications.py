"""The daemon notifies people by a real SMTP server and a real webhook, and runs hooks and pings."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.notification_servers import MailServer, Webhook, a_mail_server, a_webhook
from tests.stage import Stage, until

RETRY = 'retry = { initial = "0.1s", max = "0.5s" }'
TARGET = """
[notify.ops]
url_file = "{}"
every = "{}"
"""


@pytest.fixture
def mail() -> Iterator[MailServer]:
    with a_mail_server() as server:
        yield server


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with a_webhook() as server:
        yield server


def write_urls(stage: Stage, *urls: str, name: str = "ops") -> Path:
    path = stage.base / f"{name}.urls"
    path.write_text("# for the test\n\n" + "".join(f"{url}\n" for url in urls))
    path.chmod(0o600)
    return path


def a_receiver(stage: Stage, port: int = 0) -> RunningReceiver:
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    return RunningReceiver(stage.store, tls, port=port)


def a_cut_archive() -> bytes:
    return gzip.compress(os.urandom(2000))[:-20]


def test_an_outage_is_one_mail_and_its_end_another_also_across_a_restart(
    stage: Stage, mail: MailServer
) -> None:
    port = stage.a_free_port()
    urls = write_urls(stage, mail.url("bob"))
    stage.configure(f"https://127.0.0.1:{port}/v1/upload", destination=RETRY, more=TARGET.format(urls, "1s"))
    daemon = stage.daemon().ready()
    stage.put("core-1.cfg", b"config")
    until(lambda: mail.mails, "the mail about the outage")
    daemon.wait_for("notify.sent")
    daemon.stop()

    again = stage.daemon().ready()
    again.wait_for("destination.paused", count=2)
    with a_receiver(stage, port):
        again.wait_for("archive.delivered")
        until(lambda: len(mail.mails) > 1, "the all-clear")
        again.wait_for("notify.sent")
        again.stop()

    paused, recovered = mail.mails
    assert re.search(r"backupd \S+: vault paused \(connect failed\)", str(paused["Subject"]))
    assert re.search(r"backupd \S+: vault works again", str(recovered["Subject"]))
    assert "vault is paused:" in mail.bodies()[0]
    assert "sudo backupd status" in mail.bodies()[0]
    assert paused["To"] == "ops@host.example"


def test_fifty_rejected_archives_are_one_message_with_their_number(
    stage: Stage, receiver: RunningReceiver, webhook: Webhook
) -> None:
    options = 'on_suspicious = "reject"\ninspect_grace = "0s"'
    # without its file nothing is sent, so that the machine may be slow
    stage.configure(receiver.url, drop=options, more=TARGET.format(stage.base / "ops.urls", "1s"))
    for number in range(50):
        stage.put(f"core-{number}.tar.gz", a_cut_archive())
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.rejected", count=50)
    write_urls(stage, webhook.url())

    daemon.wait_for("notify.sent", kind="rejected")
    daemon.stop()

    [(_, body)] = webhook.requests
    assert body["title"].endswith(": 50 archives rejected")
    assert "and 40 more" in body["message"]
    assert body["type"] == "failure"


def test_deliveries_go_on_while_the_service_hangs_and_the_failure_is_a_problem(
    stage: Stage, receiver: RunningReceiver, webhook: Webhook
) -> None:
    webhook.gate.clear()
    port = stage.a_free_port()
    urls = write_urls(stage, webhook.url("secret-path"))
    more = stage.annex(f"https://127.0.0.1:{port}/v1/upload", RETRY) + TARGET.format(urls, "1s")
    stage.configure(receiver.url, drop='destinations = ["vault"]', more=more)
    daemon = stage.daemon().ready()
    config = stage.config.read_text().replace('destinations = ["vault"]', "")
    stage.config.write_text(config)
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.wait_for("config.reloaded")
    stage.put("first.cfg", b"config")
    until(lambda: webhook.requests, "a request that hangs")

    for number in range(20):
        stage.put(f"core-{number}.cfg", b"config %d" % number)
    daemon.wait_for("delivery.verified", count=21, destination="vault")
    assert not daemon.events("notify.sent")
    [failed] = daemon.wait_for("notify.failed", count=1)[:1]
    assert "secret-path" not in daemon.text()
    assert failed["target"] == "ops"
    status = until(lambda: "notify.ops" in stage.backupd("status").stdout, "the problem in the status")
    assert status

    webhook.gate.set()
    daemon.wait_for("notify.sent")
    until(lambda: "notify.ops" not in stage.backupd("status").stdout, "the end of the problem")
    daemon.stop()


def test_one_url_that_fails_has_no_effect_on_the_others(stage: Stage, webhook: Webhook) -> None:
    port = stage.a_free_port()
    urls = write_urls(stage, f"json://127.0.0.1:{stage.a_free_port()}/x", webhook.url())
    stage.configure(f"https://127.0.0.1:{port}/v1/upload", destination=RETRY, more=TARGET.format(urls, "1s"))
    daemon = stage.daemon().ready()
    stage.put("core-1.cfg", b"config")

    daemon.wait_for("notify.sent", kind="paused")
    daemon.wait_for("notify.failed", count=2)
    daemon.stop()

    assert [title for title in webhook.subjects() if "vault paused" in title] == webhook.subjects()
    assert len(webhook.subjects()) == 1


def test_a_file_name_adds_no_header_no_markup_and_no_mention_to_a_mail(
    stage: Stage, receiver: RunningReceiver, mail: MailServer
) -> None:
    options = 'on_suspicious = "reject"\ninspect_grace = "0s"'
    stage.configure(receiver.url, drop=options, more=TARGET.format(write_urls(stage, mail.url()), "1s"))
    stage.put("a\r\nBcc: evil@host.example\n<script>alert(1)<!channel>@everyone.tar.gz", a_cut_archive())

    daemon = stage.daemon().ready()
    daemon.wait_for("notify.sent", kind="rejected")
    daemon.stop()

    [mail_] = mail.mails
    assert mail_["Bcc"] is None
    assert mail_.get_content_type() == "text/plain"
    assert not re.search("[<>@]", mail.bodies()[0])
    assert "\\r\\nBcc" in mail.bodies()[0]


def test_a_url_file_that_cannot_be_used_is_a_problem_and_stops_nothing(
    stage: Stage, receiver: RunningReceiver, webhook: Webhook
) -> None:
    urls = write_urls(stage)
    stage.configure(receiver.url, more=TARGET.format(urls, "1s"))
    daemon = stage.daemon().ready()
    stage.put("core-1.cfg", b"config")
    daemon.wait_for("archive.delivered")
    daemon.wait_for("notify.failed")
    checked = stage.backupd("check", "--offline")
    assert (checked.returncode, "notify.ops.url_file" in checked.stdout) == (78, True)

    write_urls(stage, webhook.url())
    daemon.wait_for("notify.sent")
    daemon.stop()
    assert webhook.subjects()[0].endswith("notifications arrive again")


HOOK = """#!/bin/sh
cat >> "{folder}/events.jsonl"
echo "$BACKUPD_EVENT $(env | cut -d = -f 1 | sort | tr '\\n' ' ')" >> "{folder}/environment"
"""


def a_hook(stage: Stage, text: str) -> Path:
    path = stage.base / "hook"
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_hook_gets_each_event_as_json_without_a_shell(stage: Stage, receiver: RunningReceiver) -> None:
    hook = a_hook(stage, HOOK.format(folder=stage.base))
    stage.configure(receiver.url, top=f'on_event = ["{hook}", "$(touch {stage.base}/shell)"]')
    daemon = stage.daemon().ready()
    stage.put("core-1.cfg", b"config")
    daemon.wait_for("archive.delivered")
    output = stage.base / "events.jsonl"
    until(lambda: output.exists() and "archive.delivered" in output.read_text(), "the event")
    daemon.stop()

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    names = [line["event"] for line in lines]
    assert names[0] == "daemon.started"
    assert {"daemon.ready", "archive.queued", "delivery.verified", "archive.delivered"} <= set(names)
    assert "drop.scanned" not in names
    logged = {(e["event"], e["message"]) for e in daemon.events()}
    assert {(line["event"], line["message"]) for line in lines} <= logged
    first = (stage.base / "environment").read_text().split("\n")[0].split()
    assert first[0] == "daemon.started"
    assert set(first[1:]) <= {"BACKUPD_EVENT", "LANG", "PATH", "PWD", "OLDPWD", "SHLVL", "_"}
    assert not (stage.base / "shell").exists()


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("#!/bin/sh\necho no room >&2\nexit 3\n", "it ended with 3: no room"),
        ("#!/bin/sh\nsleep 1000 & sleep 1000\n", "its time limit"),
        ("not a program", "it cannot be started"),
    ],
    ids=["exit code", "time limit", "not a program"],
)
def test_a_hook_that_fails_is_logged_and_delays_nothing(
    stage: Stage, receiver: RunningReceiver, script: str, error: str
) -> None:
    hook = a_hook(stage, script)
    top = f'on_event = ["{hook}"]\non_events = ["archive.queued"]\non_event_timeout = "0.5s"'
    stage.configure(receiver.url, top=top)
    daemon = stage.daemon().ready()
    stage.put("core-1.cfg", b"config")

    daemon.wait_for("archive.delivered")
    [failed] = daemon.wait_for("hook.failed")
    daemon.stop()

    assert error in failed["error"]
    assert failed["command"] == str(hook)


def test_a_hook_can_be_ended_by_a_signal_that_the_daemon_blocks(
    stage: Stage, receiver: RunningReceiver
) -> None:
    hook = a_hook(stage, f"#!/bin/sh\nkill -TERM $$\ntouch {stage.base}/survived\n")
    stage.configure(receiver.url, top=f'on_event = ["{hook}"]\non_events = ["daemon.ready"]')
    daemon = stage.daemon().ready()

    [failed] = daemon.wait_for("hook.failed")
    daemon.stop()

    assert failed["exit_code"] == -signal.SIGTERM
    assert not (stage.base / "survived").exists()


def test_each_heartbeat_is_a_ping_and_a_failing_one_is_a_problem(
    stage: Stage, receiver: RunningReceiver, webhook: Webhook
) -> None:
    webhook.status = 503
    url = webhook.url("ping/5f0c-uuid", "http")
    stage.configure(receiver.url, top='heartbeat_every = "0.5s"', more=f'[heartbeat]\nping_url = "{url}"')
    daemon = stage.daemon().ready()
    [failed, *_] = daemon.wait_for("ping.failed")
    until(lambda: "ping_url" in stage.backupd("status").stdout, "the problem in the status")
    webhook.status = 200
    until(lambda: "ping_url" not in stage.backupd("status").stdout, "the end of the problem")
    daemon.stop()

    assert failed["error"] == "HTTP status 503"
    assert "5f0c-uuid" not in daemon.text()
    assert "5f0c-uuid" not in stage.backupd("config", "show").stdout
    assert {path for path, _ in webhook.requests} == {"/ping/5f0c-uuid"}


def test_a_test_message_goes_to_every_url_and_each_result_is_printed(
    stage: Stage, mail: MailServer, webhook: Webhook
) -> None:
    write_urls(stage, webhook.url("token-1"), mail.url("bob", password="wrong-battery"), name="boss")
    urls = write_urls(stage, mail.url())
    more = TARGET.format(urls, "1s") + TARGET.format(stage.base / "boss.urls", "1s").replace(".ops", ".boss")
    stage.configure("https://127.0.0.1:1/", more=more)

    one, every = stage.backupd("notify", "--test", "ops"), stage.backupd("notify", "--test")

    assert (one.returncode, one.stdout) == (0, "ok: notify.ops, URL 1 (mailto)\n")
    assert every.returncode == 69
    lines = every.stdout.splitlines()
    assert lines[:2] == ["ok: notify.ops, URL 1 (mailto)", "ok: notify.boss, URL 1 (json)"]
    assert lines[2].startswith("failed: notify.boss, URL 2 (mailto): ")
    assert lines[3].startswith("  hint: ")
    assert not re.search("token-1|wrong-battery", every.stdout + every.stderr)
    assert len(mail.mails) == 2
    assert webhook.subjects()[0].endswith(": test")


@pytest.mark.parametrize(
    ("arguments", "more", "code", "error"),
    [
        (["notify"], "", 2, "nothing to do"),
        (["notify", "--test"], "", 2, "the configuration has no target"),
        (["notify", "--test", "boss"], '[notify.ops]\nurl_file = "/no"\n', 2, "there is no 'boss'"),
        (["notify", "--test"], '[notify.ops]\nurl_file = "/no"\n', 69, "/no can't be read: no such file"),
    ],
    ids=["nothing", "no target", "unknown", "no file"],
)
def test_a_test_that_cannot_be_made_is_refused(
    stage: Stage, arguments: list[str], more: str, code: int, error: str
) -> None:
    stage.configure("https://127.0.0.1:1/", more=more)

    result = stage.backupd(*arguments)

    assert result.returncode == code
    assert error in result.stdout + result.stderr


def test_an_unknown_event_in_the_configuration_is_reported(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, top='on_event = ["/bin/true"]\non_events = ["archive.rejectd"]')

    checked = stage.backupd("check", "--offline")
    daemon = stage.daemon().ready()

    error = 'there is no event "archive.rejectd"; did you mean "archive.rejected"?'
    assert (checked.returncode, error in checked.stdout) == (78, True)
    assert error in [event["error"] for event in daemon.wait_for("config.warning")]
    daemon.stop()
