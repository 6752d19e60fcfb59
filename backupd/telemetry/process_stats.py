"""The memory and file descriptors that this process uses."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """The resident memory in bytes and the open descriptors of this process; None if /proc cannot be read."""

    memory_bytes: int | None
    open_files: int | None
    open_files_limit: int


def process_stats() -> ProcessStats:
    """Return the memory and descriptors that this process uses now."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ProcessStats(_memory_bytes(), _open_files(), limit)


def _memory_bytes() -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None


def _open_files() -> int | None:
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # without the descriptor of this listing
    except OSError:
        return None
