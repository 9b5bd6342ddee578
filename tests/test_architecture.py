"""The structure of the package: layers, sizes of files and functions (ruff checks the docstrings)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastcifar"
FILES = sorted(PACKAGE.rglob("*.py"))
BANNED_NAMES = {"utils", "common", "core", "base", "helpers"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TRAIN_LINES = 400, 60, 150


def lint_imports(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_layers_import_only_from_the_layers_below() -> None:
    """The contracts are in pyproject.toml."""
    run = lint_imports("--no-cache")
    assert run.returncode == 0, run.stdout


def test_the_layer_contract_finds_an_upward_import(tmp_path: Path) -> None:
    (tmp_path / "fastcifar").symlink_to(PACKAGE)
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    swapped = contract.replace('    "cli",\n    "api",\n    "sweep",\n', '    "sweep",\n    "api",\n    "cli",\n')
    assert swapped != contract
    (tmp_path / "pyproject.toml").write_text(swapped)
    run = lint_imports("--no-cache", cwd=tmp_path)
    assert run.returncode == 1
    assert "fastcifar.cli is not allowed to import fastcifar.sweep" in run.stdout


@pytest.mark.medium
def test_no_import_bypasses_the_contracts() -> None:
    """importlib hides an import from the contracts; only the lazy public names of the package use it on itself."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if path != PACKAGE / "__init__.py":
            assert 'import_module("fastcifar' not in text
            assert "import_module(f" not in text
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(ast.parse(text))), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_and_names(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    limit = MAX_TRAIN_LINES if path.name == "train.py" else MAX_FILE_LINES
    assert len(text.splitlines()) <= limit
    assert not BANNED_NAMES & set(path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_no_file_contains_an_absolute_path() -> None:
    for path in [*FILES, *ROOT.glob("*.md"), *(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        for start in ("/home/", "/Users/", "/work/", "/tmp/"):
            assert start not in text, f"{path.name} contains {start}"


def test_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist marks the tests of a group in their ids; some versions of pytest ignore this."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("not distributed over several processes")
    grouped = [item for item in request.session.items if item.get_closest_marker("xdist_group")]
    assert all("@" in item.nodeid for item in grouped)
