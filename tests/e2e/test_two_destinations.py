"""A destination that is down delays neither the other destination nor, later, itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.stage import Stage, until

pytestmark = pytest.mark.long

COUNT = 400


def _seconds_to_vault(stage: Stage, receiver: RunningReceiver, names: list[str], more: str) -> float:
    """Deliver archives to the vault and return the seconds that it took; the daemon keeps running."""
    stage.configure(receiver.url, more=more)
    daemon = stage.daemon().ready()
    began = time.monotonic()
    for name in names:
        stage.put(name, name.encode() + os.urandom(1000))
    daemon.wait_for("delivery.verified", count=len(names), destination="vault")
    return time.monotonic() - began


def test_a_destination_that_is_down_does_not_delay_the_other_and_gets_all_archives_later(
    stage: Stage, receiver: RunningReceiver, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    alone = _seconds_to_vault(stage, receiver, [f"alone-{n}.cfg" for n in range(COUNT)], "")
    first = stage._daemons[-1]
    first.wait_for("archive.disposed", count=COUNT)
    first.stop()

    port = stage.a_free_port()
    annex = stage.annex(f"https://127.0.0.1:{port}/v1/upload", 'retry = { initial = "0.2s", max = "1s" }')
    names = [f"both-{n}.cfg" for n in range(COUNT)]
    beside = _seconds_to_vault(stage, receiver, names, annex)
    daemon = stage._daemons[-1]

    assert not daemon.events("archive.delivered")
    assert not daemon.events("archive.rejected")
    assert len(stage.archives(stage.drop)) - len(stage.archives(stage.sent)) == COUNT
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    with RunningReceiver(tmp_path / "annex", tls, port=port):
        daemon.wait_for("archive.disposed", count=COUNT)
        stored = stage.archives(tmp_path / "annex" / "archives")

    assert len(stored) == COUNT
    assert len(daemon.events("archive.delivered")) == COUNT
    assert until(lambda: len(stage.archives(stage.sent)) == 2 * COUNT, "the moves")
    record_property("seconds", f"alone {alone:.1f}, beside a destination that is down {beside:.1f}")
    print(f"{COUNT} archives: alone {alone:.1f} s, beside a destination that is down {beside:.1f} s")
