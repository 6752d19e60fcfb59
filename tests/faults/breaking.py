"""A daemon with a bug: evaluating a response raises an exception while a secret is within reach."""

from __future__ import annotations

from typing import NoReturn

import httpx

from backupd.cli import main
from backupd.core.model import Digest
from backupd.upload.http.response import ResponseEvaluator


def _evaluate_success(self: ResponseEvaluator, response: httpx.Response, sent: Digest, size: int) -> NoReturn:
    secret = response.request.headers["authorization"]
    raise TypeError(f"a bug near a secret of {len(secret)} characters")


if __name__ == "__main__":
    ResponseEvaluator.evaluate_success = _evaluate_success  # type: ignore[method-assign]
    main()
