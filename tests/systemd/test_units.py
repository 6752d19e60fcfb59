"""The unit files as systemd-analyze rates them: without errors, and with little exposure."""

from __future__ import annotations

import re

import pytest

from tests.systemd.conftest import ROOT
from tests.systemd.machine import Machine

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]

UNITS = ("backupd.service", "backupd@.service")


def exposure(machine: Machine, path: str) -> float:
    """Return the exposure of a unit, from 0 to 10."""
    output = machine.run("systemd-analyze", "security", "--offline=yes", "--no-pager", path).stdout
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", output)
    assert found, output
    print(f"{path}: {found[1]}")
    return float(found[1])


@pytest.mark.parametrize("unit", UNITS)
def test_the_exposure_of_a_unit_is_low(machine: Machine, unit: str) -> None:
    alone = unit.replace("backupd", "alone")  # another name, so that no drop-in applies
    machine.write(f"/opt/{alone}", (ROOT / "systemd" / unit).read_text())
    assert exposure(machine, f"/opt/{alone}") <= 1.1


@pytest.mark.parametrize("unit", UNITS)
def test_cap_lease_adds_little_exposure(machine: Machine, unit: str) -> None:
    assert exposure(machine, f"/etc/systemd/system/{unit}") <= 1.3


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_analyze_finds_no_error_in_a_unit(machine: Machine, unit: str) -> None:
    verified = machine.run("systemd-analyze", "verify", "--man=no", f"/etc/systemd/system/{unit}")
    assert (verified.stdout, verified.stderr) == ("", "")  # the exit code is 0 for misspelt keys as well


def test_the_instance_unit_differs_only_in_its_paths() -> None:
    one, other = ((ROOT / "systemd" / unit).read_text().splitlines() for unit in UNITS)
    differing = [line for line in other if line not in one and not line.startswith("#")]
    assert differing == [
        "Description=Delivers configuration backups to HTTPS endpoints (%i)",
        "ExecStart=/opt/backupd/bin/backupd run --config /etc/backupd/%i.toml",
        "StateDirectory=backupd/%i",
    ]
    assert len([line for line in one if not line.startswith("#")]) == len(
        [line for line in other if not line.startswith("#")]
    )
