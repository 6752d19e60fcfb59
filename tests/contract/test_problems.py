"""The contract of the ledger for the problems of files in drop folders."""

from __future__ import annotations

from datetime import timedelta

from backupd.core.drop_problem import DropProblem, DropState, ProblemCount
from backupd.core.model import Outcome
from backupd.core.policy import Reason, rule_of
from backupd.ledger.history import History
from backupd.ledger.port import Ledger
from tests.contract.bench import Bench
from tests.factories import NOW, a_candidate, a_claim_result, deferred, delivered


def a_problem(
    relpath: bytes = b"r1.cfg",
    reason: str = "unreadable",
    *,
    drop: str = "switches",
    hours: int = 0,
    files: int = 1,
) -> DropProblem:
    """Return a problem that was found some hours after `NOW`."""
    since = NOW + timedelta(hours=hours)
    return DropProblem(drop, relpath, reason, since, "Permission denied", "chmod it", 7, files)


def test_saved_problems_are_returned_the_oldest_first(ledger: Ledger, history: History) -> None:
    late, early, other = (
        a_problem(b"a", hours=2),
        a_problem(b"\xff", hours=1),
        a_problem(drop="routers", hours=3),
    )

    ledger.save_problems([late, early, other], [])

    assert ledger.problems() == history.problems(None, 99) == [early, late, other]
    assert ledger.problems("routers") == history.problems("routers", 99) == [other]
    assert history.problems(None, 1) == [early]


def test_a_problem_that_is_saved_again_replaces_the_earlier_one(ledger: Ledger) -> None:
    ledger.save_problems([a_problem(files=1)], [])
    ledger.save_problems([a_problem(files=2)], [])

    assert ledger.problems() == [a_problem(files=2)]


def test_solved_problems_are_deleted(ledger: Ledger) -> None:
    unreadable, too_small = a_problem(), a_problem(reason="too_small")
    ledger.save_problems([unreadable, too_small], [])

    ledger.save_problems([], [unreadable, a_problem(b"unknown")])

    assert ledger.problems() == [too_small]


def test_a_file_with_another_problem_has_no_longer_the_first(ledger: Ledger) -> None:
    ledger.save_problems([a_problem()], [])

    ledger.save_problems([a_problem(reason="too_small")], [a_problem()])

    assert ledger.problems() == [a_problem(reason="too_small")]


def test_problems_are_counted_by_drop_and_reason_with_the_oldest_as_an_example(ledger: Ledger) -> None:
    ledger.save_problems(
        [
            a_problem(b"new", hours=2),
            a_problem(b"old", hours=1),
            a_problem(b"", "not_listed", files=40),
            a_problem(drop="routers"),
        ],
        [],
    )

    assert ledger.problem_counts() == [
        ProblemCount("routers", "unreadable", 1, NOW, b"r1.cfg", "Permission denied", "chmod it"),
        ProblemCount("switches", "not_listed", 40, NOW, b"", "Permission denied", "chmod it"),
        ProblemCount(
            "switches", "unreadable", 2, NOW + timedelta(hours=1), b"old", "Permission denied", "chmod it"
        ),
    ]  # fmt: skip


def test_the_problems_of_other_drops_are_forgotten(ledger: Ledger) -> None:
    kept = a_problem(drop="routers")
    ledger.save_problems([a_problem(), kept], [])

    ledger.forget_drops(["routers", "firewalls"])

    assert ledger.problems() == [kept]


def test_problems_outlast_the_process(bench: Bench) -> None:
    bench.ledger.save_problems([a_problem()], [])

    assert bench.crash().problems() == [a_problem()]


def test_the_last_state_of_each_drop_is_kept(ledger: Ledger) -> None:
    ledger.save_drop_state(DropState("switches", "inotify", "ext4", "event_lost", ""))
    switches = DropState("switches", "inotify", "ext4", "", "")
    routers = DropState("routers", "polling", "nfs4", "", "writers on other hosts are invisible")

    ledger.save_drop_state(switches)
    ledger.save_drop_state(routers)

    assert ledger.drop_states() == [routers, switches]
    ledger.forget_drops(["switches"])
    assert ledger.drop_states() == [switches]


def test_an_archive_that_alone_fails_is_a_problem_until_it_is_delivered(
    ledger: Ledger, history: History
) -> None:
    def attempt(hour: int, outcome: Outcome) -> None:
        now = NOW + timedelta(hours=hour)
        (delivery,) = ledger.claim("vault", now)
        ledger.record([a_claim_result(delivery, outcome, now=now)], now)

    ledger.enqueue([a_candidate(b"large.cfg")], ("vault",), NOW)
    attempt(1, deferred(Reason.SERVER_ERROR))
    assert ledger.problems() == []

    attempt(2, deferred(Reason.FAILS_ALONE))
    hint = rule_of(Reason.FAILS_ALONE).hint
    problem = DropProblem(
        "switches",
        b"large.cfg",
        "fails_alone",
        NOW,
        "vault: did not work",
        hint,
        a_candidate().fingerprint.size,
    )
    assert ledger.problems() == history.problems("switches", 9) == [problem]
    assert ledger.problem_counts() == [
        ProblemCount("switches", "fails_alone", 1, NOW, b"large.cfg", "vault: did not work", hint)
    ]
    assert ledger.problems("routers") == []

    attempt(3, delivered())
    assert not ledger.problems()
    assert not ledger.problem_counts()
