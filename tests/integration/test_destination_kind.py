"""A destination kind is one package and one entry in the registry; no other code names the kinds."""

from __future__ import annotations

import json
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from backupd.cli.app import app
from backupd.config.load import validate
from backupd.config.models import DESTINATION_MODELS, Config
from backupd.config.paths import key_path
from backupd.config.render import effective_toml, json_schema
from backupd.upload import registry
from tests.folder_kind import FOLDER, FolderConfig
from tests.stage import Stage, until


@pytest.fixture
def folder_kind() -> Iterator[None]:
    registry.register(FOLDER)
    yield
    del registry.KINDS[FOLDER.name], DESTINATION_MODELS[FOLDER.name]


def a_config(stage: Stage, target: Path, keys: str = "") -> str:
    return f"""
state_dir = "{stage.state}"
[drop.switches]
path = "{stage.drop}"
stable_for = "0.1s"
[destination.nas]
kind = "folder"
path = "{target}"
{keys}
"""


def faults(text: str) -> list[str]:
    found = validate(tomllib.loads(text))
    assert not isinstance(found, Config)
    return [f"{key_path(fault.place)}: {fault.text}" for fault in found]


def check(stage: Stage, text: str, *options: str) -> tuple[int, str]:
    stage.config.write_text(text)
    result = CliRunner().invoke(app, ["check", "--config", str(stage.config), *options])
    return result.exit_code, result.output


def test_the_daemon_delivers_to_a_kind_that_the_registry_names(stage: Stage, tmp_path: Path) -> None:
    target = tmp_path / "nas"
    target.mkdir()
    stage.config.write_text(a_config(stage, target))
    daemon = stage.daemon(program="tests.folder_kind").ready()
    stage.put("sw1.cfg", b"hostname sw1\n")
    daemon.wait_for("archive.delivered", archive="sw1.cfg", destinations=["nas"])
    assert (target / "sw1.cfg").read_bytes() == b"hostname sw1\n"
    until(lambda: stage.archives(stage.sent), "the archive in sent_dir")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait() == 0


@pytest.mark.usefixtures("folder_kind")
class TestARegisteredKind:
    def test_has_its_own_keys_beside_those_of_every_kind(self, stage: Stage) -> None:
        config = validate(tomllib.loads(a_config(stage, Path("/srv/nas"), "workers = 1")))
        assert isinstance(config, Config)
        destination = config.destination["nas"]
        assert isinstance(destination, FolderConfig)
        assert (destination.path, destination.workers) == (Path("/srv/nas"), 1)

    def test_has_its_own_error_messages(self, stage: Stage) -> None:
        text = a_config(stage, Path("nas"), 'temporary_sufix = ""\nurl = "https://vault/"\nworkers = 0')
        assert faults(text) == [
            'destination.nas.path: expected an absolute path, got "nas"',
            'destination.nas.temporary_sufix: unknown key; did you mean "temporary_suffix"?',
            "destination.nas.url: unknown key",
            "destination.nas.workers: expected at least 1, got 0",
        ]
        assert faults(a_config(stage, Path("/srv/nas"), 'temporary_suffix = "/"')) == [
            'destination.nas.temporary_suffix: expected a suffix such as ".part"'
        ]

    def test_can_name_a_systemd_credential(
        self, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        (tmp_path / "nas.password").touch()
        text = a_config(stage, Path("/srv/nas"), 'password_file = "nas.password"')
        config = validate(tomllib.loads(text))
        assert isinstance(config, Config)
        destination = config.destination["nas"]
        assert isinstance(destination, FolderConfig)
        assert destination.password_file == tmp_path / "nas.password"

    def test_is_shown_with_its_keys(self, stage: Stage) -> None:
        config = validate(tomllib.loads(a_config(stage, Path("/srv/nas"))))
        assert isinstance(config, Config)
        shown = effective_toml(config)
        assert '[destination.nas]\nkind = "folder"\n' in shown
        assert validate(tomllib.loads(shown)) == config

    def test_is_part_of_the_schema(self, stage: Stage) -> None:
        schema: Any = json_schema()
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        good = tomllib.loads(a_config(stage, Path("/srv/nas")))
        assert validator.is_valid(good)
        good["destination"]["vault"] = {"url": "https://vault.example.net/"}
        assert validator.is_valid(good)
        good["destination"]["vault"]["path"] = "/srv/nas"
        assert not validator.is_valid(good)

    def test_is_probed_by_check(self, stage: Stage, tmp_path: Path) -> None:
        target = tmp_path / "nas"
        code, output = check(stage, a_config(stage, target))
        assert (code, f"failed: destination.nas: {target}: {target} is not a directory (connect_failed)") == (
            69,
            output.splitlines()[1],
        )
        assert output.splitlines()[2] == "  hint: create it"
        target.mkdir()
        code, output = check(stage, a_config(stage, target))
        assert (code, output.splitlines()[1].startswith(f"ok: destination.nas: {target}: ")) == (0, True)
        code, output = check(stage, a_config(stage, target), "--json")
        (found,) = json.loads(output)["destinations"]
        assert (code, found["destination"], found["reason"], found["tls"]) == (0, "nas", None, None)


def test_an_unknown_kind_is_the_only_fault_of_its_table(stage: Stage) -> None:
    text = a_config(stage, Path("/srv/nas")).replace("stable_for", 'destinations = ["nas"]\nstable_for')
    assert faults(text) == ['destination.nas.kind: expected one of "http", got "folder"']
    assert faults(text.replace('"folder"', "[]")) == [
        "destination.nas.kind: expected a text in quotes, got a list"
    ]


def test_a_table_without_a_kind_is_an_http_destination(stage: Stage) -> None:
    text = a_config(stage, Path("/srv/nas")).replace('kind = "folder"\n', "")
    assert faults(text) == [
        'destination.nas.path: unknown key; did you mean "auth"?',
        "destination.nas.url: required, but missing",
    ]
