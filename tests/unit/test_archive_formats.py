"""Following the structure of a tar, with its rarer headers."""

from __future__ import annotations

import pytest

from backupd.core.archive_formats import BLOCK, EMPTY, NO_TAR_END, TarError, TarWalk, is_tar_header

END = bytes(2 * BLOCK)


def a_header(kind: bytes = b"0", size: bytes = b"00000000000", *, sparse: bool = False) -> bytes:
    """Return a header with a valid checksum."""
    block = bytearray(BLOCK)
    block[:6], block[124 : 124 + len(size)], block[156:157] = b"r1.cfg", size, kind
    block[257:263] = b"ustar\0"
    block[482] = sparse
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def walked(content: bytes, step: int = 100) -> TarWalk:
    """Return the walk of a tar that was fed in pieces of `step` bytes."""
    walk = TarWalk()
    for at in range(0, len(content), step):
        walk.feed(content[at : at + step])
    walk.finish()
    return walk


DATA = bytes(range(1, 201)) + bytes(BLOCK - 200)


@pytest.mark.parametrize("size", [b"-0000001130", b"+0000001130", b"0_000001130"])
def test_a_size_with_a_sign_is_not_valid(size: bytes) -> None:
    with pytest.raises(TarError):  # a negative size would loop indefinitely
        walked(a_header(size=size) + END)


@pytest.mark.parametrize("step", [1, 100, 511, 512, 513, 1 << 20])
def test_members_are_counted_whatever_the_size_of_the_pieces(step: int) -> None:
    content = a_header(size=b"%011o" % 200) + DATA + a_header(b"5") + END
    assert walked(content, step).members == 2


VALID = {
    "a size in base 256": a_header(size=b"\x80" + (200).to_bytes(11, "big")) + DATA,
    "a size without digits": a_header(size=b""),
    "a sparse file with two more blocks of its map": (
        a_header(b"S", b"%011o" % 200, sparse=True) + bytes(504) + b"\1" + bytes(7) + bytes(BLOCK) + DATA
    ),
    "a sparse file with a short map": a_header(b"S", b"%011o" % 200) + DATA,
    "a link with data": a_header(b"1", b"%011o" % 200) + DATA + a_header(),
    "a link with a size and no data": a_header(b"1", b"%011o" % 200) + a_header(),
    "a long name": a_header(b"L", b"%011o" % 200) + DATA + a_header(),
    "pax records for all": a_header(b"g", b"%011o" % 200) + DATA + a_header(),
    "pax records without a size": a_header(b"x", b"%011o" % 200) + DATA + a_header(),
    "no pax records": a_header(b"x") + a_header(),
    "a size in a pax record": (
        a_header(b"x", b"%011o" % 12) + b"12 size=200\n" + bytes(500) + a_header(size=b"77777777777") + DATA
    ),
}


@pytest.mark.parametrize("content", VALID.values(), ids=VALID)
def test_data_after_a_header_is_not_read_as_a_header(content: bytes) -> None:
    assert walked(content + END).members in (1, 2)
    assert walked(content + END + b"whatever").ended


INVALID = {
    "a size that is not a number": (a_header(size=b"no number  ") + END, False),
    "a pax record that ends too early": (a_header(b"x", b"%011o" % (2 << 20)) + DATA, True),
    "no header where one should be": (a_header() + DATA + END, False),
    "a header that was changed": (b"x" + a_header()[1:] + END, False),
    "no end of a header": (a_header() + a_header()[:-1], True),
    "no end of a member": (a_header(size=b"%011o" % 513) + DATA, True),
    "no end of a sparse map": (a_header(b"S", sparse=True), True),
    "no member after its long name": (a_header(b"L", b"%011o" % 200) + DATA, True),
    "no member after its pax records": (a_header() + a_header(b"x", b"%011o" % 200) + DATA, True),
    "nothing": (b"", True),
}


@pytest.mark.parametrize(("content", "truncated"), INVALID.values(), ids=INVALID)
def test_an_invalid_tar_is_distinguished_from_a_truncated_one(content: bytes, truncated: bool) -> None:
    with pytest.raises(TarError) as refusal:
        walked(content)
    assert refusal.value.truncated == truncated


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (END, EMPTY),
        (a_header(), NO_TAR_END),
        (a_header(size=b"%011o" % 200) + DATA, NO_TAR_END),
        (a_header(b"g", b"%011o" % 200) + DATA + a_header(b"5"), NO_TAR_END),
    ],
)
def test_a_tar_without_members_or_closing_blocks_is_noted(content: bytes, reason: str) -> None:
    walk = TarWalk()
    walk.feed(content)
    note = walk.finish()
    assert note is not None
    assert note.reason == reason


def test_a_checksum_of_signed_bytes_is_valid() -> None:
    block = bytearray(a_header())
    block[0] = 200
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) - 256)
    assert is_tar_header(bytes(block))


@pytest.mark.parametrize("block", [b"", bytes(BLOCK), b"x" * BLOCK, a_header()[:-1], DATA])
def test_other_blocks_are_not_headers(block: bytes) -> None:
    assert not is_tar_header(block)
