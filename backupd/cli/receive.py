"""`backupd receive`: the reference receiver."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from backupd.core.errors import ConfigError, UsageError


def receive(
    store: Annotated[Path, typer.Option(help="The folder to store archives in.")],
    cert: Annotated[Path, typer.Option(help="The receiver's certificate, PEM.", readable=False)],
    key: Annotated[Path, typer.Option(help="The key of the certificate, PEM.", readable=False)],
    client_ca: Annotated[
        Path, typer.Option(help="The CA that issues the client certificates, PEM.", readable=False)
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(metavar="NUMBER", min=0, max=65535, help="The port to listen on; 0 chooses a free one."),
    ] = 8443,
) -> None:
    """Run the reference receiver until SIGTERM or SIGINT.

    It stores the archives that clients upload, and refuses clients without a certificate of the client CA.
    """
    require_receiver()
    for option, file in (("--cert", cert), ("--key", key), ("--client-ca", client_ca)):
        _require_readable(option, file)
    from backupd.receiver.serve import ServerTls, serve  # noqa: PLC0415 -- needs the extra `receiver`

    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # stop gracefully and exit with 0, as for SIGINT
    serve(
        store,
        ServerTls(cert, key, client_ca),
        host=host,
        port=port,
        ready=lambda url: typer.echo(f"receiving at {url}, storing in {store}"),
    )


def require_receiver() -> None:
    """Raise UsageError with the command to install the extra `receiver` if it is missing."""
    try:
        import fastapi  # noqa: F401, PLC0415
        import multipart  # type: ignore[import-untyped]  # noqa: F401, PLC0415
        import trustme  # noqa: F401, PLC0415
        import uvicorn  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(
            f"this command needs the extra `receiver` ({error})", "pip install 'backupd[receiver]'"
        ) from error


def _require_readable(option: str, file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(
            f"{option}: {file} can't be read ({error.strerror})",
            "give a PEM file; `backupd demo` creates a throw-away set to try with",
        ) from error
