"""Sweeps in one process: killed and gone on with, failed and tried again, changed, planned; and their command."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastcifar.errors import DeviceError, UsageError
from fastcifar.files import lock_folder
from fastcifar.sweep.sweep import plan_sweep, run_sweep
from tests.cli.test_app import fastcifar
from tests.faults import children
from tests.sweep.sweeps import assert_equal_sweeps, file, lines, states


def test_fault01_a_sweep_killed_at_a_third_goes_on_and_repeats_no_run(tmp_path: Path) -> None:
    source, killed, whole = file(tmp_path), tmp_path / "killed", tmp_path / "whole"
    process = children.start(children.fastcifar, tmp_path / "log", 0.02, "sweep", source, "--out", str(killed))

    def in_the_third() -> bool:
        found = [key for key, state in states(killed).items() if state == "running"]
        return len(states(killed)) == 3 and any(
            (killed / "runs" / key / "checkpoints/last.pt").is_file() for key in found
        )

    children.wait_for(in_the_third)
    os.kill(process.pid, signal.SIGKILL)
    assert children.wait_for_exit(process) == -signal.SIGKILL
    with (killed / "trials.jsonl").open("a") as ledger:
        ledger.write('{"trial": "cut sho')
    before = {path: path.read_bytes() for path in killed.glob("runs/*/*.json")}
    done = [path for path in before if path.name == "summary.json"]
    assert len(done) == 2
    found = run_sweep(source, killed)
    assert found["counts"] == {"running": 0, "done": 6, "pruned": 0, "failed": 0}
    assert {path: path.read_bytes() for path in done} == {path: before[path] for path in done}
    assert all((path.parent / "env.json").read_bytes() == before[path.parent / "env.json"] for path in done)
    resumed = [json.loads(path.read_text()).get("resumed", []) for path in killed.glob("runs/*/env.json")]
    assert sorted(map(len, resumed)) == [0, 0, 0, 0, 0, 1]
    other = run_sweep(source, whole)
    assert_equal_sweeps(killed, whole)
    figures = ("trial", "label", "seed", "state", "val_acc", "test_acc")
    assert [[row[name] for name in figures] for row in found["trials"]] == [
        [row[name] for name in figures] for row in other["trials"]
    ]
    length = len(lines(whole))
    assert run_sweep(source, whole) == other
    assert len(lines(whole)) == length


def test_fault05_a_signal_ends_the_sweep_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, stopped = file(tmp_path, "[grid]\nlr = [0.1]\n"), tmp_path / "stopped"
    process = children.start(children.fastcifar, tmp_path / "log", 0.1, "sweep", source, "--out", str(stopped))
    children.wait_for(lambda: len(states(stopped)) == 1 and list(stopped.glob("runs/*/metrics.csv")))
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    assert children.wait_for_exit(process) == 130
    assert list(states(stopped).values()) == ["running"]
    assert "stopped by SIGINT after step" in (tmp_path / "log").read_text()
    run_sweep(source, stopped)
    run_sweep(source, tmp_path / "whole")
    assert_equal_sweeps(stopped, tmp_path / "whole")


def test_a_failed_trial_has_its_reason_and_waits_to_be_tried_again(tmp_path: Path) -> None:
    more = "[[list]]\nlabel='good'\n[[list]]\nlabel='bad'\nbatch_size=400\n"
    source, folder = file(tmp_path, more), tmp_path / "out"
    found = run_sweep(source, folder, seeds="1")
    assert found["counts"] == {"running": 0, "done": 1, "pruned": 0, "failed": 1}
    (failed,) = [row for row in found["trials"] if row["state"] == "failed"]
    assert (failed["label"], failed["test_acc"]) == ("bad", None)
    assert failed["reason"].startswith("--batch-size 400 is larger than the 160 training images")
    told = Console(record=True, width=200)
    assert run_sweep(source, folder, seeds="1", console=told) == found
    assert "2 trials: 1 done, 1 failed (--retry-failed tries again)" in told.export_text()
    assert len(lines(folder)) == 4
    assert run_sweep(source, folder, seeds="1", retry_failed=True)["counts"]["failed"] == 1
    assert [line["state"] for line in lines(folder)[4:]] == ["running", "failed"]


def test_what_is_nobodys_mistake_fails_its_trial_alone_and_leaves_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastcifar.training import train as loop

    finish, called = loop.test_and_summarize, []

    def broken(*given: object) -> object:
        called.append(1)
        if len(called) == 1:
            raise RuntimeError("a bug\nin two lines")
        return finish(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "test_and_summarize", broken)
    found = run_sweep(file(tmp_path, "[grid]\nlr = [0.1]\n"), tmp_path / "out")
    assert [(row["state"], row["reason"]) for row in found["trials"]] == [
        ("failed", "RuntimeError: a bug"),
        ("done", None),
    ]
    assert "in broken" in (tmp_path / "out" / found["trials"][0]["run"] / "error.txt").read_text()


def test_a_changed_file_adds_trials_and_keeps_what_is_done(tmp_path: Path) -> None:
    folder, told = tmp_path / "out", Console(record=True, width=200)
    first = run_sweep(file(tmp_path, "[grid]\nlr = [0.1, 0.02]\n"), folder, seeds="1")
    second = run_sweep(file(tmp_path, "[grid]\nlr = [0.02, 0.005]\n"), folder, seeds="1", console=told)
    text = told.export_text()
    assert "the sweep has changed: 1 trials added, 1 no longer asked for and kept" in text
    assert text.count("seed 0: done") == 1
    assert [row["label"] for row in second["trials"]] == ["lr=0.02", "lr=0.005"]
    assert second["trials"][0] == first["trials"][1]
    last = {line["trial"]: line["label"] for line in lines(folder)}
    assert last[first["trials"][0]["trial"]] == "lr=0.1 (no longer asked for)"
    third = run_sweep(file(tmp_path, "[grid]\nlr = [0.1, 0.02]\n"), folder, seeds="1")
    assert third == first


def test_rows_that_options_made_equal_are_named(tmp_path: Path) -> None:
    told = Console(record=True, width=200)
    more = "[[list]]\nlabel='a'\n[[list]]\nrecipe='row3'\nlabel='b'\n"
    run_sweep(file(tmp_path, more), tmp_path / "out", seeds="1", console=told)
    assert "a and b have the same recipe here" in told.export_text()


def test_a_plan_counts_the_steps_and_writes_nothing(tmp_path: Path) -> None:
    source = file(tmp_path)
    found = plan_sweep(source, tmp_path / "out")
    assert (found["n"], found["steps"]) == (6, 6 * 2 * 5)
    assert {row["state"] for row in found["trials"]} == {"waiting"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    run_sweep(source, tmp_path / "out", seeds="1", max_steps="3")
    found = plan_sweep(source, tmp_path / "out", max_steps="3")
    assert [row["state"] for row in found["trials"]] == ["done"] * 3 + ["waiting"] * 3
    assert found["steps"] == 3 * 3


def test_a_plan_knows_no_steps_of_a_trial_that_will_fail(tmp_path: Path) -> None:
    source = file(tmp_path, "[[list]]\nlabel='good'\n[[list]]\nlabel='bad'\nbatch_size=400\n")
    found = plan_sweep(source, tmp_path / "out", seeds="1")
    assert [(row["label"], row["steps"]) for row in found["trials"]] == [("good", 10), ("bad", None)]
    assert found["steps"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fault17_what_this_machine_lacks_is_found_before_anything_runs_but_another_may_have_it(tmp_path: Path) -> None:
    source = file(tmp_path, "[grid]\ncuda_graph = [false, true]\n")
    with pytest.raises(DeviceError, match="cuda_graph=True: --cuda-graph needs CUDA"):
        run_sweep(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert plan_sweep(source, tmp_path / "out", "ray")["n"] == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("[grid]\nloader = ['tensor', 'tensro']\n", "loader=tensro: unknown loader 'tensro'; did you mean 'tensor'?"),
        (
            "[[list]]\narch = 'speed94'\nblocks = [1, 1, 1, 1]\nchannels = [8, 8, 8, 8]\nimage_size = '16:1,32'\n",
            "speed94 takes no images of 16x16",
        ),
        ("[grid]\nlr = [0.1]\nschedule = ['cosine', 'cosin']\n", "lr=0.1, schedule=cosin: unknown schedule 'cosin'"),
        ("[grid]\noptimizer = ['sgd', 'adamv']\n", "optimizer=adamv: unknown optimizer 'adamv'"),
        ("[[list]]\narch = 'se86'\n", "arch=se86: unknown architecture 'se86'; did you mean 'se68'?"),
        ("[grid]\nclip = ['value:0.1', '0.1']\n", "--clip-grad '0.1'"),
        ("[grid]\naugment = ['flop']\n", "flop"),
    ],
)
def test_fault15_a_wrong_name_is_found_before_anything_runs(tmp_path: Path, more: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_sweep(file(tmp_path, more), tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fault23_a_sweep_that_runs_is_not_run_twice(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"), pytest.raises(UsageError, match="another process"):
        run_sweep(file(tmp_path), tmp_path / "out")
    with pytest.raises(UsageError, match="unknown place 'gpu'; did you mean 'gpus'"):
        run_sweep(file(tmp_path), tmp_path / "new", "gpu")
    assert not (tmp_path / "new").exists()


def test_the_command_ends_with_one_document_and_1_where_a_trial_failed(tmp_path: Path) -> None:
    file(tmp_path, "[[list]]\nlabel='good'\n[[list]]\nlabel='bad'\nbatch_size=400\n")
    run = fastcifar("sweep", "tiny.toml", "--max-steps", "2", "--seeds", "1", "--json", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stdout.count("\n") == 1
    found = json.loads(run.stdout)
    assert (found["sweep"], found["counts"]["done"], found["counts"]["failed"]) == ("sweeps/tiny", 1, 1)
    assert "1 of 2  good, seed 0: done, val" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--dry-run", "--seeds", "1"), 0, "3 trials, 30 steps to go at most; nothing was written"),
        (("--lr", "1"), 2, "fastcifar: --lr: lr is an axis of this sweep; leave it out, or change the file"),
        (("--executor", "gpus"), 8, "fastcifar: --on gpus: no CUDA device is visible; use --on processes"),
    ],
)
def test_the_command_without_a_run(tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    source, out = file(tmp_path), tmp_path / "out"
    command = children.start(children.fastcifar, tmp_path / "log", 0, "sweep", source, "--out", str(out), *arguments)
    assert children.wait_for_exit(command) == code
    assert words in " ".join((tmp_path / "log").read_text().split())
    assert not out.exists()


def test_the_live_table_shows_how_far_trials_are(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        terminal = Console(force_terminal=True, width=100, file=screen)
        run_sweep(file(tmp_path, "[grid]\nlr = [0.1]\n"), tmp_path / "out", console=terminal)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", (tmp_path / "screen").read_text())
    assert "2 of 2 over, 0 running" in shown
    assert re.search(r"lr=0.1 +1 +done +\d+\.\d\d % +\d+\.\d\d %", shown)
