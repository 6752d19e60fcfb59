"""The HTTP side of the reference receiver: one upload endpoint, its look-up, and a health check."""

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
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from backupd.receiver.incoming import Incoming, StoreFullError
from backupd.receiver.multipart import MAX_FIELD_BYTES, FormReader, MalformedFormError
from backupd.receiver.store import Arrival, DigestMismatchError, KeyReusedError, Store, Stored

DEFAULT_PATH = "/v1/upload"
BATCH_BYTES = 1024 * 1024
"""File data handed to a thread at a time; smaller archives need one hand-over in all."""
BATCH_PIECES = 64
MAX_KEY_LENGTH = 255


class UnsupportedTypeError(Exception):
    """The body isn't multipart/form-data."""


class TooLargeError(Exception):
    """The archive is larger than this receiver takes."""


_STATUS_OF = {
    MalformedFormError: 400,
    ClientDisconnect: 400,  # nobody is there to read it
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
    """Return the receiver as an ASGI application; raise ConfigError when the store can't be opened.

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
        app.add_exception_handler(error, partial(_refused, status))
    app.add_exception_handler(HTTPException, _http_refused)
    app.add_exception_handler(Exception, _broken)
    return app


@dataclass(frozen=True, slots=True)
class _Endpoint:
    store: Store
    file_field: str
    digest_field: str
    max_size: int | None

    async def upload(self, request: Request) -> Response:
        """Take one archive; answer when it is safe on the disk."""
        form = FormReader(_boundary(request), self.file_field)
        key = _idempotency_key(request)
        self._refuse_large_body(request)
        incoming = self.store.incoming()
        try:
            await self._receive(request, form, incoming)
            stored = await run_sync(self._finish, form, incoming, key)
        except BaseException:
            # Shielded: a client that has gone, or a receiver that stops, may leave nothing behind.
            with anyio.CancelScope(shield=True):
                await run_sync(incoming.discard)
            raise
        return JSONResponse(asdict(stored.receipt), 201 if stored.new else 200)

    async def receipt(self, sha256: str) -> Response:
        """Tell whether an archive with this digest is stored."""
        found = await run_sync(self.store.find, sha256.lower())
        if found is None:
            return _problem(404, "no archive with this digest is stored")
        return JSONResponse(asdict(found))

    async def _receive(self, request: Request, form: FormReader, incoming: Incoming) -> None:
        """Read the whole body; write full batches in a thread while the next one comes in."""
        writing: asyncio.Task[None] | None = None
        try:
            async for chunk in request.stream():
                form.feed(chunk)
                self._refuse_large(form.file_size)
                if form.pending_size >= BATCH_BYTES or form.pending_pieces >= BATCH_PIECES:
                    if writing:
                        await writing
                    writing = asyncio.create_task(run_sync(incoming.write, form.take_file_data()))
        finally:
            if writing:
                await writing

    def _finish(self, form: FormReader, incoming: Incoming, key: str | None) -> Stored:
        name = form.finish()
        incoming.write(form.take_file_data())
        stated = form.fields.get(self.digest_field) if self.digest_field else None
        if stated is not None and stated.strip().lower() != incoming.sha256:
            raise DigestMismatchError(
                f"{self.digest_field} says {stated[:64]!r}, "
                f"but the {incoming.size} bytes that arrived have {incoming.sha256}"
            )
        stored = self.store.keep(Arrival(incoming, name, key, form.fields))
        incoming.discard()
        return stored

    def _refuse_large(self, size: int) -> None:
        if self.max_size is not None and size > self.max_size:
            raise TooLargeError(f"archives may have {self.max_size} bytes")

    def _refuse_large_body(self, request: Request) -> None:
        """Refuse by Content-Length what can't be taken, before any of it is read."""
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            self._refuse_large(int(length) - 2 * MAX_FIELD_BYTES)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise UnsupportedTypeError("the body must be multipart/form-data")
    if not options.get(b"boundary"):
        raise MalformedFormError("the Content-Type states no boundary")
    return options[b"boundary"]


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
        raise MalformedFormError(f"an Idempotency-Key has 1 to {MAX_KEY_LENGTH} characters")
    return key


async def _healthy() -> Response:
    return Response(status_code=200)


def _problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as RFC 9457 has it."""
    problem = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(problem, status, headers, media_type="application/problem+json")


async def _refused(status: int, _: Request, error: Exception) -> Response:
    return _problem(status, str(error) or (type(error).__doc__ or ""))


async def _http_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - for mypy: it is registered for nothing else
    return _problem(error.status_code, error.detail, error.headers)


async def _broken(_: Request, _error: Exception) -> Response:
    return _problem(500, "the receiver has failed; its log says why")
