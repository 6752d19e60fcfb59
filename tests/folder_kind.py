"""A kind of destination for tests, "folder": archives are copied into a directory.

Run as a module, this is `backupd` with that kind registered.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from backupd.cli import main
from backupd.config.models import DestinationConfig
from backupd.config.problems import ConfigFault
from backupd.config.types import AbsolutePath, TlsPath
from backupd.core.failure import failure
from backupd.core.model import Digest, Outcome, Receipt, Superseded
from backupd.core.policy import Reason
from backupd.core.verify import ReceiptExpectation, verify_receipt
from backupd.upload.base import (
    Abort,
    Endpoint,
    FileChangedDuringUploadError,
    ProbeResult,
    Uploader,
    UploadJob,
)
from backupd.upload.registry import DestinationKind, register


class FolderConfig(DestinationConfig):
    """A directory that archives are copied into."""

    path: AbsolutePath = Field(description="Directory to copy archives into.")
    password_file: TlsPath | None = Field(default=None, description="File with a password; not used.")
    temporary_suffix: str = Field(default=".part", description="Suffix of a copy that is not complete.")

    @property
    def address(self) -> str:
        return str(self.path)

    def faults(self) -> Iterator[ConfigFault]:
        if not re.fullmatch(r"[.][a-z]+", self.temporary_suffix):
            yield ConfigFault(("temporary_suffix",), 'expected a suffix such as ".part"')


class FolderUploader(Uploader):
    def __init__(self, config: FolderConfig) -> None:
        self._config = config

    def upload(self, job: UploadJob) -> Outcome:
        target = os.path.join(self._config.path, os.fsdecode(job.name))
        size = job.fingerprint.size
        try:
            content = job.read_at(0, size + 1)
            sent = Digest("sha256", hashlib.sha256(content).hexdigest())
            for _ in job.confirm_content(sent):
                job.on_alive()
            with open(target + self._config.temporary_suffix, "wb") as copy:
                copy.write(content)
            os.replace(copy.name, target)
            job.sent_bytes = len(content)
            stored = hashlib.sha256(Path(target).read_bytes()).hexdigest()
        except FileChangedDuringUploadError as error:
            return Superseded(str(error))
        except OSError as error:
            return failure(Reason.CONNECT, f"{target}: {error.strerror}")
        return verify_receipt(sent, size, Receipt(None, stored, size), ReceiptExpectation())

    def query(self, job: UploadJob, digest: Digest) -> Outcome | None:
        raise AssertionError("a folder is never queried: its configuration says that it can't be")

    def close(self) -> None:
        pass


class FolderEndpoint(Endpoint):
    def __init__(self, config: FolderConfig, _abort: Abort) -> None:
        self._config = config

    def make_uploader(self) -> FolderUploader:
        return FolderUploader(self._config)


async def probe(name: str, config: FolderConfig, _abort: Abort) -> ProbeResult:
    if config.path.is_dir():
        return ProbeResult(name, None, "the directory exists")
    return ProbeResult(name, Reason.CONNECT, f"{config.path} is not a directory", advice="create it")


FOLDER = DestinationKind("folder", FolderConfig, FolderEndpoint, probe)

if __name__ == "__main__":
    register(FOLDER)
    main()
