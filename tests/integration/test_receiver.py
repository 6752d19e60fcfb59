"""The contract of the reference receiver, over real sockets and real TLS."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from backupd.core.errors import ConfigError, UnavailableError
from backupd.receiver import store
from backupd.receiver.form import MAX_FIELD_BYTES, MAX_HEADER_BYTES, MAX_PARTS, FormReader
from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.pki import KeyPair, Pki, in_days
from tests.stage import TIMEOUT

DOCS = Path(__file__).parents[2] / "docs" / "receiver.md"
BOUNDARY = b"a-boundary"
FORM = {"Content-Type": "multipart/form-data; boundary=a-boundary"}
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def receiver(tmp_path: Path, pki: Pki) -> Iterator[RunningReceiver]:
    with a_receiver(tmp_path, pki) as running:
        yield running


@pytest.fixture
def client(pki: Pki) -> Iterator[httpx.Client]:
    with a_client(pki) as client:
        yield client


def a_receiver(tmp_path: Path, pki: Pki, **options: Any) -> RunningReceiver:
    return RunningReceiver(tmp_path / "store", server_tls(pki), **options)


def server_tls(pki: Pki) -> ServerTls:
    return ServerTls(pki.server_cert, pki.server_key, pki.ca_pem)


def a_context(pki: Pki, pair: KeyPair | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki.ca_pem)
    if pair:
        context.load_cert_chain(pair.cert, pair.key)
    return context


def a_client(pki: Pki, pair: KeyPair | None = None) -> httpx.Client:
    pair = pair or KeyPair(pki.client_cert, pki.client_key)
    return httpx.Client(
        limits=httpx.Limits(
            max_keepalive_connections=0
        ),  # a server may close after a 500; httpx would race it
        verify=a_context(pki, pair),
        trust_env=False,
        timeout=TIMEOUT,
    )


def a_part(name: bytes, content: bytes, file_name: bytes | None = None) -> bytes:
    named = b"" if file_name is None else b'; filename="' + file_name + b'"'
    return b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (
        BOUNDARY,
        name,
        named,
        content,
    )


def a_form(content: bytes = b"an archive", name: bytes = b"sw1.tar.gz", digest: str | None = None) -> bytes:
    stated = digest or hashlib.sha256(content).hexdigest()
    return b"".join(
        [
            a_part(b"description", b"Config backup"),
            a_part(b"file", content, name),
            a_part(b"sha256", stated.encode()),
            b"--%s--\r\n" % BOUNDARY,
        ]
    )


def post(
    client: httpx.Client, receiver: RunningReceiver, form: bytes | Iterator[bytes], key: str | None = None
) -> httpx.Response:
    headers = FORM | ({"Idempotency-Key": key} if key else {})
    return client.post(receiver.url, content=form, headers=headers)


def stored(receiver: RunningReceiver) -> list[Path]:
    return sorted((receiver.store_dir / "archives").iterdir())


def incomplete_uploads(receiver: RunningReceiver) -> list[Path]:
    return list((receiver.store_dir / "incoming").iterdir())


def is_problem(response: httpx.Response, status: int) -> bool:
    problem = response.json()
    assert response.status_code == status, problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return True


def wait_until(condition: Callable[[], object], seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@contextmanager
def a_half_sent_upload(receiver: RunningReceiver, pki: Pki) -> Iterator[ssl.SSLSocket]:
    """Send half of an upload, and yield once the receiver has written some of it."""
    context = a_context(pki, KeyPair(pki.client_cert, pki.client_key))
    with (
        socket.create_connection(("127.0.0.1", receiver.port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        form = a_form(b"x" * 8 * MIB)
        head = f"POST /v1/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['Content-Type']}\r\n"
        tls.sendall(f"{head}Content-Length: {len(form)}\r\n\r\n".encode() + form[: 4 * MIB])
        wait_until(lambda: incomplete_uploads(receiver))
        yield tls


# Responses


def test_stores_an_archive_and_responds_with_its_receipt(
    receiver: RunningReceiver, client: httpx.Client
) -> None:
    response = post(client, receiver, a_form(b"an archive"), key="delivery-1")

    digest = hashlib.sha256(b"an archive").hexdigest()
    assert response.status_code == 201
    assert response.json() == {
        "id": f"sw1.{digest[:16]}.tar.gz",
        "name": "sw1.tar.gz",
        "size": 10,
        "sha256": digest,
    }
    (archive,) = stored(receiver)
    assert archive.name == response.json()["id"]
    assert archive.read_bytes() == b"an archive"
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    store = archive.parent.parent
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in store.iterdir()}
    assert modes == {True: 0o700, False: 0o600}  # the form fields are in the index
    assert not incomplete_uploads(receiver)


def test_accepts_a_form_of_httpx(receiver: RunningReceiver, client: httpx.Client) -> None:
    response = client.post(
        receiver.url,
        data={"description": "Konfiguration für sw1"},
        files={"file": ('sw"1\n.tar.gz', b"data")},
    )

    assert response.status_code == 201
    assert response.json()["name"] == 'sw"1\n.tar.gz'


def test_accepts_text_before_and_after_the_form(receiver: RunningReceiver, client: httpx.Client) -> None:
    """RFC 2046 section 5.1.1 calls them preamble and epilogue."""
    form = iter([b"This is a\r\n", b"multipart form.\r\n", a_form(b"data"), b"The end.\r\n" * 1000])

    response = post(client, receiver, form)

    assert (response.status_code, response.json()["size"]) == (201, 4)


def test_stores_a_multipart_archive_as_it_is(receiver: RunningReceiver, client: httpx.Client) -> None:
    inner = b'--inner\r\nContent-Disposition: form-data; name="file"; filename="b"\r\n\r\nx\r\n--inner--\r\n'
    head = b'--%s\r\nContent-Disposition: form-data; name="file"; filename="a.eml"\r\n' % BOUNDARY
    form = head + b"Content-Type: multipart/mixed; boundary=inner\r\n\r\n%s\r\n--%s--\r\n" % (inner, BOUNDARY)

    assert post(client, receiver, form).status_code == 201
    assert [archive.read_bytes() for archive in stored(receiver)] == [inner]


def test_accepts_a_form_without_the_digest_field(receiver: RunningReceiver, client: httpx.Client) -> None:
    form = a_part(b"file", b"data", b"sw1.tgz") + b"--%s--\r\n" % BOUNDARY

    assert post(client, receiver, form).status_code == 201


def test_stores_an_empty_archive(receiver: RunningReceiver, client: httpx.Client) -> None:
    response = post(client, receiver, a_form(b""))

    assert response.status_code == 201
    assert response.json()["size"] == 0


def test_path_and_field_names_are_configurable(tmp_path: Path, pki: Pki, client: httpx.Client) -> None:
    form = a_part(b"archive", b"data", b"a.tgz") + a_part(b"digest", b"0" * 64) + b"--%s--" % BOUNDARY
    with a_receiver(tmp_path, pki, path="/in", file_field="archive", digest_field="digest") as receiver:
        assert receiver.url.endswith("/in")
        assert is_problem(post(client, receiver, form), 422)


def test_the_same_key_and_content_is_stored_once(receiver: RunningReceiver, client: httpx.Client) -> None:
    first = post(client, receiver, a_form(), key="delivery-1")
    again = post(client, receiver, a_form(), key="delivery-1")
    renamed = post(client, receiver, a_form(name=b"renamed.tar.gz"), key="delivery-1")

    assert (first.status_code, again.status_code, renamed.status_code) == (201, 200, 200)
    assert first.json() == again.json() == renamed.json()
    assert len(stored(receiver)) == 1


def test_the_same_name_and_content_under_another_key_is_stored_once(
    receiver: RunningReceiver, client: httpx.Client
) -> None:
    first = post(client, receiver, a_form(), key="delivery-1")
    again = post(client, receiver, a_form(), key="delivery-2")
    keyless = post(client, receiver, a_form())

    assert (first.status_code, again.status_code, keyless.status_code) == (201, 200, 200)
    assert first.json() == again.json() == keyless.json()
    assert len(stored(receiver)) == 1


def test_the_same_content_under_another_name_is_stored_as_well(
    receiver: RunningReceiver, client: httpx.Client
) -> None:
    for name in (b"monday.tgz", b"tuesday.tgz"):
        assert post(client, receiver, a_form(name=name)).status_code == 201

    assert [archive.name.split(".")[0] for archive in stored(receiver)] == ["monday", "tuesday"]


def test_other_content_under_the_same_name_is_stored_beside_it(
    receiver: RunningReceiver, client: httpx.Client
) -> None:
    for content in (b"old", b"new"):
        assert post(client, receiver, a_form(content)).status_code == 201

    assert {archive.read_bytes() for archive in stored(receiver)} == {b"old", b"new"}


def test_a_key_that_was_used_for_other_content_is_a_conflict(
    receiver: RunningReceiver, client: httpx.Client
) -> None:
    post(client, receiver, a_form(b"old"), key="delivery-1")

    assert is_problem(post(client, receiver, a_form(b"new"), key="delivery-1"), 409)
    assert [archive.read_bytes() for archive in stored(receiver)] == [b"old"]
    assert not incomplete_uploads(receiver)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (b"", "closing boundary"),
        (b"no form at all", "multipart"),
        (a_form()[:-20], "closing boundary"),
        (a_part(b"description", b"x") + b"--%s--" % BOUNDARY, "no file part"),
        (a_part(b"file", b"x") + b"--%s--" % BOUNDARY, "no filename"),
        (a_part(b"upload", b"x", b"a.tgz") + b"--%s--" % BOUNDARY, "belongs in the part 'file'"),
        (a_part(b"file", b"x", b"a.tgz") * 2 + b"--%s--" % BOUNDARY, "more than one"),
        (a_part(b"note", b"x" * (MAX_FIELD_BYTES + 1)) + b"--%s--" % BOUNDARY, "longer than"),
        (a_part(b"note", b"x") * MAX_PARTS + a_part(b"file", b"x", b"a.tgz") + b"--%s--" % BOUNDARY, "count"),
        (a_part(b"n" * 20_000, b"x") + b"--%s--" % BOUNDARY, "eader"),
        (b"--%s\r\n%s" % (BOUNDARY, b"X: y\r\n" * 9), "header count"),
        (b"--%s\r\nX: %s" % (BOUNDARY, b"y" * 10 * MAX_HEADER_BYTES), "header length"),
        (a_part(b"file", b"one\r\n--a-boundary-two", b"a.tgz") + b"--%s--" % BOUNDARY, "after boundary"),
        (b"x" + a_form(), "in front of first boundary"),
        (
            b"--%s\r\nContent-Type: text/plain\r\n\r\nx\r\n--%s--" % (BOUNDARY, BOUNDARY),
            "Content-Disposition",
        ),
        (b"--%s\r\nContent-Disposition: form-data\r\n\r\nx\r\n--%s--" % (BOUNDARY, BOUNDARY), "no name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_a_malformed_form_and_stores_nothing(
    receiver: RunningReceiver, client: httpx.Client, form: bytes, says: str
) -> None:
    response = post(client, receiver, form)

    assert is_problem(response, 400)
    assert says in response.json()["detail"]
    assert not stored(receiver)
    assert not incomplete_uploads(receiver)


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "x" * 300])
def test_refuses_a_form_without_a_usable_boundary(
    receiver: RunningReceiver, client: httpx.Client, boundary: str
) -> None:
    headers = {"Content-Type": "multipart/form-data" + boundary}

    assert is_problem(client.post(receiver.url, content=a_form(), headers=headers), 400)


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_refuses_an_empty_or_too_long_idempotency_key(
    receiver: RunningReceiver, client: httpx.Client, key: str
) -> None:
    headers = FORM | {"Idempotency-Key": key}

    assert is_problem(client.post(receiver.url, content=a_form(), headers=headers), 400)


def test_refuses_a_body_that_is_no_form(receiver: RunningReceiver, client: httpx.Client) -> None:
    headers = {"Content-Type": "application/gzip"}

    assert is_problem(client.post(receiver.url, content=b"data", headers=headers), 415)
    assert is_problem(client.post(receiver.url, content=b"data"), 415)


@pytest.mark.parametrize("digest", ["0" * 64, "not a digest"])
def test_refuses_a_wrong_digest_and_stores_nothing(
    receiver: RunningReceiver, client: httpx.Client, digest: str
) -> None:
    assert is_problem(post(client, receiver, a_form(digest=digest)), 422)
    assert not stored(receiver)
    assert not incomplete_uploads(receiver)


def test_accepts_a_digest_in_upper_case(receiver: RunningReceiver, client: httpx.Client) -> None:
    digest = hashlib.sha256(b"an archive").hexdigest().upper()

    assert post(client, receiver, a_form(b"an archive", digest=digest)).status_code == 201
    assert client.get(f"{receiver.url}/{digest}").status_code == 200


def test_accepts_an_archive_of_the_maximum_size_and_refuses_larger_ones(
    tmp_path: Path, pki: Pki, client: httpx.Client
) -> None:
    with a_receiver(tmp_path, pki, max_size=3 * MIB) as receiver:
        assert post(client, receiver, a_form(b"x" * 3 * MIB)).status_code == 201
        assert is_problem(post(client, receiver, a_form(b"x" * (3 * MIB + 1))), 413)
        assert is_problem(post(client, receiver, iter([a_form(b"y" * 9 * MIB)])), 413)
        assert is_problem(post(client, receiver, a_form(b"x" * 9 * MIB)), 413)
        assert len(stored(receiver)) == 1
        assert not incomplete_uploads(receiver)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_responds_507_on_a_full_disk_and_stores_nothing(
    receiver: RunningReceiver, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, call, full)
        assert is_problem(post(client, receiver, a_form(), key="delivery-1"), 507)
    assert not stored(receiver)
    assert not incomplete_uploads(receiver)
    assert post(client, receiver, a_form(), key="delivery-1").status_code == 201


def test_responds_500_to_an_input_output_error(
    receiver: RunningReceiver, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", broken)
        assert is_problem(post(client, receiver, a_form()), 500)
    assert not incomplete_uploads(receiver)


def test_returns_the_receipt_of_a_digest(receiver: RunningReceiver, client: httpx.Client) -> None:
    receipt = post(client, receiver, a_form()).json()

    found = client.get(f"{receiver.url}/{receipt['sha256']}")
    assert found.status_code == 200
    assert found.json() == receipt
    for unknown in ("0" * 64, "not-a-digest", "%00"):
        assert is_problem(client.get(f"{receiver.url}/{unknown}"), 404)


def test_responds_to_health_checks_unknown_paths_and_methods(
    receiver: RunningReceiver, client: httpx.Client
) -> None:
    root = f"https://127.0.0.1:{receiver.port}"

    assert client.get(f"{root}/healthz").status_code == 200
    assert is_problem(client.get(f"{root}/elsewhere"), 404)
    assert is_problem(client.get(receiver.url), 405)


def test_a_removed_archive_has_no_receipt_and_can_be_uploaded_again(
    receiver: RunningReceiver, client: httpx.Client
) -> None:
    receipt = post(client, receiver, a_form(), key="delivery-1").json()
    stored(receiver)[0].unlink()

    assert is_problem(client.get(f"{receiver.url}/{receipt['sha256']}"), 404)
    assert post(client, receiver, a_form(), key="delivery-1").status_code == 201
    assert len(stored(receiver)) == 1


# Names


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        (b"../../etc/passwd", "etc_passwd.#"),
        (b"/etc/passwd", "etc_passwd.#"),
        (rb"C:\backups\sw1.zip", "C_backups_sw1.#.zip"),
        (rb"\\host\share\sw1.zip", "host_share_sw1.#.zip"),
        (b"a\x00b.tgz", "a_b.#.tgz"),
        (b"a\nb\x1b[31m.tgz", "a_b_31m.#.tgz"),
        (b"%2e%2e%2fpasswd", "2e_2e_2fpasswd.#"),
        (b"..", "archive.#"),
        (b"", "archive.#"),
        (b"-rf", "rf.#"),
        (b".bashrc", "bashrc.#"),
        (b"$(reboot) `x`;&|.tgz", "reboot_x_.#.tgz"),
        ("Zürich-東京.tar.xz".encode(), "Zürich-東京.#.tar.xz"),
        ("a\u202egpj.tgz".encode(), "a_gpj.#.tgz"),
        (b"bad\xff.tgz", "bad_xff.#.tgz"),
        (b"x" * 248 + b".tar.gz", "x" * 231 + ".#.tar.gz"),
        ("ü".encode() * 125 + b".tgz", "ü" * 117 + ".#.tgz"),
    ],
    ids=ascii,
)
def test_a_hostile_name_stays_inside_the_store(
    receiver: RunningReceiver, client: httpx.Client, tmp_path: Path, name: bytes, kept: str
) -> None:
    response = post(client, receiver, a_form(name=name))

    assert response.status_code == 201
    assert response.json()["id"] == kept.replace("#", response.json()["sha256"][:16])
    assert [archive.name for archive in stored(receiver)] == [response.json()["id"]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]
    assert len(os.fsencode(stored(receiver)[0].name)) <= 255


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (rb"a\"b\\c.tgz", 'a"b\\c.tgz'),
        (b"a%22b%0D%0A.tgz", 'a"b\r\n.tgz'),
        (b"100%25.tgz", "100%25.tgz"),
        (rb"C:\new\sw1.zip", r"C:\new\sw1.zip"),
        ("größe.tgz".encode(), "größe.tgz"),
        (b"bad\xff.tgz", r"bad\xff.tgz"),
        (b"a; filename=b.tgz", "a; filename=b.tgz"),
    ],
    ids=ascii,
)
def test_the_receipt_has_the_unescaped_name(
    receiver: RunningReceiver, client: httpx.Client, written: bytes, meant: str
) -> None:
    assert post(client, receiver, a_form(name=written)).json()["name"] == meant


def test_a_changed_file_under_the_same_name_is_not_overwritten(
    receiver: RunningReceiver, client: httpx.Client
) -> None:
    digest = hashlib.sha256(b"an archive").hexdigest()
    foreign = receiver.store_dir / "archives" / f"sw1.{digest[:16]}.tar.gz"
    foreign.write_bytes(b"foreign")

    first = post(client, receiver, a_form(b"an archive"))
    again = post(client, receiver, a_form(b"an archive"))

    assert first.json()["id"] == f"sw1.{digest}.tar.gz"
    assert (first.status_code, again.status_code) == (201, 200)
    assert foreign.read_bytes() == b"foreign"
    assert len(stored(receiver)) == 2


# Interruptions


def test_an_interrupted_upload_leaves_no_file(receiver: RunningReceiver, pki: Pki) -> None:
    with a_half_sent_upload(receiver, pki):
        pass

    wait_until(lambda: not incomplete_uploads(receiver))
    assert not stored(receiver)


def test_a_stop_ends_a_stalled_upload_and_leaves_no_file(tmp_path: Path, pki: Pki) -> None:
    with a_receiver(tmp_path, pki, stop_within=1) as receiver, a_half_sent_upload(receiver, pki):
        receiver.__exit__(None, None, None)
        assert not incomplete_uploads(receiver)


def test_parallel_uploads_of_one_archive_are_stored_once(receiver: RunningReceiver, pki: Pki) -> None:
    together = threading.Barrier(8)

    def upload(key: str | None) -> httpx.Response:
        with a_client(pki) as client:
            client.get(f"https://127.0.0.1:{receiver.port}/healthz")
            together.wait()
            return post(client, receiver, a_form(b"x" * 3 * MIB), key)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(upload, ["delivery-1"] * 4 + [None] * 4))

    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert all(answer.json() == answers[0].json() for answer in answers)
    assert len(stored(receiver)) == 1
    assert not incomplete_uploads(receiver)


def test_parallel_uploads_with_one_key_store_one_of_two_contents(receiver: RunningReceiver, pki: Pki) -> None:
    together = threading.Barrier(2)

    def upload(content: bytes) -> int:
        with a_client(pki) as client:
            together.wait()
            return post(client, receiver, a_form(content), "delivery-1").status_code

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(upload, [b"one", b"two"]))

    assert sorted(answers) == [201, 409]
    assert len(stored(receiver)) == 1


def test_a_start_removes_incomplete_uploads_of_a_crash(tmp_path: Path, pki: Pki) -> None:
    (tmp_path / "store" / "incoming").mkdir(parents=True)
    (tmp_path / "store" / "incoming" / "left-over").write_bytes(b"half")

    with a_receiver(tmp_path, pki) as receiver:
        assert not incomplete_uploads(receiver)


def test_an_archive_that_is_renamed_but_not_indexed_is_replaced_by_the_next_attempt(
    receiver: RunningReceiver, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: Path) -> None:
        raise OSError(errno.EIO, "as if the machine had stopped here")

    with monkeypatch.context() as machine:
        machine.setattr(store, "_sync_folder", crash)
        assert is_problem(post(client, receiver, a_form(), key="delivery-1"), 500)
    assert len(stored(receiver)) == 1

    assert post(client, receiver, a_form(), key="delivery-1").status_code == 201
    assert len(stored(receiver)) == 1


def test_a_confirmed_archive_survives_a_kill_and_an_incomplete_one_is_removed(
    tmp_path: Path, pki: Pki, client: httpx.Client
) -> None:
    with a_receiver_process(tmp_path, pki) as (process, receiver):
        receipt = post(client, receiver, a_form(), key="delivery-1").json()
        with a_half_sent_upload(receiver, pki):
            process.kill()
            process.wait()
            assert incomplete_uploads(receiver)

    with a_receiver(tmp_path, pki) as restarted:
        assert not incomplete_uploads(restarted)
        assert client.get(f"{restarted.url}/{receipt['sha256']}").json() == receipt
        again = post(client, restarted, a_form(), key="delivery-1")
        assert (again.status_code, again.json()) == (200, receipt)
        assert len(stored(restarted)) == 1


@pytest.mark.long
def test_memory_does_not_depend_on_the_size_of_the_archive(
    tmp_path: Path, pki: Pki, client: httpx.Client
) -> None:
    block = os.urandom(MIB)

    def form() -> Iterator[bytes]:
        yield a_part(b"file", b"", b"large.tar")[:-2]
        for _ in range(512):
            yield block
        yield b"\r\n--%s--\r\n" % BOUNDARY

    with a_receiver_process(tmp_path, pki) as (process, receiver):
        assert post(client, receiver, a_form(os.urandom(8 * MIB))).status_code == 201
        before = peak_memory(process.pid)
        response = post(client, receiver, form())
        assert response.status_code == 201
        assert response.json()["size"] == 512 * MIB
        assert peak_memory(process.pid) - before < 16 * MIB


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of the process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found.group(1)) * 1024


@contextmanager
def a_receiver_process(tmp_path: Path, pki: Pki) -> Iterator[tuple[subprocess.Popen[str], RunningReceiver]]:
    """Run `serve` in a process of its own; the RunningReceiver has its URL and store, and does not run."""
    program = (
        "import sys; from pathlib import Path; from backupd.receiver.serve import ServerTls, serve\n"
        "store, *tls = map(Path, sys.argv[1:])\n"
        "serve(store, ServerTls(*tls), port=0, ready=lambda url: print(url, flush=True))\n"
    )
    here = a_receiver(tmp_path, pki)
    paths = [here.store_dir, pki.server_cert, pki.server_key, pki.ca_pem]
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, paths)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            here.url = process.stdout.readline().strip()
            here.port = httpx.URL(here.url).port or 0
            yield process, here
        finally:
            process.terminate()


# Certificates, ports, stores


def test_refuses_a_client_without_a_certificate(receiver: RunningReceiver, pki: Pki) -> None:
    with (
        httpx.Client(verify=a_context(pki, None), trust_env=False) as anonymous,
        pytest.raises(httpx.TransportError),
    ):
        anonymous.get(receiver.url)


def test_refuses_a_client_with_an_expired_or_foreign_certificate(
    receiver: RunningReceiver, pki: Pki, tmp_path: Path
) -> None:
    foreign = Pki(tmp_path / "foreign")
    for pair in (
        pki.issue_expired_client(),
        pki.issue_client("not-yet", not_before=in_days(1)),
        KeyPair(foreign.client_cert, foreign.client_key),
    ):
        with a_client(pki, pair) as refused, pytest.raises(httpx.TransportError):
            refused.get(receiver.url)


def test_restarts_on_the_same_port(tmp_path: Path, pki: Pki, client: httpx.Client) -> None:
    with a_receiver(tmp_path, pki) as receiver:
        url = receiver.url
        post(client, receiver, a_form(), key="delivery-1")
    with pytest.raises(httpx.ConnectError):
        client.get(url)
    with receiver:
        assert receiver.url == url
        assert post(client, receiver, a_form(), key="delivery-1").status_code == 200


def test_refuses_a_store_that_another_receiver_has_open(
    receiver: RunningReceiver, tmp_path: Path, pki: Pki
) -> None:
    with pytest.raises(ConfigError, match="another receiver"), a_receiver(tmp_path, pki):
        pass


def test_reports_an_unusable_store(tmp_path: Path, pki: Pki) -> None:
    (tmp_path / "store" / "incoming" / "a-folder").mkdir(parents=True)
    for _ in range(2):  # the first failure must have unlocked the store
        with pytest.raises(ConfigError, match="can't be used"), a_receiver(tmp_path, pki):
            pass

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be used"), a_receiver(tmp_path / "file", pki):
        pass


def test_reports_a_port_in_use(receiver: RunningReceiver, tmp_path: Path, pki: Pki) -> None:
    with (
        pytest.raises(UnavailableError, match="can't listen"),
        a_receiver(tmp_path / "other", pki, port=receiver.port),
    ):
        pass


def test_reports_a_key_that_does_not_match_the_certificate(tmp_path: Path, pki: Pki) -> None:
    tls = ServerTls(pki.server_cert, pki.client_key, pki.ca_pem)
    for _ in range(2):  # the first failure must have unlocked the store
        with pytest.raises(ConfigError, match="certificate"), RunningReceiver(tmp_path / "store", tls):
            pass


# The parser, and the documentation


def test_parses_a_form_in_chunks_of_any_size() -> None:
    content = b"\r\n--a-boundar\r\n-a-boundary\r\n --a-boundary--\r\r\n" * 3 + b"\r\n--a-bound"
    form = a_form(content, b"sw1.tgz")

    for size in range(1, len(form) + 1):
        reader = FormReader(BOUNDARY, "file")
        received = b""
        for start in range(0, len(form), size):
            reader.feed(form[start : start + size])
            received += reader.pop_file_data()
        assert (reader.finish(), received) == ("sw1.tgz", content)
        assert reader.fields == {
            "description": "Config backup",
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def test_the_curl_command_of_the_documentation_works(
    receiver: RunningReceiver, pki: Pki, tmp_path: Path
) -> None:
    if not shutil.which("curl"):
        if os.environ.get("CI"):
            pytest.fail("curl is missing")
        pytest.skip("curl is missing")
    command, answer = re.findall(r"```(?:sh|json)\n(.*?)```", DOCS.read_text(), re.DOTALL)[:2]
    here = tmp_path / "here"
    here.mkdir()
    for name, path in {
        "ca.pem": pki.ca_pem,
        "client.pem": pki.client_cert,
        "client.key": pki.client_key,
    }.items():
        shutil.copy(path, here / name)

    done = subprocess.run(
        ["sh", "-ec", command.replace("https://localhost:8443/v1/upload", receiver.url)],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(done.stdout) == json.loads(answer)
    assert [archive.name for archive in stored(receiver)] == [json.loads(answer)["id"]]
