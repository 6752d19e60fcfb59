"""Changes of the configuration and of certificates while the daemon runs lose and delay no archive."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.pki import KeyPair, in_days
from tests.scripted import Peer, ScriptedServer, accept_all, in_turn, receipt_for, server_context
from tests.stage import TIMEOUT, Daemon, Stage, until

FREQUENT_HEARTBEAT = 'heartbeat_every = "0.5s"'
"""Have the certificates checked twice a second."""


def reload(daemon: Daemon, event: str = "config.reloaded") -> dict[str, Any]:
    """Send SIGHUP, wait for the event, and return it."""
    before = len(daemon.events(event))
    daemon.process.send_signal(signal.SIGHUP)
    return daemon.wait_for(event, before + 1)[-1]


def responds_after_resume(peer: Peer) -> None:
    request = peer.read_request()
    peer.pause()
    peer.send(receipt_for(request.archive))


def renew_client_files(stage: Stage, pair: KeyPair) -> None:
    """Replace the files of the client as certbot does: by renames, one after the other."""
    for new, old in ((pair.cert, stage.pki.client_cert), (pair.key, stage.pki.client_key)):
        part = Path(f"{old}.part")
        shutil.copy(new, part)
        part.chmod(0o600)
        part.rename(old)


@pytest.mark.long
def test_pending_archives_wait_until_their_drop_is_configured_again(
    stage: Stage, receiver: RunningReceiver
) -> None:
    other = stage.base / "other"
    other.mkdir()
    with_other = f'[drop.other]\npath = "{other}"\n'
    quick = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"\n'
    stage.configure("https://127.0.0.1:1/v1/upload", more=quick + with_other)
    daemon = stage.daemon().ready()
    for number in range(2):
        stage.put(f"r{number}.cfg", b"content %d" % number, into=other)
    daemon.wait_for("destination.paused")
    daemon.wait_for("archive.queued", 2)
    assert daemon.stop() == 0

    stage.configure(receiver.url, more=quick)
    daemon = stage.daemon().ready()
    daemon.wait_for("delivery.deferred", 2)
    (warning,) = daemon.events("config.warning")
    assert warning["path"] == "drop.other"
    stage.configure(receiver.url, more=quick + with_other)
    reload(daemon)

    daemon.wait_for("archive.disposed", 2, disposition="moved")
    assert not daemon.events("archive.superseded")
    assert len(daemon.events("delivery.verified")) == 2


@pytest.mark.long
def test_claims_of_a_retired_destination_are_released_once_the_ledger_is_unlocked(stage: Stage) -> None:
    with ScriptedServer(in_turn(responds_after_resume, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='stable_for = "0s"', destination="workers = 1")
        for number in range(4):
            stage.put(f"r{number}.cfg", b"content %d" % number)
        daemon = stage.daemon().ready()
        assert server.paused.wait(TIMEOUT)
        stage.configure(server.url, drop='stable_for = "0s"', destination="workers = 2")
        reload(daemon)
        path = stage.state / "ledger.sqlite3"
        with closing(sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None)) as ledger:
            claimed = "SELECT count(*) FROM delivery WHERE state = 'claimed'"
            until(lambda: ledger.execute(claimed).fetchone() == (4,), "all archives to be claimed")
            ledger.execute("BEGIN IMMEDIATE")
            server.resumed.set()
            daemon.wait_for("ledger.failed", 3)  # the worker has failed as well
            ledger.execute("ROLLBACK")
        daemon.wait_for("archive.disposed", 4)
        assert len(server.requests) == 4
        assert daemon.stop() == 0


def test_a_reload_adds_and_removes_drops_and_destinations(stage: Stage) -> None:
    other = stage.base / "firewalls"
    other.mkdir()
    with (
        ScriptedServer(accept_all, server_context(stage.pki)) as first,
        ScriptedServer(accept_all, server_context(stage.pki)) as second,
    ):
        stage.configure(first.url)
        daemon = stage.daemon().ready()
        tls = f'ca = "{stage.pki.ca_pem}"\ncert = "{stage.pki.client_cert}"\nkey = "{stage.pki.client_key}"'
        stage.configure(
            first.url,
            more=f'[drop.firewalls]\npath = "{other}"\nstable_for = "0s"\n'
            f'[destination.second]\nurl = "{second.url}"\n{tls}\n',
        )
        reloaded = reload(daemon)
        assert reloaded["drops_changed"] == ["firewalls", "switches"]  # switches has a new destination
        assert reloaded["destinations_changed"] == ["second"]
        stage.put("new.cfg", b"for two", into=other)
        stage.put("old.cfg", b"for two, too")
        daemon.wait_for("archive.disposed", 2)
        assert {r.archive for r in first.requests} == {r.archive for r in second.requests}
        stage.configure(first.url)
        assert reload(daemon)["drops_changed"] == ["firewalls", "switches"]
        stage.put("later.cfg", b"for one")
        daemon.wait_for("archive.disposed", archive="later.cfg")
        assert len(second.requests) == 2
        assert daemon.stop() == 0


@pytest.mark.long
def test_archives_pending_for_a_removed_destination_are_logged_and_in_the_status(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        tls = f'ca = "{stage.pki.ca_pem}"\ncert = "{stage.pki.client_cert}"\nkey = "{stage.pki.client_key}"'
        gone = f'[destination.gone]\nurl = "https://localhost:1/"\n{tls}\n'
        stage.configure(server.url, top=FREQUENT_HEARTBEAT, more=gone)
        daemon = stage.daemon().ready()
        stage.put("a.cfg", b"abc")
        daemon.wait_for("delivery.verified")
        daemon.wait_for("destination.paused", destination="gone")
        stage.configure(server.url, top=FREQUENT_HEARTBEAT)
        reload(daemon)
        warning = daemon.wait_for("config.warning", path="destination.gone")[0]
        assert warning["error"].startswith("1 archives are pending")
        assert daemon.wait_for("destination.status", destination="gone")[-1]["pending"] == 1
        status = json.loads(stage.backupd("status", "--json").stdout)
        assert {d["name"]: d["pending"] for d in status["destinations"]} == {"vault": 0, "gone": 1}
        stage.configure(
            server.url,
            top=FREQUENT_HEARTBEAT,
            more=gone.replace("localhost:1/", server.url.partition("//")[2]),
        )
        reload(daemon)
        daemon.wait_for("archive.disposed", archive="a.cfg")
        assert daemon.stop() == 0


def test_an_upload_in_progress_ends_with_the_old_configuration(stage: Stage) -> None:
    with ScriptedServer(in_turn(responds_after_resume, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        stage.put("slow.cfg", b"slow")
        assert server.paused.wait(TIMEOUT)
        stage.configure(server.url, destination='fields = { note = "new" }')
        assert reload(daemon)["destinations_changed"] == ["vault"]
        stage.put("quick.cfg", b"quick")  # not delayed by the other upload
        daemon.wait_for("archive.disposed", archive="quick.cfg")
        server.resumed.set()
        daemon.wait_for("archive.disposed", archive="slow.cfg")
        assert not daemon.events("attempt.failed")
        assert [b'name="note"' in r.body for r in server.requests] == [False, True]
        assert daemon.stop() == 0


def test_a_drop_folder_that_is_missing_at_a_reload_is_used_once_it_exists(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    later = stage.base / "later"
    text = stage.config.read_text().replace(f'path = "{stage.drop}"', f'path = "{later}"')
    stage.config.write_text(text)
    reload(daemon, "config.reloaded")
    daemon.wait_for("drop.failed", path=str(later))
    later.mkdir()
    stage.put("r1.cfg", b"content", into=later)
    daemon.wait_for("archive.disposed", archive="r1.cfg")
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[drop.switches]\npaht = 3", "paht"),
        ("nonsense", "nonsense"),
    ],
)
def test_an_invalid_configuration_is_refused_and_the_daemon_continues(
    stage: Stage, text: str, error: str
) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        stage.config.write_text(text)
        refused = reload(daemon, "config.refused")
        assert error in refused["error"]
        assert refused["hint"]
        stage.put("a.cfg", b"abc")
        daemon.wait_for("archive.disposed", archive="a.cfg")
        assert daemon.stop() == 0


def test_a_reload_refuses_another_state_dir(stage: Stage) -> None:
    stage.configure("https://localhost:1/")
    daemon = stage.daemon().ready()
    config = stage.config.read_text().replace(str(stage.state), str(stage.base / "elsewhere"))
    stage.config.write_text(config)
    assert "state_dir" in reload(daemon, "config.refused")["error"]


@pytest.mark.long
def test_twenty_reloads_under_load_lose_no_archive_and_upload_none_twice(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        daemon = stage.daemon().ready()
        for number in range(20):
            for each in range(10):
                stage.put(f"{number}-{each}.cfg", f"{number} {each}".encode())
            stage.configure(server.url, destination=f'fields = {{ note = "{number}" }}')
            reload(daemon)
        daemon.wait_for("archive.disposed", 200)
        contents = [request.archive for request in server.requests]
        assert len(contents) == len(set(contents)) == 200
        assert not daemon.events("attempt.failed")
        assert len(stage.archives(stage.sent)) == 200
        assert daemon.stop() == 0


def test_a_renewed_certificate_is_used_from_the_next_archive_on(stage: Stage) -> None:
    with ScriptedServer(in_turn(responds_after_resume, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, top=FREQUENT_HEARTBEAT)
        daemon = stage.daemon().ready()
        stage.put("slow.cfg", b"slow")
        assert server.paused.wait(TIMEOUT)
        renew_client_files(stage, stage.pki.issue_client("renewed", not_after=in_days(200.5)))
        renewed = daemon.wait_for("certificate.renewed")[0]
        assert (renewed["destination"], renewed["days_left"]) == ("vault", 200)
        server.resumed.set()
        daemon.wait_for("archive.disposed", archive="slow.cfg")
        stage.put("next.cfg", b"next")
        daemon.wait_for("archive.disposed", archive="next.cfg")
        names = [dict(rdn[0] for rdn in p.client_certificate["subject"])["commonName"] for p in server.peers]
        assert names[0] != "renewed"
        assert names[-1] == "renewed"
        assert not daemon.events("attempt.failed")
        assert daemon.stop() == 0


@pytest.mark.long
def test_a_certificate_with_another_key_is_refused_and_the_last_valid_pair_stays(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, top=FREQUENT_HEARTBEAT)
        daemon = stage.daemon().ready()
        shutil.copy(stage.pki.issue_client("other").cert, stage.pki.client_cert)
        refused = daemon.wait_for("certificate.refused")[0]
        assert refused["destination"] == "vault"
        assert "is not the key of the certificate" in refused["error"]
        reload(daemon)
        stage.put("a.cfg", b"abc")
        daemon.wait_for("archive.disposed", archive="a.cfg")
        assert not daemon.events("attempt.failed")
        assert not daemon.events("destination.paused")
        assert daemon.stop() == 0


@pytest.mark.long
def test_certificates_that_expire_soon_are_logged_at_each_start(stage: Stage) -> None:
    renew_client_files(stage, stage.pki.issue_client("short", not_after=in_days(5.5)))
    pair = stage.pki.issue_server("brief", not_after=in_days(2.5))
    with ScriptedServer(accept_all, server_context(stage.pki, pair)) as server:
        stage.configure(server.url, top=FREQUENT_HEARTBEAT)
        for number in range(2):
            daemon = stage.daemon().ready()
            (client,) = daemon.wait_for("certificate.expiring", certificate_role="client")
            assert (client["destination"], client["days_left"]) == ("vault", 5)
            stage.put(f"{number}.cfg", b"abc")
            (server_certificate,) = daemon.wait_for("certificate.expiring", certificate_role="server")
            assert server_certificate["days_left"] == 2
            assert daemon.stop() == 0
