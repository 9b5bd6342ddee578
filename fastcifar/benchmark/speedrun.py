"""Time to an accuracy: n runs of one recipe, of which the clock and the evaluation belong to this harness.

Build (assembling, compiling) is free and reported. Prepare, what needs the training images before the first step, is
charged. Training is timed without a look at anything. Then the network is evaluated, and hashed before and after. The
runs share one process and its compiled code; each equals `train` by the same recipe and seed, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastcifar.benchmark.bench import synchronize
from fastcifar.benchmark.speedrun_results import SpeedrunResults
from fastcifar.device import choose_execution, collect_environment, process_times
from fastcifar.errors import UsageError, lookup
from fastcifar.format import format_percent, option_flag
from fastcifar.models import count_macs, count_parameters
from fastcifar.recipe import Recipe
from fastcifar.renamed import upgrade_options
from fastcifar.training.build import build_trainer
from fastcifar.training.distributed import is_distributed_launch
from fastcifar.training.evaluate import evaluate
from fastcifar.training.lr_schedule import SCHEDULES
from fastcifar.training.progress import print_lines
from fastcifar.training.resolve import model_from_recipe
from fastcifar.training.run_dir import Clock
from fastcifar.training.step import TrainStep
from fastcifar.training.trainer import Trainer

# target in percent -> its recipe
TARGET_RECIPES = {"94": "speed94", "95": "speed95", "96": "speed96", "96.5": "speed96"}
EVAL_SPLITS = {"test": "the test set, once a run", "val": "the validation split, to tune a recipe on"}
PER_RUN_OPTIONS = ("seed", "out")  # what runs of one result may differ in
FORBIDDEN_OPTIONS = (
    "patience",
    "time_budget",
    "max_steps",
    "resume",
)  # what would end or begin a run elsewhere than its recipe
FLOP_COUNT_IMAGES = 8  # images whose operations are counted


@dataclass(frozen=True)
class SpeedrunPlan:
    """What is run: `target` a row of TARGETS, `name` the recipe's, `on` a row of SPLITS."""

    target: str
    recipe_name: str
    eval_split: str
    recipe: Recipe

    def document(self) -> dict[str, Any]:
        """What two results must have in common to be one; of a data set not its place, unless it is synthetic."""
        config = {
            key: value for key, value in self.recipe.model_dump(mode="json").items() if key not in PER_RUN_OPTIONS
        }
        config["data"] = config["data"] if str(config["data"]).startswith("synthetic") else None
        return {"target": self.target, "recipe": self.recipe_name, "on": self.eval_split, "config": config}


def speedrun(
    target: str | None = None,
    recipe_name: str | None = None,
    n: int = 1,
    eval_split: str | None = None,
    append: Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs the recipe `name` with the seeds from its own on, `n` of them; the summary of all trials of its folder.

    `target` (94) decides the recipe where none is named. `on`: "test" (default), after training on all images unless
    `val_size` is given, or "val". `append`: a folder of earlier trials, whose recipe it takes and whose seeds it goes
    on from. `knobs`: of the recipe, those that are not None. Errors: those of `train`, and `UsageError` for another
    recipe or clock than the folder's, and for a recipe that ends early.
    """
    found = SpeedrunResults.read(append) if append else None
    plan = plan_speedrun(found.document if found else {}, target, recipe_name, eval_split, options)
    first = options.get("seed")
    first = int(first) if first is not None else found.next_seed if found else plan.recipe.seed
    recipes = [plan.recipe.model_copy(update={"seed": first + index}) for index in range(n)]
    choice, seeds = choose_execution(plan.recipe), [recipe.seed for recipe in recipes]
    chosen = {name: getattr(choice, name) for name in ("device", "precision", "loader")} | {"compiled": choice.compile}
    machine = {**collect_environment(choice.device), "chosen": chosen}
    if found:
        found.require_compatible(plan.document(), machine, seeds)
    started = time.perf_counter()
    parts = build_trainer(recipes[0], choice)
    print_lines(console, [*parts.summary_lines(), *parts.execution.format_lines()])
    flops = count_flops(plan.recipe, len(parts.data.classes), count_training_images(parts))
    about = {
        "params": count_parameters(parts.model),
        "macs": count_macs(parts.model),
        "images": count_training_images(parts),
        "flops": flops,
    }
    with SpeedrunResults.open(append, plan.recipe.out, plan.document(), about, machine, seeds) as tally:
        print_lines(console, [f"trials: {tally.folder}", f"evaluation: {EVAL_SPLITS[plan.eval_split]}"])
        step = parts.build_train_step()
        build_s = time.perf_counter() - started - parts.prepare_s
        for recipe in recipes:
            if recipe is not recipes[0]:
                build_s = reset_trainer_for_recipe(parts, recipe)
            trial = {
                **time_training(parts, step, is_cold_start=recipe is recipes[0]),
                **evaluate_trial(parts, plan.eval_split),
            }
            tally.add_trial({"seed": recipe.seed, **chosen, "flops": flops, "build_s": build_s, **trial})
            print_lines(console, [format_trial(tally.trials[-1])])
        return {"folder": str(tally.folder), **tally.summary()}


def plan_speedrun(
    document: Mapping[str, Any],
    target: str | None,
    recipe_name: str | None,
    eval_split: str | None,
    options: Mapping[str, Any],
) -> SpeedrunPlan:
    """What is asked for, by a folder's `document` where it has one and nothing else is said.

    Errors: `UsageError` for unknown names, and for a recipe whose runs end early or that has nothing to evaluate on.
    """
    if is_distributed_launch():
        raise UsageError("speedrun is for one process", "start it without torchrun")
    target, eval_split = str(target or document.get("target", "94")), str(eval_split or document.get("on", "test"))
    own = lookup(TARGET_RECIPES, target, "target")
    lookup(EVAL_SPLITS, eval_split, "split")
    asked = {key: value for key, value in options.items() if value is not None}
    if document and not recipe_name:
        recipe_name, recipe = (
            str(document["recipe"]),
            Recipe.from_dict({**upgrade_options(document["config"]), **asked}),
        )
    else:
        recipe_name = recipe_name or own
        recipe = Recipe.make(recipe_name, **({"val_size": 0} if eval_split == "test" else {}) | asked)
        if recipe.tta == "none" and "tta" not in asked:
            recipe = recipe.model_copy(update={"tta": "6view"})
    defaults = Recipe()
    for knob in FORBIDDEN_OPTIONS:
        if getattr(recipe, knob) != getattr(defaults, knob):
            raise UsageError(f"{option_flag(knob)}: a timed run goes from the start to its last epoch", "leave it out")
    if recipe.eval_weights == "best" or lookup(SCHEDULES, recipe.schedule.partition(":")[0], "schedule").uses_val_loss:
        raise UsageError("a timed run looks at no validation split", "use --eval-weights last and another --schedule")
    if eval_split == "val" and not recipe.val_size:
        raise UsageError("--on val needs a validation split", "give --val-size")
    return SpeedrunPlan(target, Path(recipe_name).stem, eval_split, recipe)


def time_training(trainer: Trainer, step: TrainStep, is_cold_start: bool) -> dict[str, Any]:
    """Trains, and says how long that took: `seconds` are those of `prepare_s` and `train_s`.

    `cold`: the first run of this process, whose seconds since it was started are told too, where the system knows.
    """
    synchronize(trainer.device)
    started = time.perf_counter()
    train_without_evaluation(trainer, step)
    synchronize(trainer.device)
    train_s = time.perf_counter() - started
    figures = {"seconds": trainer.prepare_s + train_s, "train_s": train_s, "prepare_s": trainer.prepare_s}
    return {**figures, "cold_start_s": process_uptime_s() if is_cold_start else None}


def train_without_evaluation(trainer: Trainer, step: TrainStep) -> None:
    """The run's steps as the loop of `train` takes them, and nothing else; the model is left with the weights that the
    recipe evaluates."""
    progress = trainer.progress
    trainer.model.train()
    while progress.epoch < trainer.recipe.epochs:
        for batch in trainer.batches(progress.epoch):
            trainer.optimizer.set_lr(trainer.schedule.lr_at(progress.step))
            step(*batch)
            progress.step += 1
            trainer.optimizer.after_step(progress.step, trainer.meter.found_inf)
        progress.epoch += 1
    if trainer.ema and trainer.recipe.eval_weights == "ema":
        trainer.ema.copy_to_model()


def reset_trainer_for_recipe(trainer: Trainer, recipe: Recipe) -> float:
    """`parts`, which are compiled, become the run of another seed; the seconds of that without what is charged.

    Its own parts are assembled as for any run, and their state goes the way of a checkpoint into the tensors that the
    compiled step is bound to.
    """
    started = time.perf_counter()
    fresh = build_trainer(recipe, trainer.execution)
    state = fresh.checkpoint_state(Clock())
    trainer.recipe, trainer.loader, trainer.schedule = fresh.recipe, fresh.loader, fresh.schedule
    trainer.prepare_s = fresh.prepare_s
    trainer.load_checkpoint_state(state)
    trainer.warm_up_loader()  # as in `fast_step`
    return time.perf_counter() - started - trainer.prepare_s


def evaluate_trial(trainer: Trainer, eval_split: str) -> dict[str, Any]:
    """Accuracies on the split `on`, the network's hash, and why the run does not count, if it does not.

    What does not count is a run that was not finite, and one whose weights the evaluation changed.
    """
    finite = trainer.meter.compute().is_finite
    sha256 = state_dict_sha256(trainer.model.state_dict())
    split = trainer.data.test if eval_split == "test" else trainer.val_split
    scores = evaluate(trainer.model, trainer.eval_forward, split, trainer.device)
    tta = trainer.recipe.tta
    with_tta = (
        evaluate(trainer.model, trainer.eval_forward, split, trainer.device, tta).accuracy if tta != "none" else None
    )
    refused = None if finite else "the loss or a gradient was not finite"
    if state_dict_sha256(trainer.model.state_dict()) != sha256:
        refused = "the evaluation changed the weights"
    found = {"acc": scores.accuracy, "acc_tta": with_tta, "loss": scores.loss, "sha256": sha256}
    return {**found, "steps": trainer.progress.step, "refused": refused}


def state_dict_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """sha256 of the names, weights and statistics of a state dict."""
    digest = hashlib.sha256()
    for name, value in state_dict.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def count_training_images(trainer: Trainer) -> int:
    """Training images of a whole run, each as often as it is seen."""
    steps = trainer.loader.slicing
    return trainer.recipe.epochs * min(steps.num_samples, steps.steps_per_epoch * steps.batch_size)


def count_flops(recipe: Recipe, num_classes: int, num_images: int) -> int:
    """Floating-point operations of the forward and backward passes of `images`, as torch's FlopCounterMode counts them.

    Convolutions and matrix products, two operations a multiply-accumulate, on a few images of each size; nothing is
    computed (meta device). The optimizer's are left out, and those of evaluation.
    """
    with torch.device("meta"):
        model = model_from_recipe(recipe.model_copy(update={"fused_ops": False}), num_classes)  # the same operations
    epochs = [recipe.image_size_at(epoch) for epoch in range(recipe.epochs)]
    of_image: dict[int, float] = {}
    for size in dict.fromkeys(epochs):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(FLOP_COUNT_IMAGES, 3, size, size, device="meta")).sum().backward()
        of_image[size] = counter.get_total_flops() / FLOP_COUNT_IMAGES
    return round(sum(of_image[size] for size in epochs) * num_images / len(epochs))


def process_uptime_s() -> float | None:
    """Seconds since this process was started; None where the system does not say."""
    times = process_times()
    return times[1] if times else None


def format_trial(trial: Mapping[str, Any]) -> str:
    """A trial as progress."""
    tta = "" if trial["acc_tta"] is None else f", {format_percent(trial['acc_tta'])} with test-time augmentation"
    why = f" (does not count: {trial['refused']})" if trial["refused"] else ""
    return f"seed {trial['seed']}: {format_percent(trial['acc'])}{tta}, {trial['seconds']:.1f} s{why}"
