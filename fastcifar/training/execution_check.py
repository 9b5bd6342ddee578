"""`fastcifar doctor --check`: train a small network in each execution mode on this device, and compare the results."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console, Group
from rich.text import Text
from torch import Tensor

from fastcifar.device import ExecutionPlan
from fastcifar.errors import UserError
from fastcifar.format import NumericTable, format_decimal, one_line
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.fallback import describe_step, free_memory
from fastcifar.training.progress import print_lines
from fastcifar.training.resolve import resolve
from fastcifar.training.trainer import Trainer

# Eleven steps, the last of them with 20 images, and a validation. The activation is smooth: for ReLU, a rounding error
# of an activation near 0 may change its sign and with it the gradient.
RECIPE: dict[str, Any] = {
    "arch": "resnet",
    "blocks": (1, 1),
    "channels": (16, 32),
    "se": "block",
    "activation": "silu",
    "data": "synthetic:1500",
    "val_size": 200,
    "augment": "crop:4:zero,flip",
    "epochs": 1,
    "batch_size": 128,
    "lr": 0.01,
}
TIMED_S = 1.0  # seconds for which the step of each mode is timed

# precision -> largest relative differences from eager mode: of a loss, and of the change of all weights in the epoch
TOLERANCES = {"fp32": (1e-3, 1e-2), "tf32": (1e-2, 1e-1), "fp16": (1e-2, 1e-1), "bf16": (5e-2, 2e-1)}


class ModeResult(BaseModel):
    """The result of an execution mode. Without an `error`, a value is None only in eager mode, the reference."""

    mode: str  # "eager", "compiled" or "captured"
    compiled: bool
    cuda_graph: bool
    error: str | None = None  # why the mode does not work
    prepare_s: float | None = None  # seconds to build, to compile and to capture
    step_ms: float | None = None
    loss_difference: float | None = None
    update_difference: float | None = None
    agrees: bool | None = None  # whether both differences are within the tolerances

    @property
    def outcome(self) -> str:
        return "failed" if self.error else {True: "agrees", False: "differs", None: "reference"}[self.agrees]


class ExecutionCheck(BaseModel):
    """The entry `check` of the document of `fastcifar doctor --check --json`."""

    device: str
    precision: str
    loader: str
    loss_tolerance: float
    update_tolerance: float
    modes: list[ModeResult]
    works: bool  # every mode that a run may use works and agrees with eager mode
    verdict: str
    seconds: float


@dataclass(frozen=True)
class Training:
    """What one epoch of training computes: the losses of the steps and of the validation, the change of all weights."""

    losses: Tensor
    update: Tensor

    def difference(self, reference: Training) -> tuple[float, float]:
        """Return the largest relative difference of a loss, and the relative difference of `update`."""
        loss = ((self.losses - reference.losses) / reference.losses).abs().max()
        update = (self.update - reference.update).norm() / reference.update.norm()
        return loss.item(), update.item()


def check_execution(options: dict[str, Any], console: Console | None = None) -> ExecutionCheck:
    """Train a small network in eager mode and in each mode that a run with the recipe `options` uses, and compare.

    Raises a `UserError` if an option is invalid, or if the device or the loader is not available.
    """
    started = time.perf_counter()
    recipe = Recipe.make(**{**RECIPE, **options})
    plan = resolve(recipe).execution
    tolerances = TOLERANCES[plan.precision]
    modes = [("eager", False, False)]
    modes += [("compiled", True, False)] * plan.compile + [("captured", True, True)] * plan.cuda_graph
    results: list[ModeResult] = []
    reference: Training | None = None
    used = plan
    for mode, compile, cuda_graph in modes:
        # if compilation fails, a run captures the eager step
        compile = compile and used.compile
        wanted = replace(plan, compile=compile, cuda_graph=cuda_graph, winograd=plan.winograd and compile)
        result = ModeResult(mode=mode, compiled=wanted.compile, cuda_graph=cuda_graph)
        results.append(result)
        try:
            training, trained_with = run_mode(recipe, wanted, result, console)
        except Exception as error:  # there is no fallback: a run would end with this error
            result.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
            training, trained_with = None, wanted
        used = replace(used, compile=used.compile and (trained_with.compile or not wanted.compile))
        used = replace(used, cuda_graph=used.cuda_graph and (trained_with.cuda_graph or not cuda_graph))
        if training and reference and result.error is None:
            result.loss_difference, result.update_difference = differences = training.difference(reference)
            result.agrees = all(value <= limit for value, limit in zip(differences, tolerances, strict=True))
        print_lines(console, [describe_result(result)])
        reference = reference or training
        if training is None or (mode == "eager" and result.error):
            break
    return ExecutionCheck(
        device=plan.device,
        precision=plan.precision,
        loader=plan.loader,
        loss_tolerance=tolerances[0],
        update_tolerance=tolerances[1],
        modes=results,
        works=all(result.outcome in ("agrees", "reference") for result in results),
        verdict=find_verdict(results, plan, used),
        seconds=time.perf_counter() - started,
    )


def run_mode(
    recipe: Recipe, wanted: ExecutionPlan, result: ModeResult, console: Console | None
) -> tuple[Training, ExecutionPlan]:
    """Train for an epoch and time the step; return what was computed, and with which execution.

    If a fallback replaces `wanted`, its warning becomes the `error` of `result`. NaN and Inf are errors, too.
    """
    free_memory()  # of the mode before
    started = time.perf_counter()
    trainer = build_trainer(resolve(recipe, wanted))
    work = [*["compiling"] * wanted.compile, *["capturing"] * wanted.cuda_graph]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        print_lines(console, [f"{result.mode}: {' and '.join(work)} the step ..."] if work else [])
        trainer.optimize(start_loader=False)
        print_lines(console, [f"{result.mode}: starting the loader ..."])
        trainer.warm_up_loader()
    result.prepare_s = time.perf_counter() - started
    if (trainer.execution.compile, trainer.execution.cuda_graph) != (wanted.compile, wanted.cuda_graph):
        result.error = str(caught[-1].message)
    print_lines(console, [f"{result.mode}: training ..."])
    training = train_epoch(trainer)
    if result.error is None and not torch.isfinite(torch.cat((training.losses, training.update))).all():
        result.error = "the loss or a weight is not finite"
    if result.error is None:
        result.step_ms = time_step_ms(trainer)
    return training, trainer.execution


def train_epoch(trainer: Trainer) -> Training:
    """Train for one epoch, and validate."""
    initial = flat_weights(trainer)
    trainer.model.train()
    losses = []
    for batch in trainer.batches(0):
        trainer.train_step(batch)
        losses.append(trainer.meter.compute().loss)
        trainer.meter.reset()
    losses.append(trainer.validate()["val_loss"])
    return Training(torch.tensor(losses, dtype=torch.float64), flat_weights(trainer) - initial)


def flat_weights(trainer: Trainer) -> Tensor:
    """Return all parameters in one vector, float64 on the host."""
    return torch.cat([weight.detach().flatten().double().cpu() for weight in trainer.model.parameters()])


def time_step_ms(trainer: Trainer) -> float:
    """Return the milliseconds of a step on a full batch, without the loader; the steps change the weights."""
    batch = trainer.example_batch()
    trainer.model.train()
    started, steps, more = time.perf_counter(), 0, 1
    while (seconds := time.perf_counter() - started) < TIMED_S or not steps:
        for _ in range(more):
            trainer.step(*batch)
        trainer.meter.compute()  # waits for the device
        steps, more = steps + more, 2 * more
    return 1e3 * seconds / steps


def describe_result(result: ModeResult) -> str:
    """Return a line for the user: `compiled: 12.1 s to prepare, 8.4 ms a step, agrees`."""
    if result.error:
        return f"{result.mode}: {result.error}"
    return f"{result.mode}: {result.prepare_s:.1f} s to prepare, {result.step_ms:.2f} ms a step, {result.outcome}"


def find_verdict(results: list[ModeResult], plan: ExecutionPlan, used: ExecutionPlan) -> str:
    """Return the conclusion in a sentence; `used`: what a run of `plan` uses after its fallbacks."""
    by_outcome = {outcome: [r for r in results if r.outcome == outcome] for outcome in ("agrees", "differs", "failed")}
    if differs := by_outcome["differs"]:
        flag = "--no-cuda-graph" if differs[0].cuda_graph else "--no-compile"
        return f"{differs[0].mode} steps differ from eager steps: train with {flag}, and please report this"
    if failed := by_outcome["failed"]:
        if used == plan:  # there was no fallback
            return f"{failed[0].mode} steps failed, and so would a run with these options"
        return f"{failed[0].mode} steps failed; a run continues with {describe_step(used)}"
    agrees = " and ".join(result.mode for result in by_outcome["agrees"])
    verdict = f"{agrees} steps agree with eager steps" if agrees else "eager steps work"
    reasons = [
        f"no {name} ({plan.reasons[key]})"
        for key, name in (("compile", "compilation"), ("cuda_graph", "CUDA graph"))
        if not getattr(plan, key)
    ]
    return "; ".join([verdict, *reasons])


def check_tables(check: ExecutionCheck) -> Group:
    """Return the table of the modes, and the verdict."""
    title = f"{check.precision} on {check.device}, loader {check.loader}"
    table = NumericTable(["mode"], ("prepare (s)", "step (ms)", "loss diff.", "update diff.", "result"), title)
    for result in check.modes:
        differences = (
            "-" if value is None else f"{value:.1e}" for value in (result.loss_difference, result.update_difference)
        )
        table.add_row(
            result.mode,
            format_decimal(result.prepare_s, 1),
            format_decimal(result.step_ms, 2),
            *differences,
            result.outcome,
        )
    limits = f"relative differences from eager mode; allowed: {check.loss_tolerance:g}, {check.update_tolerance:g}"
    return Group(table, Text(limits), "", Text(f"verdict: {check.verdict}"))  # as text, without markup
