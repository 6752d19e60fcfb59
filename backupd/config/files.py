"""Checks of the files and folders that a configuration names."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Final

from backupd.config.certificate_files import first_to_renew, tls_problems
from backupd.config.models import Config, DropConfig, TlsFiles
from backupd.config.notification_files import notification_problems
from backupd.config.problems import FileProblem, NamedPath, error_text
from backupd.config.rules import is_local, overlap
from backupd.config.time_limit import NoAnswerError, call_all, filesystem_hint
from backupd.core.certificate_life import CertificateLimits, Validity
from backupd.core.eligibility import Eligibility, Patterns
from backupd.core.filesystems import default_stable_for, has_change_time, hidden_cache_option, is_remote
from backupd.core.folder_place import FolderPlace
from backupd.core.mountinfo import MountEntry, mounts_within, parse_mountinfo, path_on_device


@dataclass(frozen=True, slots=True)
class FilesReport:
    """The problems of all named files and folders, validities of certificates, and the drop folders' places.

    `validities` are those of each destination's client certificate that needs a renewal first; one without a
    client certificate, or with an unreadable one, has no entry.
    `places` are those of all drops, by name; the numbers of a folder that can't be reached are unknown.
    `is_new` is whether no drop has a `sent_dir`: nothing was sent before. `silent` are the drops with a
    filesystem that does not answer.
    """

    problems: tuple[FileProblem, ...]
    certificate_limits: CertificateLimits
    certificates: Mapping[str, tuple[Path, Validity]]
    places: Mapping[str, FolderPlace]
    is_new: bool
    silent: frozenset[str]

    @property
    def fatal(self) -> tuple[FileProblem, ...]:
        """Return the problems that prevent the daemon from starting with the configuration."""
        return tuple(problem for problem in self.problems if problem.fatal and problem.prevents_start)

    def unusable(self, destination: str) -> tuple[FileProblem, ...]:
        """Return the problems that prevent deliveries to a destination: of its CA, certificate or key."""
        prefix = f"destination.{destination}."
        return tuple(
            problem for problem in self.problems if problem.fatal and problem.where.startswith(prefix)
        )


ExamineFiles = Callable[[], FilesReport]
"""Loads the configuration file again and examines the files that it names; raises ConfigError if it can't."""


def examine_files(config: Config, now: datetime) -> FilesReport:
    """Return the problems of the files and folders, and the validity of the client certificates."""
    limits = certificate_limits(config)
    found = {name: first_to_renew(each, limits, now) for name, each in config.destination.items()}
    certificates = {name: first for name, first in found.items() if first is not None}
    folders = _examine_drops(config)
    places = {name: each.place for name, each in folders.items()}
    is_new = not any(each.has_sent for each in folders.values())
    silent = frozenset(name for name, each in folders.items() if not each.answers)
    problems = tuple(_file_problems(config, folders, now))
    return FilesReport(problems, limits, certificates, places, is_new, silent)


def file_problems(config: Config, now: datetime) -> list[FileProblem]:
    """Return the problems of all folders, keys and certificates at the time `now`."""
    return _file_problems(config, _examine_drops(config), now)


def _file_problems(config: Config, folders: Mapping[str, _DropFolders], now: datetime) -> list[FileProblem]:
    return [
        *_state_dir_problems(config, folders),
        *_overlapping_drops(folders),
        *(problem for folder in folders.values() for problem in folder.problems),
        *(
            replace(problem, prevents_start=False)  # only this destination has to wait for other files
            for table, files in _tls_files(config)
            for problem in tls_problems(table, files, certificate_limits(config), now)
        ),
        *notification_problems(config),
        *metrics_problems(config, now),
        *_unprotected_metrics(config),
    ]


def metrics_problems(config: Config, now: datetime) -> Iterator[FileProblem]:
    """Yield the problems of the files of the metrics' server and of the folder of their file.

    None of them prevents the start: deliveries go on without metrics.
    """
    metrics = config.metrics
    for problem in tls_problems("metrics", metrics, certificate_limits(config), now, "server"):
        yield replace(problem, prevents_start=False)
    if metrics.textfile is not None:
        folder = metrics.textfile.parent
        named = NamedPath("metrics.textfile", folder)
        if not os.path.isdir(folder):
            hint = f"mkdir -p {folder}, or name a file in another folder"
            yield named.problem("is not a folder", hint, prevents_start=False)
        elif not _is_permitted(folder, os.W_OK | os.X_OK):
            hint = f"{_permission_hint(folder)}, and add ReadWritePaths={folder} to the unit"
            yield named.problem("can't be written to", hint, prevents_start=False)


def _unprotected_metrics(config: Config) -> Iterator[FileProblem]:
    if not is_local(config.metrics) and config.metrics.ca is None:
        message = f"every host that can connect to {config.metrics.listen} can read names of archives there"
        hint = "set ca to the CA of the clients' certificates, or permit only the monitoring host's address"
        yield FileProblem("metrics.listen", message, hint, fatal=False, prevents_start=False)


def certificate_limits(config: Config) -> CertificateLimits:
    """Return the limits of all certificates."""
    return CertificateLimits(config.certificate_warning, config.certificate_critical)


def mount_entries(table: Path) -> list[MountEntry]:
    """Return the entries of a file such as `/proc/self/mountinfo`; none if it can't be read."""
    try:
        return parse_mountinfo(table.read_bytes())
    except OSError:
        return []


def _tls_files(config: Config) -> Iterator[tuple[str, TlsFiles]]:
    """Yield the tables that name TLS files, and these."""
    for name, destination in config.destination.items():
        if destination.tls_files is not None:
            yield f"destination.{name}", destination.tls_files
        if destination.sign_in_tls_files is not None:
            yield f"destination.{name}.auth", destination.sign_in_tls_files


# Folders

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_READ_WRITE_SEARCH: Final = os.R_OK | os.W_OK | os.X_OK


def folder_errors(config: Config, drops: Iterable[str]) -> dict[str, OSError]:
    """Return why the folders of drops can't be reached, by drop; NoAnswerError if a filesystem hangs."""
    calls = {name: partial(os.statvfs, config.drop[name].path) for name in drops}
    return {name: answer for name, answer in call_all(calls).items() if isinstance(answer, OSError)}


@dataclass(frozen=True, slots=True)
class _DropFolders:
    """The place of a drop's folder, its real path, None until that is known, and its problems.

    `has_sent` is whether it has a `sent_dir`, as far as that is known, and `answers` whether its filesystem
    answered in time.
    """

    named: NamedPath
    place: FolderPlace
    real_path: Path | None = None
    problems: tuple[FileProblem, ...] = ()
    has_sent: bool = True
    answers: bool = True


def _examine_drops(config: Config) -> dict[str, _DropFolders]:
    """Examine the folders of all drops at the same time: one that hangs delays no other."""
    table = mount_entries(_MOUNTINFO)
    answers = call_all({n: partial(_examine_drop, n, drop, table) for n, drop in config.drop.items()})
    return {
        name: _unusable_drop(name, config.drop[name], answer) if isinstance(answer, OSError) else answer
        for name, answer in answers.items()
    }


def _examine_drop(name: str, drop: DropConfig, table: list[MountEntry]) -> _DropFolders:
    real_path = _real_path(drop.path)
    mounts = frozenset(Path(os.fsdecode(entry.mount_point)) for entry in table)
    problems = (
        *_drop_problems(name, drop, mounts),
        *_filesystem_problems(name, drop, mounts_within(os.fsencode(real_path), table)),
        *_unusable_mounts(name, _scanned_mounts(drop, real_path, mounts)),
    )
    place = FolderPlace(str(real_path))
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # among the problems
        place = _place_of(real_path, mounts)
    has_sent = os.path.lexists(drop.path / drop.sent_dir.strip("/"))
    return _DropFolders(NamedPath(f"drop.{name}.path", drop.path), place, real_path, problems, has_sent)


def _unusable_drop(name: str, drop: DropConfig, error: OSError) -> _DropFolders:
    folder = NamedPath(f"drop.{name}.path", drop.path)
    problems, answers = (_unusable(folder, error),), not isinstance(error, NoAnswerError)
    return _DropFolders(folder, FolderPlace(str(drop.path)), problems=problems, answers=answers)


def _unusable(folder: NamedPath, error: OSError) -> FileProblem:
    text = error_text(error) if isinstance(error, NoAnswerError) else f"can't be used: {error_text(error)}"
    return folder.problem(text, filesystem_hint(folder.path, error), prevents_start=False)


def _place_of(folder: Path, mounts: frozenset[Path]) -> FolderPlace:
    """Return the place of a folder, given by a path without links; `mounts` are all mount points."""
    status, filesystem = os.stat(folder), os.statvfs(folder).f_fsid
    is_root = folder in mounts or os.stat(folder.parent).st_dev != status.st_dev
    return FolderPlace(str(folder), filesystem or status.st_dev, None if is_root else status.st_ino)


def _state_dir_problems(config: Config, folders: Mapping[str, _DropFolders]) -> Iterator[FileProblem]:
    folder = config.state_dir
    existing = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    needed = _READ_WRITE_SEARCH if existing == folder else os.W_OK | os.X_OK
    if not os.path.isdir(existing):
        yield NamedPath("state_dir", existing).problem("is not a folder", "set state_dir to another folder")
    elif not _is_permitted(existing, needed):
        verb = "written to" if existing == folder else "created"
        yield NamedPath("state_dir", folder).problem(f"can't be {verb}", _permission_hint(existing))
    for drop in folders.values():
        if drop.real_path is not None and overlap(_real_path(folder), drop.real_path):
            yield drop.named.problem(
                f"overlaps state_dir {folder}", "use separate folders for the ledger and the archives"
            )


def _overlapping_drops(folders: Mapping[str, _DropFolders]) -> Iterator[FileProblem]:
    """Yield a problem for each two drops that are within one another by a symbolic link or a bind mount.

    `config.rules` checks the paths as they are written.
    """
    mounts = mount_entries(_MOUNTINFO)
    for (one, first), (_, second) in combinations(folders.items(), 2):
        if not first.real_path or not second.real_path:
            continue
        if overlap(first.real_path, second.real_path):
            how = ""
        elif _overlap_on_device(first.real_path, second.real_path, mounts):
            how = " by a bind mount"
        else:
            continue
        yield second.named.problem(
            f"overlaps drop.{one}.path {first.named.path}{how}", "use a separate folder for each drop"
        )


def _overlap_on_device(one: Path, other: Path, mounts: list[MountEntry]) -> bool:
    first, second = (path_on_device(os.fsencode(path), mounts) for path in (one, other))
    if first is None or second is None or first[0] != second[0]:
        return False
    return overlap(Path(os.fsdecode(first[1])), Path(os.fsdecode(second[1])))


def _drop_problems(name: str, drop: DropConfig, mounts: frozenset[Path]) -> Iterator[FileProblem]:
    folder = NamedPath(f"drop.{name}.path", drop.path)
    if problem := _folder_problem(folder):
        yield problem
        return
    subfolders = {"rejected_dir": drop.rejected_dir}
    if drop.on_delivered == "move":
        subfolders["sent_dir"] = drop.sent_dir
    for key, relative in subfolders.items():
        if problem := _subfolder_problem(f"drop.{name}.{key}", drop.path, relative, mounts):
            yield problem
    if drop.on_delivered != "keep":
        yield from _unmovable(folder, drop, mounts)


def _unmovable(folder: NamedPath, drop: DropConfig, mounts: frozenset[Path]) -> Iterator[FileProblem]:
    """Yield warnings of files that could be delivered, but not moved away afterwards."""
    root = _real_path(drop.path)
    own = [root / drop.sent_dir.strip("/"), root / drop.rejected_dir.strip("/")]
    for mount in _scanned_mounts(drop, root, mounts):
        if not any(overlap(mount, each) for each in own):
            text = f"has a mount below it, {mount}: its files can't be moved out of it"
            hint = (
                "mount it elsewhere and configure it as a drop of its own, or `exclude` it: archives are"
                " moved by renaming them, and no rename crosses a mount, not even a bind mount"
            )
            yield folder.problem(text, hint, fatal=False)
    if os.geteuid() == 0:
        return
    kinds: dict[Callable[[Path, os.stat_result], bool], tuple[str, str]] = {
        _is_sticky: ("is sticky: files of other users can't be moved out of it", "chmod -t {}"),
        _is_unwritable: (
            "can't be written by the daemon's user: files in it can't be moved out of it",
            "chmod g+w {}, and let writers create directories with umask 007; see the page about operations",
        ),
    }
    for path, status in _directories(root, {*own, *mounts} if drop.recursive else None):
        for applies, (text, hint) in list(kinds.items()):
            if applies(path, status):
                del kinds[applies]  # one example is enough
                yield NamedPath(folder.where, path).problem(text, hint.format(path), fatal=False)


def _scanned_mounts(drop: DropConfig, root: Path, mounts: Collection[Path]) -> list[Path]:
    """Return the mounts below the real path of a drop folder, except those that the daemon does not scan."""
    eligibility = Eligibility(Patterns(drop.include), Patterns(drop.exclude), drop.min_size, drop.max_size)

    def is_scanned(mount: Path) -> bool:
        directories = (each for each in (mount, *mount.parents) if root in each.parents)
        return not any(eligibility.of_directory(os.fsencode(each.relative_to(root))) for each in directories)

    return sorted(m for m in mounts if drop.recursive and root in m.parents and is_scanned(m))


_MOUNT_TIMEOUT: Final = 3.0
"""Seconds within which a mount below a drop folder has to answer; the folder above has to by then, too."""


def _unusable_mounts(name: str, mounts: Iterable[Path]) -> Iterator[FileProblem]:
    """Yield a problem for each mount below a drop folder that fails or never answers."""
    answers = call_all({str(mount): partial(os.statvfs, mount) for mount in mounts}, _MOUNT_TIMEOUT)
    for path, answer in answers.items():
        if isinstance(answer, OSError) and not isinstance(answer, FileNotFoundError | PermissionError):
            yield _unusable(NamedPath(f"drop.{name}.path", Path(path)), answer)


def _is_sticky(_path: Path, status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_ISVTX) and status.st_uid != os.geteuid()


def _is_unwritable(path: Path, _status: os.stat_result) -> bool:
    return not _is_permitted(path, os.W_OK | os.X_OK)


_MAX_DIRECTORIES: Final = 10_000
"""Directories of a drop folder that are looked at before the start."""


def _directories(root: Path, skipped: Collection[Path] | None) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield a folder and the directories below it except the skipped ones; with None only the folder."""
    yield root, os.stat(root)
    if skipped is None:
        return
    count = 1
    for path, names, _ in os.walk(root):
        here = Path(path)
        names[:] = [name for name in names if not name.startswith(".") and here / name not in skipped]
        for name in names:
            count += 1
            if count > _MAX_DIRECTORIES:
                return
            with suppress(FileNotFoundError):
                status = os.lstat(here / name)
                if stat.S_ISDIR(status.st_mode):
                    yield here / name, status


def _filesystem_problems(name: str, drop: DropConfig, mounts: list[MountEntry]) -> Iterator[FileProblem]:
    """Yield the changes of files that can't be seen on the filesystems in a drop folder; its own is first."""
    for position, mount in enumerate(mounts):
        path = Path(os.fsdecode(mount.mount_point)) if position else drop.path
        if not has_change_time(mount.filesystem):
            yield NamedPath(f"drop.{name}.path", path).problem(
                f"is on {mount.filesystem}, which has no change time: if a file is rewritten and its size and"
                " modification time are restored, this is not seen",
                "have files written under a temporary name, then renamed; `checksum_file` finds the others",
                fatal=False,
                prevents_start=False,
            )
        least = default_stable_for([mount])
        option = hidden_cache_option(mount.filesystem)
        if option is not None and drop.stable_for is None:
            yield NamedPath(f"drop.{name}.stable_for", path).problem(
                f"is on {mount.filesystem}, of which the cache time is not visible: a file is sent once it is"
                f" unchanged for {least:g} s, and a longer {option} makes a growing file look unchanged",
                f'set stable_for above {option}; with the default of {option}, to "{least:g}s"',
                fatal=False,
                prevents_start=False,
            )
        is_short = drop.stable_for is not None and drop.stable_for.total_seconds() < least
        if is_short and is_remote(mount.filesystem):
            yield NamedPath(f"drop.{name}.stable_for", path).problem(
                f"is on {mount.filesystem}, which may show a growing file unchanged for {least:g} s or more",
                f'remove stable_for, or set it to "{least:g}s"',
                fatal=False,
                prevents_start=False,
            )


def _subfolder_problem(where: str, root: Path, relative: str, mounts: frozenset[Path]) -> FileProblem | None:
    """Return the problem that prevents files from being moved from `root` to the folder below it, if any."""
    device = os.stat(root).st_dev
    path = root
    for part in relative.split("/"):
        path /= part
        folder = NamedPath(where, path)
        if not os.path.lexists(path):
            return None  # the daemon creates it
        if os.path.islink(path):
            return folder.problem(
                "is a symbolic link, which is never followed",
                "replace the link with a folder",
                prevents_start=False,
            )
        if problem := _folder_problem(folder):
            return problem
        if os.stat(path).st_dev != device or _real_path(path) in mounts:
            return folder.problem(
                f"is on another filesystem than {root}",
                "name a folder on the same filesystem: archives are moved by renaming them",
            )
    return None


def _folder_problem(folder: NamedPath) -> FileProblem | None:
    """Return the problem that prevents files from being moved out of and into a folder, if any."""
    path = folder.path
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        text, hint = "does not exist", f"mkdir -p {path}, or name another folder"
    except OSError as error:
        text, hint = f"can't be reached: {error_text(error)}", _permission_hint(path.parent)
    else:
        if not stat.S_ISDIR(mode):
            text, hint = "is not a folder", "name a folder, or replace the file with one"
        elif not _is_permitted(path, _READ_WRITE_SEARCH):
            text, hint = "can't be read, written and searched", _permission_hint(path)
        else:
            return None
    return folder.problem(text, hint, prevents_start=False)


def _permission_hint(folder: Path) -> str:
    return f"permit the daemon's user (uid {os.geteuid()}) to read, write and search {folder}"


def _is_permitted(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))
