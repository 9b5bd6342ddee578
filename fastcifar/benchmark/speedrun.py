"""Measure the time to reach a target accuracy, over n training runs of one recipe.

The time of a run is that of the preparation (all work on the training images before the first step) and the training,
not of building and compiling the trainer. On a CPU, the weights are bit-identical to those of `train` with this seed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from fastcifar.benchmark.bench import synchronize
from fastcifar.benchmark.roofline import measure_cpu_matmul
from fastcifar.benchmark.speedrun_results import (
    RunCosts,
    SpeedrunEnvironment,
    SpeedrunRecipe,
    SpeedrunResults,
    SpeedrunSettings,
    SpeedrunSummary,
    SpeedrunTrial,
)
from fastcifar.device import ExecutionPlan, collect_environment, process_times
from fastcifar.errors import UsageError, lookup
from fastcifar.format import format_percent, format_timestamp, option_flag
from fastcifar.models import count_macs
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.checkpoint import state_dict_sha256
from fastcifar.training.distributed import is_distributed_launch
from fastcifar.training.evaluate import evaluate
from fastcifar.training.phases import Phase, not_trained, untrained_parameters
from fastcifar.training.progress import print_lines, print_scaling
from fastcifar.training.resolve import Resolved, model_from_recipe, resolve
from fastcifar.training.trainer import Trainer

# target accuracy in percent -> recipe
TARGET_RECIPES = {"94": "speed94", "95": "speed95", "96": "speed96"}
EVAL_SPLITS = {"test": "the test set, once per run", "val": "the validation split, for tuning a recipe"}
PER_RUN_OPTIONS = ("seed", "out")  # may differ between the runs of a result folder
# options that a speedrun refuses, because they would change where the timed training starts or ends
FORBIDDEN_OPTIONS = ("init", "patience", "time_budget", "max_steps", "resume")
FLOP_COUNT_IMAGES = 8  # batch size of the passes whose operations are counted


def speedrun(
    target: str | None = None,
    recipe_name: str | None = None,
    n: int = 1,
    eval_split: str | None = None,
    append: Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> SpeedrunSummary:
    """Time `n` training runs and return the summary of all trials in the result folder.

    Args:
        target: target accuracy in percent, a key of `TARGET_RECIPES`; "94" by default.
        recipe_name: recipe to run; by default the recipe of `target`.
        n: number of runs, with consecutive seeds.
        eval_split: "test" (default), where all images are used for training unless `val_size` is given, or "val".
        append: result folder of earlier trials; its recipe is used and its seeds are continued.
        console: console for progress lines; None prints nothing.
        options: recipe options that override the recipe; None values are ignored.

    Raises `UsageError` if the recipe is unsuitable (see `plan_speedrun`) or `append` has another recipe, another
    environment or a trial with one of the seeds, and the other `UserError`s of a training run.
    """
    assert n > 0, n
    earlier = SpeedrunResults.read(append) if append else None
    settings, resolved = plan_speedrun(earlier.recipe if earlier else None, target, recipe_name, eval_split, options)
    if recipe_name or not earlier:
        print_scaling(console, recipe_name or TARGET_RECIPES[settings.target], options)
    seed = options.get("seed")
    first_seed = int(seed) if seed is not None else earlier.next_seed if earlier else resolved.recipe.seed
    seeds = range(first_seed, first_seed + n)
    if earlier:
        earlier.require_compatible(settings, collect_timing_environment(resolved.execution), seeds)
    started = time.perf_counter()
    trainer = build_trainer(with_seed(resolved, first_seed), use_val_folder=resolved.recipe.val_size != 0)
    if settings.on == "test":
        trainer.data.require_test_set()
    print_lines(console, [*trainer.summary_lines(), *trainer.execution.format_lines()])
    recipe = SpeedrunRecipe(**dict(settings), about=count_run_costs(trainer))
    trainer.optimize()
    build_s = time.perf_counter() - started - trainer.prepare_s
    environment = collect_timing_environment(trainer.execution)  # `optimize` may have changed the execution
    with SpeedrunResults.open(append, resolved.recipe.out, recipe, environment, seeds) as results:
        print_lines(console, [f"trials: {results.folder}", f"evaluation: {EVAL_SPLITS[recipe.on]}"])
        for seed in seeds:
            if seed != first_seed:
                build_s = reset_trainer(trainer, seed)
            trial = run_trial(trainer, recipe.on, build_s, recipe.about.flops, is_cold_start=seed == first_seed)
            results.add_trial(trial)
            if seed == first_seed and not append and not environment.cuda:  # after the timed run of this process
                results.add_matmul_rates(measure_cpu_matmul())
            tta = "" if trial.acc_tta is None else f", {format_percent(trial.acc_tta)} with test-time augmentation"
            invalid = f" (invalid: {trial.refused})" if trial.refused else ""
            text = f"seed {seed}: {format_percent(trial.acc)}{tta}, {trial.seconds:.1f} s{invalid}"
            print_lines(console, [text])
        return results.summary()


def collect_timing_environment(execution: ExecutionPlan) -> SpeedrunEnvironment:
    """Return the environment of this process and how it executes the runs."""
    return SpeedrunEnvironment(
        **collect_environment(execution.device).model_dump(),
        chosen=describe_execution(execution),
        started=format_timestamp(),
    )


def describe_execution(execution: ExecutionPlan) -> dict[str, Any]:
    """Return how the runs are executed, for env.json and for each trial."""
    chosen = {name: getattr(execution, name) for name in ("device", "precision", "loader", "winograd")}
    return {**chosen, "compiled": execution.compile}


def plan_speedrun(
    earlier: SpeedrunSettings | None,
    target: str | None,
    recipe_name: str | None,
    eval_split: str | None,
    options: Mapping[str, Any],
) -> tuple[SpeedrunSettings, Resolved]:
    """Return the settings of a speedrun and its resolved recipe; `earlier` replaces arguments that are None.

    Raises `UsageError` if the recipe may stop early or needs a validation split during training, or if there is no data
    to evaluate on.
    """
    if is_distributed_launch():
        raise UsageError("speedrun does not support distributed training", "start it without torchrun")
    target = target or (earlier.target if earlier else "94")
    eval_split = eval_split or (earlier.on if earlier else "test")
    target_recipe = lookup(TARGET_RECIPES, target, "target")
    lookup(EVAL_SPLITS, eval_split, "split")
    overrides = {key: value for key, value in options.items() if value is not None}
    if earlier and not recipe_name:
        recipe_name = earlier.recipe
        recipe = Recipe(**{**earlier.config, **overrides})
    else:
        recipe_name = recipe_name or target_recipe
        recipe = Recipe.make(recipe_name, **overrides)
        if recipe.tta == "none" and "tta" not in overrides:
            recipe = recipe.model_copy(update={"tta": "6view"})
        if eval_split == "test" and "val_size" not in overrides:
            recipe = recipe.model_copy(update={"val_size": 0})
    defaults = Recipe()
    for option in FORBIDDEN_OPTIONS:
        if getattr(recipe, option) != getattr(defaults, option):
            problem = f"{option_flag(option)}: a speedrun trains from scratch for all epochs"
            raise UsageError(problem, "leave it out, or use a recipe without it")
    resolved = resolve(Recipe(**recipe.model_dump()))
    if recipe.eval_weights == "best" or resolved.schedule.uses_val_loss:
        problem = "a speedrun does not evaluate on a validation split during training"
        raise UsageError(problem, "use --eval-weights last and a --schedule that needs no validation loss")
    if eval_split == "val" and recipe.val_size == 0:
        raise UsageError("--eval-split val needs a validation split", "set --val-size")
    config = recipe.model_dump(mode="json", exclude=set(PER_RUN_OPTIONS))
    if not str(recipe.data).startswith("synthetic"):
        config["data"] = None  # the path of a data set differs between machines
    settings = SpeedrunSettings(target=target, recipe=Path(recipe_name).stem, on=eval_split, config=config)
    return settings, resolved


def with_seed(resolved: Resolved, seed: int) -> Resolved:
    """Return `resolved` with another seed."""
    return replace(resolved, recipe=resolved.recipe.model_copy(update={"seed": seed}))


def run_trial(trainer: Trainer, eval_split: str, build_s: float, flops: int, is_cold_start: bool) -> SpeedrunTrial:
    """Time the training, then evaluate the model.

    The trial is invalid if a loss or gradient was NaN or Inf, or if the evaluation changed the weights.
    """
    synchronize(trainer.device)
    started = time.perf_counter()
    train_without_evaluation(trainer)
    synchronize(trainer.device)
    train_s = time.perf_counter() - started
    times = process_times() if is_cold_start else None
    refused = None if trainer.meter.compute().all_finite else "the loss or a gradient became NaN or Inf"
    sha256 = state_dict_sha256(trainer.model.state_dict())
    split, tta = trainer.data.test if eval_split == "test" else trainer.val_split, trainer.recipe.tta
    scores = evaluate(trainer.model, trainer.eval_forward, split, trainer.device)
    acc_tta = None
    if tta != "none":
        acc_tta = evaluate(trainer.model, trainer.eval_forward, split, trainer.device, tta).accuracy
    if state_dict_sha256(trainer.model.state_dict()) != sha256:
        refused = "the evaluation changed the weights"
    return SpeedrunTrial(
        seed=trainer.recipe.seed,
        **describe_execution(trainer.execution),
        flops=flops,
        build_s=build_s,
        seconds=trainer.prepare_s + train_s,
        train_s=train_s,
        prepare_s=trainer.prepare_s,
        cold_start_s=times[1] if times else None,
        acc=scores.accuracy,
        acc_tta=acc_tta,
        loss=scores.loss,
        sha256=sha256,
        steps=trainer.progress.step,
        refused=refused,
    )


def train_without_evaluation(trainer: Trainer) -> None:
    """Run the training steps of `train`, and leave the model with the weights to be evaluated."""
    progress = trainer.progress
    trainer.model.train()
    while progress.epoch < trainer.recipe.epochs:
        for batch in trainer.batches(progress.epoch):
            trainer.train_step(batch)
        progress.epoch, progress.epoch_step = progress.epoch + 1, 0
    if trainer.ema and trainer.recipe.eval_weights == "ema":
        trainer.ema.copy_to_model()


def reset_trainer(trainer: Trainer, seed: int) -> float:
    """Load the initial state for `seed` into the compiled `trainer`; return the seconds, excluding the preparation."""
    started = time.perf_counter()
    new_trainer = build_trainer(with_seed(trainer.resolved, seed), trainer.data)
    trainer.resolved, trainer.loader, trainer.schedule = new_trainer.resolved, new_trainer.loader, new_trainer.schedule
    trainer.prepare_s = new_trainer.prepare_s
    trainer.load_state_dict(new_trainer.state_dict())
    trainer.warm_up_loader()  # as `optimize` does for the first run
    return time.perf_counter() - started - trainer.prepare_s


def count_run_costs(trainer: Trainer) -> RunCosts:
    """Count the costs of a run; each training image counts once per epoch."""
    slicing, epochs = trainer.loader.slicing, trainer.recipe.epochs
    images = epochs * min(slicing.num_samples, slicing.steps_per_epoch * slicing.batch_size)
    flops = count_flops(trainer.resolved, len(trainer.data.classes), images)
    return RunCosts(params=trainer.num_params, macs=count_macs(trainer.model), images=images, flops=flops)


def count_flops(resolved: Resolved, num_classes: int, num_images: int) -> int:
    """Return the operations of convolutions and matrix products in the training on `num_images` images.

    A multiply-accumulate is two operations. The model runs in each phase of the recipe, on the meta device if it
    supports that.
    """
    recipe = resolved.recipe
    unfused = recipe.model_copy(update={"fused_ops": False})  # the same number of operations
    model = model_from_recipe(unfused, num_classes, for_inspection=True)
    device = next(model.parameters()).device

    def count(image_size: int, backward: bool) -> float:
        images = torch.empty(FLOP_COUNT_IMAGES, 3, image_size, image_size, device=device)
        with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
            output = model(images).sum()
            if backward:
                output.backward()
        return counter.get_total_flops() / FLOP_COUNT_IMAGES

    fraction = recipe.hard_example_fraction
    selection = count(recipe.hard_example_size, backward=False) if fraction < 1 else 0
    flops_per_image: dict[Phase, float] = {}
    for phase in dict.fromkeys(resolved.phases):
        with not_trained(untrained_parameters(model, phase)):
            flops_per_image[phase] = selection + fraction * count(phase.image_size, backward=True)
    return round(sum(flops_per_image[phase] for phase in resolved.phases) * num_images / recipe.epochs)
