"""What a user sees of a capture that fails: in `fastcifar train`, with `--cuda-graph`, and in `doctor --check`."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stub_faults import read_loss_in_step, replace

from fastcifar import device
from fastcifar.recipe import Recipe
from fastcifar.training import cuda_graph, execution_check

Outcome = dict[str, Any]


def run_command(folder: Path, *arguments: str) -> Outcome:
    """Run `fastcifar` in this process; return its exit code, output and reports."""
    from fastcifar.cli import app

    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    sys.argv = ["fastcifar", *arguments]
    out, errors, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            app.main()
        except SystemExit as error:
            code = error.code
    reports = [path.read_text() for path in sorted((folder / "state").rglob("*.txt"))]
    return {"code": code, "stdout": out.getvalue(), "stderr": errors.getvalue(), "reports": reports}


def train(recipe: Recipe, folder: Path, *arguments: str) -> Outcome:
    """Train with a step that cannot be captured; with dropout, it draws random numbers during the failed capture."""
    read_loss_in_step()
    file = folder / "recipe.toml"
    file.write_text(recipe.model_copy(update={"dropout": 0.3, "optimizer": "lookahead:sgd"}).to_toml())
    run = folder / "run"
    outcome = run_command(folder, "train", "--recipe", str(file), "--out", str(run), *arguments)
    summary = run / "summary.json"
    return {**outcome, "summary": json.loads(summary.read_text()) if summary.exists() else None}


def check(recipe: Recipe, folder: Path) -> Outcome:
    """Run the check; differences between arbitrary values are not compared."""
    replace(execution_check, "flat_weights", lambda flat_weights: lambda trainer: flat_weights(trainer).nan_to_num())
    replace(execution_check.Training, "difference", lambda _: lambda training, reference: (0.0, 0.0))
    replace(device, "probe_import", lambda _: lambda module: "works")
    return run_command(folder, "doctor", "--check", "--json", "--no-compile", "--loader", "tensor")


def check_with_fault(recipe: Recipe, folder: Path) -> Outcome:
    read_loss_in_step()
    return check(recipe, folder)


def use_torch_after_failed_capture(recipe: Recipe, folder: Path) -> Outcome:
    """The state of torch after a capture that CUDA has invalidated."""
    values = torch.ones(2**20, device="cuda")
    other_stream, stream = torch.cuda.Stream(), torch.cuda.current_stream()
    torch.cuda.manual_seed(1)

    def capture(work: Callable[[], object]) -> None:
        try:
            cuda_graph.capture_cuda_graph(work)
        except RuntimeError as error:
            messages.append(str(error).splitlines()[0])

    def active_bytes() -> int:
        return torch.cuda.memory_stats()["active_bytes.all.current"]

    messages: list[str] = []
    before = active_bytes(), torch.cuda.memory_reserved()
    capture(lambda: torch.nn.functional.dropout(values, 0.5).sum().item())
    gc.collect()
    torch.cuda.empty_cache()
    outcome: Outcome = {
        "messages": messages,
        "stream": torch.cuda.current_stream() == stream,
        "gc": gc.isenabled(),
        "memory": (active_bytes(), torch.cuda.memory_reserved()) == before,
        "seed": torch.cuda.initial_seed(),
    }
    torch.rand(4, device="cuda")
    # while a capture seems to be under way, torch does not reuse the memory of another stream's tensors
    used_twice = torch.empty(2**20, device="cuda")
    used_twice.record_stream(other_stream)
    del used_twice
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    outcome["reuse"] = active_bytes() == before[0]
    replay = cuda_graph.capture_cuda_graph(lambda: torch.nn.functional.dropout(values, 0.5))
    replay()
    return outcome


FAILED_CAPTURES: dict[str, Callable[[Recipe, Path], Outcome]] = {
    "capture fails": train,
    "requested capture fails": lambda recipe, folder: train(recipe, folder, "--cuda-graph"),
    "check": check,
    "check of a capture that fails": check_with_fault,
    "torch after a failed capture": use_torch_after_failed_capture,
}
