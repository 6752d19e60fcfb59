"""A look at the folders and files that a configuration names, before anything depends on them."""

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Final

from backupd.config.certificates import certificate_problems, expiry
from backupd.config.consistency import overlap
from backupd.config.examination import Examination
from backupd.config.models import Config, DropConfig
from backupd.config.problem import Problem

__all__ = ["Problem", "preflight"]

_ALL: Final = os.R_OK | os.W_OK | os.X_OK
_REAL_FOLDER: Final = "put a folder in its place"
_MOUNTS: Final = Path("/proc/self/mountinfo")


def examine(config: Config, now: datetime) -> Examination:
    """Return what `preflight` says, and when the client certificates expire."""
    ends = {name: expiry(destination) for name, destination in config.destination.items()}
    expires = {name: end.timestamp() for name, end in ends.items() if end is not None}
    return Examination(tuple(preflight(config, now)), expires)


def preflight(config: Config, now: datetime) -> list[Problem]:
    """Return what is wrong with the folders, keys and certificates of `config` at the time `now`."""
    mounts = mount_points(_MOUNTS)
    return [
        *_state_problems(config),
        *_shared_folders(config),
        *(each for name, drop in config.drop.items() for each in _drop_problems(name, drop, mounts)),
        *(
            each
            for name, destination in config.destination.items()
            for each in certificate_problems(name, destination, now)
        ),
    ]


def mount_points(table: Path) -> frozenset[Path]:
    """Return where filesystems are mounted, after a table as in proc(5), `/proc/[pid]/mountinfo`."""
    try:
        lines = table.read_bytes().splitlines()
    except OSError:
        return frozenset()
    # blanks and the like are written as \040
    return frozenset(
        Path(os.fsdecode(line.split(b" ")[4].decode("unicode_escape").encode("latin-1"))) for line in lines
    )


def _state_problems(config: Config) -> Iterator[Problem]:
    folder = config.state_dir
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not os.path.isdir(there):
        yield Problem("state_dir", f"{there} is not a folder", "name another folder", fatal=True)
    elif not _may(there, _ALL if there == folder else os.W_OK | os.X_OK):
        verb = "written to" if there == folder else "created"
        yield Problem("state_dir", f"{folder} can't be {verb}", _let_us(there), fatal=True)
    for name, drop in config.drop.items():
        if overlap(_real(folder), _real(drop.path)):
            yield Problem(
                f"drop.{name}.path",
                f"{drop.path} and state_dir {folder} lie within one another",
                "keep the ledger apart from the archives",
                fatal=True,
            )


def _shared_folders(config: Config) -> Iterator[Problem]:
    """Tell of drops that symbolic links bring together."""
    for (one, first), (other, second) in combinations(config.drop.items(), 2):
        if overlap(_real(first.path), _real(second.path)):
            yield Problem(
                f"drop.{other}.path",
                f"{second.path} and drop.{one}.path {first.path} lie within one another",
                "give every drop a folder of its own",
                fatal=True,
            )


def _drop_problems(name: str, drop: DropConfig, mounts: frozenset[Path]) -> Iterator[Problem]:
    where = f"drop.{name}.path"
    if problem := _folder_problem(where, drop.path):
        yield problem
        return
    folders = [("rejected_dir", drop.rejected_dir)]
    if drop.on_delivered == "move":
        folders.append(("sent_dir", drop.sent_dir))
    for key, relative in folders:
        problem = _subfolder_problem(f"drop.{name}.{key}", drop.path, relative, mounts)
        if problem:
            yield problem


def _folder_problem(where: str, folder: Path) -> Problem | None:
    """Return what keeps us from taking files out of `folder`, if anything does."""
    try:
        mode = os.stat(folder).st_mode
    except FileNotFoundError:
        return Problem(where, f"{folder} does not exist", f"mkdir -p {folder}, or name another", fatal=True)
    except OSError as error:
        reason = (error.strerror or "unknown fault").lower()
        return Problem(where, f"{folder} can't be reached: {reason}", _let_us(folder.parent), fatal=True)
    if not stat.S_ISDIR(mode):
        return Problem(
            where, f"{folder} is not a folder", "name the folder that archives come to", fatal=True
        )
    if not _may(folder, _ALL):
        return Problem(where, f"{folder} can't be read, written and searched", _let_us(folder), fatal=True)
    return None


def _subfolder_problem(where: str, root: Path, relative: str, mounts: frozenset[Path]) -> Problem | None:
    """Return what keeps us from moving files from `root` to the folder below it, if anything does."""
    device = os.stat(root).st_dev
    here = root
    for part in relative.split("/"):
        here /= part
        if not os.path.lexists(here):
            return None  # it will be made
        if os.path.islink(here):
            return Problem(
                where,
                f"{here} is a symbolic link, which is never followed",
                _REAL_FOLDER,
                fatal=True,
                stops=False,
            )
        if problem := _folder_problem(where, here):
            return replace(problem, stops=False)
        if os.stat(here).st_dev != device or _real(here) in mounts:
            return Problem(
                where,
                f"{here} is on another filesystem than {root}",
                "archives are moved by renaming them; name a folder on the same filesystem",
                fatal=True,
            )
    return None


def _let_us(folder: Path) -> str:
    return f"let the daemon's user (uid {os.geteuid()}) read, write and search {folder}"


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
