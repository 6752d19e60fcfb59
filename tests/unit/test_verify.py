"""Verification of a receipt."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.model import Deferred, Delivered, Digest, Outcome, Receipt
from backupd.core.policy import Reason
from backupd.core.verify import ReceiptExpectation, matches, verify_receipt
from tests.factories import a_digest

SENT = a_digest(b"abc")
RAW = bytes.fromhex(SENT.hex)
B64 = base64.b64encode(RAW).decode()
OTHER = a_digest(b"abd")
SPECIAL = Digest("sha256", ("fb" * 32))  # base64 of it has + and /


def verified(receipt: Receipt, expected: ReceiptExpectation = ReceiptExpectation()) -> Outcome:  # noqa: B008 -- frozen
    return verify_receipt(SENT, 3, receipt, expected)


def reason(outcome: Outcome) -> Reason:
    assert isinstance(outcome, Deferred)
    return outcome.reason


def test_a_receipt_with_the_digest_and_size_that_were_sent_is_a_delivery() -> None:
    receipt = Receipt(201, SENT.hex, 3)
    assert verified(receipt) == Delivered(SENT, receipt, verified=True)


def test_a_receipt_need_not_state_the_size() -> None:
    assert isinstance(verified(Receipt(200, SENT.hex)), Delivered)


def test_another_digest_is_no_delivery() -> None:
    outcome = verified(Receipt(200, OTHER.hex, 3))
    assert reason(outcome) is Reason.MISMATCH
    assert isinstance(outcome, Deferred)
    assert outcome.http_status == 200
    assert OTHER.hex in outcome.error


def test_another_size_is_no_delivery_even_if_no_digest_is_required() -> None:
    for expected in (ReceiptExpectation(), ReceiptExpectation(required=False)):
        assert reason(verified(Receipt(201, SENT.hex, 4), expected)) is Reason.MISMATCH


def test_a_response_without_a_digest_is_no_delivery() -> None:
    assert reason(verified(Receipt(204))) is Reason.UNVERIFIED


def test_without_a_required_receipt_the_delivery_is_not_verified() -> None:
    receipt = Receipt(204)
    assert verified(receipt, ReceiptExpectation(required=False)) == Delivered(SENT, receipt, verified=False)


def test_a_long_wrong_digest_is_cut_in_the_error() -> None:
    outcome = verified(Receipt(200, "\n" * 10_000))
    assert isinstance(outcome, Deferred)
    assert len(outcome.error) < 1000
    assert outcome.error.isprintable()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (SENT.hex, ReceiptExpectation()),
        (f"  {SENT.hex.upper()}\n", ReceiptExpectation()),
        (f"sha256:{SENT.hex}", ReceiptExpectation()),
        (f"SHA-256: {SENT.hex}", ReceiptExpectation()),
        (SENT.hex[:16], ReceiptExpectation(prefix=16)),
        (f"sha256:{SENT.hex[:16]}", ReceiptExpectation(prefix=16)),
        (B64, ReceiptExpectation(encoding="base64")),
        (B64.rstrip("="), ReceiptExpectation(encoding="base64")),
        (f"sha256:{B64}", ReceiptExpectation(encoding="base64")),
        (B64[:12], ReceiptExpectation(encoding="base64", prefix=12)),
        (base64.urlsafe_b64encode(RAW).decode(), ReceiptExpectation(encoding="base64url")),
        (f"sha-256=:{B64}:", ReceiptExpectation(encoding="base64")),
        (f"sha-256=:{B64}:", ReceiptExpectation()),
        (f"md5=:kAFQmDzST7DWlj99KOF/cg==:, sha-256=:{B64}:", ReceiptExpectation()),
        (f"SHA-256={B64}", ReceiptExpectation()),  # RFC 3230
        (f"unixsum=30637,sha-256={B64}", ReceiptExpectation(encoding="base64")),
        (f"sha256={SENT.hex}", ReceiptExpectation()),
        (f"sha256={SENT.hex}", ReceiptExpectation(encoding="base64")),
        (f"sha256-{B64}", ReceiptExpectation()),  # Subresource Integrity
        (f"crc32c=AAAAAA==,sha256={B64}", ReceiptExpectation()),  # as in x-goog-hash
        (":".join(SENT.hex[i : i + 2] for i in range(0, 64, 2)).upper(), ReceiptExpectation()),
        (f'W/"{SENT.hex}"', ReceiptExpectation()),
        (f'"{SENT.hex}-gzip"', ReceiptExpectation()),
        (f'W/"{SENT.hex};br"', ReceiptExpectation()),
        (f"sha-256=:{B64}:;q=1", ReceiptExpectation()),
        (f"{SENT.hex}:gzip", ReceiptExpectation()),
        (f"sha256:{B64.translate(str.maketrans('+/', '-_')).rstrip('=')}", ReceiptExpectation()),
        (f"{SENT.hex}, {SENT.hex.upper()}", ReceiptExpectation()),  # a header field that is given twice
        (f'"{SENT.hex[:16]}"', ReceiptExpectation(prefix=16)),
    ],
)
def test_each_spelling_of_the_digest_matches(stated: str, expected: ReceiptExpectation) -> None:
    assert matches(SENT, stated, expected)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("", ReceiptExpectation()),
        ("", ReceiptExpectation(prefix=8)),
        (SENT.hex[:16], ReceiptExpectation()),
        (SENT.hex, ReceiptExpectation(prefix=16)),
        (SENT.hex + "00", ReceiptExpectation()),
        (f"sha512:{SENT.hex}", ReceiptExpectation()),
        (f"md5:{SENT.hex}", ReceiptExpectation()),
        (f":{SENT.hex}", ReceiptExpectation()),
        (B64, ReceiptExpectation()),
        (B64.swapcase(), ReceiptExpectation(encoding="base64")),
        (SENT.hex, ReceiptExpectation(encoding="base64")),
        (f"sha-512=:{B64}:", ReceiptExpectation()),
        (f"sha-256=:{base64.b64encode(bytes(32)).decode()}:", ReceiptExpectation()),
        (f"{SENT.hex}, {OTHER.hex}", ReceiptExpectation()),
        (f"{SENT.hex}, MISMATCH", ReceiptExpectation()),
        (f"{SENT.hex[:-1]}, {SENT.hex}", ReceiptExpectation()),
        (f"sha256={SENT.hex}, sha256=none", ReceiptExpectation()),
        (f"sha256={SENT.hex}, sha256={OTHER.hex}", ReceiptExpectation()),
        (f"SHA-256={base64.b64encode(bytes(32)).decode()}", ReceiptExpectation()),
        (f"sha256-{SENT.hex}00", ReceiptExpectation()),
        (f'"{SENT.hex}-3"', ReceiptExpectation()),  # of a multipart upload to S3: no digest of the content
        (SENT.hex[0] + ":" + SENT.hex[1:], ReceiptExpectation()),
    ],
)
def test_other_values_do_not_match(stated: str, expected: ReceiptExpectation) -> None:
    assert not matches(SENT, stated, expected)


def test_the_two_alphabets_of_base64_are_distinguished() -> None:
    raw = bytes.fromhex(SPECIAL.hex)
    standard, url_safe = base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()
    assert matches(SPECIAL, standard, ReceiptExpectation(encoding="base64"))
    assert not matches(SPECIAL, url_safe, ReceiptExpectation(encoding="base64"))
    assert matches(SPECIAL, url_safe, ReceiptExpectation(encoding="base64url"))


@given(st.text(), st.sampled_from(["hex", "base64", "base64url"]), st.sampled_from([0, 8, 16]))
def test_no_text_without_the_digest_matches(stated: str, encoding: str, prefix: int) -> None:
    assert not matches(SENT, stated, ReceiptExpectation(encoding=encoding, prefix=prefix))


@given(
    st.binary(),
    st.sampled_from(["sha256", "sha512", "sha1", "md5"]),
    st.sampled_from(["hex", "base64", "base64url"]),
)
def test_every_digest_matches_itself_and_no_other(content: bytes, algorithm: str, encoding: str) -> None:
    sent, other = a_digest(content, algorithm), a_digest(content + b"x", algorithm)

    def stated(digest: Digest) -> str:
        if encoding == "hex":
            return digest.hex
        encode = base64.b64encode if encoding == "base64" else base64.urlsafe_b64encode
        return encode(bytes.fromhex(digest.hex)).decode()

    assert matches(sent, stated(sent), ReceiptExpectation(encoding=encoding))
    assert not matches(sent, stated(other), ReceiptExpectation(encoding=encoding))


def test_a_digest_in_quotes_as_in_an_etag_matches() -> None:
    digest = Digest("md5", "9e107d9d372bb6826bd81d3542a419d6")
    assert matches(digest, '"9e107d9d372bb6826bd81d3542a419d6"', ReceiptExpectation())


@pytest.mark.parametrize(
    "stated", ["", "stored", SENT.hex[:16], f"{SENT.hex}-3", f"md5:{SENT.hex[:32]}", B64, "sha256:"]
)
def test_a_value_that_is_no_digest_in_the_configured_form_is_described_as_such(stated: str) -> None:
    outcome = verified(Receipt(200, stated))
    assert reason(outcome) is Reason.UNVERIFIED
    assert isinstance(outcome, Deferred)
    assert "no hex sha256: see `receipt.encoding`" in outcome.error


def test_a_size_that_has_to_be_stated_is_required_with_and_without_a_digest() -> None:
    for required in (True, False):
        expected = ReceiptExpectation(required, size_required=True)
        assert reason(verified(Receipt(201, SENT.hex), expected)) is Reason.UNVERIFIED
        assert isinstance(verified(Receipt(201, SENT.hex, 3), expected), Delivered)
