"""Hashing beside sending: on a second core, while the first encrypts what was just hashed or will be."""

from __future__ import annotations

import hashlib
import threading
from queue import SimpleQueue

WORTH_A_THREAD = 4 * 1024 * 1024
"""Bytes from which on a file is hashed in a thread; below, starting one costs more than it brings."""


class Hashing:
    """A digest that grows chunk by chunk; `hexdigest` ends it, and `close` has to be called.

    At most one chunk is waiting for the hash: whoever is slower, hash or network, sets the pace.
    """

    def __init__(self, algorithm: str, size: int) -> None:
        self._hash = hashlib.new(algorithm)
        self._todo: SimpleQueue[bytes | None] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        self._busy = False
        self._thread: threading.Thread | None = None
        if size >= WORTH_A_THREAD:
            self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
            self._thread.start()

    def update(self, chunk: bytes) -> None:
        """Take in the next chunk, which must not change any more."""
        if self._thread is None:
            self._hash.update(chunk)
            return
        self._wait()
        self._todo.put(chunk)
        self._busy = True

    def hexdigest(self) -> str:
        """Return the digest of all chunks."""
        self._wait()
        return self._hash.hexdigest()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread = None

    def _wait(self) -> None:
        if self._busy:
            self._done.get()
            self._busy = False

    def _run(self) -> None:
        while (chunk := self._todo.get()) is not None:
            self._hash.update(chunk)
            self._done.put(None)
