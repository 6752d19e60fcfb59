"""Reading what a destination says it stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backupd.core.model import Receipt

MOST = 64 * 1024
"""Bytes of an answer that are read."""


def read_receipt(where: str, status: int, headers: Mapping[str, str], body: bytes) -> Receipt:
    """Return the receipt in an answer, its digest where `where` says.

    `where` is `body:/json/pointer` (RFC 6901), `header:Name` or `none`. What is not there is None.
    """
    kind, _, place = where.partition(":")
    stated: object = None
    if kind == "header":
        stated = headers.get(place)
    elif kind == "body":
        stated = _pointed(body, place)
    digest = stated[:1024] if isinstance(stated, str) else None
    return Receipt(status, digest, None, body[:4096].decode("utf-8", "backslashreplace"))


def _pointed(body: bytes, pointer: str) -> object:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isascii() and key.isdigit() and int(key[:9]) < len(value):
            value = value[int(key[:9])]
        else:
            return None
    return value
