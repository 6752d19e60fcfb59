"""The look at files and certificates, by a child: what is loaded for it (10 MiB) is gone with it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from backupd.config.examination import Examination
from backupd.config.models import Config
from backupd.config.problem import Problem
from backupd.core.errors import ConfigError

_PATIENCE = 20.0
"""Seconds that a child may take; it only reads a few small files."""


def examine_apart(config: Config) -> Examination:
    """Examine a configuration by a fork; to be called before there are threads.

    Where there can be no child, or it ends without an answer, we look ourselves.
    """
    try:
        return _heard(_said_by_child(config))
    except (OSError, ValueError):
        return _examine(config)


def examine_file_apart(path: Path) -> Examination:
    """Examine a configuration file by a process of its own; raises ConfigError where it can't be used."""
    try:
        done = subprocess.run(  # noqa: S603 -- ourselves
            [sys.executable, "-m", "backupd.cli.apart", str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
        return _heard(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{path} could not be looked at: {error}", "`backupd check` tells more") from error


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
    """Write what was found and end the process, past whatever the parent has put up for its own end."""
    try:
        with open(writer, "wb") as answer:
            answer.write(_told(_examine(config)))
    finally:
        os._exit(0)


def _told(examination: Examination) -> bytes:
    return json.dumps(dataclasses.asdict(examination)).encode()


def _heard(said: bytes) -> Examination:
    fields = json.loads(said)
    if "error" in fields:
        raise ConfigError(fields["error"], fields["hint"])
    return Examination(tuple(Problem(**each) for each in fields["problems"]), fields["expires"])


def _examine(config: Config) -> Examination:
    from backupd.config.preflight import examine  # noqa: PLC0415 -- loads cryptography

    return examine(config, datetime.now(UTC))


def _main() -> None:
    from backupd.config.loading import load  # noqa: PLC0415

    try:
        said = _told(_examine(load(Path(sys.argv[1]))))
    except ConfigError as error:
        said = json.dumps({"error": error.message, "hint": error.hint}).encode()
    sys.stdout.buffer.write(said)


if __name__ == "__main__":
    _main()
