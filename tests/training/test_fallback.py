"""Compilation and captures that fail: what is used instead, the warning, the report, and requested options."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch

from fastcifar import device
from fastcifar.benchmark.bench import bench
from fastcifar.data import batch_loader
from fastcifar.device import ExecutionPlan, choose_execution
from fastcifar.errors import DeviceError, InsufficientMemoryError, UsageError
from fastcifar.evaluation.load_run import load_model
from fastcifar.recipe import Recipe
from fastcifar.training import compilation, cuda_graph, evaluate, fallback
from fastcifar.training.fallback import ExecutionError, run_stage, run_with_fallback
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.faults import children
from tests.training.optimizer_helpers import make_trainer

CPU = torch.device("cpu")
SECRET = "the secret folder"


class PlantedError(Exception):
    """A failure that a test plants in the compiler or in a capture."""


@pytest.fixture(autouse=True)
def log_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the reports."""
    monkeypatch.setattr(platformdirs, "user_log_dir", lambda _: str(tmp_path / "log"))
    return tmp_path / "log"


def fail_to_compile(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make every function that torch.compile returns raise `error`."""

    def compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def compiled(*_: Any) -> None:
            raise error

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    batch_loader.compile_gather.cache_clear()  # it may hold kernels of other tests


def fail_to_capture(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def capture(work: Callable[[], object]) -> None:
        work()  # a capture executes the Python code of a step
        raise error

    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", capture)


def plan_execution(trainer: Trainer, **execution: bool) -> None:
    trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, **execution))


def read_report(folder: Path) -> str:
    """Return the text of the only report."""
    (path,) = folder.iterdir()
    return path.read_text(encoding="utf-8")


@pytest.mark.medium
def test_training_continues_in_eager_mode_if_compilation_fails(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, log_folder: Path
) -> None:
    """The results equal those of a run without compilation."""
    recipe = tiny(compile=None, dropout=0.1)
    fail_to_compile(monkeypatch, PlantedError("no compiler\nsecond line"))
    with pytest.warns(UserWarning, match="torch.compile failed") as caught:
        summary = train(recipe)
    assert [str(warning.message) for warning in caught] == [
        "torch.compile failed (PlantedError: no compiler); continuing with eager steps without a CUDA graph; "
        f"a report to attach to a bug report is in {next(log_folder.iterdir())}"
    ]
    assert (summary.compiled, summary.cuda_graph) == (False, False)
    assert summary.reasons["compile"] == "torch.compile failed (PlantedError: no compiler)"
    assert json.loads((Path(summary.run) / "summary.json").read_text())["compiled"] is False
    reference = train(recipe.model_copy(update={"compile": False}))
    assert (summary.test_loss, summary.val_acc) == (reference.test_loss, reference.val_acc)


@pytest.mark.medium
def test_report_holds_what_a_bug_report_needs_and_no_paths_of_the_user(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, log_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    fail_to_compile(monkeypatch, PlantedError(f"in {tmp_path}/file"))
    trainer = make_trainer(tiny(compile=None, lr=0.025, out=SECRET))
    with pytest.warns(UserWarning, match="torch.compile failed"):
        trainer.optimize()
    text = read_report(log_folder)
    expected = (
        "rank 0 of 1: torch.compile failed (PlantedError: in ~/file)",
        "compile: on (C++ compiler",
        "compile: off (torch.compile failed",
        "lr = 0.025",
        f'"torch": "{torch.__version__.partition("+")[0]}',
        "Traceback (most recent call last)",
        "in _run_locally",
    )
    assert [part for part in expected if part not in text] == []
    assert SECRET not in text
    assert str(tmp_path) not in text


@pytest.mark.medium
@pytest.mark.parametrize("failing", ["capture", "compile", "both"])
def test_failed_option_is_switched_off_and_the_other_one_is_kept(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, failing: str, log_folder: Path
) -> None:
    """The state of the run is unchanged, and the steps equal those of the eager step."""
    monkeypatch.setattr(compilation, "compile_function", lambda function, mode="auto": function)
    monkeypatch.setattr(evaluate, "compile_function", lambda function, mode="auto": function)
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: work)
    values = {"compile": None, "winograd": False, "ema_decay": 0.9, "dropout": 0.1, "augment": "none"}
    reference, trainer = (make_trainer(tiny(**values)) for _ in range(2))
    plan_execution(trainer, compile=True, cuda_graph=True)
    if failing != "compile":
        fail_to_capture(monkeypatch, PlantedError("not permitted"))
    if failing != "capture":

        def compile_function(function: Callable[..., Any], mode: str = "auto") -> Callable[..., Any]:
            def compiled(*inputs: Any) -> Any:
                function(*inputs)  # changes the running statistics and the random state
                raise PlantedError("no compiler")

            return compiled

        monkeypatch.setattr(compilation, "compile_function", compile_function)
    with pytest.warns(UserWarning, match="failed") as caught:
        trainer.optimize()
    assert len(caught) == 1
    assert (trainer.execution.compile, trainer.execution.cuda_graph) == (failing == "capture", failing == "compile")
    assert len(re.findall(r"== traceback \d ==", read_report(log_folder))) == (2 if failing == "both" else 1)
    for owner in (reference, trainer):
        torch.manual_seed(1)
        for batch in owner.batches(0):
            owner.train_step(batch)
    pairs = zip(trainer.state_tensors(), reference.state_tensors(), strict=True)
    assert all(torch.equal(tensor, expected) for tensor, expected in pairs)


@pytest.mark.parametrize("option", ["compile", "compile_mode", "cuda_graph"])
def test_requested_option_is_never_switched_off(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, option: str, log_folder: Path
) -> None:
    monkeypatch.setattr(compilation, "enable_compile_cache", lambda: None)
    requested = {"compile": True, "compile_mode": "default", "cuda_graph": True}[option]
    trainer = make_trainer(tiny(compile=None if option != "cuda_graph" else False))
    recipe = trainer.recipe.model_copy(update={option: requested})
    trainer.resolved = replace(trainer.resolved, recipe=recipe)
    failed = "cuda_graph" if option == "cuda_graph" else "compile"
    plan_execution(trainer, **{failed: True})
    fail_to_compile(monkeypatch, PlantedError("no compiler"))
    fail_to_capture(monkeypatch, PlantedError("not permitted"))
    with pytest.raises(
        DeviceError, match=rf"failed \(PlantedError: .*\); use --no-{failed.replace('_', '-')}"
    ) as caught:
        trainer.optimize()
    assert caught.value.exit_code == 8
    assert str(next(log_folder.iterdir())) in str(caught.value)
    assert "PlantedError" in read_report(log_folder)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UsageError("a wrong option"), UsageError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), InsufficientMemoryError),
        (MemoryError(), InsufficientMemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda value: type(value).__name__,
)
def test_user_errors_and_a_lack_of_memory_are_not_failures_of_a_stage(
    error: BaseException, expected: type[BaseException]
) -> None:
    """Neither are they if another error, such as one of the compiler, was raised from them."""

    def function() -> None:
        try:
            raise error
        except Exception as cause:
            raise PlantedError("while compiling") from cause

    with pytest.raises(expected):
        run_stage("compile", function, CPU)


def test_lost_device_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, log_folder: Path) -> None:
    """Restoring the state on that device raises another error, which must not hide the first one."""
    monkeypatch.setattr(fallback, "is_usable", lambda device: False)

    def fail() -> None:
        raise PlantedError("illegal memory access")

    def build(plan: ExecutionPlan, compile_mode: str) -> None:
        try:
            run_stage("cuda_graph", fail, CPU)
        finally:
            raise RuntimeError("cannot restore")

    plan = replace(choose_execution(Recipe(device="cpu")), compile=True, cuda_graph=True)
    with pytest.raises(ExecutionError, match="can no longer use the GPU; use --no-cuda-graph"):
        run_with_fallback(build, plan, Recipe())
    assert "illegal memory access" in read_report(log_folder)


def test_other_errors_are_not_caught(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the eager step has nothing to do with compilation or captures."""
    trainer = make_trainer(tiny())
    plan_execution(trainer, cuda_graph=True)
    monkeypatch.setattr(Trainer, "build_step", lambda *_: (_ for _ in ()).throw(PlantedError("in the step")))
    with pytest.raises(PlantedError):
        trainer.optimize()


@pytest.mark.medium
def test_warning_if_the_report_cannot_be_written(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, log_folder: Path
) -> None:
    log_folder.write_text("a file")
    fail_to_compile(monkeypatch, PlantedError("no compiler"))
    with pytest.warns(UserWarning, match="the report could not be written"):
        make_trainer(tiny(compile=None)).optimize()


@pytest.mark.medium
def test_failed_autotuning_falls_back_to_the_default_mode(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, log_folder: Path
) -> None:
    modes = []

    def compile_function(function: Callable[..., Any], mode: str = "auto") -> Callable[..., Any]:
        def compiled(*inputs: Any) -> Any:
            modes.append(mode)
            if mode != "auto":
                raise PlantedError("no kernel")
            return function(*inputs)

        return compiled

    monkeypatch.setattr(compilation, "compile_function", compile_function)
    trainer = make_trainer(tiny())
    plan_execution(trainer, compile=True)
    with pytest.warns(UserWarning, match="continuing with the default mode of torch.compile; a report"):
        trainer.optimize("max-autotune-no-cudagraphs")
    assert trainer.execution.compile
    modes.clear()
    trainer.train_step(next(trainer.batches(0)))
    assert modes == ["auto"]


@pytest.mark.medium
def test_evaluation_falls_back_too(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    summary = train(tiny())
    loaded = load_model(summary.run)
    fail_to_compile(monkeypatch, PlantedError("no compiler"))
    with pytest.warns(UserWarning, match="torch.compile failed"):
        loaded.compile_for(evaluate.MIN_IMAGES_TO_COMPILE)
    assert not loaded.execution.compile
    assert loaded.forward(torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape == (3, 10)
    requested = load_model(summary.run, compile=True)
    with pytest.raises(ExecutionError, match="use --no-compile"):
        requested.compile_for(1)


def test_benchmark_of_a_mode_that_fails_is_an_error(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, log_folder: Path
) -> None:
    """A fallback would be measured under the name of the requested mode."""
    fail_to_compile(monkeypatch, PlantedError("no compiler"))
    with pytest.raises(ExecutionError, match="use --no-compile; a report"):
        bench(tiny(), "step", trials=1, trial_s=0.01, grid={"mode": ["compiled"]})
    with pytest.raises(ExecutionError, match="use --no-compile; a report"):
        bench(tiny(compile=None), "infer", trials=1, trial_s=0.01)


def train_rank(rank: int, port: int, option: str, folder: Path) -> None:
    """Train as one of two ranks, of which rank 1 fails to compile or to capture."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["XDG_STATE_HOME"] = str(folder / "state")

    def fail(*_: Any) -> Any:
        raise RuntimeError("planted in rank 1")

    device.AUTOMATIC_CHOICES["compile"] = device.AUTOMATIC_CHOICES["cuda_graph"] = lambda _: (True, "test")
    fails: Any = rank == 1 and option
    torch.compile = lambda function, **_: fail if fails == "compile" else function
    cuda_graph.capture_cuda_graph = lambda work: fail() if fails == "cuda_graph" else work
    arguments = ["--arch", "resnet", "--blocks", "1,1", "--channels", "8,16", "--device", "cpu", "--precision", "fp32"]
    arguments += ["--data", "synthetic:300", "--val-size", "44", "--batch-size", "64", "--augment", "flip", "--json"]
    arguments += ["--epochs", "2", "--out", str(folder / "run")]
    children.fastcifar(folder / f"{rank}.log", 0.0, "train", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["compile", "cuda_graph"])
def test_all_ranks_switch_off_an_option_that_fails_on_one_of_them(option: str, tmp_path: Path) -> None:
    """Otherwise the ranks would wait for each other forever: the step exchanges gradients. Rank 0 warns."""
    port = children.free_port()
    ranks = [children.start(train_rank, rank, port, option, tmp_path) for rank in range(2)]
    codes = [children.wait_for_exit(rank) for rank in ranks]
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], logs
    (document,) = [line for log in logs for line in log.splitlines() if line.startswith("{")]
    summary = json.loads(document)
    assert summary["compiled"] == (option != "compile")
    assert summary["cuda_graph"] == (option != "cuda_graph")
    assert summary["complete"]
    (line,) = [line for log in logs for line in log.splitlines() if "warning" in line and "fastcifar" in line]
    assert "failed (RuntimeError: planted in rank 1); continuing with" in line
    (report,) = (tmp_path / "state").rglob("*.txt")
    assert "rank 1 of 2: " in report.read_text()
