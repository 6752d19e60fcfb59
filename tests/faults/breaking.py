"""A daemon with a bug: each answer is stumbled over, with the secret of its request at hand."""

from __future__ import annotations

from typing import Any, NoReturn

from backupd.cli import main
from backupd.upload.http.uploader import HttpUploader


def _judged(*request_and_answer: Any) -> NoReturn:
    response = request_and_answer[1]
    secret = response.request.headers["authorization"]
    raise TypeError(f"a bug near a secret of {len(secret)} characters")


if __name__ == "__main__":
    HttpUploader._judged = _judged  # type: ignore[method-assign,assignment]
    main()
