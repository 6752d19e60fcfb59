"""A drop of the configuration together with its open folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from backupd.config.models import DropConfig
from backupd.core.eligibility import Eligibility, Patterns
from backupd.core.folder_place import label_of
from backupd.core.retention_policy import RetentionPolicy
from backupd.dropfolder.folder import DropFolder


@dataclass(frozen=True, slots=True)
class Drop:
    """Everything the daemon knows about one drop; built once for each configuration.

    `sent_dir` and `rejected_dir` are relative to `folder`. `destinations` are the names of all destinations
    of its archives.
    """

    name: str
    config: DropConfig
    folder: DropFolder
    destinations: tuple[str, ...]
    sent_dir: bytes
    rejected_dir: bytes
    label_pattern: re.Pattern[str] | None
    retention: RetentionPolicy
    eligibility: Eligibility

    @classmethod
    def of(cls, name: str, config: DropConfig, folder: DropFolder, destinations: tuple[str, ...]) -> Drop:
        """Return the drop for its table in the configuration."""
        return cls(
            name,
            config,
            folder,
            destinations,
            os.fsencode(config.sent_dir.strip("/")),
            os.fsencode(config.rejected_dir.strip("/")),
            re.compile(config.label_pattern) if config.label_pattern else None,
            RetentionPolicy(config.keep_sent_for, config.keep_sent_last, config.min_free),
            Eligibility(
                Patterns(config.include),
                Patterns(config.exclude),
                config.min_size,
                config.max_size,
                checksums=config.checksum_file != "off",
            ),
        )

    def skips(self, directory: bytes) -> bool:
        """Return whether a directory is neither watched nor scanned, by its path relative to `folder`.

        These are the folders into which archives are moved, those with a temporary, hidden or excluded name,
        and all below them; without `recursive` all directories.
        """
        if not self.config.recursive or directory in (self.sent_dir, self.rejected_dir):
            return True
        return self.eligibility.of_directory(directory) is not None

    @property
    def label(self) -> str:
        """Return the name of the drop in the configuration, also for an earlier folder of it."""
        return label_of(self.name)

    @property
    def tracks_devices(self) -> bool:
        """Whether the archives of each device are counted and expected, or their sizes compared."""
        return self.config.expect.every is not None or self.config.size_alarm is not None

    @property
    def uses_checksum_files(self) -> bool:
        """Whether checksum files belong to their archives; otherwise they are archives of their own."""
        return self.config.checksum_file != "off"
