"""The look at files and certificates, by a child: what is loaded for it (9 MiB) is gone with it."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from typing import NoReturn

from backupd.config.models import Config
from backupd.config.problem import Problem


def preflight_apart(config: Config) -> list[Problem]:
    """Return what `preflight` says of a configuration now; to be called before there are threads.

    Where there can be no child, or it ends without an answer, we look ourselves.
    """
    try:
        return [Problem(**fields) for fields in json.loads(_said_by_child(config))]
    except (OSError, ValueError):
        return _preflight(config)


def _said_by_child(config: Config) -> bytes:
    reader, writer = os.pipe()
    with open(reader, "rb") as answer:
        try:
            child = os.fork()
            if child == 0:
                _say(config, writer)
        finally:
            os.close(writer)
        said = answer.read()
    with suppress(ChildProcessError):  # who started us may have SIGCHLD ignored
        os.waitpid(child, 0)
    return said


def _say(config: Config, writer: int) -> NoReturn:
    """Write the problems and end the process, past whatever the parent has put up for its own end."""
    try:
        with open(writer, "wb") as answer:
            answer.write(json.dumps([dataclasses.asdict(problem) for problem in _preflight(config)]).encode())
    finally:
        os._exit(0)


def _preflight(config: Config) -> list[Problem]:
    from backupd.config.preflight import preflight  # noqa: PLC0415 -- loads cryptography

    return preflight(config, datetime.now(UTC))
