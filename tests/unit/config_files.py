"""Small configurations to change one thing in."""

import tomllib

from backupd.config.load import validate
from backupd.config.models import Config
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


def told(text: str) -> tuple[str, ...]:
    findings = validate(tomllib.loads(text))
    assert not isinstance(findings, Config)
    return tuple(f"{key_path(finding.place)}: {finding.text}" for finding in findings)
