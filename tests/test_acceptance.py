"""The GPU acceptance test with tiny sizes: parts run, write their results, and report failures."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run_acceptance(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "gpu_acceptance"), *arguments]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_exits_with_a_message_of_one_line(tmp_path: Path) -> None:
    run = run_acceptance("bench", "--out", str(tmp_path / "results"))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (8, "", 1)
    assert not list(tmp_path.iterdir())


def test_parts_run_on_a_cpu_and_write_results_and_an_archive(tmp_path: Path) -> None:
    out = tmp_path / "results"
    run = run_acceptance("profile", "train", "--device", "cpu", "--quick", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("profile", "train"):
        part = json.loads((out / f"{name}.part.json").read_text())
        assert part["passed"], part
        assert [command["exit_code"] for command in part["commands"]] == [0]
    (result,) = json.loads((out / "profile.json").read_text())["results"]
    assert result["what"] == "step"
    assert "convolution" in (out / "profile.txt").read_text()
    assert json.loads((out / "train.json").read_text())["complete"]
    with tarfile.open(f"{out}.tar.gz") as archive:
        assert {"results/profile.json", "results/train.json", "results/step.trace.json.gz"} <= set(archive.getnames())


def test_a_part_fails_if_a_command_fails_or_exceeds_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acceptance = importlib.import_module("acceptance")
    quick = acceptance.Settings(tmp_path, "cpu", True)
    sleep = "import time; time.sleep(600)"
    codes = {"fails": "raise SystemExit(3)", "stops": "raise SystemExit(8)", "sleeps": sleep, "never": sleep}

    def part(_: object) -> object:
        for name, code in codes.items():
            yield acceptance.Command(name, ("-c", code), {8: "expected"})

    monkeypatch.setattr(acceptance, "GRACE_S", 0.5)
    monkeypatch.setitem(acceptance.PARTS, "custom", part)
    result = acceptance.run_part("custom", quick, limit_s=5)
    assert [command["exit_code"] for command in result["commands"]] == [3, 8, -15]
    assert [command["passed"] for command in result["commands"]] == [False, True, False]
    assert result["commands"][1]["note"] == "expected"
    assert not result["passed"]
    assert result["problem"] == "no time is left for never"
    assert result["seconds"] < 5 + acceptance.GRACE_S
    assert json.loads((tmp_path / "custom.part.json").read_text()) == result


def test_the_script_lists_every_part() -> None:
    listed = re.search(r"gpu_acceptance \[(.+)\]", (ROOT / "scripts" / "gpu_acceptance").read_text())
    assert listed is not None
    assert listed[1].split() == list(importlib.import_module("acceptance").PARTS)


def test_kernel_times_are_summed_by_name_and_sorted() -> None:
    events = [
        {"cat": "kernel", "name": "short", "dur": 100},
        {"cat": "kernel", "name": "long", "dur": 200},
        {"cat": "kernel", "name": "long", "dur": 100},
        {"cat": "cpu_op", "name": "other", "dur": 900},
        {"name": "an event without a duration"},
    ]
    _, first, second = importlib.import_module("acceptance").format_kernel_times(events, "kernel").splitlines()
    assert first.split() == ["75.0", "%", "0.300", "ms", "2", "long"]
    assert second.split() == ["25.0", "%", "0.100", "ms", "1", "short"]


def test_different_forms_of_the_step_fail_the_equality_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled form is replaced by an eager one, first with the same and then with another weight decay."""
    equality = importlib.import_module("equality")
    from fastcifar.recipe import Recipe

    recipe = Recipe.make(**equality.QUICK, activation="silu", val_size=0, device="cpu", loader="tensor")
    build_form = equality.build_form
    for decay, passed in ((recipe.weight_decay, True), (0.5, False)):
        changes = {"eager": {}, "compiled": {"weight_decay": decay}}

        def form(recipe: Recipe, mode: str, precision: str, changes: dict = changes) -> object:
            return build_form(recipe.model_copy(update=changes[mode]), "eager", precision)

        monkeypatch.setattr(equality, "build_form", form)
        checks = equality.run_checks(recipe, ["eager", "compiled"], steps=3)
        assert [check["form"] for check in checks] == ["compiled"] * 3
        assert all(check["passed"] for check in checks) == passed
        assert (checks[1]["largest"] < 1e-6) == passed
