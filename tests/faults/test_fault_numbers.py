"""Every fault in the table of faults has a test whose name contains its number."""

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


@pytest.mark.parametrize("number", [*range(1, 51)])
def test_fault_has_a_test(number: int) -> None:
    assert any(f"fault{number:02d}" in name for name in NAMES)
