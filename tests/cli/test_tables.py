"""The commands that `train` prints at the end."""

from __future__ import annotations

from typing import Any

import pytest

from fastcifar.cli.tables import next_commands
from fastcifar.recipe import Recipe
from fastcifar.training.summary import RunSummary
from tests.training.summaries import summary_document


@pytest.mark.parametrize(
    ("values", "command"),
    [
        ({}, "train longer:\n    fastcifar train --resume runs/x --epochs 6"),
        ({"stop_reason": "SIGINT", "complete": False}, "continue:\n    fastcifar train --resume runs/x"),
        (
            {"stop_reason": "patience", "config": Recipe(patience=5).model_dump(mode="json")},
            "train longer:\n    fastcifar train --resume runs/x --patience 10",
        ),
    ],
)
def test_the_command_that_continues_a_run_is_one_that_trains(values: dict[str, Any], command: str) -> None:
    lines = next_commands(RunSummary.model_validate(summary_document(**values)))
    assert lines[-1] == f"  {command}"
