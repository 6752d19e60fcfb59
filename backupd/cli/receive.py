"""`backupd receive`: the reference receiver."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backupd.core.errors import UsageError


def receive(
    store: Annotated[Path, typer.Option(help="The folder to store archives in.")],
    cert: Annotated[Path, typer.Option(help="The receiver's certificate, PEM.")],
    key: Annotated[Path, typer.Option(help="Its key, PEM.")],
    client_ca: Annotated[Path, typer.Option(help="The CA whose clients are let in, PEM.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8443,
) -> None:
    """Run the reference receiver: stores what clients with a certificate upload, until SIGTERM or SIGINT."""
    require_receiver()
    from backupd.receiver.serve import ServerTls, serve  # noqa: PLC0415

    serve(
        store,
        ServerTls(cert, key, client_ca),
        host=host,
        port=port,
        ready=lambda url: typer.echo(f"receiving at {url}, storing in {store}"),
    )


def require_receiver() -> None:
    """Raise UsageError with the remedy where the extra `receiver` is not installed."""
    try:
        import fastapi  # noqa: F401, PLC0415
        import trustme  # noqa: F401, PLC0415
        import uvicorn  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(
            f"this command needs the extra `receiver` ({error})", "pip install 'backupd[receiver]'"
        ) from error
