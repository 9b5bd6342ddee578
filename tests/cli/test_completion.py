"""Completion of option values: the names are those of the tables, and torch is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar.cli.completion import TABLES, complete_from_tables, complete_recipe, complete_run
from fastcifar.data.augment import AUGMENTS
from fastcifar.data.loaders import LOADERS
from fastcifar.data.mixers import MIXERS
from fastcifar.models import MODELS
from fastcifar.training.evaluate import VIEWS
from fastcifar.training.lr_schedule import SCHEDULES
from fastcifar.training.optimizers import OPTIMIZERS
from fastcifar.training.trackers import TRACKERS

IMPORTED_TABLES = {
    "arch": MODELS,
    "augment": {**AUGMENTS, **MIXERS},
    "loader": LOADERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "track": TRACKERS,
    "tta": VIEWS,
}


OWN_NETWORK = Path(__file__).parents[2] / "examples" / "own_network.py"


@pytest.mark.parametrize("name", TABLES)
def test_names_are_those_of_the_tables(name: str) -> None:
    assert complete_from_tables(name)("") == list(IMPORTED_TABLES[name])


def test_the_last_item_of_a_list_is_completed() -> None:
    assert complete_from_tables("augment")("crop:4:zero,cut") == ["crop:4:zero,cutout", "crop:4:zero,cutmix"]


def test_recipes_and_runs_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quicker.toml").touch()
    for name in ("se68-quick-s0-20260101T000000Z", "se55-quick-s0-20260102T000000Z"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert complete_recipe("qui") == ["quick", "quicker.toml"]
    assert complete_run("runs/se") == ["runs/se55-quick-s0-20260102T000000Z", "runs/se68-quick-s0-20260101T000000Z"]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --arch se68", ["se68", "se68_block", "se68_none"]),
        ("train --recipe speed", ["speed94", "speed95", "speed96"]),
        ("train --precision bf", ["bf16"]),
        (f"train --import {OWN_NETWORK} --arch plain", ["plain_cnn"]),
    ],
)
def test_a_shell_gets_the_completions_without_torch(words: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {
        "_FASTCIFAR_COMPLETE": "complete_bash",
        "COMP_WORDS": f"fastcifar {words}",
        "COMP_CWORD": f"{len(words.split())}",
    }
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    program = "import sys; sys.argv = ['fastcifar']; from fastcifar.cli.app import app; app(prog_name='fastcifar')"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **environment, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.stdout.split() == expected, run.stderr
