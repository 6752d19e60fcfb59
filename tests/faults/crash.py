"""The crash matrix: a delivery is struck at each of its system calls, and has to end well all the same."""

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

from tests.faults.campaign import Report, Terms
from tests.faults.delivery import DELETED, KEPT, MOVED, REJECTED, Archive, BrokenError, Ground
from tests.faults.shim import Call, Manner
from tests.faults.stepping import STEPS

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EROFS, errno.EXDEV)
FAR_ERRORS = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENOBUFS)
_WRITES = ("write", "send")
_GOES_ON = 1.0
"""Seconds that a daemon gets to go on by itself after one error; then it is started anew, without it."""


@dataclass(frozen=True, slots=True)
class Strike:
    """What is done to which call of a step, counted from the moment in which the archive appears."""

    step: int
    at: int
    manner: Manner
    error: int = 0

    @property
    def column(self) -> str:
        """Return the column of the table that it belongs to."""
        match self.manner:
            case Manner.KILL_BEFORE | Manner.KILL_HALFWAY:
                return "killed"
            case Manner.CUT_POWER:
                return "power cut"
            case Manner.FAIL:
                return errno.errorcode[self.error]
            case _:
                return f"{errno.errorcode[self.error]} from there on"

    @property
    def is_far(self) -> bool:
        return self.error in FAR_ERRORS

    @property
    def kills(self) -> bool:
        return self.manner in (Manner.KILL_BEFORE, Manner.KILL_HALFWAY, Manner.CUT_POWER)


@dataclass(slots=True)
class Tally:
    """What was tried: by step and column, how many cases, and which of them broke a promise."""

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    broken_at: Counter[tuple[str, str]] = field(default_factory=Counter)
    told_twice: int = 0
    gave_up: Counter[str] = field(default_factory=Counter)
    """Daemons that ended by themselves after an error, by the call."""

    @property
    def cases(self) -> int:
        return self.tried.total()

    def add(self, other: Tally) -> None:
        """Count what another has counted."""
        self.tried += other.tried
        self.broken += other.broken
        self.broken_at += other.broken_at
        self.told_twice += other.told_twice
        self.gave_up += other.gave_up


def recorded(ground: Ground) -> list[Call]:
    """Return the calls of one delivery that nothing happens to."""
    ground.start()
    for begin in (lambda: None, ground.shim.arm):  # a first delivery does more, such as to connect
        archives = ground.put(begin)
        for archive in archives:
            ground.wait_until_over(archive)
    ground.shim.disarm()
    for archive in archives:
        ground.check_the_end(archive)
    return ground.shim.calls


def by_step(calls: Sequence[Call], ground: Ground) -> dict[int, list[Call]]:
    """Return the calls of each step that is the ending's own."""
    found: dict[int, list[Call]] = {}
    for call in calls:
        if call.step >= STEPS.index(ground.ending.since):
            found.setdefault(call.step, []).append(call)
    return found


def all_strikes(calls: Sequence[Call], ground: Ground) -> Iterator[Strike]:
    """Yield all there is to try; some calls more than were recorded, as another run may have more."""
    for step, recorded_ones in by_step(calls, ground).items():
        for at, call in enumerate([*recorded_ones, None, None], 1):
            if ground.drives:
                yield Strike(step, at, Manner.CUT_POWER)
                continue
            yield Strike(step, at, Manner.KILL_BEFORE)
            if call is None or call.name in _WRITES:
                yield Strike(step, at, Manner.KILL_HALFWAY)
            if call is None or call.is_local:
                yield from (Strike(step, at, Manner.FAIL, error) for error in ERRORS)
                yield from (Strike(step, at, Manner.FAIL_FROM_NOW_ON, error) for error in ERRORS[:2])
            elif call.is_far:
                yield from (Strike(step, at, Manner.FAIL, error) for error in FAR_ERRORS)
                yield Strike(step, at, Manner.FAIL_FROM_NOW_ON, FAR_ERRORS[0])


def some_strikes(calls: Sequence[Call], ground: Ground, chance: random.Random) -> Iterator[Strike]:
    """Yield some of each step: a kill and an error of either kind, or a cut of the power."""
    for step, recorded_ones in by_step(calls, ground).items():
        at = chance.randint(1, len(recorded_ones))
        if ground.drives:
            yield Strike(step, at, Manner.CUT_POWER)
            continue
        yield Strike(step, at, Manner.KILL_BEFORE)
        local = [at for at, call in enumerate(recorded_ones, 1) if call.is_local]
        if local:
            yield Strike(step, chance.choice(local), Manner.FAIL, chance.choice(ERRORS))
        far = [at for at, call in enumerate(recorded_ones, 1) if call.is_far]
        if far:
            yield Strike(step, chance.choice(far), Manner.FAIL, chance.choice(FAR_ERRORS))


def strike(ground: Ground, one: Strike, tally: Tally) -> bool:
    """Try one case; return whether there was such a call to strike."""
    daemon = ground.start()
    archives = ground.put(lambda: ground.shim.arm(one.step, one.at, one.manner, one.error, far=one.is_far))
    try:
        struck = _see_it_end(ground, one, archives)
        if struck is None:
            return False
        cell = STEPS[struck.step], one.column
        tally.tried[cell] += 1
        try:
            for drive in ground.drives:
                drive.power_on()
            with ground.standing_still():
                for archive in archives:
                    ground.check_nothing_lost(archive)
            if one.manner is Manner.CUT_POWER:
                assert daemon.process.returncode == -signal.SIGKILL, "the power was not cut"
            if daemon.process.poll() is not None and not one.kills:
                tally.gave_up[f"{struck.name} of {struck.path}: {errno.errorcode[one.error]}"] += 1
            if one.kills or not all(map(ground.is_over, archives)):
                ground.restart(gently=one.manner is Manner.FAIL)
            for archive in archives:
                ground.wait_until_over(archive)
            tally.told_twice += max(map(ground.check_the_end, archives)) > 1
            ground.check_the_ledger()
        except AssertionError as error:
            tally.broken_at[cell] += 1
            what = f"{ground.ending.name}, {one}, {struck.name} of {struck.path} ({STEPS[struck.step]})"
            tally.broken.append(f"{what}: {error}")
            ground.restart()
        return True
    finally:
        ground.shim.disarm()
        for archive in archives:
            ground.clear(archive)


def _see_it_end(ground: Ground, one: Strike, archives: Sequence[Archive]) -> Call | None:
    """Wait until the daemon has ended, or the deliveries, or neither seems to come; return what was struck.

    Nothing reads the ledger of a daemon that was killed: whoever closes it last would tidy it up.
    """
    daemon = ground.daemon
    assert daemon is not None
    struck_at = gone_by = None
    over = False
    began = time.monotonic()
    while daemon.process.poll() is None:
        if not over and all(ground.told("archive.disposed", archive) for archive in archives):
            over = all(map(ground.is_over, archives))
        struck = ground.shim.struck
        if struck is not None:
            struck_at = struck_at or time.monotonic()
            if not one.kills and (over or time.monotonic() - struck_at > _GOES_ON):
                break
        elif over:
            gone_by = gone_by or time.monotonic()  # the last calls come after the commit that we see
            if time.monotonic() - gone_by > _GOES_ON and ground.shim.struck is None:
                return None
        if time.monotonic() - began > 180:
            raise BrokenError(f"{archives[0].name} did not end: {daemon.text()[-3000:]}")
        time.sleep(0.005)
    return ground.shim.struck


def run_all(ground: Ground, terms: Terms) -> Tally:
    """Try what there is time for, in an order of chance."""
    tally = Tally()
    with ground.open():
        chosen = list(all_strikes(recorded(ground), ground))
        random.Random(terms.seed).shuffle(chosen)
        for one in chosen:
            if not terms.go_on():
                break
            strike(ground, one, tally)
    return tally


def run_some(ground: Ground, seed: int) -> Tally:
    """Try one of each step."""
    tally = Tally()
    with ground.open():
        for one in some_strikes(recorded(ground), ground, random.Random(seed)):
            at = one.at
            while not strike(ground, replace(one, at=at), tally) and at > 1:
                at -= 1  # another run may have fewer calls: an answer may come in one read or in two
    return tally


ENDINGS = [
    *((ending, False) for ending in (MOVED, DELETED, KEPT, REJECTED)),
    *((ending, True) for ending in (MOVED, DELETED, REJECTED)),
]
"""The ways in which a delivery ends, and whether it is the power that is cut."""


def a_ground(number: int, base: Path) -> Ground:
    """Return an installation for one of `ENDINGS`."""
    ending, can_lose_power = ENDINGS[number]
    base.mkdir(exist_ok=True)
    return Ground(base / str(number), ending, can_lose_power=can_lose_power)


def _run(number: int, terms: Terms) -> tuple[str, Tally]:
    ground = a_ground(number, terms.base)
    return ground.name, run_all(ground, terms)


def campaign(terms: Terms) -> Report:
    """Try cases drawn by chance, on all installations at a time, as long as there is time."""
    report = Report()
    with concurrent.futures.ProcessPoolExecutor(len(ENDINGS)) as pool:
        for name, tally in pool.map(_run, range(len(ENDINGS)), [terms] * len(ENDINGS)):
            report.tried += tally.cases
            report.broken += tally.broken or [f"{name}: there was no time for any case"] * (not tally.cases)
            report.figures[name] = (
                f"{tally.cases} cases, {tally.told_twice} told twice, {tally.gave_up.total()} daemons ended"
            )
    return report
