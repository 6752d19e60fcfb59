"""The help of each command is laid out for the width of the terminal."""

from __future__ import annotations

import itertools

import pytest
import typer

from backupd.cli.app import app
from tests.stage import Stage
from tests.terminal import Terminal


def all_commands() -> list[str]:
    """Return the names of all commands, with those of their groups."""
    root = typer.main.get_command(app)
    assert isinstance(root, typer.core.TyperGroup)
    context = typer.Context(root)
    found = [""]
    for name in root.list_commands(context):
        found.append(name)
        command = root.get_command(context, name)
        if isinstance(command, typer.core.TyperGroup):
            found += [f"{name} {each}" for each in command.list_commands(context)]
    return found


def paragraphs(text: str) -> list[list[str]]:
    """Return the paragraphs outside of the boxes, each as its lines, without the usage."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith(("╭", "│", "╰"))]
    groups = [list(group) for is_text, group in itertools.groupby(lines, bool) if is_text]
    return [group for group in groups if not group[0].startswith("Usage:")]


@pytest.mark.long
@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", all_commands())
def test_paragraphs_fill_the_lines(stage: Stage, command: str, columns: int) -> None:
    done = stage.backupd(*command.split(), "--help", environ={"COLUMNS": str(columns)})
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= columns
    found = paragraphs(done.stdout)
    assert found
    for lines in found:
        for line, following in itertools.pairwise(lines):
            word = following.split()[0]
            assert len(line) + 1 + len(word) > columns - 2, f"{line!r} has room for {word!r}"


@pytest.mark.long
def test_the_width_is_that_of_the_terminal(stage: Stage) -> None:
    with Terminal(stage, ["run", "--help"], columns=70, lines=60) as terminal:
        assert terminal.wait() == 0
        lines = [line for line in terminal.display if line]
    assert max(map(len, lines)) == 70
    assert " Run the daemon in the foreground; it logs to standard output and" in lines


@pytest.mark.parametrize("command", ["", "run", "list", "notify", "config", "config show"])
def test_flags_have_no_type_and_names_one_pair_of_brackets(stage: Stage, command: str) -> None:
    help_text = stage.backupd(*command.split(), "--help", environ={"COLUMNS": "100"}).stdout
    names = ("│ --help", "│ --once", "│ --problems")
    flags = [line for line in help_text.splitlines() if line.startswith(names)]
    assert flags
    assert not [line for line in flags if "<" in line]
    assert "[[" not in help_text
