"""Each fault of a configuration, with its key and message."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.config.load import validate
from backupd.config.models import Config
from backupd.config.rules import PLACEHOLDERS
from backupd.core.names import TextTemplate
from tests.unit.config_files import a_file, a_url, faults_in


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # types
        (
            a_file('stable_for = "two"'),
            'drop.switches.stable_for: expected a duration such as "2s", got "two"',
        ),
        (a_file("stable_for = 2"), 'drop.switches.stable_for: expected a duration such as "2s", got 2'),
        (a_file('rescan_every = "0s"'), 'rescan_every: expected a duration longer than "0s", got "0s"'),
        (a_file('min_size = "big"'), 'drop.switches.min_size: expected a size such as "20MB", got "big"'),
        (a_file("min_size = true"), 'drop.switches.min_size: expected a size such as "20MB", got true'),
        (a_file('recursive = "yes"'), 'drop.switches.recursive: expected true or false, got "yes"'),
        (a_file('include = "*.gz"'), 'drop.switches.include: expected a list, got "*.gz"'),
        (a_file("include = []"), "drop.switches.include: expected at least one, got a list"),
        (
            a_file('include = ["*.gz", ""]'),
            'switches.include[1]: expected a pattern such as "*.tar.gz", got ""',
        ),
        (a_file("exclude = [1.5]"), "drop.switches.exclude[0]: expected a text in quotes, got 1.5"),
        (a_file("exclude = [2020-02-02]"), "exclude[0]: expected a text in quotes, got a date"),
        (a_file("path2 = 1"), 'drop.switches.path2: unknown key; did you mean "path"?'),
        (a_file('on_delivered = "mvoe"'), 'expected "move", "delete" or "keep", got "mvoe"'),
        # metrics
        (
            a_file(rest='[metrics]\nlisten = "9184"'),
            'metrics.listen: expected an IP address and a port such as "127.0.0.1:9184", got "9184"',
        ),
        (
            a_file(rest='[metrics]\nlisten = "backup1:9184"'),
            "metrics.listen: expected an IP address and a port",
        ),
        (a_file(rest='[metrics]\nlisten = "::1:9184"'), "metrics.listen: expected an IP address and a port"),
        (
            a_file(rest='[metrics]\nlisten = "127.0.0.1:0"'),
            "metrics.listen: expected an IP address and a port",
        ),
        (
            a_file(rest='[metrics]\nlisten = "0.0.0.0:9184"'),
            'metrics.listen: expected "cert" and "key" to be set too; plain HTTP is for loopback',
        ),
        (
            a_file(rest='[metrics]\nlisten = "[::1]:9184"\nca = "/ca.pem"'),
            'metrics.ca: expected "cert" to be set too',
        ),
        (
            a_file(rest='[metrics]\ntextfile = "/a.prom"\ncert = "/c.pem"\nkey = "/c.key"'),
            'metrics.cert: expected "listen" to be set too',
        ),
        (
            a_file(rest='[metrics]\ntextfile = "/var/a.txt"'),
            'metrics.textfile: expected a file that ends with ".prom"',
        ),
        # expected devices
        (
            a_file("size_alarm = 50"),
            'drop.switches.size_alarm: expected a percentage from "1%" to "1000%", got 50',
        ),
        (
            a_file('size_alarm = "half"'),
            'drop.switches.size_alarm: expected a percentage from "1%" to "1000%", got "half"',
        ),
        (a_file('expect.every = "0s"'), 'switches.expect.every: expected a duration longer than "0s"'),
        (a_file('expect.evry = "1h"'), 'switches.expect.evry: unknown key; did you mean "every"?'),
        (a_file('expect.every = "1h"\nexpect.by = "sw"'), 'expected a placeholder such as "{device}"'),
        (
            a_file('expect.every = "1h"\nexpect.by = "{nme}"'),
            'unknown placeholder {nme}; did you mean "name"?',
        ),
        (a_file('expect.every = "1h"\nexpect.by = "{digest}"'), "expect.by: unknown placeholder {digest}"),
        (a_file('expect.by = "{stem}"'), 'drop.switches.expect.by: expected "every" to be set too'),
        (
            a_file('size_alarm = "9%"\nexpect.by = "{stem}"\nexpect.devices = ["a"]'),
            'drop.switches.expect.devices: expected "every" to be set too',
        ),
        (
            a_file('expect.every = "1h"\nexpect.devices = ["sw1"]'),
            'drop.switches.expect.devices: expected "by" to be set too',
        ),
        (
            a_file('expect = { every = "1h", by = "{stem}", devices = ["sw1", ""] }'),
            'switches.expect.devices[1]: expected the name of a device, got ""',
        ),
        (a_file(top='keep_history_for = "0s"'), 'keep_history_for: expected a duration longer than "0s"'),
        (a_file(destination="workers = 0"), "destination.vault.workers: expected at least 1, got 0"),
        (a_file(destination="workers = 65"), "destination.vault.workers: expected at most 64, got 65"),
        (a_file(destination='workers = "2"'), 'workers: expected a whole number, got "2"'),
        (a_file(destination="workers = true"), "workers: expected a whole number, got true"),
        (a_file(destination="success = [200, 302]"), "vault.success[1]: expected at most 299, got 302"),
        (a_file(destination="success = [199]"), "vault.success[0]: expected at least 200, got 199"),
        (a_file(destination="success = []"), "success: expected at least one, got a list"),
        (a_file(destination="timeout = 5"), "destination.vault.timeout: expected a table, got 5"),
        (
            a_file(destination="timeout.conect = 5"),
            'timeout.conect: unknown key; did you mean "connect"?',
        ),
        (
            a_file(destination='deadline = "0s"'),
            'deadline: expected a duration longer than "0s", got "0s"',
        ),
        (a_file(destination="fields = []"), "destination.vault.fields: expected a table"),
        (a_file(top="dorp = 1"), 'dorp: unknown key; did you mean "drop"?'),
        (a_file(top="zzz = 1"), "zzz: unknown key"),
        (a_file(top='state_dir = "var"'), 'state_dir: expected an absolute path, got "var"'),
        (a_file(top='state_dir = "/v\\u0000"'), 'state_dir: expected an absolute path, got "/v\\u0000"'),
        # names and paths
        ('drop = {}\n[destination.v]\nurl = "https://h"', "drop: expected at least one, got a table"),
        ('[destination.v]\nurl = "https://h"', "drop: required, but missing"),
        ('[drop.d]\npath = "/srv"', "destination: required, but missing"),
        ('drop = 5\n[destination.v]\nurl = "https://h"', "drop: expected a table, got 5"),
        ('drop.d = 5\n[destination.v]\nurl = "https://h"', "drop.d: expected a table, got 5"),
        (a_file(rest="[destination.other]"), "destination.other.url: required, but missing"),
        (a_file(rest="[drop.other]"), "drop.other.path: required, but missing"),
        (
            a_file(rest='[drop."a b"]\npath = "/x"'),
            'drop."a b": expected a name of letters, digits, ".", "_" and "-", got "a b"',
        ),
        (a_file(rest='[drop.-a]\npath = "/x"'), "drop.-a: expected a name of letters"),
        (a_file(rest='[drop."a\\n"]\npath = "/x"'), 'drop."a\\n": expected a name of letters'),
        (
            a_file(rest='[drop.other]\npath = "srv"'),
            'drop.other.path: expected an absolute path, got "srv"',
        ),
        (
            a_file(destination='ca = "ca.pem"'),
            "vault.ca: expected an absolute path, or the name of a file",
        ),
        (a_file('sent_dir = "/sent"'), "sent_dir: expected a folder below the drop folder"),
        (a_file('sent_dir = "a/../.."'), "sent_dir: expected a folder below the drop folder"),
        (a_file('sent_dir = ""'), "sent_dir: expected a folder below the drop folder"),
        (a_file('rejected_dir = "./."'), "rejected_dir: expected a folder below the drop folder"),
        # within a drop
        (a_file('sent_dir = "x"\nrejected_dir = "x/"'), 'expected a folder apart from sent_dir, got "x"'),
        (
            a_file('sent_dir = "x/y"\nrejected_dir = "x"'),
            'expected a folder apart from sent_dir, got "x"',
        ),
        (a_file('sent_dir = "rejected/x"'), "drop.switches.rejected_dir: expected a folder apart from"),
        (
            a_file('min_size = "2kB"\nmax_size = "1kB"'),
            'drop.switches.max_size: expected at least min_size, "2kB", got "1kB"',
        ),
        (a_file("destinations = []"), "drop.switches.destinations: expected at least one, got a list"),
        (a_file('destinations = ["vault", "vault"]'), "destinations: expected every destination once"),
        (
            a_file("label_pattern = '('"),
            "drop.switches.label_pattern: expected a regular expression: missing )",
        ),
        (a_file("label_pattern = '[[a](?P<b>)'"), "expected a regular expression: Possible nested set"),
        (a_file("label_pattern = '(.*)'"), 'expected a named group such as "(?P<device>[^/]+)"'),
        (
            a_file("label_pattern = '(?P<name>.*)'"),
            'the group "name" has the name of a built-in placeholder',
        ),
        # between drops and destinations
        (
            a_file('destinations = ["valut"]'),
            'drop.switches.destinations: no destination is named "valut"; did you mean "vault"?',
        ),
        (
            a_file('on_delivered = "delete"', 'receipt.digest = "none"'),
            'expected "move" or "keep", as destination.vault.receipt.digest is "none", got "delete"',
        ),
        (
            a_file(rest='[drop.other]\npath = "/srv/backups/switches/"'),
            'apart from drop.switches.path, "/srv/backups/switches", got "/srv/backups/switches"',
        ),
        (
            a_file(rest='[drop.other]\npath = "/srv/backups/switches/x"'),
            "drop.other.path: expected a folder",
        ),
        (a_file(rest='[drop.other]\npath = "/srv"'), "drop.other.path: expected a folder apart"),
        # TLS
        (a_file(destination='cert = "/c"'), 'destination.vault.cert: expected "key" to be set too'),
        (a_file(destination='key = "/k"'), 'destination.vault.key: expected "cert" to be set too'),
        (
            a_file(destination='key_password_file = "/p"'),
            'destination.vault.key_password_file: expected "key" to be set too',
        ),
        # addresses
        (
            a_url("http://vault.example.net/"),
            "url: expected https; plain http is for loopback addresses only",
        ),
        (a_url("http://127.0.0.1.example.net/"), "url: expected https"),
        (a_url("http://localhost.example.net/"), "url: expected https"),
        (a_url("ftp://vault/"), "url: expected a URL such as https://host/path"),
        (a_url("vault.example.net/x"), "url: expected a URL such as https://host/path"),
        (a_url("https:///x"), "url: expected a URL such as https://host/path"),
        (
            a_url("https://h:99999/x"),
            "url: expected a URL such as https://host/path: port out of range",
        ),
        (a_url("https://[::1/x"), "url: expected a URL such as https://host/path: invalid ipv6"),
        (a_url("https://me@vault/"), "url: expected a URL without a user name or password"),
        (a_url("https://me:geheim@vault/"), "url: expected a URL without a user name or password"),
        (a_url("https://vault/#part"), "url: expected a URL without a fragment"),
        (a_url("https://vault/a b"), "url: expected a URL without blanks and control characters"),
        (
            a_url("https://vault/\\u0007"),
            "url: expected a URL without blanks and control characters",
        ),
        (a_url("https://{name}/x"), "url: expected placeholders in the path and query only"),
        (a_url("https://vault/{name"), 'url: unmatched "{" at character 15'),
        # placeholders
        (a_url("https://vault/{nmae}"), 'url: unknown placeholder {nmae}; did you mean "name"?'),
        (
            a_file(destination='fields = { d = "of {size} {dorp}" }'),
            'destination.vault.fields.d: unknown placeholder {dorp}; did you mean "drop"?',
        ),
        (
            a_file(destination='headers = { X-D = "{device}" }'),
            "destination.vault.headers.X-D: unknown placeholder {device}",
        ),
        (
            a_file(
                "label_pattern = '(?P<device>.+)/'",
                'headers = { X-D = "{device}" }',
                '[drop.other]\npath = "/x"',
            ),
            "vault.headers.X-D: placeholder {device} is no named group of drop.other.label_pattern",
        ),
        (
            a_file("label_pattern = '(?P<device>.+)/'", 'fields = { a = "{devcie}" }'),
            'unknown placeholder {devcie}; did you mean "device"?',
        ),
        (
            a_file(destination='fields = { a = "{name!r}" }'),
            "fields.a: expected a plain name in the braces",
        ),
        # headers and fields
        *(
            (
                a_file(destination=f'headers = {{ {name} = "x" }}'),
                f"headers.{name}: {name} is set by backupd",
            )
            for name in ("Content-Length", "host", "Transfer-Encoding", "CONTENT-TYPE", "Idempotency-Key")
        ),
        (
            a_file(destination='headers = { "a b" = "x" }'),
            'headers."a b": expected a header name of letters',
        ),
        (a_file(destination='headers = { a = "x\\ny" }'), "headers.a: expected printable ASCII"),
        (a_file(destination='headers = { a = "é" }'), "headers.a: expected printable ASCII"),
        (a_file(destination='headers = { a = " x" }'), "headers.a: expected printable ASCII"),
        (a_file(destination='headers = { a = "x", A = "y" }'), 'headers.A: the same header as "a"'),
        (a_file(destination='fields = { "" = "x" }'), 'fields."": expected the name of a form field'),
        (
            a_file(destination='fields = { sha256 = "x" }'),
            "fields.sha256: this form field is digest_field",
        ),
        (
            a_file(destination='fields = { file = "x" }'),
            "fields.file: this form field is file_field already",
        ),
        (
            a_file(destination='file_field = "sha256"'),
            "digest_field: expected another field than file_field",
        ),
        (a_file(destination='file_field = ""'), 'file_field: expected the name of a form field, got ""'),
        (a_file(destination='digest_field = "a\\r"'), "digest_field: expected the name of a form field"),
        # receipts and retries
        *(
            (
                a_file(destination=f'receipt.digest = "{digest}"'),
                'receipt.digest: expected "body:/json/pointer" or "header:Name" or "none", got',
            )
            for digest in (
                "",
                "sha256",
                "body:",
                "body:sha256",
                "body:/a~2",
                "header:",
                "header:a b",
                "none:",
            )
        ),
        (
            a_file(destination="receipt.prefix = 65"),
            "receipt.prefix: expected 0 or 8 to 64 characters, got 65",
        ),
        (
            a_file(destination="receipt.prefix = 4"),
            "receipt.prefix: expected 0 or 8 to 64 characters, got 4",
        ),
        (a_file(destination="receipt.prefix = -1"), "receipt.prefix: expected at least 0, got -1"),
        (
            a_file(destination='receipt = { prefix = 45, encoding = "base64" }'),
            "receipt.prefix: expected 0 or 8 to 44 characters, got 45",
        ),
        (
            a_file(destination='retry.initial = "1h"'),
            'retry.max: expected at least initial, "1h", got "5m"',
        ),
    ],
)
def test_each_fault_is_reported_once_with_its_key(text: str, message: str) -> None:
    lines = faults_in(text)
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert re.match(r"[a-z]", lines[0])
    assert not lines[0].endswith(".")


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (a_file('destinations = ["x", "x"]'), ["drop.switches.destinations"]),
        (a_file(destination='headers = {A = "1", a = "{zz}"}'), ["destination.vault.headers.a"]),
    ],
)
def test_a_fault_within_a_table_causes_no_fault_between_tables(text: str, places: list[str]) -> None:
    assert [fault.split(": ")[0] for fault in faults_in(text)] == places


@pytest.mark.parametrize("key", ["checksum_files", "keep_sent", "inspection"])
def test_similar_keys_are_unknown(key: str) -> None:
    assert faults_in(a_file(drop=f'{key} = "x"'))[0].startswith(f"drop.switches.{key}: unknown key")


def test_query_url_needs_a_receipt_with_a_digest() -> None:
    text = a_file(destination='query_url = "https://vault.example.net/{digest}"\nreceipt.digest = "none"')
    [line] = faults_in(text)
    assert line.startswith("destination.vault.query_url: a response without a digest verifies nothing")


def test_all_faults_are_reported_at_once_in_the_order_of_the_file() -> None:
    text = """
        shutdown_grace = 5
        bogus = "x"
        [log]
        level = "loud"
        [drop.switches]
        path = "/srv/a"
        stable_for = "two"
        stabel_for = "3s"
        destinations = ["valut"]
        sent_dir = "x"
        rejected_dir = "x/y"
        [drop.routers]
        path = "/srv/a/b"
        workers = 3
        [destination.vault]
        url = "https://vault.example.net/{nmae}"
        cert = "/etc/client.pem"
        success = [200, 404]
        workers = 99
        headers = { Host = "x" }
        receipt = { prefix = 3 }
        [destination.other]
        retry.max = "0.1s"
    """
    assert faults_in(text) == (
        'shutdown_grace: expected a duration such as "2s", got 5',
        "bogus: unknown key",
        'log.level: expected "debug", "info", "warning" or "error", got "loud"',
        'drop.switches.stable_for: expected a duration such as "2s", got "two"',
        'drop.switches.stabel_for: unknown key; did you mean "stable_for"?',
        'drop.switches.destinations: no destination is named "valut"; did you mean "vault"?',
        'drop.switches.rejected_dir: expected a folder apart from sent_dir, got "x/y"',
        'drop.routers.path: expected a folder apart from drop.switches.path, "/srv/a", got "/srv/a/b"',
        "drop.routers.workers: unknown key",
        'destination.vault.url: unknown placeholder {nmae}; did you mean "name"?',
        'destination.vault.cert: expected "key" to be set too',
        "destination.vault.success[1]: expected at most 299, got 404",
        "destination.vault.workers: expected at most 64, got 99",
        "destination.vault.headers.Host: Host is set by backupd itself",
        "destination.vault.receipt.prefix: expected 0 or 8 to 64 characters, got 3",
        'destination.other.retry.max: expected at least initial, "1s", got "0.1s"',
        "destination.other.url: required, but missing",
    )


@pytest.mark.parametrize(
    "text",
    [
        a_file("label_pattern = '('", 'headers = { X-D = "{device}" }'),
        a_file('destinations = ["vault"]').replace('url = "https', 'url = "ftp'),
        '[drop.d]\npath = "/x"\ndestinations = ["v"]\n[destination]\nv = 5',
        '[drop.d]\npath = 5\n[drop.e]\npath = "/missing"\n[destination.v]\nurl = "https://h"',
        '[destination.v]\nurl = "https://h/{device}"',
        '[drop.d]\npath = "/x"\ndestinations = ["v"]',
    ],
)
def test_a_fault_that_follows_from_another_one_is_not_reported(text: str) -> None:
    assert len(faults_in(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        a_url("https://me:geheim@vault/"),
        a_file(destination='headers = { Authorization = "geheim\\n" }'),
        a_file(destination='headers = "geheim"'),
        a_file(destination='headers = { X-Key = ["geheim"] }'),
        a_file(destination='fields = { token = "{geheim" }'),
        a_file(destination='key = "geheim"\ncert = "/c"'),
        a_file(destination='cert = "/c"\nkey = "/k"\nkey_password_file = "geheim"'),
        a_file(destination='password = "geheim"'),
        a_file(destination='auth = { token = "geheim" }'),
    ],
)
def test_no_message_contains_a_secret(text: str) -> None:
    assert "geheim" not in str(faults_in(text))


def test_a_quoted_value_is_on_one_short_line() -> None:
    (line,) = faults_in(a_file(f'on_delivered = "a\\n\\u202e{"x" * 500}"'))
    assert line.isprintable()
    assert len(line) < 200


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(
                    ["drop", "destination", "a", "path", "url", "headers", "retry", "log", "include"]
                ),
                inner,
                max_size=3,
            )
        ),
    )
)
def test_every_structure_of_a_file_is_valid_or_faulty(value: object) -> None:
    data: dict[str, Any] = value if isinstance(value, dict) else {"drop": {"a": value}, "destination": value}
    found = validate(data)
    assert isinstance(found, Config) or found


def test_every_built_in_placeholder_is_a_valid_name() -> None:
    assert TextTemplate.parse("".join(f"{{{name}}}" for name in PLACEHOLDERS)).names == PLACEHOLDERS
