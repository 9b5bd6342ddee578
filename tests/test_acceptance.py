"""The acceptance of a machine with a GPU, in its tiny form: parts run, write their results, and say what failed."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def accept(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "gpu_acceptance"), *arguments]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    run = accept("bench", "--out", str(tmp_path / "found"))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (8, "", 1)
    assert not list(tmp_path.iterdir())


def test_parts_run_on_a_cpu_and_leave_their_results_and_an_archive(tmp_path: Path) -> None:
    out = tmp_path / "found"
    run = accept("profile", "train", "--device", "cpu", "--quick", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("profile", "train"):
        part = json.loads((out / f"{name}.part.json").read_text())
        assert part["passed"], part
        assert [command["exit_code"] for command in part["commands"]] == [0]
    (row,) = json.loads((out / "profile.json").read_text())["results"]
    assert row["what"] == "step"
    assert "convolution" in (out / "profile.txt").read_text()
    assert json.loads((out / "train.json").read_text())["complete"]
    with tarfile.open(f"{out}.tar.gz") as archive:
        assert {"found/profile.json", "found/train.json", "found/step.trace.json.gz"} <= set(archive.getnames())


def test_a_part_whose_command_fails_or_runs_too_long_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acceptance = script("acceptance")
    quick = acceptance.Setting(tmp_path, "cpu", True)
    sleep = "import time; time.sleep(600)"
    codes = {"fails": "raise SystemExit(3)", "stops": "raise SystemExit(8)", "sleeps": sleep, "never": sleep}

    def part(_: object) -> object:
        for name, code in codes.items():
            yield acceptance.Command(name, ("-c", code), {8: "as it should"})

    monkeypatch.setattr(acceptance, "GRACE_S", 0.5)
    monkeypatch.setitem(acceptance.PARTS, "mine", part)
    found = acceptance.run_part("mine", quick, limit_s=5)
    assert [command["exit_code"] for command in found["commands"]] == [3, 8, -15]
    assert [command["passed"] for command in found["commands"]] == [False, True, False]
    assert found["commands"][1]["note"] == "as it should"
    assert not found["passed"]
    assert found["problem"] == "no time was left for never"
    assert found["seconds"] < 5 + acceptance.GRACE_S
    assert json.loads((tmp_path / "mine.part.json").read_text()) == found


def test_the_script_lists_every_part() -> None:
    listed = re.search(r"gpu_acceptance \[(.+)\]", (ROOT / "scripts" / "gpu_acceptance").read_text())
    assert listed is not None
    assert listed[1].split() == list(script("acceptance").PARTS)


def test_kernels_are_summed_by_name_and_the_longest_comes_first() -> None:
    events = [
        {"cat": "kernel", "name": "short", "dur": 100},
        {"cat": "kernel", "name": "long", "dur": 200},
        {"cat": "kernel", "name": "long", "dur": 100},
        {"cat": "cpu_op", "name": "other", "dur": 900},
        {"name": "a mark"},
    ]
    _, first, second = script("acceptance").by_kernel(events, "kernel").splitlines()
    assert first.split() == ["75.0", "%", "0.300", "ms", "2", "long"]
    assert second.split() == ["25.0", "%", "0.100", "ms", "1", "short"]


def test_forms_that_differ_are_told_from_forms_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two eager forms, one of them with another weight decay, in place of eager and compiled."""
    equality = script("equality")
    from fastcifar.recipe import Recipe

    recipe = Recipe.make(**equality.QUICK, activation="silu", val_size=0, device="cpu", loader="tensor")
    made = equality.form
    for decay, passed in ((recipe.weight_decay, True), (0.5, False)):
        changes = {"eager": {}, "compiled": {"weight_decay": decay}}

        def form(recipe: Recipe, mode: str, precision: str, changes: dict = changes) -> object:
            return made(recipe.model_copy(update=changes[mode]), "eager", precision)

        monkeypatch.setattr(equality, "form", form)
        found = equality.checks(recipe, ["eager", "compiled"], steps=3)
        assert [check["form"] for check in found] == ["compiled"] * 3
        assert all(check["passed"] for check in found) == passed
        assert (found[1]["largest"] < 1e-6) == passed
