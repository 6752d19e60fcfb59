"""Uploads by HTTP: one reused client, a streamed multipart POST, and the answer judged."""

from __future__ import annotations

import urllib.parse
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

import httpx

from backupd import __version__
from backupd.config.models import DestinationConfig
from backupd.core.errors import BackupdError
from backupd.core.failure import failure
from backupd.core.model import Deferred, Outcome, Superseded
from backupd.core.policy import Reason, reason_of_status
from backupd.core.retry import parse_retry_after
from backupd.core.template import Template
from backupd.core.verify import Expectation, judge
from backupd.upload.body import Body, FileChangedError, ReadFailedError
from backupd.upload.failures import reason_of
from backupd.upload.line import Abort, AttemptEndedError, Line
from backupd.upload.multipart import frame
from backupd.upload.port import Cargo, Uploader
from backupd.upload.receipt import MOST, read_receipt
from backupd.upload.tls import make_context
from backupd.upload.transport import Transport

TransportMaker = Callable[[DestinationConfig, Line], httpx.BaseTransport]


def own_transport(config: DestinationConfig, line: Line) -> httpx.BaseTransport:
    """Return the transport of production; raises TlsFilesError where the TLS files can't be used."""
    return Transport(make_context(config), line, http2=config.http2)


class HttpUploader(Uploader):
    """Uploads to one destination over a client of its own, made at the first upload.

    `abort` ends what is under way; `transport` is replaced in tables of statuses only.
    """

    def __init__(
        self, config: DestinationConfig, abort: Abort, transport: TransportMaker = own_transport
    ) -> None:
        self._config = config
        self._make_transport = transport
        deadline = config.deadline.total_seconds() if config.deadline else None
        self._line = Line(abort, deadline=deadline, min_rate=config.min_rate)
        self._client: httpx.Client | None = None
        self._url = Template.parse(config.url)
        self._fields = {key: Template.parse(value) for key, value in config.fields.items()}
        self._headers = {key: Template.parse(value) for key, value in config.headers.items()}
        receipt = config.receipt
        self._expected = Expectation(receipt.digest != "none", receipt.encoding, receipt.prefix)

    def close(self) -> None:
        """See `Uploader.close`."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def upload(self, cargo: Cargo) -> Outcome:
        """See `Uploader.upload`."""
        self._line.begin()
        try:
            client = self._client = self._client or self._open_client()
            return self._post(client, cargo)
        except BackupdError as error:
            return Deferred(Reason.LOCAL_TLS, error.message)
        except FileChangedError as error:
            return Superseded(str(error))
        except ReadFailedError as error:
            return Deferred(Reason.UNREADABLE, str(error))
        except AttemptEndedError as ended:
            return Deferred(ended.reason, ended.error)
        except httpx.InvalidURL as error:
            return Deferred(Reason.PROTOCOL, str(error))
        except httpx.TransportError as error:
            reason, words = reason_of(error)
            return Deferred(reason, words)

    def _open_client(self) -> httpx.Client:
        t = self._config.timeout
        return httpx.Client(
            transport=self._make_transport(self._config, self._line),
            timeout=httpx.Timeout(
                connect=t.connect.total_seconds(),
                read=t.read.total_seconds(),
                write=t.write.total_seconds(),
                pool=t.pool.total_seconds(),
            ),
            headers={
                "User-Agent": f"backupd/{__version__}",
                "Accept": "application/json, application/problem+json;q=0.9, */*;q=0.1",
                "Accept-Encoding": "identity",
            },
            trust_env=False,  # the environment's proxies and .netrc must not divert a backup
            follow_redirects=False,  # a redirect would leak the archive, or lose its body
        )

    def _post(self, client: httpx.Client, cargo: Cargo) -> Outcome:
        fields = {key: template.render(cargo.variables) for key, template in self._fields.items()}
        framing = frame(
            uuid.uuid4().hex, fields, self._config.file_field, cargo.name, self._config.digest_field
        )
        body = Body(cargo, framing, self._config.receipt.algorithm, self._line)
        request = client.build_request(
            "POST",
            self._url.render(cargo.variables, _in_url),
            content=body,
            headers={
                **{
                    key: template.render(cargo.variables, _in_header).strip(" ")
                    for key, template in self._headers.items()
                },
                "Content-Type": framing.content_type,
                "Content-Length": str(len(body)),
                "Idempotency-Key": cargo.delivery_id,
            },
        )
        response = client.send(request, stream=True)
        try:
            return self._judge(response, body, cargo)
        finally:
            response.close()

    def _judge(self, response: httpx.Response, body: Body, cargo: Cargo) -> Outcome:
        status = response.status_code
        if status not in self._config.success:
            asked = response.headers.get("Retry-After")
            wait = parse_retry_after(asked, datetime.now(UTC)) if asked else None
            return failure(reason_of_status(status), _explained(response), status, wait)
        if not body.complete:
            error = f"answered {status} after {cargo.sent} of {cargo.fingerprint.size} bytes"
            return failure(Reason.EARLY_SUCCESS, error, status)
        receipt = read_receipt(self._config.receipt.digest, status, response.headers, _read(response))
        return judge(body.digest, cargo.fingerprint.size, receipt, self._expected)


def _read(response: httpx.Response) -> bytes:
    """Return the answer's body, up to a bound."""
    data = b""
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > MOST:
            return data[:MOST]
    return data


def _explained(response: httpx.Response) -> str:
    """Return a status with the beginning of what the destination says about it."""
    try:
        said = _read(response)[:300].decode("utf-8", "backslashreplace").strip()
    except httpx.TransportError:
        said = ""
    line = f"{response.status_code} {response.reason_phrase}".strip()
    if 300 <= response.status_code < 400:
        line += f" to {response.headers.get('Location', 'nowhere').partition('?')[0][:200]}"
    return f"{line}: {said}" if said else line


def _in_url(value: str) -> str:
    return urllib.parse.quote(value.encode("utf-8", "backslashreplace"), safe="")


def _in_header(value: str) -> str:
    """Return a value as a header field can hold it: what is no printable ASCII becomes %NN.

    So do blanks at its ends, which a field can't begin or end with (RFC 9110 section 5.5).
    """
    text = urllib.parse.quote(value.encode("utf-8", "backslashreplace"), safe=" !#$&'()*+,/:;=?@[]~\"<>{}|^`")
    inner = text.strip(" ")
    before, _, after = text.partition(inner) if inner else (text, "", "")
    return "%20" * len(before) + inner + "%20" * len(after)
