"""Limits of descriptors, memory and threads: the daemon ends in words, or goes on; nothing is lost."""

from __future__ import annotations

import json

import pytest

from tests.scripted import ScriptedServer, accept_all, server_context
from tests.stage import Stage, until

pytestmark = pytest.mark.long

LIMITS = [
    *(f"--nofile={count}" for count in (6, 8, 10, 12, 14, 16, 20, 24, 32)),
    *(f"--as={mebibytes * 1024 * 1024}" for mebibytes in (90, 100, 110, 140, 160, 180, 200, 250, 400, 700)),
    *(f"--data={mebibytes * 1024 * 1024}" for mebibytes in (50, 70, 90, 120)),
]


@pytest.mark.parametrize("limit", LIMITS)
def test_within_a_limit_the_daemon_goes_on_or_ends_in_words(stage: Stage, limit: str) -> None:
    contents = {f"r{number}.cfg": b"%d" % number * 100_000 for number in range(12)}
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, destination="workers = 4", top='heartbeat_every = "1s"')
        for name, content in contents.items():
            stage.put(name, content)
        daemon = stage.daemon(before=["prlimit", limit])

        def has_decided() -> bool:
            """Whether the daemon has ended, delivered everything, or goes on and says that it cannot."""
            lines = daemon.text().splitlines()
            heartbeats = sum('"event":"daemon.heartbeat"' in line for line in lines)
            failures = sum('"level":"error"' in line or '"level":"warning"' in line for line in lines)
            is_done = len(stage.archives(stage.sent)) == len(contents)
            return daemon.process.poll() is not None or is_done or (heartbeats > 5 and failures > 0)

        until(has_decided, "the daemon to end, to deliver or to go on")
        code, text = daemon.process.poll(), daemon.text()
        assert code != 0
        if code is None:
            assert daemon.stop() in (0, 1)
        elif code > 0:  # else a C library has aborted without memory, and systemd says by which signal
            errors = [line for line in text.splitlines() if '"level":"error"' in line]
            hints = [json.loads(line).get("hint", "") for line in errors]
            assert any(hints) or "backupd: " in text or "error while loading" in text, text[-3000:]

        normal = stage.daemon().ready()
        until(lambda: len(stage.archives(stage.sent)) == len(contents), "all archives in sent")
        assert normal.stop() == 0
        stored = {request.archive for request in server.requests}
    assert stored == set(contents.values())
    assert {path.name: path.read_bytes() for path in stage.archives(stage.sent)} == contents
