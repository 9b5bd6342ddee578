"""Every row of the table of faults has a test that carries its number."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NAMES = [
    node.name
    for path in TESTS.rglob("test_*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.mark.parametrize("row", range(1, 27))
def test_the_row_has_a_test(row: int) -> None:
    assert any(f"fault{row:02d}" in name for name in NAMES)
