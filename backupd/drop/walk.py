"""Everything that lies in a drop folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing

from backupd.drop.folder import Descent, DropFolder

Complaint = Callable[[bytes, OSError], None]


def walk(
    folder: DropFolder,
    below: bytes,
    skip: frozenset[bytes],
    complain: Complaint,
    *,
    recursive: bool,
    go_on: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield the relative path and status of all that is no directory, below a directory of the folder.

    `skip` names directories that are not entered, relative to the folder. What can't be read goes to
    `complain`, except what has vanished meanwhile; the rest of the walk goes on. `go_on` is asked before
    each directory.
    """
    waiting = [below]
    with closing(Descent(folder)) as descent:
        while waiting and go_on():
            directory = waiting.pop()
            try:
                with os.scandir(descent.directory(directory)) as entries:
                    for entry in entries:
                        name = os.fsencode(entry.name)
                        relpath = directory + b"/" + name if directory else name
                        if entry.is_dir(follow_symlinks=False):
                            if recursive and relpath not in skip and not name.startswith(b"."):
                                waiting.append(relpath)
                            continue
                        try:
                            yield relpath, entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        except OSError as error:
                            complain(relpath, error)
            except (FileNotFoundError, NotADirectoryError) as error:
                if not directory:
                    complain(directory, error)
            except OSError as error:
                complain(directory, error)
