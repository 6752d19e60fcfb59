"""Inspecting archives: each format whole, cut at every byte, and with changed bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import re
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.archive_formats import EMPTY, MISNAMED, NO_TAR_END, Damage, Note
from backupd.core.policy import Reason
from backupd.dropfolder.content import digest_of
from backupd.dropfolder.decompress import StoppedError, UninspectableError
from backupd.dropfolder.inspect import inspect

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT = b"".join(b"interface Gi1/0/%d\n description %d\n" % (n, n * n) for n in range(40))


def a_tar(tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar with members of all kinds."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, data in (("running.cfg", TEXT), ("n" * 90 + "/" + "x" * 120, b"1"), ("empty", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"of-{kind!r}")
            info.type, info.linkname = kind, "running.cfg"
            tar.addfile(info)
        info = tarfile.TarInfo("ü" * 30)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    return out.getvalue()


def a_zip(method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip with two files and a comment."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("running.cfg", TEXT)
        archive.writestr("startup.cfg", b"abc")
        archive.comment = b"of router 1"
    return out.getvalue()


def a_zstd(content: bytes, *, checksum: bool = True) -> bytes:
    """Return a frame."""
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: checksum})


TAR = a_tar()
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
WHOLE = {
    "r.tar": TAR,
    "gnu.tar": a_tar(tarfile.GNU_FORMAT),
    "r.gz": gzip.compress(TEXT),
    "r.tar.gz": gzip.compress(TAR),
    "two.gz": gzip.compress(TEXT) + gzip.compress(b"more"),
    "r.bz2": bz2.compress(TEXT),
    "r.tbz2": bz2.compress(TAR),
    "two.bz2": bz2.compress(TEXT) + bz2.compress(b"more"),
    "r.xz": lzma.compress(TEXT),
    "r.tar.xz": lzma.compress(TAR),
    "two.xz": lzma.compress(TEXT) + bytes(8) + lzma.compress(b"more"),
    "r.zip": a_zip(),
    "stored.zip": a_zip(zipfile.ZIP_STORED),
    "r.zst": a_zstd(TEXT),
    "r.tar.zst": a_zstd(TAR),
    "frames.zst": a_zstd(b"abc") + SKIPPABLE + a_zstd(TEXT, checksum=False),
    "skippable-first.zst": SKIPPABLE + a_zstd(TEXT),
}


class File:
    """A file in memory that can be inspected with several contents."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("archive")

    def inspected(self, content: bytes, name: str = "", *, full: bool = True) -> Damage | None:
        """Return the damage; a note is none."""
        found = self.examined(content, name, full=full)
        return found if isinstance(found, Damage) else None

    def examined(self, content: bytes, name: str = "", *, full: bool = True) -> Damage | Note | None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, content, 0)
        return inspect(self.fd, len(content), name.encode(), full=full, should_stop=lambda: False)


@pytest.fixture
def file() -> Iterator[File]:
    made = File()
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("full", [False, True])
def test_a_whole_archive_has_no_damage_whatever_its_name(file: File, name: str, full: bool) -> None:
    names = [name, name.upper()]
    if name != "skippable-first.zst":  # of which only the name shows that it is not LZ4
        names += ["noname"]
    for called in names:
        assert file.examined(WHOLE[name], called, full=full) is None


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "skippable-first.zst"])
@pytest.mark.parametrize("full", [False, True])
def test_a_whole_archive_with_the_name_of_another_kind_is_noted(file: File, name: str, full: bool) -> None:
    wrong = "wrong.gz" if name.endswith("zip") else "wrong.zip"

    found = file.examined(WHOLE[name], wrong, full=full)

    assert isinstance(found, Note)
    assert found.reason == MISNAMED


def _valid_lengths(name: str) -> set[int]:
    """Return the lengths at which an archive can be cut and is still valid."""
    if name.startswith("two"):
        of = {"two.gz": gzip.compress(TEXT), "two.bz2": bz2.compress(TEXT), "two.xz": lzma.compress(TEXT)}
        whole = len(of[name])
        return set(range(whole, whole + (9 if name == "two.xz" else 1)))  # with the padding of xz
    if name == "skippable-first.zst":  # an empty archive
        return {len(SKIPPABLE)}
    if name == "frames.zst":  # between two frames
        return {len(a_zstd(b"abc")), len(a_zstd(b"abc")) + len(SKIPPABLE)}
    return set()


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.endswith(".tar")])
def test_an_archive_cut_at_any_byte_is_truncated(file: File, name: str) -> None:
    content, ends = WHOLE[name], _valid_lengths(name)
    passed = {n for n in range(len(content)) if file.inspected(content[:n], name) is None}
    reasons = {f.reason for n in range(len(content)) if (f := file.inspected(content[:n], name))}

    assert passed <= ends, sorted(passed - ends)
    assert reasons <= {Reason.TRUNCATED, Reason.DAMAGED}
    assert Reason.TRUNCATED in reasons


@pytest.mark.parametrize("name", ["r.tar", "gnu.tar"])
def test_a_tar_cut_within_a_member_or_header_is_truncated(file: File, name: str) -> None:
    content = WHOLE[name]
    end = -(-len(content.rstrip(b"\0")) // 512) * 512
    ends_of_members = set[int]()
    for cut in [*range(0, end, 256), *range(1, 1100), end - 1, end]:
        found = file.examined(content[:cut], name)
        if isinstance(found, Note):
            assert found.reason == NO_TAR_END
            ends_of_members.add(cut)
            continue
        assert found is not None, cut
        assert found.reason is Reason.TRUNCATED, cut
    assert end in ends_of_members
    assert all(cut % 512 == 0 for cut in ends_of_members)
    assert len(ends_of_members) <= 8  # one for each member


@pytest.mark.parametrize("name", ["r.gz", "r.tar.gz", "r.bz2", "r.xz", "r.zip", "r.tar", "r.zst"])
def test_a_quick_inspection_detects_a_missing_end(file: File, name: str) -> None:
    found = file.inspected(WHOLE[name][: len(WHOLE[name]) * 2 // 3], name, full=False)

    assert found is not None
    assert found.reason is Reason.TRUNCATED


@pytest.mark.parametrize("name", ["r.gz", "r.bz2", "r.xz", "r.zst", "r.zip", "stored.zip"])
def test_a_changed_byte_in_the_middle_is_detected(file: File, name: str) -> None:
    content = WHOLE[name]
    for at in range(60, len(content) - 200, 7):
        changed = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
        found = file.inspected(changed, name)
        assert found is not None, at
        assert found.reason in (Reason.DAMAGED, Reason.TRUNCATED), at


@pytest.mark.parametrize("name", ["r.gz", "r.bz2", "r.xz", "r.tar.gz", "r.zst"])
@pytest.mark.parametrize("behind", [bytes(3), bytes(5000), b"\r\n", b"signature" * 100])
def test_bytes_after_the_end_of_an_archive_are_ignored(file: File, name: str, behind: bytes) -> None:
    assert file.inspected(WHOLE[name] + behind, name) is None
    assert file.inspected(WHOLE[name] + behind, name, full=False) is None


def a_bgzf_block(content: bytes) -> bytes:
    """Return a gzip member with the extra field of bgzip."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = squeeze.compress(content) + squeeze.flush()
    extra = b"\6\0BC\2\0" + (len(data) + 25).to_bytes(2, "little")
    trailer = zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(4, "little")
    return b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + extra + data + trailer


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
def test_a_bgzip_file_is_truncated_without_its_end_block(file: File, full: bool) -> None:
    blocks = a_bgzf_block(TEXT) + a_bgzf_block(TEXT)
    for behind in (b"", bytes(100), b"\n"):
        assert file.examined(blocks + a_bgzf_block(b"") + behind, "r.gz", full=full) is None
        found = file.inspected(blocks + behind, "r.gz", full=full)
        assert found is not None
        assert found.reason is Reason.TRUNCATED


UNSOUND = {
    "next-1.gz": (gzip.compress(TEXT) + b"\x1f", Reason.TRUNCATED),
    "next-2.gz": (gzip.compress(TEXT) + b"\x1f\x8b", Reason.TRUNCATED),
    "next-padded.gz": (gzip.compress(TEXT) + bytes(512) + b"\x1f\x8b", Reason.TRUNCATED),
    "next-9.bz2": (bz2.compress(TEXT) + bz2.compress(TEXT)[:9], Reason.TRUNCATED),
    "next-5.xz": (lzma.compress(TEXT) + lzma.compress(TEXT)[:5], Reason.TRUNCATED),
    "next-3.zst": (a_zstd(TEXT) + a_zstd(TEXT)[:3], Reason.TRUNCATED),
    "next-skippable-1.zst": (a_zstd(TEXT) + SKIPPABLE[:1], Reason.TRUNCATED),
    "empty.gz": (b"", Reason.TRUNCATED),
    "one-byte.gz": (b"\x1f", Reason.TRUNCATED),
    "zeros.zip": (bytes(5000), Reason.TRUNCATED),
    "zeros.tar": (bytes(20480), Reason.TRUNCATED),
    "zeros-first.tar": (bytes(512) + TEXT, Reason.TRUNCATED),
    "cut.tar": (TAR[:300], Reason.TRUNCATED),
    "cut.tar.gz": (gzip.compress(TAR[:2000]), Reason.TRUNCATED),
    "cut.tar.zst": (a_zstd(TAR[:2000]), Reason.TRUNCATED),
    "broken.tar.zst": (a_zstd(TAR[:512] + b"y" * 5000), Reason.DAMAGED),
    "broken.tar": (TAR[:100] + b"x" + TAR[101:512] + b"y" * 5000, Reason.DAMAGED),
    "first.tar.gz": (gzip.compress(TAR[:100] + b"x" + TAR[101:]), Reason.DAMAGED),
}


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
@pytest.mark.parametrize("name", UNSOUND)
def test_an_archive_that_ends_too_early_or_is_broken_is_damaged(file: File, name: str, full: bool) -> None:
    content, reason = UNSOUND[name]

    found = file.inspected(content, name, full=full)

    assert found is not None
    assert found.reason is reason
    assert found.error


NOTED = {
    "nothing.gz": (gzip.compress(b""), EMPTY),
    "nothing.xz": (lzma.compress(b""), EMPTY),
    "nothing.bz2": (bz2.compress(b""), EMPTY),
    "nothing.zst": (a_zstd(b""), EMPTY),
    "skipped.zst": (SKIPPABLE, EMPTY),
    "nothing.zip": (b"PK\5\6" + bytes(18), EMPTY),
    "nothing.tar": (bytes(10240), EMPTY),
    "nothing.tar.gz": (gzip.compress(bytes(10240)), EMPTY),
    "nothing.tar.zst": (a_zstd(bytes(10240)), EMPTY),
    "encrypted.tar.gz": (b"Salted__" + TEXT, MISNAMED),
    "text.tar.gz": (b"550 no such file\r\n", MISNAMED),
    "page.zip": (b"<!DOCTYPE html>" * 100, MISNAMED),
    "text.tar": (TEXT, MISNAMED),
    "plain.tar.gz": (TAR, MISNAMED),
    "compressed.tar": (gzip.compress(TAR), MISNAMED),
    "notar.tar.gz": (gzip.compress(TEXT), MISNAMED),
    "notar.tzst": (a_zstd(TEXT), MISNAMED),
    "no-end.tar": (TAR[: -(-len(TAR.rstrip(b"\0")) // 512) * 512], NO_TAR_END),
    "no-end.tar.gz": (gzip.compress(TAR[: -(-len(TAR.rstrip(b"\0")) // 512) * 512]), NO_TAR_END),
}


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
@pytest.mark.parametrize("name", NOTED)
def test_an_unusual_file_is_noted_but_not_damaged(file: File, name: str, full: bool) -> None:
    content, reason = NOTED[name]

    found = file.examined(content, name, full=full)

    if name == "nothing.xz" and not full:  # its footer is right
        assert found is None
    else:
        assert isinstance(found, Note)
        assert (found.reason, bool(found.text)) == (reason, True)


@pytest.mark.parametrize("name", ["a.cfg", "a.txt", "a", "a.7z", "a.gpg", "a.tar.gz.gpg", "a.enc", "a.ucs"])
@pytest.mark.parametrize(
    "content", [b"", b"x", bytes(2000), TEXT, b"Salted__" + TEXT, b"BZhello", b"PK is short"]
)
def test_a_file_of_an_unknown_format_has_no_damage(file: File, name: str, content: bytes) -> None:
    assert file.inspected(content, name) is None


@given(st.sampled_from(sorted(WHOLE)), st.randoms(use_true_random=False), st.booleans())
def test_an_archive_with_random_changes_never_fails_the_inspection(
    name: str, chance: random.Random, full: bool
) -> None:
    content = bytearray(WHOLE[name])
    for _ in range(chance.randint(1, 20)):
        content[chance.randrange(6, len(content))] = chance.randrange(256)
    made = File()
    try:
        found = made.inspected(bytes(content), name, full=full)
    except UninspectableError:
        found = None
    finally:
        os.close(made.fd)
    assert found is None or found.error


def _bombs() -> dict[str, bytes]:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    gz = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(600)) + squeeze.flush()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number in range(6):
            archive.writestr(f"{number}", bytes(100 << 20))
    return {"b.gz": gz, "b.zip": out.getvalue()}


@pytest.mark.long
def test_a_decompression_bomb_reaches_the_limit_in_bounded_memory(file: File) -> None:
    for name, content in _bombs().items():
        tracemalloc.start()
        with pytest.raises(UninspectableError):
            file.inspected(content, name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20, name


def test_the_size_in_a_pax_header_is_used(file: File) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("large")
        info.size = 2000
        info.pax_headers = {"size": "2000"}
        tar.addfile(info, io.BytesIO(b"y" * 2000))
    assert file.inspected(plain.getvalue(), "a.tar") is None


def test_an_xz_file_with_a_large_dictionary_reaches_the_limit(file: File) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 256 << 20}]
    content = lzma.compress(TEXT, filters=filters)
    with pytest.raises(UninspectableError, match="dictionary"):
        file.inspected(content, "a.xz")


@pytest.mark.parametrize("end", [b"\0" * 22, b"PK\5\6" + bytes(17), b"PK\5\6" + bytes(16) + b"\xff\xff"])
def test_a_zip_without_an_end_record_is_truncated(file: File, end: bytes) -> None:
    found = file.inspected(b"PK\3\4" + bytes(100) + end, "a.zip")
    assert found is not None
    assert found.reason is Reason.TRUNCATED


@pytest.mark.parametrize(("at", "value"), [(12, 0xFFFFFFF0), (16, 0xFFFFFFF0), (12, 1), (16, 0xFFFFFFFF)])
def test_a_zip_with_a_wrong_position_of_its_directory_is_damaged(file: File, at: int, value: int) -> None:
    content = bytearray(a_zip())
    end = content.rindex(b"PK\5\6")
    content[end + at : end + at + 4] = value.to_bytes(4, "little")
    found = file.inspected(bytes(content), "a.zip")
    assert found is not None
    assert found.reason is Reason.DAMAGED


def a_zip_of_zips() -> bytes:
    """Return a zip that contains zips as they are, an empty one among them, and a file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.zip", a_zip())
        archive.writestr("empty.zip", b"PK\5\6" + bytes(18))
        archive.writestr("b.zip", a_zip(zipfile.ZIP_STORED))
        archive.writestr("last.cfg", TEXT)
    return out.getvalue()


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
def test_the_end_of_a_zip_inside_a_zip_is_not_taken_for_its_own(file: File, full: bool) -> None:
    content = a_zip_of_zips()
    assert file.examined(content, "r.zip", full=full) is None
    for behind in (b"", bytes(500), TEXT):
        for cut in range(100, len(content), 11):
            assert file.inspected(content[:cut] + behind, "r.zip", full=full) is not None, cut
        for end in re.finditer(re.escape(b"PK\5\6"), content[:-100]):
            cut = content.index(b"PK\3\4", end.end())  # an inner zip is whole
            assert file.inspected(content[:cut] + behind, "r.zip", full=full) is not None, cut


@pytest.mark.parametrize("marker", [b"PK\7\x08", b"PK00"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
def test_a_split_zip_in_one_part_is_whole_whether_or_not_its_offsets_count_the_marker(
    file: File, marker: bytes, full: bool
) -> None:
    out = io.BytesIO(marker)
    out.seek(len(marker))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("running.cfg", TEXT)
    assert file.examined(out.getvalue(), "r.zip", full=full) is None
    assert file.examined(marker + a_zip(), "r.zip", full=full) is None


def test_the_content_of_an_encrypted_entry_is_not_checked(file: File) -> None:
    content = bytearray(a_zip())
    for at in (content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8):
        content[at] |= 1
    content[60] ^= 1
    assert file.inspected(bytes(content), "a.zip") is None


@pytest.mark.long
def test_a_zip64_is_inspected(file: File, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(zipfile.ZipInfo("large"), "w", force_zip64=True) as member:
            member.write(TEXT)
        for number in range(66_000):
            archive.writestr(str(number), b"")
    content = path.read_bytes()

    assert file.inspected(content, "a.zip") is None
    assert file.inspected(content[:-30], "a.zip") is not None


def test_a_changed_byte_in_a_large_zstd_block_is_detected(file: File) -> None:
    content = random.Random(1).randbytes(300_000) + TEXT * 1000
    archive = a_zstd(content)
    for at in (20, 150_000, 290_000, len(archive) - 6):
        changed = archive[:at] + bytes([archive[at] ^ 1]) + archive[at + 1 :]
        for full in (True, False):
            found = file.inspected(changed, "r.zst", full=full)
            assert found is not None, at
            assert found.reason is Reason.DAMAGED, at


def test_a_changed_header_in_a_tar_is_detected_without_a_zstd_checksum(file: File) -> None:
    tar = TAR[:1] + b"?" + TAR[2:]

    found = file.inspected(a_zstd(tar, checksum=False), "r.tar.zst")

    assert found is not None
    assert found.reason is Reason.DAMAGED


def a_zstd_frame(flags: int, window_log: int, more: bytes = b"") -> bytes:
    """Return a frame of 3 bytes with a window size in its header; RFC 8878, section 3.1.1.1."""
    block = (3 << 3 | 1).to_bytes(3, "little") + b"abc"
    return b"\x28\xb5\x2f\xfd" + bytes([flags, (window_log - 10) << 3]) + more + block


def test_a_zstd_window_of_128_mib_is_inspected(file: File) -> None:
    assert file.inspected(a_zstd_frame(0, 27), "a.zst") is None


@pytest.mark.parametrize("window_log", [28, 31, 41])
def test_a_larger_zstd_window_is_not_called_damaged(file: File, window_log: int) -> None:
    with pytest.raises(UninspectableError, match="128 MiB for its zstd window"):
        file.inspected(a_zstd_frame(0, window_log), "a.zst")


def test_a_zstd_file_that_needs_a_dictionary_is_not_called_damaged(file: File) -> None:
    with pytest.raises(UninspectableError, match="dictionary"):
        file.inspected(a_zstd_frame(1, 20, b"\x07"), "a.zst")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("calls", [1, 2])
def test_an_inspection_ends_when_it_is_to_stop(file: File, name: str, calls: int) -> None:
    file.inspected(WHOLE[name])
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= calls

    with pytest.raises(StoppedError):
        inspect(file.fd, len(WHOLE[name]), name.encode(), full=True, should_stop=should_stop)
    assert asked == calls


def test_hashing_ends_when_it_is_to_stop(file: File) -> None:
    file.inspected(TEXT)
    with pytest.raises(StoppedError):
        digest_of(file.fd, len(TEXT), "sha256", lambda: True)


@pytest.mark.parametrize("name", ["r.gz", "r.zst", "r.zip", "r.tar"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WHOLE[name])
    fd = os.open(path, os.O_WRONLY)  # each read fails
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            inspect(fd, len(WHOLE[name]), name.encode(), full=True, should_stop=lambda: False)
    finally:
        os.close(fd)
