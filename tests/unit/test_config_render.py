"""Output of configurations: the effective one, the example, and the JSON Schema."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from backupd.config.models import Config, DropConfig, models_of
from backupd.config.paths import key_path, subtables
from backupd.config.render import effective_toml, example_toml, json_schema
from backupd.config.toml import setting
from tests.documents import DOCS
from tests.unit.config_files import a_file, read, vault


def every_model(model: type[BaseModel] = Config) -> list[type[BaseModel]]:
    tables = [each for _, inner, _ in subtables(model) for each in models_of(inner)]
    return [model, *dict.fromkeys(each for table in tables for each in every_model(table))]


def test_every_key_is_described_in_one_sentence() -> None:
    for model in every_model():
        for key, field in model.model_fields.items():
            assert field.description, key
            assert field.description.endswith("."), key
            assert len(field.description) < 100, key


def test_the_schema_has_exactly_the_keys_of_the_models() -> None:
    schema = json_schema()
    tables = [schema, *schema["$defs"].values()]
    assert sum(len(table["properties"]) for table in tables) == sum(
        len(model.model_fields) for model in every_model()
    )
    for table in tables:
        assert table["additionalProperties"] is False
        assert all(entry["description"] for entry in table["properties"].values())


def test_the_schema_has_durations_and_sizes_as_strings() -> None:
    drop = json_schema()["$defs"]["DropConfig"]["properties"]
    assert (drop["rescan_every"]["default"], drop["stable_for"]["type"]) == ("1m", "string")
    assert re.search(drop["stable_for"]["pattern"], "1h30m")
    assert not re.search(drop["rescan_every"]["pattern"], "0s")
    assert drop["min_size"]["default"] == "1B"
    assert re.search(drop["max_size"]["pattern"], "20MB")


def test_the_example_loads_with_its_comments_and_without() -> None:
    text = example_toml()
    config = read(text)
    assert config.drop["switches"] == DropConfig(path=Path("/srv/backups/switches"))
    everything = re.sub(r"^#(?! \S)", "", text, flags=re.MULTILINE)
    # authentication schemes exclude each other, and so do proxy and connect_to
    everything, _, sign_in = everything.partition("[destination.vault.auth]")
    chosen = "\n".join(line for line in everything.splitlines() if not line.startswith("proxy"))
    drop = read(chosen).drop["switches"]
    schemes = {
        "basic": {"user", "password_file"},
        "bearer": {"token_file"},
        "oauth2": {"token_url", "client_id", "client_secret_file", "scope", "ca", "cert", "key"},
    }
    for scheme, keys in schemes.items():
        lines = [line for line in sign_in.splitlines() if line.partition(" =")[0] in keys]
        auth = "\n".join(["[destination.vault.auth]", f'type = "{scheme}"', *lines])
        assert vault(read(f"{chosen}\n{auth}")).auth.model_fields_set == keys | {"type"}
    assert drop.model_fields_set == set(DropConfig.model_fields)
    assert drop.include == config.drop["switches"].include


def test_the_example_in_the_docs_is_the_generated_one() -> None:
    assert (DOCS / "backupd.example.toml").read_text("utf-8") == example_toml(), (
        "run `backupd init > docs/backupd.example.toml`"
    )


def test_the_effective_configuration_loads_as_the_same_one() -> None:
    text = a_file(
        "expect = { every = '26h', by = '{device}', devices = ['a b'] }\nsize_alarm = '12.5%'\n"
        "label_pattern = '(?P<device>[^/]+)/'\nmax_size = \"1.5GiB\"\ninclude = ['a \"b\"*', '\\']",
        'fields = { "a b" = "tab\\t\\u007f \\"{name}\\" é" }\n'
        'retry.give_up_after = "30d"\nsuccess = [204, 200]',
        '[drop."a.b"]\npath = "/srv/ü"\ndestinations = ["other"]\n[destination.other]\nurl = "https://o"',
    )
    config = read(text)
    assert read(effective_toml(config)) == config


def test_the_effective_configuration_hides_credentials() -> None:
    text = a_file(
        destination='headers = { Authorization = "geheim", x-api-key = "geheim", X-Site = "north" }\n'
        'fields = { token = "geheim", site = "south" }'
    ).replace("{name}", "{name}?site=east&api_key=geheim&x")
    shown_text = effective_toml(read(text))
    assert "geheim" not in shown_text
    assert "/{name}?site=east&api_key=***&x" in shown_text
    with_query_url = a_file(destination='query_url = "https://vault.example.net/{digest}?token=geheim&x=1"')
    assert "geheim" not in effective_toml(read(with_query_url))
    hidden = vault(read(shown_text))
    assert hidden.headers == {"Authorization": "***", "x-api-key": "***", "X-Site": "north"}
    assert hidden.fields == {"token": "***", "site": "south"}


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("BAREQUERYsecret", "***"),
        ("site=east&{name}-f81d4fae7dec", "site=east&***"),
        ("uploads&list-type=2", "uploads&list-type=***"),
        ("pin2=48213&timeout=30", "pin2=***&timeout=30"),
    ],
)
def test_the_effective_configuration_hides_bare_parameters_and_numbers(query: str, shown: str) -> None:
    text = a_file(destination='headers = { X-Pin = "48213", Depth = "1" }')
    config = read(text.replace("{name}", "{name}?" + query))
    assert f"/{{name}}?{shown}" in effective_toml(config)
    assert vault(read(effective_toml(config))).headers == {"X-Pin": "***", "Depth": "1"}


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans() | st.lists(st.text())))
def test_every_written_table_is_parsed_back(table: dict[str, object]) -> None:
    text = "\n".join(setting(key, value) for key, value in table.items())
    assert tomllib.loads(text) == table
    assert tomllib.loads(setting("table", table)) == {"table": table}


def test_a_place_is_written_as_in_toml() -> None:
    assert key_path(("drop", "a.b", "include", 2)) == 'drop."a.b".include[2]'


def test_another_type_of_value_is_refused() -> None:
    with pytest.raises(TypeError, match="no TOML for object"):
        setting("key", object())
