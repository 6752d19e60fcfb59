import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from backupd.config.models import Config, DropConfig
from backupd.config.paths import key_path, subtables
from backupd.config.render import effective_toml, example_toml, json_schema
from backupd.config.toml import setting
from tests.unit.config_files import a_file, read


def every_model(model: type[BaseModel] = Config) -> list[type[BaseModel]]:
    return [model, *(each for _, inner, _ in subtables(model) for each in every_model(inner))]


def test_every_key_is_described_in_one_sentence() -> None:
    for model in every_model():
        for key, field in model.model_fields.items():
            assert field.description, key
            assert field.description.endswith("."), key
            assert len(field.description) < 100, key


def test_the_schema_describes_every_key_and_knows_no_other() -> None:
    schema = json_schema()
    tables = [schema, *schema["$defs"].values()]
    assert sum(len(table["properties"]) for table in tables) == sum(
        len(model.model_fields) for model in every_model()
    )
    for table in tables:
        assert table["additionalProperties"] is False
        assert all(entry["description"] for entry in table["properties"].values())


def test_the_schema_writes_durations_and_sizes_as_texts() -> None:
    drop = json_schema()["$defs"]["DropConfig"]["properties"]
    assert (drop["stable_for"]["default"], drop["stable_for"]["type"]) == ("2s", "string")
    assert re.search(drop["stable_for"]["pattern"], "1h30m")
    assert not re.search(drop["rescan_every"]["pattern"], "0s")
    assert drop["min_size"]["default"] == "1B"
    assert re.search(drop["max_size"]["pattern"], "20MB")


def test_the_example_loads_with_its_comments_or_without() -> None:
    text = example_toml()
    config = read(text)
    assert config.drop["switches"] == DropConfig(path=Path("/srv/backups/switches"))
    everything = re.sub(r"^#(?! \S)", "", text, flags=re.MULTILINE)
    # two ways to sign in, or to get there, exclude each other: the reader has to choose
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
        assert read(f"{chosen}\n{auth}").destination["vault"].auth.model_fields_set == keys | {"type"}
    assert drop.model_fields_set == set(DropConfig.model_fields)
    assert drop.include == config.drop["switches"].include


def test_the_effective_configuration_reads_back_the_same() -> None:
    text = a_file(
        "expect = { every = '26h', by = '{device}', devices = ['a b'] }\nsize_alarm = '12.5%'\n"
        "label_pattern = '(?P<device>[^/]+)/'\nmax_size = \"1.5GiB\"\ninclude = ['a \"b\"*', '\\']",
        'fields = { "a b" = "tab\\t\\u007f \\"{name}\\" é" }\n'
        'retry.give_up_after = "30d"\nsuccess = [204, 200]',
        '[drop."a.b"]\npath = "/srv/ü"\ndestinations = ["other"]\n[destination.other]\nurl = "https://o"',
    )
    config = read(text)
    assert read(effective_toml(config)) == config


def test_the_effective_configuration_hides_what_looks_like_a_credential() -> None:
    text = a_file(
        destination='headers = { Authorization = "geheim", x-api-key = "geheim", X-Site = "north" }\n'
        'fields = { token = "geheim", site = "south" }'
    ).replace("{name}", "{name}?site=east&api_key=geheim&x")
    shown_text = effective_toml(read(text))
    assert "geheim" not in shown_text
    assert "/{name}?site=east&api_key=***&x" in shown_text
    asked = a_file(destination='query_url = "https://vault.example.net/{digest}?token=geheim&x=1"')
    assert "geheim" not in effective_toml(read(asked))
    hidden = read(shown_text).destination["vault"]
    assert hidden.headers == {"Authorization": "***", "x-api-key": "***", "X-Site": "north"}
    assert hidden.fields == {"token": "***", "site": "south"}


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans() | st.lists(st.text())))
def test_every_table_reads_back_as_written(table: dict[str, object]) -> None:
    text = "\n".join(setting(key, value) for key, value in table.items())
    assert tomllib.loads(text) == table
    assert tomllib.loads(setting("table", table)) == {"table": table}


def test_a_place_reads_like_the_file() -> None:
    assert key_path(("drop", "a.b", "include", 2)) == 'drop."a.b".include[2]'


def test_no_other_kind_of_value_is_written() -> None:
    with pytest.raises(TypeError, match="no TOML for object"):
        setting("key", object())
