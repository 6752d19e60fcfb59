"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.stage import Stage, a_stage

# how long an example takes is the machine's affair
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


def pytest_xdist_auto_num_workers() -> int:
    """Have more workers than processors: half of the time a test waits for what it has started."""
    return max(os.cpu_count() or 1, 4)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A whole installation without a destination yet."""
    yield from a_stage(tmp_path)


@pytest.fixture
def receiver(stage: Stage) -> Iterator[RunningReceiver]:
    """The reference receiver over mTLS."""
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    with RunningReceiver(stage.store, tls) as running:
        yield running
