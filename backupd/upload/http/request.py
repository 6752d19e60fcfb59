"""Making the request for an archive: address, headers and body from the destination's templates."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import urllib.parse
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from backupd.config.models import HttpDestinationConfig
from backupd.config.types import names_a_credential
from backupd.core.model import Digest
from backupd.core.names import TextTemplate
from backupd.core.verify import RFC_9530_NAMES
from backupd.upload.base import UploadJob
from backupd.upload.http.body import (
    CHUNK,
    MultipartFraming,
    ReadFailedError,
    UploadBody,
    check_unchanged,
    frame,
    raw,
)
from backupd.upload.http.limits import UNWATCHED, AttemptLimits
from backupd.upload.http.redact import SECRET_HEADERS, SECRETS, read_secret


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is ready to be sent."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: UploadBody


class RequestBuilder:
    """Makes the requests of one destination; its templates are parsed once."""

    def __init__(self, config: HttpDestinationConfig, line: AttemptLimits) -> None:
        self._config = config
        self._line = line
        self._url = TextTemplate.parse(config.url)
        self._query_url = TextTemplate.parse(config.query_url) if config.query_url else None
        self._fields = {key: TextTemplate.parse(value) for key, value in config.fields.items()}
        self._headers = {key: TextTemplate.parse(value) for key, value in config.headers.items()}

    def build(self, cargo: UploadJob) -> PreparedRequest:
        """Return the request for an archive.

        Raises ReadFailedError or FileChangedError if the archive has to be read first and can't be or
        changes, SecretError for a header's file.
        """
        algorithm = self._config.receipt.algorithm
        digest = None if self._config.digest_at == "after" else self.digest_of(cargo)
        values = {**cargo.variables, "digest": digest.hex if digest else ""}
        framing = self._framing(cargo, values, digest)
        body = UploadBody(cargo, framing, algorithm, self._line, expected=digest)
        headers = {
            **self.own_headers(values),
            "Content-Type": framing.content_type,
            "Content-Length": str(body.size),
            "Idempotency-Key": cargo.delivery_id,
        }
        if digest and self._config.body == "raw" and algorithm in RFC_9530_NAMES:
            encoded = base64.b64encode(binascii.unhexlify(digest.hex)).decode("ascii")
            headers["Repr-Digest"] = f"{RFC_9530_NAMES[algorithm]}=:{encoded}:"
        return PreparedRequest(self._config.method, _address(self._url, values), headers, body)

    def extensions(self, cargo: UploadJob) -> dict[str, object]:
        """Return what a request carries along for whoever quotes its answer, or waits for its sign-in."""
        return {
            SECRET_HEADERS: tuple(self._config.header_files),
            SECRETS: tuple(
                template.render({"digest": "", **cargo.variables})
                for name, template in self._fields.items()
                if names_a_credential(name)
            ),
            UNWATCHED: self._line.unwatched,
        }

    def query_request(self, cargo: UploadJob, digest: Digest) -> str | None:
        """Return the address that tells whether a content is stored, or None without `query_url`."""
        if self._query_url is None:
            return None
        return _address(self._query_url, {**cargo.variables, "digest": digest.hex})

    def probe_request(self, values: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """Return address and headers of a request that only asks; raises SecretError for a header's file."""
        return _address(self._url, values), self.own_headers(values)

    def own_headers(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return the configured headers, those from files included."""
        plain = {key: template.render(values, _in_header).strip() for key, template in self._headers.items()}
        return plain | {key: read_secret(path) for key, path in self._config.header_files.items()}

    def _framing(
        self, cargo: UploadJob, values: Mapping[str, str], digest: Digest | None
    ) -> MultipartFraming:
        config = self._config
        if config.body == "raw":
            return raw()
        fields = {key: template.render(values) for key, template in self._fields.items()}
        after = config.digest_field if config.digest_at == "after" else ""
        if digest and config.digest_at == "before" and config.digest_field:
            fields[config.digest_field] = digest.hex
        return frame(uuid.uuid4().hex, fields, config.file_field, cargo.name, after)

    def digest_of(self, cargo: UploadJob) -> Digest:
        """Read the archive for its digest alone; raises ReadFailedError or FileChangedError."""
        algorithm = self._config.receipt.algorithm
        hasher = hashlib.new(algorithm)
        at, size = 0, cargo.fingerprint.size
        while at < size:
            self._line.check()
            try:
                chunk = os.pread(cargo.fd, min(CHUNK, size - at), at)
            except OSError as error:
                raise ReadFailedError(error.strerror) from error
            if not chunk:
                break
            hasher.update(chunk)
            at += len(chunk)
        check_unchanged(cargo)
        return Digest(algorithm, hasher.hexdigest())


def _address(template: TextTemplate, values: Mapping[str, str]) -> str:
    """Return a filled-in address; of all values only the relative path is a path there, too."""
    return template.render({name: _in_address(name, value) for name, value in values.items()})


def _in_address(name: str, value: str) -> str:
    if value and not value.strip("."):  # dots alone would lead to another folder, even as %2E
        return "%252E" * len(value)
    return urllib.parse.quote(
        value.encode("utf-8", "backslashreplace"), safe="/" if name == "relpath" else ""
    )


def _in_header(value: str) -> str:
    """Return a value as a header field can hold it: what is no printable ASCII becomes %NN.

    So do blanks at its ends, where a field can't have any (RFC 9110 section 5.5).
    """
    text = urllib.parse.quote(value.encode("utf-8", "backslashreplace"), safe=" !#$&'()*+,/:;=?@[]~\"<>{}|^`")
    return re.sub("^ +| +$", lambda blanks: "%20" * len(blanks[0]), text)
