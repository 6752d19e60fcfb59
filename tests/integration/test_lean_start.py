"""What the daemon's start leaves out of its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backupd.cli.absent import absent
from backupd.cli.apart import examine_apart
from backupd.config.destination import DestinationConfig
from backupd.config.loading import load
from backupd.config.models import Config, DropConfig
from backupd.config.preflight import preflight
from tests.stage import Stage

LOOKED_APART = """
import sys
from pathlib import Path
from backupd.cli.apart import examine_apart
from backupd.config.loading import load

for problem in examine_apart(load(Path(sys.argv[1]))).problems:
    print(problem)
sys.exit("cryptography" in sys.modules)
"""

STARTED = """
import sys
from backupd.cli.absent import absent

with absent("rich", "click"):
    import backupd.assembly
sys.exit(bool({"rich", "click"} & set(sys.modules)))
"""


def python(program: str, *arguments: str) -> str:
    """Run a program in a process of its own, with one thread; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def a_config(base: Path, drop: bytes = b"none") -> Config:
    return Config(
        state_dir=base / "state",
        drop={"d": DropConfig(path=base / os.fsdecode(drop))},
        destination={"v": DestinationConfig(url="https://vault.example.net/")},
    )


def test_a_look_apart_says_the_same_and_leaves_nothing_loaded(stage: Stage) -> None:
    stage.configure("https://localhost:1/")
    stage.pki.client_key.chmod(0o644)
    stage.pki.ca_pem.write_bytes(b"nothing")
    (stage.drop / "sent").write_bytes(b"")
    problems = preflight(load(stage.config), datetime.now(UTC))
    assert len(problems) == 3
    assert python(LOOKED_APART, str(stage.config)) == "".join(f"{problem}\n" for problem in problems)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the test's process, not ours
def test_a_path_that_is_no_text_comes_through(tmp_path: Path) -> None:
    (problem,) = examine_apart(a_config(tmp_path, b"bad\xff")).problems
    assert problem.message == f"{os.fsdecode(os.fsencode(tmp_path) + b'/bad' + bytes([0xFF]))} does not exist"


def test_where_there_can_be_no_child_the_look_is_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("os.fork", no_fork)
    descriptors = len(os.listdir("/proc/self/fd"))
    (problem,) = examine_apart(a_config(tmp_path)).problems
    assert problem.where == "drop.d.path"
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_where_the_child_has_no_answer_the_look_is_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.cli.apart._say", lambda *_: os._exit(1))
    (problem,) = examine_apart(a_config(tmp_path)).problems
    assert problem.where == "drop.d.path"


def test_what_is_absent_is_not_found_meanwhile_and_found_again_after() -> None:
    with absent("wave", "json"):
        with pytest.raises(ModuleNotFoundError):
            __import__("wave")
        __import__("json")  # loaded already
    assert "wave" not in sys.modules
    assert __import__("json") is sys.modules["json"]


def test_the_daemons_parts_need_nothing_that_is_for_terminals() -> None:
    python(STARTED)
