"""Minimal configurations, and functions that validate them."""

import tomllib

from backupd.config.load import validate
from backupd.config.models import Config, HttpDestinationConfig
from backupd.config.paths import key_path

SMALLEST = """
[drop.switches]
path = "/srv/backups/switches"

[destination.vault]
url = "https://vault.example.net/v1/upload"
"""


def a_file(drop: str = "", destination: str = "", rest: str = "", top: str = "") -> str:
    return (
        f'{top}\n[drop.switches]\npath = "/srv/backups/switches"\n{drop}\n'
        f'[destination.vault]\nurl = "https://vault.example.net/{{name}}"\n{destination}\n{rest}\n'
    )


def a_url(url: str) -> str:
    return f'[drop.switches]\npath = "/srv"\n[destination.vault]\nurl = "{url}"\n'


def read(text: str) -> Config:
    config = validate(tomllib.loads(text))
    assert isinstance(config, Config), config
    return config


def vault(config: Config) -> HttpDestinationConfig:
    destination = config.destination["vault"]
    assert isinstance(destination, HttpDestinationConfig)
    return destination


def faults_in(text: str) -> tuple[str, ...]:
    faults = validate(tomllib.loads(text))
    assert not isinstance(faults, Config)
    return tuple(f"{key_path(fault.place)}: {fault.text}" for fault in faults)
