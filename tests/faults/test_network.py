"""Every archive is delivered once, through every kind of network fault."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.network import NetworkTally, deliver, run
from tests.faults.proxy import BELOW_HTTP, Fault, Kind

SEED = random.randrange(1_000_000)


LOSE_THE_RESPONSE = (
    Kind.STALL_BEFORE_RESPONSE,
    Kind.NO_RESPONSE,
    Kind.PARTIAL_RESPONSE,
    Kind.RESET_IN_RESPONSE,
    Kind.SLOW_RESPONSE,
    Kind.BAD_GATEWAY,
)
HARMLESS = (Kind.RESPONSE_TWICE, Kind.CLOSED_TWICE)


@pytest.mark.long
@pytest.mark.parametrize("kind", [*Kind], ids=lambda kind: kind.value)
def test_a_fault_loses_no_archive_and_stores_none_twice(tmp_path: Path, kind: Kind) -> None:
    result = deliver(
        tmp_path, [Fault(kind, after=5_000)] * 2, 6, query=False, sizes=(300_000,), deadline="2s"
    )

    assert result.injected == {kind: 2}
    assert result.attempts_failed > 0 or kind in HARMLESS


def test_a_wrong_server_certificate_loses_no_archive_and_repeats_no_upload(tmp_path: Path) -> None:
    result = deliver(tmp_path, [Fault(Kind.WRONG_CERTIFICATE)] * 12, 6, query=False, sizes=(30_000,))

    assert result.injected == {Kind.WRONG_CERTIFICATE: 12}
    assert result.attempts_failed >= 12
    assert 1 <= result.sent_completely <= 1 + result.failed_without_fault


@pytest.mark.long
@pytest.mark.parametrize("kind", LOSE_THE_RESPONSE, ids=lambda kind: kind.value)
def test_a_query_after_a_lost_response_avoids_a_second_upload(tmp_path: Path, kind: Kind) -> None:
    """The response to the upload is lost, then the response to the query."""
    schedule = [
        Fault(kind, after=302_000),
        Fault(kind if kind is not Kind.STALL_BEFORE_RESPONSE else Kind.HANG),
    ]
    result = deliver(tmp_path, schedule, 1, query=True, sizes=(300_000,), workers=1, deadline="2s")

    assert result.attempts_failed > 0
    assert 1 <= result.sent_completely <= 1 + result.failed_without_fault
    assert result.archives == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", BELOW_HTTP, ids=lambda kind: kind.value)
def test_a_fault_below_http2_loses_no_archive_and_stores_none_twice(tmp_path: Path, kind: Kind) -> None:
    result = deliver(
        tmp_path,
        [Fault(kind, after=5_000)] * 2,
        6,
        query=False,
        http2=True,
        sizes=(300_000,),
        deadline="2s",
    )

    assert result.injected == {kind: 2}
    assert result.attempts_failed > 0


def test_faults_of_two_destinations_lose_no_archive_of_either(tmp_path: Path) -> None:
    schedule = [Fault(kind, after=5_000) for kind in Kind for _ in range(2)]
    result = deliver(
        tmp_path, schedule, 12, query=False, two_destinations=True, sizes=(300_000,), deadline="2s"
    )

    assert result.injected == dict.fromkeys(Kind, 2)
    assert result.attempts_failed > 0


@pytest.mark.long
def test_a_random_schedule_ends_with_all_archives_delivered_once() -> None:
    print(f"seed {SEED}")
    tally = NetworkTally()

    run(SEED, count=60, times=1, most=2, tally=tally)

    assert tally.archives >= 120
    assert tally.injected == dict.fromkeys(Kind, 2)
