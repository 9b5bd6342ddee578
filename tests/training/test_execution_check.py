"""`fastcifar doctor --check` on the CPU: modes that agree, differ or fail. tests/cuda_stub tests captured steps."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastcifar import device
from fastcifar.errors import DeviceError
from fastcifar.training import compilation, execution_check
from fastcifar.training.execution_check import TOLERANCES, Training, check_execution, check_tables
from tests.cli.test_exit import run_main

OPTIONS: dict[str, Any] = {
    "device": "cpu", "precision": "fp32", "loader": "torchvision", "workers": 0,
    "data": "synthetic:340", "val_size": 60, "batch_size": 64,  # less than a user's check, with a short last batch
}  # fmt: skip


@pytest.fixture(autouse=True)
def fast_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time few steps, replace the compiler, and write reports to a temporary folder."""
    monkeypatch.setattr(execution_check, "TIMED_S", 0.0)
    monkeypatch.setattr(platformdirs, "user_log_dir", lambda _: str(tmp_path))
    replace_compiler(monkeypatch, lambda loss: loss)


def replace_compiler(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Make compiled functions return the loss that `change` returns."""

    def compile_function(function: Callable[..., Any], mode: str = "auto") -> Callable[..., Any]:
        def compiled(*inputs: Any) -> Any:
            loss, correct = function(*inputs)
            return change(loss), correct

        return compiled

    monkeypatch.setattr(compilation, "compile_function", compile_function)


def fail(_: Tensor) -> Tensor:
    raise RuntimeError("no compiler")


@pytest.mark.slow
def test_modes_that_agree() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    check = check_execution({**OPTIONS, "winograd": False}, console)
    assert [mode.outcome for mode in check.modes] == ["reference", "agrees"]
    assert check.works
    assert check.verdict == "compiled steps agree with eager steps; no CUDA graph (CUDA only)"
    assert (check.modes[1].loss_difference, check.modes[1].update_difference) == (0.0, 0.0)
    console.print(check_tables(check))
    printed = console.export_text().splitlines()
    assert max(map(len, printed)) <= 80
    assert "compiled: compiling the step ..." in printed


@pytest.mark.medium
def test_only_eager_mode() -> None:
    check = check_execution({**OPTIONS, "compile": False})
    assert check.verdict == "eager steps work; no compilation (requested); no CUDA graph (CUDA only)"
    assert check.works


@pytest.mark.medium
@pytest.mark.parametrize("factor", [1.05, 0.0])
def test_modes_that_differ(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Each loss is off by five percent, or the weights are not updated."""
    replace_compiler(monkeypatch, lambda loss: loss * factor if factor else loss.detach() + 0 * loss)
    check = check_execution(OPTIONS)
    assert [mode.outcome for mode in check.modes] == ["reference", "differs"]
    assert not check.works
    assert check.verdict == "compiled steps differ from eager steps: train with --no-compile, and please report this"


@pytest.mark.medium
@pytest.mark.parametrize(
    ("requested", "verdict"),
    [
        (None, "compiled steps failed; a run continues with eager steps without a CUDA graph"),
        (True, "compiled steps failed, and so would a run with these options"),
    ],
)
def test_mode_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, requested: bool | None, verdict: str) -> None:
    replace_compiler(monkeypatch, fail)
    check = check_execution({**OPTIONS, "compile": requested})
    assert [mode.outcome for mode in check.modes] == ["reference", "failed"]
    assert "torch.compile failed (RuntimeError: no compiler)" in str(check.modes[1].error)
    assert (check.works, check.verdict) == (False, verdict)
    assert len(list(tmp_path.iterdir())) == 1
    assert "traceback 1" in next(tmp_path.iterdir()).read_text()


@pytest.mark.medium
def test_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch, lambda loss: loss * torch.nan)
    check = check_execution(OPTIONS)
    assert check.modes[1].error == "the loss or a weight is not finite"
    assert not check.works
    json.dumps(check.model_dump(), allow_nan=False)


@pytest.mark.medium
def test_interruption_and_invalid_options_are_not_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    replace_compiler(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_execution(OPTIONS)
    with pytest.raises(DeviceError, match="--cuda-graph needs CUDA"):
        check_execution({**OPTIONS, "cuda_graph": True})


@pytest.mark.parametrize("precision", TOLERANCES)
def test_tolerances_find_a_wrong_learning_rate(precision: str) -> None:
    """Half of the learning rate changes the weights half as much."""
    update = torch.arange(1.0, 9.0)
    losses = torch.tensor([2.3, 2.2])
    _, difference = Training(losses, update / 2).difference(Training(losses, update))
    assert difference == pytest.approx(0.5)
    assert difference > TOLERANCES[precision][1]


@pytest.mark.medium
def test_command_prints_progress_and_one_document(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "probe_import", lambda _: "works")
    arguments = ["doctor", "--check", "--no-compile", "--device", "cpu", "--json"]
    assert run_main(arguments, monkeypatch) == 0
    printed = capfd.readouterr()
    assert "eager: training ..." in printed.err
    (line,) = printed.out.splitlines()
    assert json.loads(line)["check"]["verdict"].startswith("eager steps work")
