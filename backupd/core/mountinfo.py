"""The kernel's list of mounted filesystems."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One mounted filesystem.

    `filesystem` is its type, such as `ext4` or `fuse.sshfs`; `device` is its number as `major:minor`. `root`
    is the directory of the filesystem that is mounted, `/` unless it is a bind mount or a subvolume.
    `options` are those of the filesystem, separated by commas.
    """

    mount_point: bytes
    filesystem: str
    device: str
    root: bytes = b"/"
    options: str = ""


def parse_mountinfo(content: bytes) -> list[MountEntry]:
    """Return the entries of a `/proc/PID/mountinfo`, in the order of the file.

    Of several entries with the same mount point, the last one is visible. Lines in another format are
    skipped. Source: proc_pid_mountinfo(5).
    """
    entries = []
    for line in content.split(b"\n"):
        left, _, right = line.partition(b" - ")
        fields, (filesystem, _, rest) = left.split(b" "), right.partition(b" ")
        if len(fields) >= 6 and filesystem:
            mount_point, device, root = _unescape(fields[4]), _text(fields[2]), _unescape(fields[3])
            options = _text(rest.partition(b" ")[2])
            entries.append(MountEntry(mount_point, _text(filesystem), device, root, options))
    return entries


def filesystem_at(path: bytes, entries: list[MountEntry]) -> str:
    """Return the type of the filesystem that holds an absolute path without links, or `unknown`."""
    entry = _entry_of(path, entries)
    return "unknown" if entry is None else entry.filesystem


def path_on_device(path: bytes, entries: list[MountEntry]) -> tuple[str, bytes] | None:
    """Return the device of an absolute path without links, and the path on it; None if no entry has it.

    Both are the same for two paths to one directory, of which one leads through a bind mount.
    """
    entry = _entry_of(path, entries)
    if entry is None:
        return None
    below = path.removeprefix(entry.mount_point.rstrip(b"/"))
    return entry.device, entry.root.rstrip(b"/") + below or b"/"


def mounts_within(path: bytes, entries: list[MountEntry]) -> list[MountEntry]:
    """Return the entry that holds an absolute path without links, and those mounted below it."""
    entry = _entry_of(path, entries)
    below = path.rstrip(b"/") + b"/"
    return [
        *([entry] if entry is not None else []),
        *(other for other in entries if other is not entry and other.mount_point.startswith(below)),
    ]


def _entry_of(path: bytes, entries: list[MountEntry]) -> MountEntry | None:
    found: MountEntry | None = None
    for entry in entries:
        point = entry.mount_point
        is_inside = path == point or path.startswith(point.rstrip(b"/") + b"/")
        if is_inside and (found is None or len(point) >= len(found.mount_point)):
            found = entry
    return found


def _unescape(field: bytes) -> bytes:
    r"""Replace the escapes of space, tab, line feed and backslash, such as `\040`."""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)


def _text(field: bytes) -> str:
    return field.decode("utf-8", "backslashreplace")
