"""Configurations that are valid."""

from datetime import timedelta
from pathlib import Path

import pytest

from backupd.config.models import Config, DropConfig, HttpDestinationConfig
from tests.unit.config_files import a_file, a_url, read, vault


@pytest.mark.parametrize(
    "url",
    [
        "https://vault.example.net",
        "https://vault.example.net:8443/{drop}/{relpath}?n={name}&{{x}}",
        "HTTPS://[2001:db8::1]/x",
        "http://localhost:8080/x",
        "http://127.0.0.1/x",
        "http://127.9.9.9:80/x",
        "http://[::1]:8080/x",
    ],
)
def test_urls_of_https_and_of_loopback_are_valid(url: str) -> None:
    assert vault(read(a_url(url))).url == url


@pytest.mark.parametrize("digest", ["none", "header:Repr-Digest", "body:/a/0/b~1c", "body:/files/sha-256"])
def test_positions_of_the_digest_are_valid(digest: str) -> None:
    text = a_file(destination=f'receipt.digest = "{digest}"')
    assert vault(read(text)).receipt.digest == digest


def test_deletion_is_valid_if_every_receipt_is_verified() -> None:
    text = a_file(
        'on_delivered = "delete"\ndestinations = ["vault"]',
        rest='[destination.blind]\nurl = "https://b"\nreceipt.digest = "none"',
    )
    assert read(text).drop["switches"].on_delivered == "delete"


def test_a_label_is_a_placeholder_if_every_drop_has_it() -> None:
    text = a_file(
        "label_pattern = '(?P<device>[^/]+)/.*'",
        'headers = { X-Device = "{device}" }',
        '[drop.other]\npath = "/x"\ndestinations = ["plain"]\n[destination.plain]\nurl = "https://p"',
    )
    assert vault(read(text)).headers == {"X-Device": "{device}"}


def test_device_names_can_use_labels_and_built_in_placeholders() -> None:
    text = a_file(
        "label_pattern = '(?P<device>[^/]+)/.*'\nsize_alarm = \"50%\"",
        rest='[drop.switches.expect]\nevery = "26h"\nby = "{drop}/{device}"\ndevices = ["switches/sw1"]',
    )
    drop = read(text).drop["switches"]
    assert drop.size_alarm == 0.5
    assert (drop.expect.every, drop.expect.by) == (timedelta(hours=26), "{drop}/{device}")
    assert drop.expect.devices == ("switches/sw1",)


def test_device_names_are_valid_with_size_alarm_alone() -> None:
    text = a_file('size_alarm = "200%"\nexpect.by = "{stem}"')
    assert read(text).drop["switches"].expect.every is None


def test_digest_field_can_be_empty() -> None:
    assert vault(read(a_file(destination='digest_field = ""'))).digest_field == ""


def test_subfolders_are_normalized() -> None:
    assert read(a_file('sent_dir = "./done//ok/"')).drop["switches"].sent_dir == "done/ok"


def test_folders_with_a_common_prefix_do_not_overlap() -> None:
    text = a_file('sent_dir = "x"\nrejected_dir = "xy"', rest='[drop.b]\npath = "/srv/backups/switches2"')
    assert set(read(text).drop) == {"switches", "b"}


def test_a_configuration_can_be_built_from_objects() -> None:
    config = Config(
        drop={"a": DropConfig(path=Path("/srv/a"), stable_for=timedelta(0), max_size=5)},
        destination={"v": HttpDestinationConfig(url="http://127.0.0.1:1/{name}", workers=1)},
    )
    assert config.drop["a"].stable_for == timedelta(0)


@pytest.mark.parametrize(
    "lines",
    [
        'listen = "127.0.0.1:9184"',
        'listen = "localhost:9184"',
        'listen = "[::1]:9184"',
        'listen = "0.0.0.0:9184"\ncert = "/c.pem"\nkey = "/c.key"',
        'textfile = "/var/lib/node_exporter/backupd.prom"',
    ],
    ids=["ipv4", "localhost", "ipv6", "tls", "textfile"],
)
def test_metrics_are_plain_on_loopback_and_over_tls_elsewhere(lines: str) -> None:
    assert read(a_file(rest=f"[metrics]\n{lines}")).metrics.is_enabled
    assert not read(a_file()).metrics.is_enabled
