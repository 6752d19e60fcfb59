"""`backupd demo`: receiver, throw-away CA, drop folder and daemon in one; two archives go through."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from backupd.cli.receive import require_receiver
from backupd.core.errors import BackupdError

_PATIENCE = 120.0
"""Seconds that the archives get to go through."""

_CONFIG = """\
state_dir = "{base}/state"
log.format = "{log_format}"

[drop.switches]
path = "{base}/drop"
stable_for = "0.5s"

[destination.vault]
url = "{url}"
ca = "{pki}/ca.pem"
cert = "{pki}/client.pem"
key = "{pki}/client.key"
"""


class DemoError(BackupdError):
    """The archives did not go through."""

    exit_code = 69


def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Stay up for files of your own, until Ctrl-C; nothing is removed.")
    ] = False,
) -> None:
    """Show an archive going through: receiver, throw-away CA, drop folder and daemon, all in one folder."""
    require_receiver()
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemon is stopped, too
        base = Path(tempfile.mkdtemp(prefix="backupd-demo-"))
        typer.echo(f"everything below is in {base}\n")
        _play(base, keep=keep)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DemoError(
            f"the demo can't run here: {where}{error.strerror or error}",
            "it needs room and write permission in the temporary folder; $TMPDIR names another one",
        ) from error
    if not keep:
        typer.echo("\nThe folder is left for you to look at; remove it when you like.")


def _play(base: Path, *, keep: bool) -> None:
    from backupd.receiver.serve import RunningReceiver, ServerTls  # noqa: PLC0415

    pki = base / "pki"
    _make_certificates(pki)
    (base / "drop").mkdir()
    tls = ServerTls(pki / "server.pem", pki / "server.key", pki / "ca.pem")
    with RunningReceiver(base / "stored", tls) as receiver:
        config = base / "backupd.toml"
        config.write_text(
            _CONFIG.format(base=base, url=receiver.url, pki=pki, log_format=_log_format()), encoding="utf-8"
        )
        daemon = _start_daemon(config)
        try:
            _drop_samples(base / "drop")
            _wait_for_receipts(base / "drop" / "sent", daemon)
            _tell(base)
            if keep:
                _stay(base, daemon)
        finally:
            _stop(daemon)


def _log_format() -> str:
    return "console" if sys.stdout.isatty() else "json"


def _make_certificates(folder: Path) -> None:
    import trustme  # noqa: PLC0415

    folder.mkdir(mode=0o700)
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name, certificate in (
        ("server", ca.issue_cert("localhost", "127.0.0.1")),
        ("client", ca.issue_cert("demo.backupd.invalid")),
    ):
        (folder / f"{name}.pem").write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
        key = folder / f"{name}.key"
        key.touch(mode=0o600)
        key.write_bytes(certificate.private_key_pem.bytes())


def _start_daemon(config: Path) -> subprocess.Popen[str]:
    """Start the daemon and show its log lines as they come; return once it is ready."""
    command = [sys.executable, "-m", "backupd", "run", "--config", str(config)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BACKUPD_")}
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603 -- ourselves
    ready = threading.Event()

    def show() -> None:
        for line in daemon.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            if "daemon.ready" in line:
                ready.set()
        ready.set()

    threading.Thread(target=show, name="show", daemon=True).start()
    if not ready.wait(_PATIENCE) or daemon.poll() is not None:
        _stop(daemon)
        raise DemoError("the daemon did not start", "its words are above")
    return daemon


def _drop_samples(drop: Path) -> None:
    """Write one archive in pieces, as a device does, and rename the other one in, as scp tools do."""
    for name, content in (
        ("core-switch-1.tar.gz", "hostname core-switch-1\nvlan 10\n name servers\n"),
        ("firewall-edge.tar.gz", "hostname firewall-edge\naccess-list 100 deny ip any any\n"),
    ):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            member = tarfile.TarInfo("running-config")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
        part = drop / f"{name}.part"
        part.write_bytes(packed.getvalue())
        part.rename(drop / name)


def _wait_for_receipts(sent: Path, daemon: subprocess.Popen[str]) -> None:
    until = time.monotonic() + _PATIENCE
    while len(list(sent.glob("*.receipt.json"))) < 2:
        if daemon.poll() is not None or time.monotonic() > until:
            raise DemoError("the archives did not go through", "the log lines above say why")
        time.sleep(0.05)


def _tell(base: Path) -> None:
    stored = {_sha256(path): path for path in (base / "stored").rglob("*") if path.is_file()}
    for receipt in sorted((base / "drop" / "sent").glob("*.receipt.json")):
        record = json.loads(receipt.read_text("utf-8"))
        digest = record["digest"].partition(":")[2]
        if digest not in stored:
            raise DemoError(f"{record['archive']}: the receiver holds no file with the digest {digest}")
        typer.echo(f"\n{record['archive']}")
        typer.echo(f"  moved to   {receipt.parent / record['archive']}")
        typer.echo(f"  receipt    {receipt}")
        typer.echo(f"  stored as  {stored[digest]}")
        typer.echo(f"  sha256     {digest}  (receipt)")
        typer.echo(f"  sha256     {_sha256(stored[digest])}  (of what the receiver stored: the same)")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stay(base: Path, daemon: subprocess.Popen[str]) -> None:
    typer.echo(f"\nDrop files into {base / 'drop'} and watch; Ctrl-C ends it.")
    try:
        daemon.wait()
    except KeyboardInterrupt:
        typer.echo("")


def _stop(daemon: subprocess.Popen[str]) -> None:
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
    daemon.wait()
