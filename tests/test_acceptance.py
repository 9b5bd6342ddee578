"""The GPU acceptance test with tiny sizes: parts run, write their results, and report failures."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run_acceptance(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "gpu_acceptance"), *arguments]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_exits_with_a_message_of_one_line(tmp_path: Path) -> None:
    run = run_acceptance("conv", "--out", str(tmp_path / "results"))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (8, "", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_run_on_a_cpu_and_write_results_and_an_archive(tmp_path: Path) -> None:
    out = tmp_path / "results"
    run = run_acceptance("profile", "train", "--device", "cpu", "--quick", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("profile", "train"):
        part = json.loads((out / f"{name}.part.json").read_text())
        assert part["passed"], part
        assert [command["exit_code"] for command in part["commands"]] == [0]
        assert f"| {name} | passed |" in run.stdout
    (result,) = json.loads((out / "profile.json").read_text())["results"]
    assert result["what"] == "step"
    assert "convolution" in (out / "profile.txt").read_text()
    assert json.loads((out / "train.json").read_text())["complete"]
    with tarfile.open(f"{out}.tar.gz") as archive:
        assert {
            "results/profile.json",
            "results/train.json",
            "results/step.trace.json.gz",
            "results/summary.md",
        } <= set(archive.getnames())


def make_arguments(out: Path, **changes: object) -> argparse.Namespace:
    values = {"out": out, "device": "cpu", "quick": True, "airbench": None, "started": "now"}
    return argparse.Namespace(**values | changes)


@pytest.fixture
def acceptance(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with short times, whose commands are Python code instead of programs."""
    module = importlib.import_module("acceptance")
    monkeypatch.setattr(module, "interpreter_arguments", lambda command, _: ["-c", command.options])
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    monkeypatch.setattr(module, "ARCHIVE_S", 0.0)
    return module


def make_part(acceptance: ModuleType, expected_s: float, **codes: str) -> object:
    commands = [acceptance.Command(name, "", code, accepted={8: "expected"}) for name, code in codes.items()]
    return acceptance.Part(expected_s, expected_s, commands)


def test_a_part_fails_if_a_command_fails_or_exceeds_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acceptance: ModuleType
) -> None:
    sleep = "import time; time.sleep(600)"
    fails = "import sys; print('first', file=sys.stderr); sys.exit('the reason')"
    part = make_part(acceptance, 1, fails=fails, stops="raise SystemExit(8)", sleeps=sleep, never=sleep)
    monkeypatch.setitem(acceptance.PARTS, "custom", part)
    result = acceptance.run_part("custom", make_arguments(tmp_path), limit_s=5)
    assert [command["exit_code"] for command in result["commands"]] == [1, 8, -15]
    assert [command["passed"] for command in result["commands"]] == [False, True, False]
    notes = ["exit code 1: the reason", "expected", "stopped by the time limit, exit code -15: "]
    assert [command["note"] for command in result["commands"]] == notes
    assert not result["passed"]
    assert result["problem"] == "no time is left for never"
    assert result["seconds"] < 5 + acceptance.GRACE_S


def test_only_parts_that_fit_the_budget_run_and_each_result_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acceptance: ModuleType
) -> None:
    """The second part is too long, and the last one reads what was written before it started."""
    out = tmp_path / "results"
    out.mkdir()
    look = f"import os; print(sorted(os.listdir({str(out)!r})), os.path.isfile({str(out) + '.tar.gz'!r}))"
    missing = acceptance.Part(1, 1, [], lambda _: "no pytest")
    parts = {
        "first": make_part(acceptance, 1, a="print(1)"),
        "long": make_part(acceptance, 100, b="print(1)"),
        "missing": missing,
        "last": make_part(acceptance, 1, c=look),
    }
    monkeypatch.setattr(acceptance, "PARTS", parts)
    results = acceptance.run_parts(list(parts), make_arguments(out), time.perf_counter() + 60)
    assert [result.get("passed") for result in results] == [True, None, None, True]
    assert results[1]["not_run"].startswith("it takes about 100 s, and ")
    assert results[2]["not_run"] == "no pytest"
    names = ["a", "a.log", "c", "c.log", *(f"{name}.part.json" for name in ("first", "long", "missing")), "summary.md"]
    assert (out / "c").read_text() == f"{names} True\n"
    rows = [line.split(" | ")[:2] for line in (out / "summary.md").read_text().splitlines()[2:]]
    states = ["passed", "not run", "not run", "passed"]
    assert rows == [[f"| {name}", state] for name, state in zip(parts, states, strict=True)]


def test_a_part_that_hangs_leaves_time_for_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acceptance: ModuleType
) -> None:
    parts = {
        "hangs": make_part(acceptance, 0.5, a="import time; time.sleep(600)"),
        "next": make_part(acceptance, 0.5, b="print(1)"),
    }
    monkeypatch.setattr(acceptance, "PARTS", parts)
    results = acceptance.run_parts(list(parts), make_arguments(tmp_path), time.perf_counter() + 60)
    assert [result["passed"] for result in results] == [False, True]
    assert results[0]["seconds"] < 10


def test_the_last_part_may_take_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acceptance: ModuleType
) -> None:
    monkeypatch.setattr(acceptance, "PARTS", {"only": make_part(acceptance, 0.1, a="import time; time.sleep(3)")})
    (result,) = acceptance.run_parts(["only"], make_arguments(tmp_path), time.perf_counter() + 60)
    assert result["passed"], result


def test_a_home_folder_that_is_read_only_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    acceptance = importlib.import_module("acceptance")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert acceptance.command_environment(tmp_path)["HOME"] == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    environment = acceptance.command_environment(tmp_path)
    assert os.access(environment["HOME"], os.W_OK)
    assert "XDG_CACHE_HOME" not in environment


def test_key_figures_are_read_from_the_documents(tmp_path: Path) -> None:
    read_figures = importlib.import_module("acceptance_figures").read_figures
    step = {"what": "step", "arch": "se68", "batch_size": 128, "precision": "bf16", "compiled": True}
    step |= {"cuda_graph": True, "images_per_s": 20_000.4, "mfu": 0.251, "peak_memory_bytes": 2**31}
    conv = {"what": "conv", "arch": "se68", "batch_size": 128, "precision": "bf16", "direction": "forward"}
    convs = [
        conv | {"calls": 3, "flop_per_image": 10**9, "images_per_s": 100_000.0},  # 30 us for 3 GFLOP
        conv | {"calls": 1, "flop_per_image": 10**9, "images_per_s": 100_000.0},
    ]
    document = {
        "limits": {"bf16": {"matmul_tflop_per_s": 400.0, "copy_gb_per_s": 3000.0, "published_tflop_per_s": 800.0}},
        "results": [step, *convs],
    }
    (tmp_path / "bench").write_text(f"a line\n{json.dumps(document)}\n")
    assert read_figures(tmp_path / "bench") == [
        ("step se68 128 bf16 captured", "20,000", "25.1 %", "peak memory 2.00 GiB"),
        ("all convolutions of se68, 128, forward", "25,000", "25.0 %", "100.0 TFLOP/s"),
        (
            "matrix product bf16 (MFU 100 %)",
            "",
            "",
            "400.0 TFLOP/s, copy 3,000 GB/s; 50.0 % of the published 800.0 TFLOP/s",
        ),
    ]
    loader = {"what": "loader", "loader": "dali", "batch_size": 128, "compiled": True, "images_per_s": 1e6}
    (tmp_path / "loader").write_text(json.dumps({"limits": None, "results": [loader]}))
    assert read_figures(tmp_path / "loader") == [("loader 128 dali compiled", "1,000,000", "", "")]
    speedrun = {
        "reached": True,
        "target": 0.94,
        "seconds": {"mean": 2.5, "trials": [2, 3]},
        "acc_tta": {"mean": 0.9412},
    }
    (tmp_path / "speedrun").write_text(json.dumps(speedrun))
    other = "2.50 s, accuracy 94.12 %, n = 2"
    assert read_figures(tmp_path / "speedrun") == [("time to 94 %", "", "", other)]
    (tmp_path / "slow").write_text(json.dumps(speedrun | {"reached": False}))
    assert read_figures(tmp_path / "slow") == [("time to 94 %", "", "", f"{other}, which does not reach the target")]
    checks = [{"check": "losses", "form": "captured", "passed": False}, {"check": "a", "form": "b", "passed": True}]
    (tmp_path / "equality").write_text(json.dumps({"checks": checks}))
    ((_, _, _, text),) = read_figures(tmp_path / "equality")
    assert text == "1 of 2 checks passed; failed: losses (captured)"
    (tmp_path / "text").write_text("no document")
    assert read_figures(tmp_path / "text") == read_figures(tmp_path / "none") == []


def test_kernel_times_are_summed_by_name_and_sorted() -> None:
    events = [
        {"cat": "kernel", "name": "short", "dur": 100},
        {"cat": "kernel", "name": "long", "dur": 200},
        {"cat": "kernel", "name": "long", "dur": 100},
        {"cat": "cpu_op", "name": "other", "dur": 900},
        {"name": "an event without a duration"},
    ]
    _, first, second = importlib.import_module("acceptance_figures").format_kernel_times(events, "kernel").splitlines()
    assert first.split() == ["75.0", "%", "0.300", "ms", "2", "long"]
    assert second.split() == ["25.0", "%", "0.100", "ms", "1", "short"]


@pytest.mark.medium
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


def test_the_documentation_lists_every_part() -> None:
    table = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split("\n## Acceptance test\n")[1]
    names = [
        name for line in table.splitlines() if line.startswith("| `") for name in line.split("|")[1].split("`")[1::2]
    ]
    assert names == list(importlib.import_module("acceptance").PARTS)
