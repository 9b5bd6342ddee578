"""Sweeps in one process: resuming, failed trials, changed sweep files, plans, and the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastcifar.data import cifar
from fastcifar.errors import DeviceError, UsageError
from fastcifar.files import lock_folder
from fastcifar.sweep.sweep import plan_sweep, run_sweep
from fastcifar.training import resolve
from tests.faults import children
from tests.sweep.sweeps import assert_equal_sweeps, read_log_lines, trial_states, write_sweep_file


@pytest.mark.slow
def test_fault01_killed_sweep_is_resumed_without_repeating_runs(tmp_path: Path) -> None:
    source, killed, uninterrupted = write_sweep_file(tmp_path), tmp_path / "killed", tmp_path / "uninterrupted"
    process = children.start(children.fastcifar, tmp_path / "log", 0.02, "sweep", source, "--out", str(killed))

    def third_trial_is_training() -> bool:
        running = [key for key, state in trial_states(killed).items() if state == "running"]
        return len(trial_states(killed)) == 3 and any(
            (killed / "runs" / key / "checkpoints/last.pt").is_file() for key in running
        )

    children.wait_for(third_trial_is_training)
    os.kill(process.pid, signal.SIGKILL)
    assert children.wait_for_exit(process) == -signal.SIGKILL
    with (killed / "trials.jsonl").open("a") as trial_log:
        trial_log.write('{"trial": "incompl')
    before = {path: path.read_bytes() for path in killed.glob("runs/*/*.json")}
    done = [path for path in before if path.name == "summary.json"]
    assert len(done) == 2
    resumed = run_sweep(source, killed)
    assert resumed.counts == {"running": 0, "done": 6, "pruned": 0, "failed": 0}
    assert {path: path.read_bytes() for path in done} == {path: before[path] for path in done}
    assert all((path.parent / "env.json").read_bytes() == before[path.parent / "env.json"] for path in done)
    resumptions = [json.loads(path.read_text()).get("resumed", []) for path in killed.glob("runs/*/env.json")]
    assert sorted(map(len, resumptions)) == [0, 0, 0, 0, 0, 1]
    expected = run_sweep(source, uninterrupted)
    assert_equal_sweeps(killed, uninterrupted)
    columns = {"trial", "label", "seed", "state", "val_acc", "test_acc"}
    assert [row.model_dump(include=columns) for row in resumed.trials] == [
        row.model_dump(include=columns) for row in expected.trials
    ]
    length = len(read_log_lines(uninterrupted))
    assert run_sweep(source, uninterrupted) == expected
    assert len(read_log_lines(uninterrupted)) == length


@pytest.mark.slow
def test_fault05_interrupted_sweep_is_resumed_by_the_same_command(tmp_path: Path) -> None:
    source, stopped = write_sweep_file(tmp_path, "[grid]\nlr = [0.1]\n"), tmp_path / "stopped"
    process = children.start(children.fastcifar, tmp_path / "log", 0.1, "sweep", source, "--out", str(stopped))
    children.wait_for(lambda: len(trial_states(stopped)) == 1 and list(stopped.glob("runs/*/metrics.csv")))
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    assert children.wait_for_exit(process) == 130
    assert list(trial_states(stopped).values()) == ["running"]
    assert "stopped by SIGINT after step" in (tmp_path / "log").read_text()
    run_sweep(source, stopped)
    run_sweep(source, tmp_path / "uninterrupted")
    assert_equal_sweeps(stopped, tmp_path / "uninterrupted")


@pytest.mark.medium
def test_failed_trial_has_a_reason_and_is_rerun_on_request_only(tmp_path: Path) -> None:
    axes = "[[list]]\nlabel='good'\n[[list]]\nlabel='bad'\nbatch_size=400\n"
    source, folder = write_sweep_file(tmp_path, axes), tmp_path / "out"
    document = run_sweep(source, folder, seeds="1")
    assert document.counts == {"running": 0, "done": 1, "pruned": 0, "failed": 1}
    (failed,) = [row for row in document.trials if row.state == "failed"]
    assert (failed.label, failed.test_acc) == ("bad", None)
    assert str(failed.reason).startswith("--batch-size 400 is larger than the 160 training images")
    console = Console(record=True, width=200)
    assert run_sweep(source, folder, seeds="1", console=console) == document
    assert "2 trials: 1 done, 1 failed (--retry-failed reruns them)" in console.export_text()
    assert len(read_log_lines(folder)) == 4
    assert run_sweep(source, folder, seeds="1", retry_failed=True).counts["failed"] == 1
    assert [line["state"] for line in read_log_lines(folder)[4:]] == ["running", "failed"]


@pytest.mark.medium
def test_unexpected_error_fails_only_its_trial_and_its_traceback_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastcifar.training import train as train_module

    summarize_run, calls = train_module.summarize_run, []

    def fail_first_call(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a bug\nin two lines")
        return summarize_run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train_module, "summarize_run", fail_first_call)
    document = run_sweep(write_sweep_file(tmp_path, "[grid]\nlr = [0.1]\n"), tmp_path / "out")
    assert [(row.state, row.reason) for row in document.trials] == [
        ("failed", "RuntimeError: a bug"),
        ("done", None),
    ]
    assert "in fail_first_call" in (tmp_path / "out" / document.trials[0].folder / "error.txt").read_text()


@pytest.mark.medium
def test_changed_sweep_file_adds_trials_and_keeps_finished_ones(tmp_path: Path) -> None:
    folder, console = tmp_path / "out", Console(record=True, width=200)
    first = run_sweep(write_sweep_file(tmp_path, "[grid]\nlr = [0.1, 0.02]\n"), folder, seeds="1")
    second = run_sweep(write_sweep_file(tmp_path, "[grid]\nlr = [0.02, 0.005]\n"), folder, seeds="1", console=console)
    text = console.export_text()
    assert "the sweep file has changed: 1 trials added, 1 removed (their runs are kept)" in text
    assert text.count("seed 0: done") == 1
    assert [row.label for row in second.trials] == ["lr=0.02", "lr=0.005"]
    assert second.trials[0] == first.trials[1]
    last = {line["trial"]: line["label"] for line in read_log_lines(folder)}
    assert last[first.trials[0].trial] == "lr=0.1 (no longer asked for)"
    third = run_sweep(write_sweep_file(tmp_path, "[grid]\nlr = [0.1, 0.02]\n"), folder, seeds="1")
    assert third == first


@pytest.mark.medium
def test_labels_with_identical_recipes_are_reported(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    axes = "[[list]]\nlabel='a'\n[[list]]\nrecipe='row3'\nlabel='b'\n"
    run_sweep(write_sweep_file(tmp_path, axes), tmp_path / "out", seeds="1", console=console)
    assert "a and b have identical recipes" in console.export_text()


@pytest.mark.medium
def test_plan_counts_steps_and_writes_nothing(tmp_path: Path) -> None:
    source = write_sweep_file(tmp_path)
    document = plan_sweep(source, tmp_path / "out")
    assert (document.n, document.steps) == (6, 6 * 2 * 5)
    assert {row.state for row in document.trials} == {"waiting"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    run_sweep(source, tmp_path / "out", seeds="1", max_steps="3")
    document = plan_sweep(source, tmp_path / "out", max_steps="3")
    assert [row.state for row in document.trials] == ["done"] * 3 + ["waiting"] * 3
    assert document.steps == 3 * 3


def test_plan_has_no_steps_for_a_trial_that_will_fail(tmp_path: Path) -> None:
    source = write_sweep_file(tmp_path, "[[list]]\nlabel='good'\n[[list]]\nlabel='bad'\nbatch_size=400\n")
    document = plan_sweep(source, tmp_path / "out", seeds="1")
    assert [(row.label, row.steps) for row in document.trials] == [("good", 10), ("bad", None)]
    assert document.steps is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fault17_unavailable_devices_are_refused_before_anything_runs_except_on_ray(tmp_path: Path) -> None:
    source = write_sweep_file(tmp_path, "[grid]\ncuda_graph = [false, true]\n")
    with pytest.raises(DeviceError, match="cuda_graph=True: --cuda-graph needs CUDA"):
        run_sweep(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert plan_sweep(source, tmp_path / "out", "ray").n == 4


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ("[grid]\nloader = ['tensor', 'tensro']\n", "loader=tensro: unknown loader 'tensro'; did you mean 'tensor'?"),
        (
            "[[list]]\narch = 'speed94'\nblocks = [1, 1, 1, 1]\nchannels = [8, 8, 8, 8]\nimage_size = '16:1,32'\n",
            "speed94 does not accept images of 16x16",
        ),
        ("[grid]\nlr = [0.1]\nschedule = ['cosine', 'cosin']\n", "lr=0.1, schedule=cosin: unknown schedule 'cosin'"),
        ("[grid]\noptimizer = ['sgd', 'adamv']\n", "optimizer=adamv: unknown optimizer 'adamv'"),
        ("[[list]]\narch = 'se86'\n", "arch=se86: unknown architecture 'se86'; did you mean 'se68'?"),
        ("[grid]\nclip_grad = ['value:0.1', '0.1']\n", "--clip-grad should be"),
        ("[grid]\naugment = ['flop']\n", "flop"),
    ],
)
def test_fault15_invalid_values_are_refused_before_anything_runs(tmp_path: Path, axes: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_sweep(write_sweep_file(tmp_path, axes), tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fault23_sweep_folder_is_locked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"), pytest.raises(UsageError, match="another process"):
        run_sweep(write_sweep_file(tmp_path), tmp_path / "out")
    with pytest.raises(UsageError, match="unknown executor 'gpu'; did you mean 'gpus'"):
        run_sweep(write_sweep_file(tmp_path), tmp_path / "new", "gpu")
    assert not (tmp_path / "new").exists()


@pytest.mark.medium
def test_command_prints_one_json_document_and_exits_with_1_if_a_trial_failed(tmp_path: Path) -> None:
    write_sweep_file(tmp_path, "[[list]]\nlabel='good'\n[[list]]\nlabel='bad'\nbatch_size=400\n")
    run = children.run_fastcifar("sweep", "tiny.toml", "--max-steps", "2", "--seeds", "1", "--json", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stdout.count("\n") == 1
    document = json.loads(run.stdout)
    counts = document["counts"]
    assert (document["sweep"], counts["done"], counts["failed"]) == ("sweeps/tiny", 1, 1)
    assert "1 of 2  good, seed 0: done, val" in run.stderr


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--dry-run", "--seeds", "1"), 0, "3 trials, at most 30 steps remaining; nothing was written"),
        (("--lr", "1"), 2, "fastcifar: --lr: lr is varied by the sweep; leave it out, or edit the sweep file"),
        (("--executor", "gpus"), 8, "fastcifar: --executor gpus: no CUDA device is visible; use --executor processes"),
    ],
)
def test_command_that_runs_no_trial(tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    source, out = write_sweep_file(tmp_path), tmp_path / "out"
    command = children.start(children.fastcifar, tmp_path / "log", 0, "sweep", source, "--out", str(out), *arguments)
    assert children.wait_for_exit(command) == code
    assert words in " ".join((tmp_path / "log").read_text().split())
    assert not out.exists()


@pytest.mark.medium
def test_live_table_shows_progress(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        terminal = Console(force_terminal=True, width=100, file=screen)
        run_sweep(write_sweep_file(tmp_path, "[grid]\nlr = [0.1]\n"), tmp_path / "out", console=terminal)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", (tmp_path / "screen").read_text())
    assert "2 of 2 ended, 0 running" in shown
    assert re.search(r"lr=0.1 +1 +done +\d+\.\d\d +\d+\.\d\d ", shown)


def test_fault46_equal_networks_and_optimizers_of_a_sweep_are_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    for module, name in ((resolve, "check_network"), (resolve, "check_optimizer"), (cifar, "load_dataset")):
        function = getattr(module, name)

        def count(*arguments: Any, name: str = name, function: Any = function, **options: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, count)
    source = tmp_path / "sweep.toml"
    source.write_text(
        "[base]\ndata = 'synthetic:200'\narch = 'speednet'\n[grid]\nlr = [0.1, 0.2, 0.3]\n"
        "weight_decay = [0.0, 1e-4, 1e-3]\nbatch_size = [16, 32]\noptimizer = ['sgd', 'adamw']\nwidth = [0.5, 0.25]"
    )
    plan = plan_sweep(str(source), tmp_path / "out")
    assert (plan.n, {trial.steps for trial in plan.trials}) == (72, {200 * 12, 200 * 6})
    assert calls == {"check_network": 2, "check_optimizer": 2, "load_dataset": 1}
    source.write_text(source.read_text().replace("0.25]", "9]"))
    with pytest.raises(UsageError, match=r"lr=0.1, .*, width=9: speednet has [\d,]+ parameters, .* over the budget"):
        plan_sweep(str(source), tmp_path / "out")
