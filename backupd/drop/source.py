"""Reading from an archive that is held open, at any place and never more than is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass

CHUNK = 256 * 1024


@dataclass(frozen=True, slots=True)
class Source:
    """An open file and its size, beyond which nothing is read; its methods raise OSError."""

    fd: int
    size: int

    def read(self, at: int, most: int) -> bytes:
        """Return up to `most` bytes from a place, fewer only at the end."""
        most = min(most, self.size - at)
        data = b""
        while most > len(data):
            more = os.pread(self.fd, most - len(data), at + len(data))
            if not more:
                break
            data += more
        return data
