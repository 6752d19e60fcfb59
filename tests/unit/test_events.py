"""The catalogue of events, compared with the source of every call that logs one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import backupd
from backupd.telemetry import events
from backupd.telemetry.docs import SECTIONS, events_page, events_schema, lnav_format
from backupd.telemetry.events import CATALOGUE, COMMON_KEYS, KEYS, Event
from backupd.telemetry.message import keys_of, required_keys

PACKAGE = Path(backupd.__file__).parent
PRINT = (sys.executable, "-m", "backupd.telemetry.docs")
BY_NAME = {name: value for name, value in vars(events).items() if isinstance(value, Event)}


@dataclass(frozen=True)
class Emission:
    """A call of `emit` in the source; `keys` is None if the source does not determine them."""

    where: str
    events: frozenset[str]
    keys: frozenset[str] | None


class Module:
    """The source of a module, in which the arguments of calls are looked up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text("utf-8"))
        self.functions = [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)]

    def emissions(self) -> Iterator[Emission]:
        for function in self.functions:
            for call in _calls(function, "emit"):
                named = self._events(call.args[0], function) if call.args else frozenset()
                if named:
                    keys = self._keywords(call, function)
                    where = f"{self.path.relative_to(PACKAGE.parent)}:{call.lineno}"
                    yield Emission(where, named, keys)

    def _events(self, node: ast.expr, function: ast.FunctionDef) -> frozenset[str]:
        """Return the constants of the catalogue that an expression may evaluate to."""
        match node:
            case ast.Attribute(value=ast.Name(id="events"), attr=name) | ast.Name(id=name) if name in BY_NAME:
                return frozenset([name])
            case ast.IfExp(body=one, orelse=other):
                return self._events(one, function) | self._events(other, function)
            case ast.Name(id=name):
                values = list(_assigned(function, name))
                return frozenset().union(*(self._events(value, function) for value in values))
        return frozenset()

    def _keywords(self, call: ast.Call, function: ast.FunctionDef) -> frozenset[str] | None:
        return self._union(
            _just(_KEY_OF.get(word.arg, word.arg)) if word.arg else self._dict(word.value, function)
            for word in call.keywords
            if not (word.arg in _KEY_OF and isinstance(word.value, ast.Constant))
        )

    def _dict(self, node: ast.expr, function: ast.FunctionDef) -> frozenset[str] | None:
        """Return the keys of a dict that is passed with `**`, or None if the source does not fix them."""
        if isinstance(node, ast.Dict):
            return self._union(
                self._dict(value, function) if key is None else _literal(key)
                for key, value in zip(node.keys, node.values, strict=True)
            )
        if not isinstance(node, ast.Name):
            return None
        values = list(_assigned(function, node.id))
        if values:
            return self._union(self._dict(value, function) for value in values)
        return self._passed(node.id, function)

    def _passed(self, parameter: str, function: ast.FunctionDef) -> frozenset[str] | None:
        """Return the keys that the calls of a function within the module pass to one of its parameters."""
        arguments = function.args
        names = [argument.arg for argument in arguments.args if argument.arg != "self"]
        found: list[frozenset[str] | None] = []
        for caller in self.functions:
            for call in _calls(caller, function.name):
                if arguments.kwarg and arguments.kwarg.arg == parameter:
                    rest = [word for word in call.keywords if word.arg not in names]
                    found.append(self._union(_just(word.arg) for word in rest))
                elif parameter in names and len(call.args) > names.index(parameter):
                    found.append(self._dict(call.args[names.index(parameter)], caller))
        return self._union(found) if found else None

    @staticmethod
    def _union(parts: Iterator[frozenset[str] | None] | list[frozenset[str] | None]) -> frozenset[str] | None:
        whole: frozenset[str] = frozenset()
        for part in parts:
            if part is None:
                return None
            whole |= part
        return whole


_KEY_OF = {"exc_info": "exception"}
"""Arguments of `emit` that become another key, unless they are None."""


def _just(name: str | None) -> frozenset[str] | None:
    return frozenset([name]) if name else None


def _literal(node: ast.expr) -> frozenset[str] | None:
    return frozenset([node.value]) if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _calls(function: ast.FunctionDef, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
            yield node


def _assigned(function: ast.FunctionDef, name: str) -> Iterator[ast.expr]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            yield node.value


EMISSIONS = list(
    {
        emission.where: emission
        for path in sorted(PACKAGE.rglob("*.py"))
        for emission in Module(path).emissions()
    }.values()
)


@pytest.mark.parametrize("emission", EMISSIONS, ids=lambda emission: emission.where)
def test_each_call_passes_only_keys_that_the_catalogue_lists(emission: Emission) -> None:
    assert emission.keys is not None, "the source does not determine the keys"
    for name in emission.events:
        assert emission.keys <= set(BY_NAME[name].keys)


def test_every_call_logs_an_event_of_the_catalogue() -> None:
    calls = 0
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        calls += sum(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "emit"
            and len(node.args) == 1
            for node in ast.walk(tree)
        )
    assert len(EMISSIONS) == calls > 30


def test_every_event_is_logged_somewhere() -> None:
    logged = {name for emission in EMISSIONS for name in emission.events}
    logged.add("LOG_LOST")  # by the log itself
    assert logged == set(BY_NAME)


@pytest.mark.parametrize("event", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_every_key_of_an_event_is_passed_by_some_call(event: Event) -> None:
    if event is events.LOG_LOST:
        return
    passed: set[str] = set()
    for emission in EMISSIONS:
        if any(BY_NAME[name] is event for name in emission.events):
            passed |= emission.keys or set()
    assert passed == set(event.keys) - {"left_out"}  # the log adds it


def test_every_constant_is_in_the_catalogue_under_its_own_name() -> None:
    assert {event.name: event for event in BY_NAME.values()} == CATALOGUE
    assert [name.replace("_", ".", 1).lower() for name in BY_NAME] == [
        event.name for event in BY_NAME.values()
    ]


@pytest.mark.parametrize("event", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_the_name_of_an_event_has_two_words_and_its_keys_are_declared(event: Event) -> None:
    assert re.fullmatch(r"[a-z]+\.[a-z_]+", event.name)
    assert event.level in {"debug", "info", "warning", "error"}
    assert set(event.keys) <= set(KEYS) - set(COMMON_KEYS)
    assert len(set(event.keys)) == len(event.keys)
    assert event.meaning
    assert not event.meaning.endswith(".")


def test_every_key_is_used() -> None:
    used = {key for event in CATALOGUE.values() for key in event.keys}
    assert set(KEYS) == used | set(COMMON_KEYS)


@pytest.mark.parametrize("event", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_the_message_of_an_event_has_only_keys_of_the_event(event: Event) -> None:
    assert keys_of(event.message) <= set(event.keys)
    assert required_keys(event.message)
    assert not event.message.endswith(".")


@pytest.mark.parametrize("emission", EMISSIONS, ids=lambda emission: emission.where)
def test_each_call_passes_the_keys_that_the_message_requires(emission: Emission) -> None:
    for name in emission.events:
        assert required_keys(BY_NAME[name].message) <= (emission.keys or set())


def test_the_page_is_generated_from_the_catalogue() -> None:
    page = (PACKAGE.parent / "docs" / "events.md").read_text("utf-8")
    assert page == events_page(), "run: python -m backupd.telemetry.docs > docs/events.md"
    assert all(page.count(f"\n| `{name}` |") == 1 for name in (*CATALOGUE, *KEYS))


@pytest.mark.parametrize(
    ("options", "output"), [([], events_page), (["--schema"], events_schema), (["--lnav"], lnav_format)]
)
def test_the_module_prints_the_generated_files(options: list[str], output: Callable[[], str]) -> None:
    done = subprocess.run([*PRINT, *options], capture_output=True, text=True, check=True)
    assert done.stdout == output()


def test_the_module_refuses_unknown_options() -> None:
    done = subprocess.run([*PRINT, "--html"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "--lnav" in done.stderr


def test_every_event_is_in_one_section_of_the_page() -> None:
    prefixes = [prefix for words in SECTIONS.values() for prefix in words]
    assert len(set(prefixes)) == len(prefixes)
    assert {name.partition(".")[0] for name in CATALOGUE} == set(prefixes)


def test_no_cell_of_the_page_breaks_its_table() -> None:
    rows = [line for line in events_page().splitlines() if line.startswith("|")]
    assert len(rows) > len(CATALOGUE) + len(KEYS)
    assert {row.count("|") for row in rows} == {4}


def test_each_key_is_declared_once() -> None:
    source = (PACKAGE / "telemetry" / "events.py").read_text("utf-8")
    assert len(re.findall(r"\bKey\(\s*\"", source)) == len(KEYS) > 70
