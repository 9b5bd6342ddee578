"""The house holds: imports go down only and never in a circle, and files and functions stay small."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastcifar"
FILES = sorted(PACKAGE.rglob("*.py"))
# top to bottom; a room imports from rooms below it and from itself
FLOORS = [
    {"cli"},
    {"lab"},
    {"results"},
    {"training"},
    {"data", "models"},
    {"options", "ending", "recipe", "device", "errors"},
]
FACES = {"__init__", "__main__"}  # the package's own faces may see every room
BANNED = {"utils", "common", "core", "base", "helpers"}
MOST_LINES, MOST_FUNCTION_LINES, MOST_TRAIN_LINES = 400, 60, 150


def module(path: Path) -> str:
    parts = ("fastcifar", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module(path): path for path in FILES}


def room(name: str) -> str:
    return ([*name.split("."), "__init__"])[1]


def floor(name: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if room(name) in rooms)


@functools.cache
def imports(name: str) -> frozenset[str]:
    """The modules of the package that `name` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found & MODULES.keys()) - {name, "fastcifar"}


def test_there_are_rooms_to_check() -> None:
    assert {room(name) for name in MODULES} >= {"cli", "training", "data", "models", "recipe", "errors"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) not in FACES])
def test_imports_go_down(name: str) -> None:
    for other in imports(name):
        below = floor(other) > floor(name) or room(other) == room(name)
        same_files = floor(other) == floor(name) == len(FLOORS) - 1
        assert below or same_files, f"{name} imports {other}"


def test_no_circles() -> None:
    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in imports(name):
                walk(other, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in MODULES:
        walk(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_names_and_openings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    limit = MOST_TRAIN_LINES if path.name == "train.py" else MOST_LINES
    assert len(text.splitlines()) <= limit
    assert not BANNED & set(path.relative_to(PACKAGE).with_suffix("").parts)
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file opens with what the room is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_no_path_of_a_machine() -> None:
    for path in [*FILES, *ROOT.glob("*.md"), *(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        for start in ("/home/", "/Users/", "/work/", "/tmp/"):
            assert start not in text, f"{path.name} holds {start}"
