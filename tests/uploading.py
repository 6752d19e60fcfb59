"""An uploader without a daemon, against any server: real files, real sockets, real TLS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backupd.config.models import HttpDestinationConfig
from backupd.core.model import Digest, Outcome, fingerprint_of
from backupd.telemetry.thread_watchdog import ThreadWatchdog
from backupd.upload.base import Abort, OnProgress, UploadJob
from backupd.upload.http.uploader import HttpEndpoint, HttpUploader
from tests.pki import Pki

MIB = 1024 * 1024


def a_destination(url: str, pki: Pki | None = None, **keys: Any) -> HttpDestinationConfig:
    """Return a destination, with the PKI's client certificate if given; the connect time-out is long."""
    if pki is not None and url.startswith("https"):
        keys = {"ca": pki.ca_pem, "cert": pki.client_cert, "key": pki.client_key, **keys}
    timeout = {"connect": "10m", **keys.pop("timeout", {})}
    return HttpDestinationConfig.model_validate({"url": url, "timeout": timeout, **keys})


def an_archive(folder: Path, content: bytes = b"", *, size: int = 0, name: str = "a.tar.gz") -> Path:
    """Return a new file with a content, or a sparse one of `size` bytes."""
    path = folder / name
    path.write_bytes(content)
    if size:
        os.truncate(path, size)
    return path


class Sender:
    """Sends files through one uploader, as a worker does."""

    def __init__(self, uploader: HttpUploader, abort: Abort) -> None:
        self.abort = abort
        self.watchdog = ThreadWatchdog("sender")
        self._uploader = uploader
        self._job: UploadJob | None = None
        self._unchanged = (0, 0)
        self.known_digests: tuple[Digest, ...] = ()
        self.unconfirmed_digest: Digest | None = None
        self.is_being_written: Callable[[], bool] = lambda: False

    @property
    def sent(self) -> int:
        """Return the number of bytes of the archive that were handed to the connection so far."""
        return self._job.sent_bytes if self._job else 0

    def send(self, path: Path, progress: OnProgress = lambda _sent: None) -> Outcome:
        fd = os.open(path, os.O_RDONLY)
        try:
            variables = {"name": path.name}
            fingerprint = fingerprint_of(os.fstat(fd))
            self._job = UploadJob(
                "the-delivery",
                os.fsencode(path.name),
                fd,
                fingerprint,
                variables,
                progress,
                on_alive=self.watchdog.alive,
                on_idle=self.watchdog.idle,
                unconfirmed_digest=self.unconfirmed_digest,
                known_digests=self.known_digests,
                is_being_written=self.is_being_written,
                open_path=lambda: os.open(path, os.O_RDONLY),
            )
            self.watchdog.alive()
            return self._uploader.upload(self._job)
        finally:
            os.close(fd)

    def disconnect(self) -> None:
        """Close the connections; the next archive is sent over a new one."""
        self._uploader.close()

    def is_stuck(self) -> bool:
        """Return whether `sent` is unchanged since twenty calls."""
        sent, calls = self._unchanged
        self._unchanged = (self.sent, calls + 1 if sent == self.sent else 0)
        return self.sent > 0 and calls > 20


@contextmanager
def a_sender(destination: HttpDestinationConfig) -> Iterator[Sender]:
    """Yield a sender to a destination, with an endpoint and an uploader of its own."""
    abort = Abort()
    uploader = HttpEndpoint.open(destination, abort).make_uploader()
    try:
        yield Sender(uploader, abort)
    finally:
        uploader.close()
        abort.close()
