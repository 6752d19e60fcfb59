"""Messages are sent by Apprise to a real SMTP server and a real webhook, and no error has a secret."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.telemetry.sender import Envelope, redacted, send
from tests.notification_servers import MailServer, Webhook, a_mail_server, a_webhook, body_of
from tests.scripted import ScriptedServer


@pytest.fixture
def mail() -> Iterator[MailServer]:
    with a_mail_server() as server:
        yield server


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with a_webhook() as server:
        yield server


def send_one(url: str) -> str:
    return send([Envelope("one", url, "Subject", "Body", "failure")], lambda: False)["one"]


def test_a_mail_is_plain_text_with_one_line_of_subject(mail: MailServer) -> None:
    subject = "host: core\r\nBcc: evil@host.example <b>x</b>"
    errors = send([Envelope("one", mail.url("bob"), subject, "a <i>b</i>\n  *c* _d_ é")], lambda: False)

    [sent] = mail.mails
    assert errors == {"one": ""}
    assert sent["Bcc"] is None
    assert sent["Subject"] == "host: core Bcc: evil@host.example <b>x</b>"
    assert sent.get_content_type() == "text/plain"
    assert body_of(sent).replace("\r\n", "\n").strip() == "a <i>b</i>\n  *c* _d_ é"


def test_a_webhook_gets_subject_body_and_severity(webhook: Webhook) -> None:
    assert send_one(webhook.url("hooks/backup")) == ""

    [(path, body)] = webhook.requests
    assert path == "/hooks/backup"
    assert (body["title"], body["message"], body["type"]) == ("Subject", "Body", "failure")


def test_a_wrong_password_is_an_error_without_it(mail: MailServer) -> None:
    error = send_one(mail.url("bob", password="wrong-battery"))

    assert "authentication credentials invalid" in error.lower()
    assert "wrong-battery" not in error
    assert not mail.mails


def test_a_refused_connection_is_an_error_without_the_path(webhook: Webhook) -> None:
    with ScriptedServer(lambda _: None) as server:
        server.refuse()
        error = send_one(f"json://127.0.0.1:{server.port}/services/T000/B000/XXXX")

    assert "127.0.0.1" in error
    assert not any(word in error for word in ("services", "T000", "B000", "XXXX"))


def test_an_http_error_is_an_error_with_its_status(webhook: Webhook) -> None:
    webhook.status = 403
    assert "403" in send_one(webhook.url("token-1"))


@pytest.mark.parametrize("url", ["nonsense://x", "slack://token-without-more", "mailto://"])
def test_a_url_that_apprise_does_not_know_is_an_error_without_it(url: str) -> None:
    assert send_one(url) == f"Apprise does not accept the URL of the service {url.partition(':')[0]}"


def test_a_service_that_hangs_delays_no_other_one(mail: MailServer, webhook: Webhook) -> None:
    webhook.gate.clear()
    envelopes = [
        Envelope("hangs", webhook.url("token-1"), "Subject", "Body"),
        Envelope("works", mail.url(), "Subject", "Body"),
    ]
    errors = send(envelopes, lambda: False)

    assert errors["works"] == ""
    assert "timed out" in errors["hangs"].lower()
    assert "token-1" not in errors["hangs"]


def test_sending_ends_at_once_when_it_is_cancelled(webhook: Webhook) -> None:
    webhook.gate.clear()
    cancelled = threading.Event()
    found: list[dict[str, str]] = []
    url = webhook.url() + "?rto=1000&cto=1000"
    thread = threading.Thread(
        target=lambda: found.append(send([Envelope("one", url, "Subject", "Body")], cancelled.is_set))
    )
    thread.start()
    while not webhook.requests:
        time.sleep(0.02)
    cancelled.set()
    thread.join()

    assert found == [{}]


@pytest.mark.parametrize(
    ("url", "shown", "text", "expected"),
    [
        ("json://h.example/a-token/b?key=c-key", "json://h.example/", "at h.example /a-token ?key=c-key",
         "at h.example /*** ?***=***"),
        ("slack://T123456/B123456/x", "slack://T...6/B...6/", "T123456 failed", "*** failed"),
        ("mailto://me%40x.org:pass%21word@h.example", "mailto://me:****@h.example/",
         "pass!word pass%21word h.example", "*** *** h.example"),
    ],
    ids=["webhook", "token", "password"],
)  # fmt: skip
def test_the_secret_parts_of_a_url_are_redacted(url: str, shown: str, text: str, expected: str) -> None:
    assert redacted(text, url, shown) == expected


def test_each_of_many_failures_has_its_error() -> None:
    with ScriptedServer(lambda _: None) as server:
        server.refuse()
        url = f"json://127.0.0.1:{server.port}/x"
        errors = send([Envelope(f"ops#{number}", url, "s", "b") for number in range(250)], lambda: False)

    assert len(errors) == 250
    assert all("127.0.0.1" in error for error in errors.values())


def test_what_a_plugin_prints_is_no_result(
    webhook: Webhook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        """
import threading

print("noise at the start")
start = threading.Thread.start

def noisy_start(self):
    print("noise", flush=True)
    start(self)

threading.Thread.start = noisy_start
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert send_one(webhook.url("x")) == ""
