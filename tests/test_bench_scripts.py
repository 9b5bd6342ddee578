"""The benchmark scripts; the tables of results in README and docs are up to date."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastcifar.benchmark.speedrun import speedrun
from fastcifar.benchmark.speedrun_results import (
    RunCosts,
    SpeedrunEnvironment,
    SpeedrunRecipe,
    SpeedrunResults,
    SpeedrunTrial,
)
from fastcifar.data.cifar import load_dataset
from fastcifar.device import Environment, ExecutionPlan
from fastcifar.errors import UsageError
from fastcifar.models import MODELS
from fastcifar.recipe import Recipe
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """Import a script of bench/ or bench/peers/, which pyproject.toml adds to the import path."""
    return importlib.import_module(name)


def test_tables_of_readme_and_docs_are_up_to_date() -> None:
    tables = script("tables")
    pages = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    for name in tables.TABLES:
        assert f"<!-- table: {name} -->" in "\n".join(pages)
    for text in pages:
        assert tables.update_tables(text) == text


def test_results_contain_no_absolute_path() -> None:
    files = [path for path in (ROOT / "bench" / "results").rglob("*") if path.is_file()]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "/tmp" not in text, path
        assert "/work" not in text, path


def trial(seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    names = ("arch", "recipe", "device", "precision", "eval_weights", "run", "stop_reason")
    figures = {"params": 10, "macs": 100, "epochs": 2, "images_trained": 1000, "test_acc": accuracy, "complete": True,
               "classes": list("0123456789")}  # fmt: skip
    absent = dict.fromkeys(("test_acc_ema", "val_acc"))
    sizes = {"arch": "speed94", "epochs": 2, "image_size": "24:1,32"}
    config = {**sizes, "seed": seed, "out": "here", "data": "there"}
    return {**dict.fromkeys(names, "x"), **figures, **absent, "test_loss": 1.0, "images_per_s": 5.0, "seed": seed,
            "config": config, "seconds": {"total": 9.0}, **changes}  # fmt: skip


def operations_per_image(size: int) -> int:
    """Return the operations of a forward and a backward pass of `speed94`, whose convolutions are 3x3 but for one."""
    pooled = [size - 1]  # height of the maps: after the whitening layer, and after each group
    operations = 2 * pooled[0] ** 2 * 24 * 12  # of the whitening layer, whose weight is not trained
    for channels_in, channels in ((24, 64), (64, 256), (256, 256)):
        pooled.append(pooled[-1] // 2)
        computed = (2 * pooled[-1]) ** 2 * channels_in + pooled[-1] ** 2 * channels
        operations += 3 * 2 * computed * channels * 9
    return operations + 3 * 2 * 256 * 10


def write(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(document))
    (folder / "env.json").write_text(json.dumps({"device": "a CPU, 2 cores", "command": ["here"]}))
    return folder


def test_record_writes_every_trial_and_their_standard_deviation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = script("record")
    monkeypatch.setattr(record.results_folder, "RESULTS", tmp_path / "results")
    runs = [write(tmp_path / f"run{seed}", trial(seed, accuracy)) for seed, accuracy in enumerate((0.8, 0.9, 1.0))]
    folder = record.record("quick", runs)
    assert folder.name.endswith("Z_a-cpu-2-cores_quick")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["n"], summary["seeds"]) == (3, [0, 1, 2])
    assert summary["test_acc"]["mean"] == pytest.approx(0.9)
    assert summary["test_acc"]["std"] == pytest.approx(0.1)
    two = record.summarize("quick", [trial(seed, 0.8 + 0.1 * seed) for seed in range(2)])["test_acc"]
    assert two == {"mean": pytest.approx(0.85), "std": None, "trials": [0.8, 0.9]}, "two runs have no deviation"
    assert summary["train_flops"] == 500 * (operations_per_image(24) + operations_per_image(32))
    assert "val_acc" not in summary
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [entry["test_acc"] for entry in trials] == [0.8, 0.9, 1.0]
    assert "out" not in trials[0]["config"]
    assert "command" not in json.loads((folder / "env.json").read_text())


def test_record_refuses_incomplete_runs_and_different_recipes(tmp_path: Path) -> None:
    record = script("record")
    complete = write(tmp_path / "complete", trial(0, 0.8))
    incomplete = write(tmp_path / "incomplete", trial(1, 0.8, complete=False))
    other = write(tmp_path / "other", trial(1, 0.8, config={"lr": 0.2}))
    for invalid in (incomplete, other):
        with pytest.raises(SystemExit):
            record.record("quick", [complete, invalid])


PEERS = ("source_loop", "eager", "plain_compile", "ours")
METRICS = {"cpu_us_per_image": 1.0, "prepare_s": 2.0, "others_cores": 0.5}


def test_peers_are_compared_by_round_and_all_trials_are_kept() -> None:
    speeds = {
        "source_loop": (10, 20, 40),
        "eager": (40, 40, 40),
        "plain_compile": (50, 40, 20),
        "ours": (60, 60, 80),
    }
    trials = [
        {"round": number, "loop": name, "images_per_s": speeds[name][number], **METRICS}
        for number in range(3)
        for name in PEERS
    ]
    disturbed = {**trials[3], "images_per_s": 1}
    summary = script("run").summarize([disturbed, *trials], arch="se68")
    assert (summary["n"], summary["arch"], tuple(summary["loops"])) == (3, "se68", PEERS)
    assert summary["loops"]["ours"]["trials"] == [60, 60, 80]
    assert summary["loops"]["ours"]["images_per_s"] == 60
    assert summary["loops"]["ours"]["times_source_loop"] == {"min": 2, "median": 3, "max": 6}
    assert summary["loops"]["ours"]["times_plain_compile"] == {"min": 1.2, "median": 1.5, "max": 4}
    assert summary["loops"]["source_loop"]["times_source_loop"]["median"] == 1


@pytest.mark.medium
@pytest.mark.parametrize("name", ["source_loop", "eager", "airbench_style", "ours"])
def test_a_loop_trains_one_step_per_iteration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = script("loops")
    monkeypatch.setitem(MODELS, "mini", partial(MODELS["resnet"], blocks=(1, 1), channels=(8, 16)))
    execution = ExecutionPlan("cpu", "fp32", "tensor", False, False)
    monkeypatch.setattr(loops, "resolve", lambda recipe: resolve(recipe, execution))
    loop = loops.LOOPS[name](loops.Settings("mini", 32, "crop-flip-cutout", "synthetic:80", "cpu", "fp32"))
    drops_last_batch = name in loops.ON_DEVICE
    assert [next(loop) for _ in range(4)] == ([32] * 4 if drops_last_batch else [32, 32, 16, 32])


def test_on_device_crop_and_flip_returns_possible_crops_and_flips() -> None:
    loops = script("loops")
    padded = F.pad(torch.arange(3 * 32 * 32.0).view(1, 3, 32, 32) + 1, (4, 4, 4, 4)).expand(400, -1, -1, -1)
    crops = [padded[0, :, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    unflipped = {crop.contiguous().numpy().tobytes() for crop in crops}
    flipped = {crop.flip(2).contiguous().numpy().tobytes() for crop in crops}
    images = {image.contiguous().numpy().tobytes() for image in loops.crop_and_flip(padded)}
    assert images <= unflipped | flipped
    assert len(images) > 100
    assert images & unflipped
    assert images & flipped


# The output of the scripts of cifar10-airbench: a warm-up on random labels, then two runs. The name of the last column
# differs between scripts.
TABLE = """
-----------------------------------------------------------------------
|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  {seconds}  |
-----------------------------------------------------------------------
|  warmup  |      0  |     0.1000  |   0.1010  |               |        0.9000  |
|          |   eval  |     0.1000  |   0.1010  |       0.0990  |        1.5000  |
-----------------------------------------------------------------------
Training small proxy...
|       0  |      0  |     0.6000  |   0.6100  |               |        0.3000  |
|          |   eval  |     0.9000  |   0.9310  |       0.9404  |        2.5000  |
-----------------------------------------------------------------------
|       1  |   eval  |     0.9000  |   0.9320  |       0.9398  |        2.5500  |
"""


@pytest.mark.parametrize("seconds", ["time_seconds", "total_time_seconds"])
def test_the_output_of_a_published_script_is_parsed_without_its_warm_up(seconds: str) -> None:
    runs = list(script("airbench").parse_runs(iter(TABLE.format(seconds=seconds).splitlines())))
    assert [run["accuracy"] for run in runs] == [0.9404, 0.9398]
    assert [run["own_s"] for run in runs] == [2.5, 2.55]
    assert [run["without_tta"] for run in runs] == [0.9310, 0.9320]
    assert all(run["compiled"] for run in runs)


def test_seconds_with_compilation_are_reported_separately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    airbench, tables = script("airbench"), script("tables")
    table = TABLE.format(seconds="time_seconds").replace("warmup", "     0")
    runs = [{**run, "since_start_s": 9.0} for run in airbench.parse_runs(iter(table.splitlines()))]
    assert [run["compiled"] for run in runs] == [False, True, True]
    summary = airbench.summarize([{"script": "a.py", "start": "cold", "runs": runs}])
    metrics = summary["scripts"]["a.py"]
    assert (len(metrics["accuracy"]), metrics["own_compiling_s"]) == (3, [runs[0]["own_s"]])
    assert (metrics["own_s"], metrics["cold_s"], metrics["warm_s"]) == ([2.5, 2.55], [9.0], [])
    assert "2.52" in airbench.format_table(summary)
    compiling_only = airbench.summarize([{"script": "a.py", "start": "cold", "runs": runs[:1]}])
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(airbench.results_folder, "RESULTS", tmp_path)
    airbench.results_folder.write("airbench", Environment(device="a CPU"), compiling_only, [])
    assert "| - | 9.0 | - | a CPU |" in tables.airbench()


@pytest.mark.slow
def test_speedruns_are_compared_by_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speedruns = script("speedruns")
    port = tmp_path / "port.py"
    one_run = "".join(
        line for line in TABLE.format(seconds="time_seconds").splitlines(True) if "       1  |" not in line
    )
    port.write_text(
        f"import os, sys; assert sys.argv[1] == '7'; print('flops', 1 + ('GLIBC_TUNABLES' in os.environ))\n"
        f"print({one_run!r})\n"
    )
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    peer = speedruns.measure_run("peer", 0, 7, lambda: speedruns.run_peer(port, 7, tmp_path))
    assert [peer[key] for key in speedruns.METRICS] == [2.5, 0.9404, 0.9310, 1], "without the variable of this process"
    before, after = peer["cpu_matmul_tflop_per_s"]
    assert before > 0
    assert after > 0
    tuned = speedruns.run_peer(port, 7, tmp_path, same_allocator=True)
    assert tuned == {key: 2 if key == "flops" else peer[key] for key in speedruns.METRICS}
    peer["flops"] = 4.5e14
    ours = {**peer, "who": "ours", "seconds": 2.0, "acc_tta": 0.95}
    summary = speedruns.summarize(
        [ours, peer, {**peer, "round": 1}, {**ours, "round": 1, "seconds": 1.0}], "94", "port.py"
    )
    assert summary["ours"]["seconds"] == [2.0, 1.0]
    assert summary["seconds_over_peer"] == {"min": 0.4, "median": pytest.approx(0.6), "max": 0.8}
    assert summary["mean_acc_tta"] == {"ours": pytest.approx(0.95), "peer": pytest.approx(0.9404)}
    same = {**peer, "who": "peer_same_allocator", "seconds": 2.0}
    both = speedruns.summarize([ours, peer, same], "94", "port.py")
    assert both["peer_same_allocator"]["seconds"] == [2.0]
    assert (both["seconds_over_peer"]["median"], both["seconds_over_peer_same_allocator"]["median"]) == (0.8, 1.0)
    tables = script("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(speedruns.results_folder, "RESULTS", tmp_path / "results")
    assert tables.pairs() == "(None recorded yet.)"
    trials, cpu = [ours, peer], Environment(device="a CPU", versions={"torch": "2.11"})
    folder = speedruns.results_folder.write("speed94", cpu, summary, trials)
    measured = cpu.model_copy(update={"matmul_tflop_per_s": {"fp32": 0.1}})
    del summary["config"]["hard_example_size"]  # as in a result that is older than the option
    (folder / "summary.json").write_text(json.dumps(summary))
    assert speedruns.read_trials(folder, "94", "port.py", measured) == trials
    with pytest.raises(SystemExit, match="device a CPU, not a GPU"):
        speedruns.read_trials(folder, "94", "port.py", cpu.model_copy(update={"device": "a GPU"}))
    different = r"epochs 9, not 17, target 0\.94, not 0\.95, peer_script port\.py, not e1\.py"
    with pytest.raises(SystemExit, match=different):
        speedruns.read_trials(folder, "95", "e1.py", cpu)
    ours_row, peer_row = tables.pairs().splitlines()[2:]
    assert "| 94 % | ours, `speed94` | 2 | 95.00 % | 93.10 % | 1.5 | 2.0, 1.0 |" in ours_row
    assert "| 1.5 | 2.0, 1.0 | 0.60 (0.40 to 0.80) | not measured | 0.4500 |" in ours_row
    assert "| 94 % | peer, `port.py` | 2 | 94.04 % | 93.10 % | 2.5 | 2.5, 2.5 |  |  | 0.4500 |" in peer_row
    speedruns.results_folder.write("speed95", Environment(device="a CPU"), both, [])
    ours_row, peer_row, same_row = tables.pairs().splitlines()[4:]
    assert "| 2.0 | 0.80 | 1.00 | 0.4500 |" in ours_row
    assert "| 94 % | peer, `port.py`, allocator of fastcifar | 1 |" in same_row
    port.write_text("print('broken')\n")
    with pytest.raises(SystemExit, match="broken"):
        speedruns.run_peer(port, 7, tmp_path)
    with pytest.raises(SystemExit, match="fastcifar with seed 7 failed with exit code 3; no result is written"):
        speedruns.run_fastcifar("94", 7, str(tmp_path / "nowhere"), tmp_path)


def test_a_published_script_is_stopped_after_its_runs_and_timed_from_process_start(tmp_path: Path) -> None:
    airbench = script("airbench")
    sleeps = (
        f"import time, os; assert os.path.exists('cifar10/test.pt'); print({TABLE.format(seconds='time_seconds')!r})\n"
    )
    (tmp_path / "script.py").write_text(sleeps + "time.sleep(600)\n")
    (tmp_path / "short.py").write_text("print('no table')\n")
    trials = airbench.run_scripts(tmp_path, ["script.py"], "synthetic:50", runs=2, starts=2)
    assert [(trial["start"], len(trial["runs"])) for trial in trials] == [("cold", 2), ("warm", 2)]
    assert all(0 < trial["runs"][0]["since_start_s"] < 60 for trial in trials)
    metrics = airbench.summarize(trials)["scripts"]["script.py"]
    assert metrics["own_s"] == [2.5, 2.55] * 2
    assert (len(metrics["cold_s"]), len(metrics["warm_s"])) == (1, 1)
    for name, message in (("short.py", "no table"), ("none.py", "no none.py")):
        with pytest.raises(SystemExit, match=message):
            airbench.run_scripts(tmp_path, [name], "synthetic:50", runs=1, starts=1)


def test_loops_are_recorded_if_a_published_script_ends_early_and_missing_scripts_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, airbench, rounds = script("run"), script("airbench"), []
    trials = [{"round": 0, "loop": name, "images_per_s": 10.0, **METRICS} for name in PEERS]
    monkeypatch.setattr(run.results_folder, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "run_trials", lambda *_: rounds.append(0) or list(trials))
    monkeypatch.setattr(airbench, "missing_cuda_message", lambda: "")
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", "synthetic:50", "--airbench", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no airbench94_muon\.py"):
        run.main()
    assert not rounds
    for name in airbench.SCRIPTS:
        (tmp_path / name).write_text("print('no table')\n")
    with pytest.raises(SystemExit, match="ended after 0 of 3 runs: no table"):
        run.main()
    (folder,) = (tmp_path / "results").iterdir()
    assert tuple(json.loads((folder / "summary.json").read_text())["loops"]) == PEERS


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_published_scripts_need_cuda(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "peers" / "airbench.py"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (8, "", 1)
    assert "needs CUDA" in run.stderr


def test_the_peers_table_has_a_line_for_each_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, run = script("tables"), script("run")
    trials = [{"round": 0, "loop": name, "images_per_s": 10.0, **METRICS} for name in PEERS]
    monkeypatch.setattr(run.results_folder, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    summary = run.summarize(trials, arch="se68", batch_size=128, augment="none")
    summary["scripts"] = {"a.py": {"accuracy": [0.94, 0.95], "own_s": [2.0, 3.0], "cold_s": [30.0], "warm_s": []}}
    run.results_folder.write("peers-se68", Environment(device="a CPU"), summary, trials)
    assert "| `a.py` | 2 | 94.50 % | 2.50 | 30.0 | - | a CPU |" in tables.airbench()
    lines = tables.peers().splitlines()
    assert len(lines) == 2 + len(PEERS)
    ratios = "1.00 | not measured | 1.00 | not measured"
    assert all(f"| 1 | 10.0 | 10.0 | {ratios} |" in line for line in lines[2:])


def test_the_speedruns_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four results: two runs, one of which reaches the target; a run without TTA and a refused run; a run on the
    validation split, which is not shown; three runs."""
    tables = script("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.speedruns() == "(None recorded yet.)"
    times: dict[str, Any] = {"seconds": 60.0, "train_s": 59.0, "prepare_s": 1.0, "build_s": 9.0}
    costs = RunCosts(params=1000, macs=1, images=1, flops=2 * 10**14)
    accuracies = {"a": [0.939, 0.941], "b": [None], "c": [0.95], "d": [0.93, 0.94, 0.95]}
    for name, tta_accuracies in accuracies.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "env.json").write_text('{"device": "a CPU"}')
        config = Recipe().model_dump(mode="json")
        recipe = SpeedrunRecipe(
            target="94", recipe="small", on="val" if name == "c" else "test", config=config, about=costs
        )
        results = SpeedrunResults(tmp_path / name, recipe, SpeedrunEnvironment())
        for seed, accuracy in enumerate(tta_accuracies):
            cold_start_s = None if seed else 90.2
            trial = SpeedrunTrial(
                seed=seed, acc=0.93, acc_tta=accuracy, cold_start_s=cold_start_s, refused=None, **times
            )
            results.add_trial(trial)
        if name == "b":
            changes = {"seed": 1, "cold_start_s": None, "refused": "it was not finite"}
            results.add_trial(results.trials[0].model_copy(update=changes))
    first, second, third = tables.speedruns().splitlines()[2:]
    assert first == (
        "| `small` | 1,000 | 94 % | 2 | 93.00 (93.00-93.00) % | 94.00 (93.90-94.10) % | 50 % | 60.0 (60.0-60.0) | 90 "
        "| 0.2000 | a CPU | `a` |"
    )
    assert "| 3 | 93.00 ± 0.00 % | 94.00 ± 1.00 % | 67 % | 60.0 ± 0.0 |" in third
    assert "| 1 of 2 | 93.00 % | - | 0 % | 60.0 | 90 | 0.2000 |" in second
    environment = {"device": "a CPU", "untimed": "other programs ran", "chosen": {"precision": "fp32"}}
    (tmp_path / "d" / "env.json").write_text(json.dumps(environment))
    assert "| 67 % | not measured | 90 |" in tables.speedruns().splitlines()[-1]
    (row,) = tables.headline().splitlines()[2:]  # the other results have fewer runs
    assert (
        "a CPU, fp32 | 94.00 ± 1.00 % with test-time augmentation, 93.00 ± 0.00 % without (n=3) | not measured |" in row
    )


def test_spills_are_those_of_the_best_block_size() -> None:
    def kernel(name: str, spilled: int, registers: int = 32) -> dict[str, Any]:
        return {"workload": "step", "kernel": name, "registers": registers, "spill_store_bytes": spilled,
                "shared_bytes": 512}  # fmt: skip

    kernels = [kernel("avoidable", 64), kernel("avoidable", 0, 255), kernel("spilling", 16), kernel("spilling", 8)]
    assert script("compiled_kernels").summarize(kernels) == {
        "kernels": 2, "compiled": 4, "registers": 255, "shared_bytes": 512, "spilling": 1, "spill_bytes": 8,
        "most_spilled": "spilling",
    }  # fmt: skip
    assert script("compiled_kernels").summarize([])["kernels"] == 0


@pytest.mark.medium
def test_training_runs_become_the_trials_of_a_speedrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"blocks": (1, 1), "channels": (8, 8), "lr": 0.05, "epochs": 2, "image_size": "24:1,32", "batch_size": 32}
    options |= {"data": "synthetic:200", "val_size": 0, "compile": False, "precision": "fp32", "device": "cpu"}
    runs = [tmp_path / f"run-{seed}" for seed in range(2)]
    for seed, run in enumerate(runs):
        train(Recipe.make("speed94", seed=seed, out=str(run), **options), recipe_name="speed94")
    out = tmp_path / "result"
    convert = script("speedrun_of_runs")
    for group in runs:
        monkeypatch.setattr(sys, "argv", ["speedrun_of_runs.py", str(group), "--out", str(out)])
        convert.main()
    with pytest.raises(UsageError, match="already has a trial with seed 1"):
        convert.main()
    timed = speedrun(recipe_name="speed94", n=2, out=str(tmp_path / "timed"), **options)
    for name in ("params", "macs", "images", "flops", "seeds", "acc", "acc_tta"):
        assert json.loads((out / "summary.json").read_text())[name] == json.loads(timed.model_dump_json())[name], name
    added, expected = (SpeedrunResults.read(folder).trials for folder in (out, tmp_path / "timed"))
    assert [trial.sha256 for trial in added] == [trial.sha256 for trial in expected]
    assert [trial.steps for trial in added] == [trial.steps for trial in expected]
    train(Recipe.make("speed94", out=str(tmp_path / "split"), **{**options, "val_size": 20}), recipe_name="speed94")
    monkeypatch.setattr(sys, "argv", ["speedrun_of_runs.py", str(tmp_path / "split"), "--out", str(out)])
    with pytest.raises(SystemExit, match="is not a finished run on all training images"):
        convert.main()


@pytest.mark.medium
def test_fine_tuning_starts_from_another_run_and_freezes_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine_tuning = script("fine_tuning")
    for name in ("SOURCE", "TARGET"):
        options = {"arch": "speednet", "width": 0.125, "val_size": 0, "epochs": 1, "batch_size": 10, "compile": False}
        monkeypatch.setattr(fine_tuning, name, options)
        monkeypatch.setattr(fine_tuning, f"{name}_IMAGES", (10, 5))
    data = load_dataset("synthetic:1000")
    selected = fine_tuning.select(data, ("horse", "cat"), (10, 5))
    assert selected["classes"] == ["horse", "cat"]
    assert selected["test"].labels.tolist() == [0] * 5 + [1] * 5
    assert (selected["train"].images[0] == data.train.images[data.train.labels == 7][0]).all()
    summary, runs = fine_tuning.measure(data, [3, 4], tmp_path)
    assert [run["seed"] for run in runs] == [3, 4] * len(fine_tuning.STARTS)
    starts = summary["starts"]
    assert [start["n"] for start in starts.values()] == [2] * len(starts)
    assert starts["init"]["test_acc"] == {
        "mean": pytest.approx(sum(starts["init"]["test_acc"]["trials"]) / 2),
        "std": None,
        "trials": [run["test_acc"] for run in runs[4:6]],
    }
    assert [run["init_sha256"] is None for run in runs] == [True] * 4 + [False] * 6
    trained = [start["trained_params"] for start in starts.values()]
    assert trained[0] == trained[2] > trained[3] > trained[4] > 0
    assert all(list(run["per_class"]) == ["cat", "horse", "truck"] and run["total"] == 15 for run in runs)
