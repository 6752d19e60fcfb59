"""The crash matrix: a fault at each system call of a delivery, after which the delivery must complete."""

from __future__ import annotations

import concurrent.futures
import errno
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.faults.campaign import CampaignOptions, Report
from tests.faults.delivery import DELETED, KEPT, MOVED, REJECTED, Archive, BrokenError, Harness
from tests.faults.shim import Call, Mode
from tests.faults.stepping import STEPS

FILE_ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EROFS, errno.EXDEV)
MOUNT_ERRORS = (errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN)
"""Errors of a network filesystem without its server; one of them in turn at each call."""
NETWORK_ERRORS = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENOBUFS)
_WRITES = ("write", "send")
_CONTINUE_SECONDS = 1.0
"""Seconds for which a daemon may continue after an error; then it is restarted without the error."""


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault at one system call: call number `at` of a step, counted since the archive appeared."""

    step: int
    at: int
    mode: Mode
    error: int = 0

    @property
    def column(self) -> str:
        """Return the table column of this kind of fault."""
        match self.mode:
            case Mode.KILL_BEFORE | Mode.KILL_HALFWAY:
                return "killed"
            case Mode.CUT_POWER:
                return "power cut"
            case Mode.FAIL:
                return errno.errorcode[self.error]
            case _:
                return f"{errno.errorcode[self.error]} from there on"

    @property
    def on_network(self) -> bool:
        """Whether the fault is an error of a call on a socket."""
        return self.error in NETWORK_ERRORS

    @property
    def kills(self) -> bool:
        """Whether the fault ends the daemon."""
        return self.mode in (Mode.KILL_BEFORE, Mode.KILL_HALFWAY, Mode.CUT_POWER)


@dataclass(slots=True)
class CrashTally:
    """The number of cases by step and column, and the cases that broke a promise."""

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    broken_at: Counter[tuple[str, str]] = field(default_factory=Counter)
    logged_twice: int = 0
    daemon_exits: Counter[str] = field(default_factory=Counter)
    """Daemons that ended by themselves after an error, by the call that failed."""

    @property
    def cases(self) -> int:
        return self.tried.total()

    def add(self, other: CrashTally) -> None:
        """Add the counts of another tally."""
        self.tried += other.tried
        self.broken += other.broken
        self.broken_at += other.broken_at
        self.logged_twice += other.logged_twice
        self.daemon_exits += other.daemon_exits


def record_calls(harness: Harness) -> list[Call]:
    """Return the system calls of a delivery without a fault."""
    harness.start()
    for begin in (lambda: None, harness.shim.arm):  # the first delivery makes more calls, such as to connect
        archives = harness.put(begin)
        for archive in archives:
            harness.wait_until_completed(archive)
    harness.shim.disarm()
    for archive in archives:
        harness.check_completed(archive)
    return harness.shim.calls


def calls_by_step(calls: Sequence[Call], harness: Harness) -> dict[int, list[Call]]:
    """Return the calls of each step that is specific to the scenario."""
    found: dict[int, list[Call]] = {}
    for call in calls:
        if call.step >= STEPS.index(harness.scenario.since):
            found.setdefault(call.step, []).append(call)
    return found


def all_injections(calls: Sequence[Call], harness: Harness) -> Iterator[Injection]:
    """Yield every case; two more calls than recorded for each step, as another run may make more."""
    for step, step_calls in calls_by_step(calls, harness).items():
        for at, call in enumerate([*step_calls, None, None], 1):
            if harness.disks:
                yield Injection(step, at, Mode.CUT_POWER)
                continue
            yield Injection(step, at, Mode.KILL_BEFORE)
            if call is None or call.name in _WRITES:
                yield Injection(step, at, Mode.KILL_HALFWAY)
            if call is None or call.is_local:
                yield from (Injection(step, at, Mode.FAIL, error) for error in FILE_ERRORS)
                yield from (Injection(step, at, Mode.FAIL_FROM_NOW_ON, error) for error in FILE_ERRORS[:2])
                yield Injection(step, at, Mode.FAIL, MOUNT_ERRORS[at % len(MOUNT_ERRORS)])
                yield Injection(step, at, Mode.FAIL_FROM_NOW_ON, MOUNT_ERRORS[at % len(MOUNT_ERRORS)])
            elif call.on_network:
                yield from (Injection(step, at, Mode.FAIL, error) for error in NETWORK_ERRORS)
                yield Injection(step, at, Mode.FAIL_FROM_NOW_ON, NETWORK_ERRORS[0])


def sample_injections(calls: Sequence[Call], harness: Harness, chance: random.Random) -> Iterator[Injection]:
    """Yield random cases of each step: a kill and one error of each kind, or a power cut."""
    for step, step_calls in calls_by_step(calls, harness).items():
        at = chance.randint(1, len(step_calls))
        if harness.disks:
            yield Injection(step, at, Mode.CUT_POWER)
            continue
        yield Injection(step, at, Mode.KILL_BEFORE)
        local = [at for at, call in enumerate(step_calls, 1) if call.is_local]
        if local:
            yield Injection(
                step, chance.choice(local), Mode.FAIL, chance.choice((*FILE_ERRORS, *MOUNT_ERRORS))
            )
        network = [at for at, call in enumerate(step_calls, 1) if call.on_network]
        if network:
            yield Injection(step, chance.choice(network), Mode.FAIL, chance.choice(NETWORK_ERRORS))


def run_case(harness: Harness, case: Injection, tally: CrashTally) -> bool:
    """Run one case; return False if the delivery made no such call."""
    daemon = harness.start()
    arm = harness.shim.arm
    archives = harness.put(lambda: arm(case.step, case.at, case.mode, case.error, network=case.on_network))
    try:
        hit = _wait_for_end(harness, case, archives)
        if hit is None:
            return False
        cell = STEPS[hit.step], case.column
        tally.tried[cell] += 1
        try:
            for disk in harness.disks:
                disk.power_on()
            with harness.stopped():
                for archive in archives:
                    harness.check_nothing_lost(archive)
            if case.mode is Mode.CUT_POWER:
                assert daemon.process.returncode == -signal.SIGKILL, "the power was not cut"
            if daemon.process.poll() is not None and not case.kills:
                tally.daemon_exits[f"{hit.name} of {hit.path}: {errno.errorcode[case.error]}"] += 1
            if case.kills or not all(map(harness.is_completed, archives)):
                harness.restart(gently=case.mode is Mode.FAIL)
            for archive in archives:
                harness.wait_until_completed(archive)
            tally.logged_twice += max(map(harness.check_completed, archives)) > 1
            harness.check_the_ledger()
        except AssertionError as error:
            tally.broken_at[cell] += 1
            description = f"{harness.scenario.name}, {case}, {hit.name} of {hit.path} ({STEPS[hit.step]})"
            tally.broken.append(f"{description}: {error}")
            harness.restart()
        return True
    finally:
        harness.shim.disarm()
        for archive in archives:
            harness.clear(archive)


def _wait_for_end(harness: Harness, case: Injection, archives: Sequence[Archive]) -> Call | None:
    """Wait until the daemon has ended or the deliveries are complete, and return the call with the fault.

    A daemon that does neither is given up after a while. The ledger of a killed daemon is not opened: the
    last connection that closes it would run a checkpoint.
    """
    daemon = harness.daemon
    assert daemon is not None
    hit_at = completed_at = None
    completed = False
    began = time.monotonic()
    while daemon.process.poll() is None:
        if not completed and all(harness.count_logged("archive.disposed", archive) for archive in archives):
            completed = all(map(harness.is_completed, archives))
        hit = harness.shim.hit
        if hit is not None:
            hit_at = hit_at or time.monotonic()
            if not case.kills and (completed or time.monotonic() - hit_at > _CONTINUE_SECONDS):
                break
        elif completed:
            completed_at = completed_at or time.monotonic()  # the last calls follow the commit seen here
            if time.monotonic() - completed_at > _CONTINUE_SECONDS and harness.shim.hit is None:
                return None
        if time.monotonic() - began > 180:
            raise BrokenError(f"{archives[0].name} did not complete: {daemon.text()[-3000:]}")
        time.sleep(0.005)
    return harness.shim.hit


def run_all(harness: Harness, options: CampaignOptions) -> CrashTally:
    """Run the cases that fit into the time, in random order."""
    tally = CrashTally()
    with harness.open():
        chosen = list(all_injections(record_calls(harness), harness))
        random.Random(options.seed).shuffle(chosen)
        for case in chosen:
            if not options.has_time():
                break
            run_case(harness, case, tally)
    return tally


def run_sample(harness: Harness, seed: int) -> CrashTally:
    """Run a few random cases of each step."""
    tally = CrashTally()
    with harness.open():
        for case in sample_injections(record_calls(harness), harness, random.Random(seed)):
            at = case.at
            while not run_case(harness, replace(case, at=at), tally) and at > 1:
                at -= 1  # another run may make fewer calls: a response may arrive in one read or in two
    return tally


SCENARIOS = [
    *((scenario, False) for scenario in (MOVED, DELETED, KEPT, REJECTED)),
    *((scenario, True) for scenario in (MOVED, DELETED, REJECTED)),
]
"""The dispositions of an archive, each without and with power cuts."""


def a_harness(number: int, base: Path) -> Harness:
    """Return a harness for one of `SCENARIOS`."""
    scenario, can_lose_power = SCENARIOS[number]
    base.mkdir(exist_ok=True)
    return Harness(base / str(number), scenario, can_lose_power=can_lose_power)


def _run(number: int, options: CampaignOptions) -> tuple[str, CrashTally]:
    harness = a_harness(number, options.base)
    return harness.name, run_all(harness, options)


def campaign(options: CampaignOptions) -> Report:
    """Run random cases on a harness of each scenario at once, as long as there is time."""
    report = Report()
    with concurrent.futures.ProcessPoolExecutor(len(SCENARIOS)) as pool:
        for name, tally in pool.map(_run, range(len(SCENARIOS)), [options] * len(SCENARIOS)):
            report.tried += tally.cases
            report.broken += tally.broken or [f"{name}: there was no time for any case"] * (not tally.cases)
            report.figures[name] = (
                f"{tally.cases} cases, {tally.logged_twice} results logged twice,"
                f" {tally.daemon_exits.total()} daemons ended by themselves"
            )
    return report
