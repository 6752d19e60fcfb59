"""The requests to a destination: address, headers and body, rendered from the templates of its table."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from backupd.config.models import HttpDestinationConfig
from backupd.config.types import may_hold_a_secret, names_a_credential
from backupd.core.model import Digest, Fingerprint, fingerprint_of
from backupd.core.names import TextTemplate
from backupd.core.verify import RFC_9530_NAMES
from backupd.upload.base import UploadJob
from backupd.upload.http.body import CHUNK, MultipartFraming, UploadBody, frame, raw
from backupd.upload.http.limits import UNBOUNDED_WAIT, AttemptLimits
from backupd.upload.http.redact import GAP, SECRETS, read_secret, secrets_in_query

BODY_HEADERS = frozenset({"Content-Type", "Content-Length", "Idempotency-Key", "Repr-Digest"})
"""The header fields that belong to an upload alone; other requests have those of the configuration."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """The request for one upload."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: UploadBody


class ConfirmedDigests:
    """The digests of archives that were read before their upload; safe to use from several threads.

    An archive is read once, and not again at each attempt while the destination is down.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[Fingerprint, tuple[Digest, ...], Digest]] = {}

    def find(self, job: UploadJob, algorithm: str) -> Digest | None:
        """Return the digest of an archive that has not changed since it was confirmed, else None.

        `confirmed` of the job is set as if its content had been read.
        """
        if (found := self._found.get(job.delivery_id)) is None:
            return None
        fingerprint, compared, digest = found
        if (digest.algorithm, compared, fingerprint) != (algorithm, job.known_digests, _fingerprint_of(job)):
            return None
        job.confirmed = fingerprint
        return digest

    def add(self, job: UploadJob, digest: Digest) -> None:
        """Note the digest of an archive that was confirmed, with its fingerprint at that time."""
        if len(self._found) >= _MAX_CONFIRMED:
            with suppress(KeyError, RuntimeError):  # of another thread
                del self._found[next(iter(self._found))]
        if job.confirmed is not None:
            self._found[job.delivery_id] = job.confirmed, job.known_digests, digest


_MAX_CONFIRMED = 1000
"""Archives of which the digest is kept."""


def _fingerprint_of(job: UploadJob) -> Fingerprint | None:
    with suppress(OSError):
        return fingerprint_of(os.fstat(job.fd))
    return None


class RequestBuilder:
    """Builds the requests to one destination; parses its templates once."""

    def __init__(
        self, config: HttpDestinationConfig, limits: AttemptLimits, confirmed: ConfirmedDigests | None = None
    ) -> None:
        self._config = config
        self._confirmed = confirmed or ConfirmedDigests()
        self._limits = limits
        self._url = TextTemplate.parse(config.url)
        self._query_url = TextTemplate.parse(config.query_url) if config.query_url else None
        self._fields = {key: TextTemplate.parse(value) for key, value in config.fields.items()}
        self._headers = {key: TextTemplate.parse(value) for key, value in config.headers.items()}
        self._secrets = tuple(self._secrets_in_templates())

    def build(self, job: UploadJob) -> PreparedRequest:
        """Return the request for an upload.

        `digest_at` can require the digest first, so this may read the archive. Raises ReadFailedError,
        FileChangedDuringUploadError, or SecretError for a file in `header_files`.
        """
        algorithm = self._config.receipt.algorithm
        digest = None if self._config.digest_at == "after" else self.digest_of(job)
        values = {**job.variables, "digest": digest.hex if digest else ""}
        framing = self._framing(job, values, digest)
        body = UploadBody(job, framing, algorithm, self._limits, expected=digest)
        headers = {
            **self.own_headers(values),
            "Content-Type": framing.content_type,
            "Content-Length": str(body.size),
            "Idempotency-Key": job.delivery_id,
        }
        if digest and self._config.body == "raw" and algorithm in RFC_9530_NAMES:
            encoded = base64.b64encode(binascii.unhexlify(digest.hex)).decode("ascii")
            headers["Repr-Digest"] = f"{RFC_9530_NAMES[algorithm]}=:{encoded}:"
        return PreparedRequest(self._config.method, _render_url(self._url, values), headers, body)

    def digest_of(self, job: UploadJob) -> Digest:
        """Return the digest of an archive that is read for it alone.

        Raises ReadFailedError or FileChangedDuringUploadError.
        """
        algorithm = self._config.receipt.algorithm
        if (confirmed := self._confirmed.find(job, algorithm)) is not None:
            return confirmed
        hasher = hashlib.new(algorithm)
        offset, size = 0, job.fingerprint.size
        while offset < size:
            self._limits.check()
            chunk = job.read_at(offset, min(CHUNK, size - offset))
            if not chunk:
                break
            hasher.update(chunk)
            offset += len(chunk)
        digest = Digest(algorithm, hasher.hexdigest())
        self.confirm_content(job, digest)
        return digest

    def confirm_content(self, job: UploadJob, digest: Digest) -> None:
        """Check that an archive has a digest, as `UploadJob.confirm_content` does and raises."""
        if self._confirmed.find(job, digest.algorithm) == digest:
            return
        for _ in job.confirm_content(digest):
            self._limits.check()
        self._confirmed.add(job, digest)

    def query_request(self, job: UploadJob, digest: Digest) -> str | None:
        """Return the URL for a query about a content; None without `query_url`."""
        if self._query_url is None:
            return None
        return _render_url(self._query_url, {**job.variables, "digest": digest.hex})

    def probe_request(self, values: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """Return URL and headers of a request without an archive; raises SecretError for `header_files`."""
        return _render_url(self._url, values), self.own_headers(values)

    def own_headers(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return the header fields of `headers` and `header_files`; raises SecretError."""
        plain = {
            key: template.render(values, _quote_for_header).strip() for key, template in self._headers.items()
        }
        return plain | {key: read_secret(path) for key, path in self._config.header_files.items()}

    def extensions(self, headers: Mapping[str, str]) -> dict[str, object]:
        """Return the extensions of a request with these `own_headers`: its secrets, and `unbounded_wait`."""
        from_files = [headers[name] for name in self._config.header_files]
        return {SECRETS: (*self._secrets, *from_files), UNBOUNDED_WAIT: self._limits.unbounded_wait}

    def _secrets_in_templates(self) -> Iterator[str]:
        """Yield the constant text of headers, fields and query parameters that may be a secret."""
        for name, text in self._fields.items():
            if names_a_credential(name):
                yield from _with_gaps(text).split(GAP)
        for name, text in self._headers.items():
            constants = _with_gaps(text).split(GAP)
            if may_hold_a_secret(name, constants):
                yield from constants
        for url in (self._url, self._query_url):
            if url is not None:
                yield from secrets_in_query(_with_gaps(url))

    def _framing(self, job: UploadJob, values: Mapping[str, str], digest: Digest | None) -> MultipartFraming:
        config = self._config
        if config.body == "raw":
            return raw()
        fields = {key: template.render(values) for key, template in self._fields.items()}
        after = config.digest_field if config.digest_at == "after" else ""
        if digest and config.digest_at == "before" and config.digest_field:
            fields[config.digest_field] = digest.hex
        return frame(secrets.token_hex(16), fields, config.file_field, job.name, after)


def _with_gaps(template: TextTemplate) -> str:
    return template.render(dict.fromkeys(template.names, GAP))


def _render_url(template: TextTemplate, values: Mapping[str, str]) -> str:
    return template.render({name: _quote_for_url(name, value) for name, value in values.items()})


def _quote_for_url(name: str, value: str) -> str:
    """Return a value in percent-encoding; only in `relpath` a slash separates path segments."""
    if value and not value.strip("."):  # a segment of dots leads to another folder, even as %2E
        return "%252E" * len(value)
    return urllib.parse.quote(
        value.encode("utf-8", "backslashreplace"), safe="/" if name == "relpath" else ""
    )


def _quote_for_header(value: str) -> str:
    """Return a value for a header field: characters other than printable ASCII become %NN.

    So do spaces at its ends, where a field value can't have any (RFC 9110 section 5.5).
    """
    text = urllib.parse.quote(value.encode("utf-8", "backslashreplace"), safe=" !#$&'()*+,/:;=?@[]~\"<>{}|^`")
    return re.sub("^ +| +$", lambda spaces: "%20" * len(spaces[0]), text)
