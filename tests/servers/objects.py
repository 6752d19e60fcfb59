"""An application that stores raw bodies under their paths and returns their digests in all usual forms."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from fastapi import FastAPI, Request, Response

app = FastAPI()
_store = Path(os.environ["STORE"])


@app.put("/{path:path}", response_model=None)
async def put(path: str, request: Request) -> Response:
    sha256, md5 = hashlib.sha256(), hashlib.md5()
    target = _store / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        async for piece in request.stream():
            sha256.update(piece)
            md5.update(piece)
            out.write(piece)
    repr_digest = f"sha-256=:{base64.b64encode(sha256.digest()).decode()}:"
    if request.headers.get("Repr-Digest", repr_digest) != repr_digest:
        target.unlink()
        return Response("the body does not match Repr-Digest", 422)
    return Response(
        f'{{"file": {{"checksum": "{sha256.hexdigest()[:16]}"}}}}',
        201,
        {
            "Repr-Digest": repr_digest,
            "X-Checksum-Sha256": sha256.hexdigest(),
            "Content-MD5": base64.b64encode(md5.digest()).decode(),
        },
    )
