"""Hashing beside sending: the same digest, and no thread left behind."""

from __future__ import annotations

import hashlib
import threading
from contextlib import closing

import pytest

from backupd.upload.hashing import WORTH_A_THREAD, Hashing
from tests.stage import until

CHUNKS = [bytes([number]) * 100_000 for number in range(64)]


def hashing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hash"]


@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "md5"])
@pytest.mark.parametrize("size", [0, WORTH_A_THREAD - 1, WORTH_A_THREAD])
def test_the_digest_is_that_of_all_chunks(algorithm: str, size: int) -> None:
    with closing(Hashing(algorithm, size)) as hashing:
        for chunk in CHUNKS:
            hashing.update(chunk)
        assert hashing.hexdigest() == hashlib.new(algorithm, b"".join(CHUNKS)).hexdigest()


def test_a_large_file_is_hashed_in_a_thread_that_ends_with_it() -> None:
    with closing(Hashing("sha256", WORTH_A_THREAD)) as hashing:
        assert hashing_threads()
        hashing.update(CHUNKS[0])
    until(lambda: not hashing_threads(), "the thread to end")


def test_a_small_file_needs_no_thread() -> None:
    with closing(Hashing("sha256", WORTH_A_THREAD - 1)):
        assert not hashing_threads()
