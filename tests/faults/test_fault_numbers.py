"""Every fault in docs/reliability.md has a test whose name contains its number."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMES = [
    node.name
    for path in TESTS.rglob("test_*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.mark.parametrize("number", [*range(1, 51)])
def test_fault_has_a_test(number: int) -> None:
    assert any(f"fault{number:02d}" in name for name in NAMES)


@pytest.mark.parametrize("number", [*range(1, 51)])
def test_documentation_names_the_files_of_the_tests(number: int) -> None:
    (last_column,) = re.findall(rf"^\| {number} \| .* \| (.+) \|$", PAGE, re.MULTILINE)
    files = {
        path.relative_to(TESTS).with_suffix("").as_posix()
        for path in TESTS.rglob("test_*.py")
        if re.search(rf"def test_\w*fault{number:02d}", path.read_text(encoding="utf-8"))
    }
    assert set(re.findall(r"`([\w/]+)`", last_column)) == files
