"""Time to an accuracy: n runs of one recipe, of which the clock and the evaluation belong to this harness.

Build (assembling, compiling) is free and reported. Prepare, what needs the training images before the first step, is
charged. Training is timed without a look at anything. Then the network is evaluated, and hashed before and after. The
runs share one process and its compiled code; each equals `train` by the same recipe and seed, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastcifar.benchmark.bench import synchronise
from fastcifar.benchmark.speedrun_results import Tally
from fastcifar.device import choose, environment
from fastcifar.errors import UsageError, pick
from fastcifar.models import macs, parameters
from fastcifar.recipe import Recipe, option
from fastcifar.training.distributed import launched
from fastcifar.training.evaluate import evaluate
from fastcifar.training.lr_schedule import SCHEDULES
from fastcifar.training.progress import say
from fastcifar.training.run_dir import Clock
from fastcifar.training.step import Step
from fastcifar.training.trainer import Parts, assemble, network

# target in percent -> its recipe
TARGETS = {"94": "speed94", "95": "speed95", "96": "speed96", "96.5": "speed96"}
SPLITS = {"test": "the test set, once a run", "val": "the validation split, to tune a recipe on"}
FREE = ("seed", "out")  # what runs of one result may differ in
CUTTING = ("patience", "time_budget", "max_steps", "resume")  # what would end or begin a run elsewhere than its recipe
COUNTED = 8  # images whose operations are counted


@dataclass(frozen=True)
class Plan:
    """What is run: `target` a row of TARGETS, `name` the recipe's, `on` a row of SPLITS."""

    target: str
    name: str
    on: str
    recipe: Recipe

    def document(self) -> dict[str, Any]:
        """What two results must have in common to be one; of a data set not its place, unless it is synthetic."""
        config = {key: value for key, value in self.recipe.model_dump(mode="json").items() if key not in FREE}
        config["data"] = config["data"] if str(config["data"]).startswith("synthetic") else None
        return {"target": self.target, "recipe": self.name, "on": self.on, "config": config}


def speedrun(
    target: str | None = None,
    name: str | None = None,
    n: int = 1,
    on: str | None = None,
    append: Path | None = None,
    console: Console | None = None,
    **knobs: Any,
) -> dict[str, Any]:
    """Runs the recipe `name` with the seeds from its own on, `n` of them; the summary of all trials of its folder.

    `target` (94) decides the recipe where none is named. `on`: "test" (default), after training on all images unless
    `val_size` is given, or "val". `append`: a folder of earlier trials, whose recipe it takes and whose seeds it goes
    on from. `knobs`: of the recipe, those that are not None. Errors: those of `train`, and `UsageError` for another
    recipe or clock than the folder's, and for a recipe that ends early.
    """
    found = Tally.read(append) if append else None
    plan = planned(found.document if found else {}, target, name, on, knobs)
    first = knobs.get("seed")
    first = int(first) if first is not None else found.next_seed if found else plan.recipe.seed
    recipes = [plan.recipe.model_copy(update={"seed": first + index}) for index in range(n)]
    choice, seeds = choose(plan.recipe), [recipe.seed for recipe in recipes]
    chosen = {name: getattr(choice, name) for name in ("device", "precision", "loader")} | {"compiled": choice.compile}
    machine = {**environment(choice.device), "chosen": chosen}
    if found:
        found.require_same(plan.document(), machine, seeds)
    started = time.perf_counter()
    parts = assemble(recipes[0], choice)
    say(console, [*parts.lines(), *parts.choice.lines()])
    flops = operations(plan.recipe, len(parts.data.classes), images(parts))
    about = {"params": parameters(parts.model), "macs": macs(parts.model), "images": images(parts), "flops": flops}
    with Tally.open(append, plan.recipe.out, plan.document(), about, machine, seeds) as tally:
        say(console, [f"trials: {tally.folder}", f"evaluation: {SPLITS[plan.on]}"])
        step = parts.fast_step()
        build_s = time.perf_counter() - started - parts.prepare_s
        for recipe in recipes:
            if recipe is not recipes[0]:
                build_s = following(parts, recipe)
            trial = {**timed(parts, step, cold=recipe is recipes[0]), **graded(parts, plan.on)}
            tally.add({"seed": recipe.seed, **chosen, "flops": flops, "build_s": build_s, **trial})
            say(console, [told(tally.trials[-1])])
        return {"folder": str(tally.folder), **tally.summary()}


def planned(
    document: Mapping[str, Any], target: str | None, name: str | None, on: str | None, knobs: Mapping[str, Any]
) -> Plan:
    """What is asked for, by a folder's `document` where it has one and nothing else is said.

    Errors: `UsageError` for unknown names, and for a recipe whose runs end early or that has nothing to evaluate on.
    """
    if launched():
        raise UsageError("speedrun is for one process", "start it without torchrun")
    target, on = str(target or document.get("target", "94")), str(on or document.get("on", "test"))
    own = pick(TARGETS, target, "target")
    pick(SPLITS, on, "split")
    asked = {key: value for key, value in knobs.items() if value is not None}
    if document and not name:
        name, recipe = str(document["recipe"]), Recipe.checked({**document["config"], **asked})
    else:
        name = name or own
        recipe = Recipe.make(name, **({"val_size": 0} if on == "test" else {}) | asked)
        if recipe.tta == "none" and "tta" not in asked:
            recipe = recipe.model_copy(update={"tta": "6view"})
    defaults = Recipe()
    for knob in CUTTING:
        if getattr(recipe, knob) != getattr(defaults, knob):
            raise UsageError(f"{option(knob)}: a timed run goes from the start to its last epoch", "leave it out")
    if recipe.weights == "best" or pick(SCHEDULES, recipe.schedule.partition(":")[0], "schedule").watches:
        raise UsageError("a timed run looks at no validation split", "use --weights last and another --schedule")
    if on == "val" and not recipe.val_size:
        raise UsageError("--on val needs a validation split", "give --val-size")
    return Plan(target, Path(name).stem, on, recipe)


def timed(parts: Parts, step: Step, cold: bool) -> dict[str, Any]:
    """Trains, and says how long that took: `seconds` are those of `prepare_s` and `train_s`.

    `cold`: the first run of this process, whose seconds since it was started are told too, where the system knows.
    """
    synchronise(parts.device)
    started = time.perf_counter()
    fit(parts, step)
    synchronise(parts.device)
    train_s = time.perf_counter() - started
    figures = {"seconds": parts.prepare_s + train_s, "train_s": train_s, "prepare_s": parts.prepare_s}
    return {**figures, "cold_start_s": process_s() if cold else None}


def fit(parts: Parts, step: Step) -> None:
    """The run's steps as the loop of `train` takes them, and nothing else; the model is left with the weights that the
    recipe evaluates."""
    progress = parts.progress
    parts.model.train()
    while progress.epoch < parts.recipe.epochs:
        for batch in parts.batches(progress.epoch):
            parts.optimizer.set_lr(parts.schedule.lr_at(progress.step))
            step(*batch)
            progress.step += 1
            parts.optimizer.between_steps(progress.step, parts.meter.bad)
        progress.epoch += 1
    if parts.ema and parts.recipe.weights == "ema":
        parts.ema.copy_to_live()


def following(parts: Parts, recipe: Recipe) -> float:
    """`parts`, which are compiled, become the run of another seed; the seconds of that without what is charged.

    Its own parts are assembled as for any run, and their state goes the way of a checkpoint into the tensors that the
    compiled step is bound to.
    """
    started = time.perf_counter()
    fresh = assemble(recipe, parts.choice)
    state = fresh.state(Clock())
    parts.recipe, parts.loader, parts.schedule = fresh.recipe, fresh.loader, fresh.schedule
    parts.prepare_s = fresh.prepare_s
    parts.load(state)
    parts.start_loader()  # as in `fast_step`
    return time.perf_counter() - started - parts.prepare_s


def graded(parts: Parts, on: str) -> dict[str, Any]:
    """Accuracies on the split `on`, the network's hash, and why the run does not count, if it does not.

    What does not count is a run that was not finite, and one whose weights the evaluation changed.
    """
    finite = parts.meter.read().finite
    sha256 = fingerprint(parts.model.state_dict())
    split = parts.data.test if on == "test" else parts.val
    scores = evaluate(parts.model, parts.inference, split, parts.device)
    tta = parts.recipe.tta
    with_tta = evaluate(parts.model, parts.inference, split, parts.device, tta).accuracy if tta != "none" else None
    refused = None if finite else "the loss or a gradient was not finite"
    if fingerprint(parts.model.state_dict()) != sha256:
        refused = "the evaluation changed the weights"
    found = {"acc": scores.accuracy, "acc_tta": with_tta, "loss": scores.loss, "sha256": sha256}
    return {**found, "steps": parts.progress.step, "refused": refused}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 of the names, weights and statistics of a state dict."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def images(parts: Parts) -> int:
    """Training images of a whole run, each as often as it is seen."""
    steps = parts.loader.steps
    return parts.recipe.epochs * min(steps.samples, steps.per_epoch * steps.batch_size)


def operations(recipe: Recipe, num_classes: int, images: int) -> int:
    """Floating-point operations of the forward and backward passes of `images`, as torch's FlopCounterMode counts them.

    Convolutions and matrix products, two operations a multiply-accumulate, on a few images of each size; nothing is
    computed (meta device). The optimizer's are left out, and those of evaluation.
    """
    with torch.device("meta"):
        model = network(recipe.model_copy(update={"fused_ops": False}), num_classes)  # the same operations
    epochs = [recipe.size_at(epoch) for epoch in range(recipe.epochs)]
    of_image: dict[int, float] = {}
    for size in dict.fromkeys(epochs):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(COUNTED, 3, size, size, device="meta")).sum().backward()
        of_image[size] = counter.get_total_flops() / COUNTED
    return round(sum(of_image[size] for size in epochs) * images / len(epochs))


def process_s() -> float | None:
    """Seconds since this process was started; None where /proc does not say."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return None


def told(trial: Mapping[str, Any]) -> str:
    """A trial as progress."""
    tta = "" if trial["acc_tta"] is None else f", {100 * trial['acc_tta']:.2f} % with test-time augmentation"
    why = f" (does not count: {trial['refused']})" if trial["refused"] else ""
    return f"seed {trial['seed']}: {100 * trial['acc']:.2f} %{tta}, {trial['seconds']:.1f} s{why}"
