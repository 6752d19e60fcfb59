"""No private name of another library is used or overridden."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "backupd").rglob("*.py") if path.stem != "__main__")
PRIVATE = re.compile(r"_[^_]\w*")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def is_private(name: str) -> bool:
    """Return whether a name has one underscore in front; `_sunder_` names of enums are documented."""
    return PRIVATE.fullmatch(name) is not None and not name.endswith("_")


@cache
def defined_in(path: Path) -> frozenset[str]:
    """Return the private names that a module defines: functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return frozenset(filter(is_private, names))


def accesses(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private name that a module reads from an object, by `.` or `getattr`."""
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Attribute(attr=name):
                yield node.lineno, name
            case ast.MatchClass(kwd_attrs=names):
                yield from ((node.lineno, name) for name in names)
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"), args=[_, *rest]):
                if rest and isinstance(rest[0], ast.Constant) and isinstance(rest[0].value, str):
                    yield node.lineno, rest[0].value


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of each package, module and object that a module imports from another library."""
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] != "backupd":
                yield from ((node.lineno, name) for name in (*module.split("."), *(a.name for a in names)))
            case ast.Import(names=names):
                yield from ((node.lineno, name) for alias in names for name in alias.name.split("."))


def foreign_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base is not object and not is_ours(base)]


def is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("backupd", "tests")


def own_classes(path: Path) -> Iterator[tuple[ast.ClassDef, type]]:
    """Yield each class of a module with its definition; all must be defined at its top."""
    module = importlib.import_module(module_name(path))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            yield node, getattr(module, node.name)


@cache
def private_names_of(cls: type) -> frozenset[str]:
    """Return the private methods and attributes of a foreign class, those in its source included."""
    names = set(vars(cls))
    with suppress(OSError, TypeError):  # a class in C
        names |= set(re.findall(r"\bself\.(_\w+)", inspect.getsource(cls)))
    return frozenset(filter(is_private, names))


def private_names_in(definition: ast.ClassDef) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private method and class variable, and of each private name of `self`."""
    for node in ast.walk(definition):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if node in definition.body:
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                yield node.lineno, name
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if node in definition.body:
                    yield node.lineno, name


def faults(path: Path) -> Iterator[str]:
    """Yield each use of a private name of another library, with its line."""
    inherited: set[str] = set()
    for definition, cls in own_classes(path):
        for base in cls.__mro__:
            if is_ours(base):
                inherited |= defined_in(Path(inspect.getfile(base)))
        foreign = frozenset[str]().union(*map(private_names_of, foreign_bases(cls)))
        for line, name in private_names_in(definition):
            if name in foreign:
                yield f"{line}: {definition.name}.{name} is a private name of its base class"
    known = defined_in(path) | inherited
    for line, name in accesses(path):
        if is_private(name) and name not in known:
            yield f"{line}: {name} is not defined here"
    for line, name in imports(path):
        if is_private(name):
            yield f"{line}: {name} is imported"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "backupd")))
def test_a_module_uses_no_private_name_of_another_library(path: Path) -> None:
    assert not list(faults(path))


class _Foreign:
    """Stands for a class of another library in the test below."""

    def _method(self) -> None:
        self._attribute = 1


@pytest.mark.parametrize("name", ["_method", "_attribute"])
def test_private_methods_and_attributes_of_a_class_are_found(name: str) -> None:
    assert name in private_names_of(_Foreign)
