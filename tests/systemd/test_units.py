"""What systemd itself says of the unit files: nothing, and little exposure."""

from __future__ import annotations

import re

import pytest

from tests.systemd.conftest import ROOT
from tests.systemd.machine import Machine

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]

UNITS = ("backupd.service", "backupd@.service")


def exposure(machine: Machine, path: str) -> float:
    """Return a unit's exposure, out of 10."""
    told = machine.run("systemd-analyze", "security", "--offline=yes", "--no-pager", path).stdout
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", told)
    assert found, told
    print(f"{path}: {found[1]}")
    return float(found[1])


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_hardly_exposed(machine: Machine, unit: str) -> None:
    alone = unit.replace("backupd", "alone")  # another name, and so without the drop-ins
    machine.write(f"/opt/{alone}", (ROOT / "systemd" / unit).read_text())
    assert exposure(machine, f"/opt/{alone}") <= 1.1


@pytest.mark.parametrize("unit", UNITS)
def test_seeing_writers_costs_little(machine: Machine, unit: str) -> None:
    assert exposure(machine, f"/etc/systemd/system/{unit}") <= 1.3


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_has_nothing_to_say_against_a_unit(machine: Machine, unit: str) -> None:
    told = machine.run("systemd-analyze", "verify", "--man=no", f"/etc/systemd/system/{unit}")
    assert (told.stdout, told.stderr) == ("", "")  # it ends with 0 on misspelt keys as well


def test_an_instance_is_as_the_only_one_but_for_its_places() -> None:
    one, other = ((ROOT / "systemd" / unit).read_text().splitlines() for unit in UNITS)
    own = [line for line in other if line not in one and not line.startswith("#")]
    assert own == [
        "Description=Delivers configuration backups to HTTPS endpoints (%i)",
        "ExecStart=/opt/backupd/bin/backupd run --config /etc/backupd/%i.toml",
        "StateDirectory=backupd/%i",
    ]
    assert len([line for line in one if not line.startswith("#")]) == len(
        [line for line in other if not line.startswith("#")]
    )
