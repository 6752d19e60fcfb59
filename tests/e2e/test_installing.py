"""`backupd install --root`, as packagers and image builders use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backupd.cli.install import INSTALLED_FILES


def backupd(*arguments: str) -> str:
    """Run a command that has to succeed, and return its output."""
    return subprocess.run(
        [sys.executable, "-m", "backupd", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=180,
    ).stdout


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_dry_run_prints_the_steps_that_a_first_run_does(tmp_path: Path) -> None:
    root = str(tmp_path)
    dry = backupd("install", "--root", root, "--dry-run")
    assert files_below(tmp_path) == set()
    assert backupd("install", "--root", root) == dry
    assert files_below(tmp_path) == set(INSTALLED_FILES)
    assert "nothing to do" in backupd("install", "--root", root)


def test_the_units_start_the_backupd_that_installed_them(tmp_path: Path) -> None:
    backupd("install", "--root", str(tmp_path))
    unit = (tmp_path / "etc/systemd/system/backupd.service").read_text()
    assert f"ExecStart={Path(sys.executable).parent}/backupd run\n" in unit


@pytest.mark.long
def test_uninstall_removes_the_installed_files_only(tmp_path: Path) -> None:
    backupd("install", "--root", str(tmp_path))
    mine = tmp_path / "etc/systemd/system/backupd.service.d/mine.conf"
    mine.write_text("[Service]\n")
    printed = backupd("uninstall", "--root", str(tmp_path))
    assert files_below(tmp_path) == {"etc/systemd/system/backupd.service.d/mine.conf"}
    assert "kept: /etc/backupd, " in printed
