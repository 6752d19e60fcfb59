"""The service while it runs under systemd: watchdog, reloads, renewed certificates, the journal."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import urllib.request

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.documents import block
from tests.notification_servers import a_webhook
from tests.scripted import Peer, ScriptedServer, accept_all, in_turn, receipt_for, server_context
from tests.stage import TIMEOUT, until
from tests.systemd.conftest import UNIT, Site

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]

HANGS_ONCE = """
import os, threading, time

_really = os.pread

def pread(*arguments):
    if not threading.current_thread().name.startswith("worker"):
        return _really(*arguments)
    try:
        os.close(os.open(os.environ["STATE_DIRECTORY"] + "/hung", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return _really(*arguments)
    while True:
        time.sleep(60)

os.pread = pread
"""
"""A disk that never returns from the first read of a worker, for which backupd has no time-out."""


def test_the_watchdog_restarts_a_daemon_with_a_hanging_worker_and_the_archive_is_delivered(
    site: Site, receiver: RunningReceiver
) -> None:
    site.configure(receiver.url)
    site.machine.write("/opt/hangs/sitecustomize.py", HANGS_ONCE)
    site.drop_in("hangs", "[Service]\nEnvironment=PYTHONPATH=/opt/hangs\nWatchdogSec=1s\nLimitCORE=0\n")
    site.start()
    first = site.pid()
    site.put("core.tar.gz", b"content")

    assert site.sent("core.tar.gz").read_bytes() == b"content"

    assert site.pid() != first
    assert int(site.machine.show(UNIT, "NRestarts")["NRestarts"]) >= 1
    assert site.events("daemon.hung")[0]["thread"] == "worker of vault"
    messages = [entry.get("MESSAGE", "") for entry in site.machine.journal("--unit", UNIT, since=site.since)]
    assert any("Watchdog timeout" in text for text in messages)
    assert [path.read_bytes() for path in site.stage.stored()] == [b"content"]


def test_notifications_and_hooks_work_inside_the_sandbox(site: Site) -> None:
    hook = "#!/bin/sh\ncat >> /var/lib/backupd/events\ntouch /usr/written 2>/dev/null\nexit 0\n"
    site.machine.write("/opt/hook", hook)
    site.machine.run("chmod", "755", "/opt/hook")
    with a_webhook() as webhook, ScriptedServer(accept_all) as server:
        server.refuse()
        site.machine.write("/etc/backupd/tls/ops.urls", webhook.url())
        top = 'on_event = ["/opt/hook"]\non_events = ["destination.paused"]'
        target = '[notify.ops]\nurl_file = "/etc/backupd/tls/ops.urls"\nevery = "1s"'
        site.configure(f"https://127.0.0.1:{server.port}/", top=top, destination=target)
        site.start()
        site.put("core.tar.gz", b"content")
        site.wait_for("notify.sent")

    assert "vault paused (connect failed)" in webhook.subjects()[0]
    [event, *_] = site.machine.path("/var/lib/backupd/events").read_text().splitlines()
    assert json.loads(event)["event"] == "destination.paused"
    assert not site.machine.path("/usr/written").exists()
    assert not site.events("hook.failed")


def test_twenty_reloads_under_load_lose_nothing(site: Site, receiver: RunningReceiver) -> None:
    site.configure(receiver.url)
    site.start()
    pid = site.pid()
    contents = {f"r{number}.tar.gz": os.urandom(200_000) for number in range(60)}
    remaining = iter(contents.items())
    for reload in range(1, 21):
        for _ in range(3):
            site.put(*next(remaining))
        site.configure(receiver.url, destination=f"workers = {1 + reload % 3}")
        site.machine.systemctl("reload", UNIT)
        site.wait_for("config.reloaded", reload)  # `systemctl reload` does not wait for it

    for name, content in contents.items():
        assert site.sent(name).read_bytes() == content

    assert site.pid() == pid
    assert site.machine.show(UNIT, "NRestarts") == {"NRestarts": "0"}
    stored = [hashlib.sha256(path.read_bytes()).digest() for path in site.stage.stored()]
    assert sorted(stored) == sorted(hashlib.sha256(content).digest() for content in contents.values())
    assert len(site.wait_for("archive.delivered", len(contents))) == len(contents)


def test_the_next_upload_uses_certificates_that_were_renewed_during_an_upload(site: Site) -> None:
    def answers_late(peer: Peer) -> None:
        request = peer.read_request()
        peer.pause()
        peer.send(receipt_for(request.archive))
        accept_all(peer)

    def names(server: ScriptedServer) -> list[str]:
        subjects = [dict(pair[0] for pair in peer.client_certificate["subject"]) for peer in server.peers]
        return [subject["commonName"] for subject in subjects]

    with ScriptedServer(in_turn(answers_late, accept_all), server_context(site.stage.pki)) as server:
        site.configure(server.url, destination="workers = 1")
        site.start()
        site.put("before.tar.gz", b"before")
        assert server.paused.wait(60)
        renewed = site.stage.pki.issue_client("renewed")
        for new, name in ((renewed.cert, "client.pem"), (renewed.key, "client.key")):
            there = site.machine.path(f"/etc/backupd/tls/{name}")
            part = there.with_suffix(".part")
            shutil.copyfile(new, part)
            shutil.copystat(there, part)
            os.chown(part, there.stat().st_uid, there.stat().st_gid)
            part.rename(there)
        site.machine.systemctl("reload", UNIT)
        site.wait_for("certificate.renewed")
        server.resume()
        site.sent("before.tar.gz")
        site.put("after.tar.gz", b"after")
        site.sent("after.tar.gz")

        until(lambda: len(server.requests) == 2, "both requests")
        assert names(server) == ["client", "renewed"]
        assert [request.archive for request in server.requests] == [b"before", b"after"]
        assert not site.events("attempt.failed")


def test_the_journal_can_be_queried_by_event(site: Site, receiver: RunningReceiver) -> None:
    site.configure(receiver.url)
    site.start()
    site.put("core.tar.gz", b"content")
    site.sent("core.tar.gz")
    site.wait_for("archive.delivered")
    (entry,) = site.machine.journal("BACKUPD_EVENT=archive.delivered", since=site.since)
    assert entry["BACKUPD_ARCHIVE"] == "core.tar.gz"
    assert entry["_SYSTEMD_UNIT"] == UNIT
    assert entry["PRIORITY"] == "6"


def test_the_sandbox_permits_the_metrics_by_http_and_as_a_file(site: Site, receiver: RunningReceiver) -> None:
    folder, port = "/var/lib/node_exporter", site.stage.a_free_port()
    site.machine.path(folder).mkdir(exist_ok=True)
    site.machine.run("chown", "backupd", folder)
    table = f'[metrics]\nlisten = "127.0.0.1:{port}"\ntextfile = "{folder}/backupd.prom"'
    site.configure(receiver.url, top=f'heartbeat_every = "1s"\n{table}')
    site.start()
    [failed] = site.wait_for("metrics.failed")
    assert "read-only file system" in failed["error"]
    assert f"ReadWritePaths={folder}" in failed["hint"]

    site.drop_in("metrics", block("monitoring/README.md", "As a file, for hosts that allow no port", "ini"))
    site.machine.systemctl("restart", UNIT)
    written = site.machine.path(f"{folder}/backupd.prom")
    until(written.exists, "the file of the metrics")
    assert "backupd_up{" in written.read_text()
    assert written.stat().st_mode & 0o777 == 0o644
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=TIMEOUT) as response:
        assert response.read() == b"ok\n"
    site.put("core.tar.gz", b"content")
    site.sent("core.tar.gz")
