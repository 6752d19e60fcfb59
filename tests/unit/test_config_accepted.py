from datetime import timedelta
from pathlib import Path

import pytest

from backupd.config.models import Config, DestinationConfig, DropConfig
from tests.unit.config_files import a_file, a_url, read


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
def test_addresses(url: str) -> None:
    assert read(a_url(url)).destination["vault"].url == url


@pytest.mark.parametrize("digest", ["none", "header:Repr-Digest", "body:/a/0/b~1c", "body:/files/sha-256"])
def test_places_of_the_digest(digest: str) -> None:
    text = a_file(destination=f'receipt.digest = "{digest}"')
    assert read(text).destination["vault"].receipt.digest == digest


def test_deletion_where_every_receipt_is_verified() -> None:
    text = a_file(
        'on_delivered = "delete"\ndestinations = ["vault"]',
        rest='[destination.blind]\nurl = "https://b"\nreceipt.digest = "none"',
    )
    assert read(text).drop["switches"].on_delivered == "delete"


def test_labels_as_placeholders_where_every_drop_has_them() -> None:
    text = a_file(
        "label_pattern = '(?P<device>[^/]+)/.*'",
        'headers = { X-Device = "{device}" }',
        '[drop.other]\npath = "/x"\ndestinations = ["plain"]\n[destination.plain]\nurl = "https://p"',
    )
    assert read(text).destination["vault"].headers == {"X-Device": "{device}"}


def test_devices_are_told_apart_by_labels_and_what_is_built_in() -> None:
    text = a_file(
        "label_pattern = '(?P<device>[^/]+)/.*'\nsize_alarm = \"50%\"",
        rest='[drop.switches.expect]\nevery = "26h"\nby = "{drop}/{device}"\ndevices = ["switches/sw1"]',
    )
    drop = read(text).drop["switches"]
    assert drop.size_alarm == 0.5
    assert (drop.expect.every, drop.expect.by) == (timedelta(hours=26), "{drop}/{device}")
    assert drop.expect.devices == ("switches/sw1",)


def test_devices_are_told_apart_for_their_sizes_alone() -> None:
    text = a_file('size_alarm = "200%"\nexpect.by = "{stem}"')
    assert read(text).drop["switches"].expect.every is None


def test_a_digest_field_can_be_left_out() -> None:
    assert read(a_file(destination='digest_field = ""')).destination["vault"].digest_field == ""


def test_folders_are_kept_without_detours() -> None:
    assert read(a_file('sent_dir = "./done//ok/"')).drop["switches"].sent_dir == "done/ok"


def test_folders_whose_names_begin_alike_are_apart() -> None:
    text = a_file('sent_dir = "x"\nrejected_dir = "xy"', rest='[drop.b]\npath = "/srv/backups/switches2"')
    assert set(read(text).drop) == {"switches", "b"}


def test_ready_made_values() -> None:
    config = Config(
        drop={"a": DropConfig(path=Path("/srv/a"), stable_for=timedelta(0), max_size=5)},
        destination={"v": DestinationConfig(url="http://127.0.0.1:1/{name}", workers=1)},
    )
    assert config.drop["a"].stable_for == timedelta(0)
