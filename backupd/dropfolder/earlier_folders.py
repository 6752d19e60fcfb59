"""Recognition of folders that were `sent_dir` or `rejected_dir` under an earlier configuration.

After one of these keys is changed, the old folder is an ordinary one below the drop folder, full of archives
that were delivered or rejected before. It is recognised by the receipt files in it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from backupd.core.names import RECEIPT_NAME, as_text
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DropFolder, walk

_MAX_RECEIPT_BYTES = 128 * 1024
_MAX_READ = 100
"""Files with the name of a receipt file that are read in one directory; the first one mostly decides."""


@dataclass(frozen=True, slots=True)
class EarlierFolder:
    """A folder that was `key` (`sent_dir` or `rejected_dir`) before; `relpath` is below the drop folder."""

    relpath: bytes
    key: str

    @property
    def error(self) -> str:
        """Return what is wrong with it."""
        return f"nothing in it is sent: by its receipt files, it was `{self.key}` before"

    def hint(self, drop: Drop) -> str:
        """Return how to move it to the place of today."""
        root, current = os.fsencode(drop.folder.path), drop.sent_dir
        if self.key == "rejected_dir":
            current = drop.rejected_dir
        old, new = (shlex.quote(as_text(os.path.join(root, path))) for path in (self.relpath, current))
        return (
            f"move its content: `rsync -a --remove-source-files --ignore-existing {old}/ {new}/`, then"
            f" `find {old} -type d -empty -delete`, both as the daemon's user; or set `{self.key}` back"
        )


class EarlierFolders:
    """The earlier folders of one drop, as a scan finds them; for one thread."""

    def __init__(self, drop: Drop) -> None:
        self._drop = drop
        self._found: dict[bytes, EarlierFolder] = {}

    def clear(self) -> None:
        """Forget all: the scan that follows finds those that are still there."""
        self._found.clear()

    def containing(self, relpath: bytes) -> EarlierFolder | None:
        """Return the earlier folder that a path is, or is in."""
        while self._found and relpath:
            if relpath in self._found:
                return self._found[relpath]
            relpath = relpath.rpartition(b"/")[0]
        return None

    def skips(self, directory: bytes) -> bool:
        """Return whether a directory is not scanned: because of `Drop.skips`, or in an earlier folder."""
        if self._drop.skips(directory) or self.containing(directory) is not None:
            return True
        found = _earlier_folder(self._drop.folder, directory)
        if found is not None:
            self._found[found.relpath] = found
        return found is not None


def find_earlier_folders(drop: Drop, should_continue: Callable[[], bool]) -> Iterator[EarlierFolder]:
    """Yield the earlier folders of a drop, until `should_continue` returns False."""
    folders, reported = EarlierFolders(drop), set()
    for relpath, _ in walk(drop.folder, b"", folders.skips, lambda *_: None, should_continue):
        found = folders.containing(relpath)
        if found is not None and found.relpath not in reported:
            reported.add(found.relpath)
            yield found


def _earlier_folder(folder: DropFolder, directory: bytes) -> EarlierFolder | None:
    """Return the earlier folder that a directory belongs to, by the receipt files right in it."""
    read = 0
    with suppress(OSError), folder.directory(directory) as fd, os.scandir(fd) as entries:
        for entry in entries:
            match = RECEIPT_NAME.search(os.fsencode(entry.name))
            if match is None or read >= _MAX_READ:
                continue
            read += 1
            with suppress(OSError):
                path = directory + b"/" + os.fsencode(entry.name)
                top = _top_folder(folder.read(path, _MAX_RECEIPT_BYTES), directory)
                if top is not None:
                    return EarlierFolder(top, "sent_dir" if match[1] == b"receipt" else "rejected_dir")
    return None


def _top_folder(content: bytes, directory: bytes) -> bytes | None:
    """Return the folder into which the archive of a receipt file in `directory` was moved.

    That is `directory` without the directories that the archive was in before. None if the content is not
    that of a receipt file, or if the archive was moved back to where it came from.
    """
    try:
        fields = json.loads(content)
        is_receipt = isinstance(fields["drop"], str) and "delivery_id" in fields["deliveries"][0]
        parent = fields["archive"].rpartition("/")[0]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    names = directory.split(b"/")
    depth = len(parent.split("/")) if parent else 0
    below = b"/".join(names[len(names) - depth :] if depth <= len(names) else names)
    if not is_receipt or as_text(directory) == parent:
        return None
    return b"/".join(names[: len(names) - depth]) if depth and as_text(below) == parent else directory
