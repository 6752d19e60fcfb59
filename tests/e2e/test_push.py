"""`backupd push` on a terminal and in scripts: bars, results, and their amount."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.scripted import Peer, ScriptedServer, receipt_for, server_context
from tests.stage import Stage
from tests.terminal import CTRL_C, Terminal


def some_files(stage: Stage, *names: str, size: int = 300) -> list[Path]:
    files = [stage.base / name for name in names]
    for file in files:
        file.write_bytes(os.urandom(size))
    return files


def digest_of(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_the_results_of_three_files_are_whole_lines_below_their_bars_at_80_columns(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    files = some_files(stage, "a.cfg", "b.cfg", f"core-switch-{'x' * 60}.tar.gz")
    with Terminal(stage, ["push", *map(str, files)]) as terminal:
        assert terminal.wait() == 0
        bars, below = terminal.display[:3], [line for line in terminal.display[3:] if line]

    for bar, name in zip(bars, ("a.cfg → vault", "b.cfg → vault", "core-switc…"), strict=True):
        assert bar.startswith(name)
        assert "━" * 14 in bar  # a small file ends with a full bar, too
        assert "300 B/300 B" in bar
    assert bars[2].split(" ━")[0].rstrip().endswith(".gz → vault")
    assert below[:4] == [
        "a.cfg → vault: delivered",
        f"  {digest_of(files[0])}",
        "b.cfg → vault: delivered",
        f"  {digest_of(files[1])}",
    ]
    assert below[-1] == f"  {digest_of(files[2])}"


def test_only_the_latest_bars_are_shown(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    files = some_files(stage, *(f"sw-{number:02}.cfg" for number in range(12)))
    with Terminal(stage, ["push", *map(str, files)], lines=60) as terminal:
        assert terminal.wait() == 0
        bars = [line.split(" ")[0] for line in terminal.display if "━" in line]
    assert bars == [file.name for file in files[2:]]


def test_results_go_to_standard_output_while_the_bars_are_on_a_terminal(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    [file] = some_files(stage, "a.cfg")
    with (stage.base / "out").open("w+b") as out:
        with Terminal(stage, ["push", str(file)], stdout=out.fileno()) as terminal:
            assert terminal.wait() == 0
        out.seek(0)
        assert out.read().decode() == f"a.cfg → vault: delivered, {digest_of(file)}\n"
    assert "delivered" not in terminal.text


def test_ctrl_c_prints_the_results_so_far(stage: Stage) -> None:
    def stores_the_first(peer: Peer) -> None:
        request = peer.read_request()
        if b"first.cfg" not in request.body:
            peer.pause()
        peer.send(receipt_for(request.archive))

    files = some_files(stage, "first.cfg", "second.cfg")
    with ScriptedServer(stores_the_first, server_context(stage.pki)) as server:
        stage.configure(server.url)
        with Terminal(stage, ["push", *map(str, files)]) as terminal:
            terminal.until(server.paused.is_set, "the second upload")
            terminal.press(CTRL_C)
            assert terminal.wait() == 130
            assert "first.cfg → vault: delivered" in terminal.display
            assert f"  {digest_of(files[0])}" in terminal.display


@pytest.mark.long
def test_quiet_prints_failures_only(stage: Stage) -> None:
    def refuses_one(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            is_bad = b"bad.cfg" in request.body
            peer.send(receipt_for(request.archive, 422 if is_bad else 201))

    files = some_files(stage, "good.cfg", "bad.cfg")
    with ScriptedServer(refuses_one, server_context(stage.pki)) as server:
        stage.configure(server.url)
        done = stage.backupd("push", "-q", *map(str, files))
        with Terminal(stage, ["push", "-q", *map(str, files)]) as terminal:
            assert terminal.wait() == 3
    assert done.returncode == 3
    assert [line.split(" → ")[0] for line in done.stdout.splitlines() if " → " in line] == ["bad.cfg"]
    assert "━" not in terminal.text


@pytest.mark.long
def test_verbose_prints_the_connection_the_duration_and_the_response(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    [file] = some_files(stage, "a.cfg", size=3000)
    lines = stage.backupd("push", "-v", str(file)).stdout.splitlines()

    assert lines[0] == f"a.cfg → vault: delivered, {digest_of(file)}"
    facts = {line[2:12].rstrip(): line[13:] for line in lines[1:]}
    assert facts["url"] == receiver.url
    assert facts["connection"].startswith(("127.0.0.1", "[::1]", "::1"))
    assert facts["connection"].endswith("TLSv1.3")
    assert facts["status"] in ("200", "201")
    assert facts["sent"].startswith("2.9 KiB in ")
    assert facts["receipt"] == "its digest matches"
    assert digest_of(file).partition(":")[2] in facts["response"]


def test_quiet_and_verbose_contradict_each_other(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    [file] = some_files(stage, "a.cfg")
    done = stage.backupd("push", "-q", "-v", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert "contradict" in done.stderr
