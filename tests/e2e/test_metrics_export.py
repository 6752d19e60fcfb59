"""The metrics of a running daemon: by HTTP, over TLS and as a file, and their failures."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import ssl
import stat
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from backupd.receiver.serve import RunningReceiver
from tests.e2e.test_reload import reload
from tests.pki import in_days
from tests.stage import Daemon, Stage, until

BEATS = 'heartbeat_every = "0.5s"'


def series(text: str) -> dict[str, float]:
    """Return the value of each series, by its name and the values of its labels without the host."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "host"]
            found[" ".join([sample.name, *labels])] = sample.value
    return found


def get(url: str, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, context=context, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def problems(stage: Stage) -> list[str]:
    """Return the subjects of the daemon's own problems."""
    found: dict[str, Any] = json.loads(stage.backupd("status", "--json").stdout)
    return [problem["subject"] for problem in found["daemon_problems"]]


def with_metrics(stage: Stage, receiver: RunningReceiver, lines: str) -> None:
    stage.configure(receiver.url, top=BEATS, more=f"[metrics]\n{lines}")


def test_metrics_and_health_are_served_and_a_reload_ends_them(
    stage: Stage, receiver: RunningReceiver
) -> None:
    port = stage.a_free_port()
    with_metrics(stage, receiver, f'listen = "127.0.0.1:{port}"')
    daemon = stage.daemon().ready()
    url = f"http://127.0.0.1:{port}"
    stage.put("r1.cfg", b"abc")
    daemon.wait_for("archive.disposed")

    def counted() -> bool:
        found = series(get(f"{url}/metrics")[1])
        return found.get("backupd_archives_delivered_total switches") == 1 and bool(
            found.get("backupd_last_delivery_timestamp_seconds vault")
        )

    until(counted, "the delivery among the metrics")
    assert get(f"{url}/healthz") == (200, "ok\n")
    assert get(f"{url}/readyz") == (200, "ok\n")
    assert get(f"{url}/nothing")[0] == 404
    status, page = get(url)
    assert status == 200
    assert "r1.cfg" in page

    other = stage.a_free_port()
    with_metrics(stage, receiver, f'listen = "127.0.0.1:{other}"')
    reload(daemon)
    assert (
        series(get(f"http://127.0.0.1:{other}/metrics")[1])["backupd_archives_delivered_total switches"] == 1
    )
    stage.configure(receiver.url, top=BEATS)
    reload(daemon)
    for closed in (port, other):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", closed)) != 0
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_port_in_use_is_a_problem_until_it_is_free_and_stops_no_delivery(
    stage: Stage, receiver: RunningReceiver
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with_metrics(stage, receiver, f'listen = "{address}"')
        daemon = stage.daemon().ready()
        [failed] = daemon.wait_for("metrics.failed", path="metrics.listen")
        assert failed["error"] == f"no server can listen at {address}: address already in use"
        assert "ss -ltnp" in failed["hint"]
        stage.put("r1.cfg", b"abc")
        daemon.wait_for("archive.disposed")
        assert problems(stage) == ["metrics.listen"]
    daemon.wait_for("metrics.served", listen=address)
    daemon.wait_for("metrics.recovered", path="metrics.listen")
    assert get(f"http://{address}/metrics")[0] == 200
    assert problems(stage) == []
    assert len(daemon.events("metrics.failed")) == 1


def renew(stage: Stage, name: str, days: float) -> None:
    """Issue the certificate of the metrics' server again."""
    new = stage.pki.issue_server("new", not_after=in_days(days))
    for path, suffix in zip(new, ("pem", "key"), strict=True):
        target = stage.pki.folder / f"{name}.{suffix}"
        part = Path(f"{target}.part")
        shutil.copy(path, part)
        part.chmod(0o600)
        part.rename(target)


def served_until(port: int, context: ssl.SSLContext) -> str:
    with (
        socket.create_connection(("127.0.0.1", port), 30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        certificate = secure.getpeercert()
        assert certificate is not None
        return str(certificate["notAfter"])


@pytest.mark.long
def test_a_renewed_certificate_is_used_without_a_restart(stage: Stage, receiver: RunningReceiver) -> None:
    port, pki = stage.a_free_port(), stage.pki
    renew(stage, "metrics", 0.05)
    with_metrics(
        stage,
        receiver,
        f'listen = "127.0.0.1:{port}"\nca = "{pki.ca_pem}"\n'
        f'cert = "{pki.folder}/metrics.pem"\nkey = "{pki.folder}/metrics.key"',
    )
    daemon = stage.daemon().ready()
    context = ssl.create_default_context(cafile=pki.ca_pem)
    context.load_cert_chain(pki.client_cert, pki.client_key)
    assert get(f"https://127.0.0.1:{port}/healthz", context) == (200, "ok\n")
    before = served_until(port, context)
    [warned] = daemon.wait_for("metrics.failed", path="metrics.cert")
    assert "which expires" in warned["error"]
    assert problems(stage) == ["metrics.cert"]

    renew(stage, "metrics", 60)
    daemon.wait_for("metrics.served", 2)
    daemon.wait_for("metrics.recovered", path="metrics.cert")
    assert served_until(port, context) != before
    assert problems(stage) == []

    (pki.folder / "metrics.key").write_text("no key")
    daemon.wait_for("metrics.failed", path="metrics.key")
    assert get(f"https://127.0.0.1:{port}/healthz", context) == (200, "ok\n")
    assert daemon.stop() == 0


def written(path: Path) -> dict[str, float]:
    return series(path.read_text()) if path.exists() else {}


def test_the_textfile_is_replaced_with_each_heartbeat_and_shows_the_end(
    stage: Stage, receiver: RunningReceiver
) -> None:
    folder = stage.base / "node_exporter"
    path = folder / "backupd.prom"
    with_metrics(stage, receiver, f'textfile = "{path}"')
    daemon = stage.daemon().ready()
    [failed] = daemon.wait_for("metrics.failed", path="metrics.textfile")
    assert failed["error"] == f"{path} can't be written: no such file or directory"
    assert problems(stage) == ["metrics.textfile"]

    folder.mkdir()
    daemon.wait_for("metrics.recovered", path="metrics.textfile")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    first = written(path)["backupd_heartbeat_timestamp_seconds"]
    until(lambda: written(path)["backupd_heartbeat_timestamp_seconds"] > first, "the next heartbeat")
    assert written(path)["backupd_up"] == 1
    assert daemon.stop() == 0
    assert written(path)["backupd_up"] == 0
    assert [each.name for each in folder.iterdir()] == ["backupd.prom"]


def test_a_reload_adds_the_textfile(stage: Stage, receiver: RunningReceiver) -> None:
    path = stage.base / "backupd.prom"
    stage.configure(receiver.url, top=BEATS)
    daemon: Daemon = stage.daemon().ready()
    with_metrics(stage, receiver, f'textfile = "{path}"')
    reload(daemon)

    until(lambda: written(path).get("backupd_up") == 1, "the file")
    assert daemon.stop() == 0


@pytest.mark.parametrize("cause", ["removed", "held"])
def test_a_ledger_that_cannot_be_written_is_a_problem_until_it_can(
    stage: Stage, receiver: RunningReceiver, cause: str, tmp_path: Path
) -> None:
    port = stage.a_free_port()
    with_metrics(stage, receiver, f'listen = "127.0.0.1:{port}"')
    stage.daemon().ready()
    url = f"http://127.0.0.1:{port}"
    assert get(f"{url}/readyz")[0] == 200

    ledger, away = stage.state / "ledger.sqlite3", tmp_path / "away"
    with closing(sqlite3.connect(ledger, isolation_level=None)) as other:
        if cause == "removed":
            ledger.rename(away)
        else:
            other.execute("BEGIN IMMEDIATE")
        until(lambda: get(f"{url}/readyz")[0] == 503, "the ledger as a problem")
        assert "the ledger cannot be used" in get(f"{url}/readyz")[1]
        assert series(get(f"{url}/metrics")[1])["backupd_daemon_problems ledger"] == 1
        until(lambda: "ledger: " in get(url)[1], "it on the page")
        if cause == "removed":
            away.rename(ledger)
        else:
            other.execute("ROLLBACK")
    until(lambda: get(f"{url}/readyz")[0] == 200, "the end of the problem")
    assert "backupd_daemon_problems ledger" not in series(get(f"{url}/metrics")[1])
