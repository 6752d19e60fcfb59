"""An uploader on its own, against any server: real files, real sockets, real TLS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backupd.config.models import HttpDestinationConfig
from backupd.core.model import Outcome, fingerprint_of
from backupd.telemetry.thread_watchdog import ThreadWatchdog
from backupd.upload.base import Abort, OnProgress, UploadJob
from backupd.upload.http.uploader import HttpEndpoint, HttpUploader
from tests.pki import Pki

MIB = 1024 * 1024


def a_destination(url: str, pki: Pki | None = None, **keys: Any) -> HttpDestinationConfig:
    """Return a destination; with a PKI it shows its client's certificate. A slow server is waited for."""
    if pki is not None and url.startswith("https"):
        keys = {"ca": pki.ca_pem, "cert": pki.client_cert, "key": pki.client_key, **keys}
    timeout = {"connect": "10m", **keys.pop("timeout", {})}
    return HttpDestinationConfig.model_validate({"url": url, "timeout": timeout, **keys})


def an_archive(folder: Path, content: bytes = b"", *, size: int = 0, name: str = "a.tar.gz") -> Path:
    """Return a new file of a content, or a sparse one of a size in bytes."""
    path = folder / name
    path.write_bytes(content)
    if size:
        os.truncate(path, size)
    return path


class Sender:
    """Sends files by one uploader, as a worker does."""

    def __init__(self, uploader: HttpUploader, abort: Abort) -> None:
        self.abort = abort
        self.pulse = ThreadWatchdog("sender")
        self._uploader = uploader
        self._cargo: UploadJob | None = None
        self._looks = (0, 0)

    @property
    def sent(self) -> int:
        """Return how many bytes of the archive were handed to the connection so far."""
        return self._cargo.sent_bytes if self._cargo else 0

    def send(self, path: Path, progress: OnProgress = lambda _sent: None) -> Outcome:
        fd = os.open(path, os.O_RDONLY)
        try:
            variables = {"name": path.name}
            fingerprint = fingerprint_of(os.fstat(fd))
            self._cargo = UploadJob(
                "the-delivery",
                os.fsencode(path.name),
                fd,
                fingerprint,
                variables,
                progress,
                on_alive=self.pulse.alive,
                on_idle=self.pulse.idle,
            )
            self.pulse.alive()
            return self._uploader.upload(self._cargo)
        finally:
            os.close(fd)

    def is_stuck(self) -> bool:
        """Tell whether nothing more went out between twenty looks."""
        sent, looks = self._looks
        self._looks = (self.sent, looks + 1 if sent == self.sent else 0)
        return self.sent > 0 and looks > 20


@contextmanager
def a_sender(destination: HttpDestinationConfig) -> Iterator[Sender]:
    """Yield a sender to a destination."""
    abort = Abort()
    uploader = HttpEndpoint.open(destination, abort).make_uploader()
    try:
        yield Sender(uploader, abort)
    finally:
        uploader.close()
        abort.close()
