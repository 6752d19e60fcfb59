"""Fixtures and selection for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.privileges import IS_ROOT
from tests.stage import Stage, a_stage

# Have Python compile the package once, and not in each of the thousand processes that the tests start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A slow machine must fail no test.
hypothesis.settings.register_profile(
    "any-speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-speed")


def pytest_xdist_auto_num_workers() -> int:
    """Use more workers than processors: a test waits half of its time for the daemon that it started."""
    return max(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need root for other users, and start the longest tests first.

    A worker runs the tests in a systemd container one after the other. If it started with them last, the
    other workers would have nothing left to do.
    """
    for item in items:
        if item.get_closest_marker("root") and not IS_ROOT:
            item.add_marker(pytest.mark.skip(reason="needs root"))
    items.sort(key=lambda item: not item.get_closest_marker("long"))
    items.sort(key=lambda item: not item.get_closest_marker("systemd"))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """An installation, still without a configuration."""
    yield from a_stage(tmp_path)


@pytest.fixture
def receiver(stage: Stage) -> Iterator[RunningReceiver]:
    """The reference receiver, over mutual TLS."""
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    with RunningReceiver(stage.store, tls) as running:
        yield running
