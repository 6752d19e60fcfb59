"""`backupd demo`: deliver two archives from a drop folder to a receiver, all in one temporary folder."""

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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from backupd.cli.receive import require_receiver
from backupd.core.errors import BackupdError

_TIMEOUT = 120.0
"""Seconds for the start of the daemon, and again for the delivery of the archives."""

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
    """The archives were not delivered."""

    exit_code = 69


def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep running for files of your own, until Ctrl-C.")
    ] = False,
) -> None:
    """Deliver two sample archives, with a throw-away CA, a receiver, a drop folder and a daemon.

    All files are in one new temporary folder, which is kept.
    """
    require_receiver()
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run the `finally` that stops the daemon
        base = Path(tempfile.mkdtemp(prefix="backupd-demo-"))
        typer.echo(f"everything below is in {base}\n")
        _run(base, keep=keep)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DemoError(
            f"the demo can't run here: {where}{error.strerror or error}",
            "it needs space and write permission in the temporary folder; $TMPDIR sets another one",
        ) from error
    if not keep:
        typer.echo("\nThe folder is kept for inspection; remove it at any time.")


def _run(base: Path, *, keep: bool) -> None:
    from backupd.receiver.serve import RunningReceiver, ServerTls  # noqa: PLC0415 -- extra `receiver`

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
            _print_deliveries(base)
            if keep:
                _wait_for_interrupt(base, daemon)
        finally:
            _stop(daemon)


def _log_format() -> str:
    return "console" if sys.stdout.isatty() else "json"


def _make_certificates(folder: Path) -> None:
    import trustme  # noqa: PLC0415 -- extra `receiver`

    folder.mkdir(mode=0o700)
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    end = datetime.now(UTC) + timedelta(days=365)
    for name, certificate in (
        ("server", ca.issue_cert("localhost", "127.0.0.1", not_after=end)),
        ("client", ca.issue_cert("demo.backupd.invalid", not_after=end)),
    ):
        (folder / f"{name}.pem").write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
        key = folder / f"{name}.key"
        key.touch(mode=0o600)
        key.write_bytes(certificate.private_key_pem.bytes())


def _start_daemon(config: Path) -> subprocess.Popen[str]:
    """Start the daemon and print its log lines; return once it is ready."""
    command = [sys.executable, "-m", "backupd", "run", "--config", str(config)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BACKUPD_")}
    if sys.stdout.isatty():  # the daemon writes to a pipe
        environment["FORCE_COLOR"] = "1"
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603 -- this program
    ready = threading.Event()

    def copy_log() -> None:
        for line in daemon.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            if "daemon.ready" in line:
                ready.set()
        ready.set()

    threading.Thread(target=copy_log, name="log", daemon=True).start()
    if not ready.wait(_TIMEOUT) or daemon.poll() is not None:
        _stop(daemon)
        raise DemoError("the daemon did not start", "see its log lines above")
    return daemon


def _drop_samples(drop: Path) -> None:
    """Write two archives under temporary names and rename them, as many copy tools do."""
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
    deadline = time.monotonic() + _TIMEOUT
    while len(list(sent.glob("*.receipt.json"))) < 2:
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise DemoError("the archives were not delivered", "see the log lines above")
        time.sleep(0.05)


def _print_deliveries(base: Path) -> None:
    stored = {_sha256(path): path for path in (base / "stored").rglob("*") if path.is_file()}
    for receipt in sorted((base / "drop" / "sent").glob("*.receipt.json")):
        fields = json.loads(receipt.read_text("utf-8"))
        digest = fields["digest"].partition(":")[2]
        if digest not in stored:
            raise DemoError(f"{fields['archive']}: the receiver holds no file with the digest {digest}")
        typer.echo(f"\n{fields['archive']}")
        typer.echo(f"  moved to   {receipt.parent / fields['archive']}")
        typer.echo(f"  receipt    {receipt}")
        typer.echo(f"  stored as  {stored[digest]}")
        typer.echo(f"  sha256 in the receipt\n    {digest}")
        typer.echo(f"  sha256 of the stored file, identical\n    {_sha256(stored[digest])}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _wait_for_interrupt(base: Path, daemon: subprocess.Popen[str]) -> None:
    typer.echo(f"\nDrop files into {base / 'drop'} to deliver them; Ctrl-C stops the demo.")
    typer.echo(f"In another terminal: backupd status --config {base / 'backupd.toml'}")
    try:
        daemon.wait()
    except KeyboardInterrupt:
        typer.echo("")


def _stop(daemon: subprocess.Popen[str]) -> None:
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
    daemon.wait()
