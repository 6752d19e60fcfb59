"""The HTTP interface of the reference receiver: uploads, queries by digest, and a health check."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path

import anyio
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from multipart import parse_options_header  # type: ignore[import-untyped]
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from backupd.receiver.form import MAX_FIELD_BYTES, FormReader, MalformedFormError
from backupd.receiver.incoming import Incoming, StoreFullError
from backupd.receiver.store import DigestMismatchError, KeyReusedError, Store, Stored

DEFAULT_PATH = "/v1/upload"
BATCH_BYTES = 1024 * 1024
"""Bytes of file data that are passed to a writing thread at once; smaller archives are passed as a whole."""
MAX_KEY_LENGTH = 255


class UnsupportedTypeError(Exception):
    """The body is not multipart/form-data."""


class TooLargeError(Exception):
    """The archive is larger than this receiver accepts."""


_STATUS_OF = {
    MalformedFormError: 400,
    ClientDisconnect: 400,  # the client does not receive this response
    KeyReusedError: 409,
    TooLargeError: 413,
    UnsupportedTypeError: 415,
    DigestMismatchError: 422,
    StoreFullError: 507,
}


def create_app(
    store_dir: Path,
    *,
    path: str = DEFAULT_PATH,
    file_field: str = "file",
    digest_field: str = "sha256",
    max_size: int | None = None,
) -> FastAPI:
    """Return the receiver as an ASGI application; raise ConfigError if the store can't be opened.

    `max_size` is in bytes. The store stays open until the application's shutdown.
    """
    store = Store(store_dir)
    endpoint = _Endpoint(store, file_field, digest_field, max_size)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    app = FastAPI(title="backupd reference receiver", lifespan=lifespan, openapi_url=None)
    app.state.store = store
    app.add_api_route(path, endpoint.upload, methods=["POST"], response_model=None)
    app.add_api_route(path + "/{sha256}", endpoint.receipt, methods=["GET"], response_model=None)
    app.add_api_route("/healthz", _healthy, methods=["GET"], response_model=None)
    for error, status in _STATUS_OF.items():
        app.add_exception_handler(error, partial(_problem_of_error, status))
    app.add_exception_handler(HTTPException, _problem_of_http_error)
    app.add_exception_handler(Exception, _problem_of_bug)
    return app


@dataclass(frozen=True, slots=True)
class _Endpoint:
    store: Store
    file_field: str
    digest_field: str
    max_size: int | None

    async def upload(self, request: Request) -> Response:
        """Store one archive; respond once it is synced to disk."""
        form = FormReader(_boundary(request), self.file_field)
        key = _idempotency_key(request)
        self._refuse_large_body(request)
        incoming = self.store.incoming()
        try:
            await self._receive(request, form, incoming)
            stored = await run_sync(self._finish, form, incoming, key)
        except BaseException:
            # Shielded, so that a disconnect or a stop of the receiver leaves no temporary file.
            with anyio.CancelScope(shield=True):
                await run_sync(incoming.discard)
            raise
        return JSONResponse(asdict(stored.receipt), 201 if stored.new else 200)

    async def receipt(self, sha256: str) -> Response:
        """Return the receipt of a stored archive with this digest, or 404."""
        found = await run_sync(self.store.find, sha256.lower())
        if found is None:
            return _problem(404, "no archive with this digest is stored")
        return JSONResponse(asdict(found))

    async def _receive(self, request: Request, form: FormReader, incoming: Incoming) -> None:
        """Read the whole body; write each full batch in a thread while the next one is received."""
        writing: asyncio.Task[None] | None = None
        try:
            async for chunk in request.stream():
                form.feed(chunk)
                self._refuse_large(form.file_size)
                if form.pending_size >= BATCH_BYTES:
                    if writing:
                        await writing
                    writing = asyncio.create_task(run_sync(incoming.write, form.pop_file_data()))
        finally:
            if writing:
                await writing

    def _finish(self, form: FormReader, incoming: Incoming, key: str | None) -> Stored:
        name = form.finish()
        incoming.write(form.pop_file_data())
        stated = form.fields.get(self.digest_field) if self.digest_field else None
        if stated is not None and stated.strip().lower() != incoming.sha256:
            raise DigestMismatchError(
                f"{self.digest_field} is {stated[:64]!r}, "
                f"but the {incoming.size} received bytes have the digest {incoming.sha256}"
            )
        stored = self.store.keep(incoming, name, key, form.fields)
        incoming.discard()
        return stored

    def _refuse_large(self, size: int) -> None:
        if self.max_size is not None and size > self.max_size:
            raise TooLargeError(f"archives may have at most {self.max_size} bytes")

    def _refuse_large_body(self, request: Request) -> None:
        """Refuse a body that is too large by its Content-Length, before it is read."""
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            self._refuse_large(int(length) - 2 * MAX_FIELD_BYTES)


def _boundary(request: Request) -> bytes:
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data":
        raise UnsupportedTypeError("the body must be multipart/form-data")
    boundary: str = parameters.get("boundary", "")
    if not boundary:
        raise MalformedFormError("the Content-Type has no boundary")
    return boundary.encode("latin-1")


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
        raise MalformedFormError(f"an Idempotency-Key has 1 to {MAX_KEY_LENGTH} characters")
    return key


async def _healthy() -> Response:
    return Response(status_code=200)


def _problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as `application/problem+json` (RFC 9457)."""
    problem = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(problem, status, headers, media_type="application/problem+json")


async def _problem_of_error(status: int, _: Request, error: Exception) -> Response:
    return _problem(status, str(error) or (type(error).__doc__ or ""))


async def _problem_of_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 -- for mypy; registered for this class only
    return _problem(error.status_code, error.detail, error.headers)


async def _problem_of_bug(_: Request, _error: Exception) -> Response:
    return _problem(500, "internal error; see the receiver's log")
