"""The metrics as a file for the textfile collector of node_exporter, for hosts that allow no port."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from backupd.telemetry.thread_watchdog import ThreadWatchdog

_MODE = 0o644
"""node_exporter reads the file as another user, whatever the umask of the daemon is."""


class TextfileWriter:
    """Writes the metrics to a file with each new snapshot, at most once in `every` seconds, and at the end.

    `render` returns the content, `render_last` that of a daemon that ends. `on_result` is called after each
    attempt with the error, None after a success. It has a thread of its own, as a disk may hang.
    """

    def __init__(
        self,
        path: Path,
        render: Callable[[], bytes],
        render_last: Callable[[], bytes],
        every: Callable[[], float],
        on_result: Callable[[Exception | None], None],
    ) -> None:
        self.stop = threading.Event()
        self.watchdog = ThreadWatchdog("textfile", may_hang=True)
        self._path = path
        self._render = render
        self._render_last = render_last
        self._every = every
        self._on_result = on_result
        self._wake = threading.Event()

    def notify(self) -> None:
        """Have the file written soon, as there is a new snapshot."""
        self._wake.set()

    def request_stop(self) -> None:
        """Have the file written a last time; do not wait for the end of the thread."""
        self.stop.set()
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        """Write the file until the stop event is set."""
        while not stop.is_set():
            self._wake.wait()
            self._wake.clear()
            if not stop.is_set():
                self._write(self._render)
                stop.wait(self._every())
        self._write(self._render_last)

    def _write(self, render: Callable[[], bytes]) -> None:
        self.watchdog.alive()
        try:
            replace_file(self._path, render())
        except Exception as error:  # noqa: BLE001 -- a full disk or a bug must not end the daemon
            self._on_result(error)
        else:
            self._on_result(None)
        self.watchdog.idle()


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file at once, so that no reader sees a part of it; raises OSError."""
    # node_exporter reads no file of which the name does not end with .prom
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            os.fchmod(descriptor, _MODE)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
