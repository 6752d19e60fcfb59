"""What the process itself uses."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """The process's resident memory in bytes and its open descriptors; None where /proc does not tell."""

    memory_bytes: int | None
    open_files: int | None
    open_files_limit: int


def process_stats() -> ProcessStats:
    """Return how it is now."""
    return ProcessStats(_memory(), _open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _memory() -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None


def _open_files() -> int | None:
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # but the one that lists them
    except OSError:
        return None
