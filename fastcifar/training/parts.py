"""What a run is made of, assembled from its recipe: data, network, optimizer, step, evaluation.

Every name and number of the recipe is checked here, before anything is written. The loop itself is in `train.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.data import cifar
from fastcifar.data.augment import Fill, parse
from fastcifar.data.cifar import Dataset, Split
from fastcifar.data.loaders import LOADERS, Loader
from fastcifar.device import Choice
from fastcifar.errors import DeviceError, pick
from fastcifar.models import KNOBS, build, check_budget, fuse, parameters
from fastcifar.recipe import Recipe
from fastcifar.training import capture, checkpoint
from fastcifar.training.evaluate import Scores, evaluate
from fastcifar.training.optim import OPTIMIZERS, Ema, Optimizer, clipper
from fastcifar.training.schedule import Schedule
from fastcifar.training.step import (
    Forward,
    LossAndHits,
    Meter,
    Step,
    forward_pass,
    loss_and_hits,
    training_step,
)


@dataclass
class Parts:
    """The parts of one run, on its device. Shapes: images uint8 [n,3,32,32], labels int64 [n]."""

    recipe: Recipe
    choice: Choice
    device: torch.device
    data: Dataset
    train: Split
    val: Split
    loader: Loader
    model: nn.Module
    optimizer: Optimizer
    ema: Ema | None
    meter: Meter
    forward: Forward
    schedule: Schedule
    clip: Callable[[], object]

    @property
    def steps(self) -> int:
        """Steps of the whole run, if nothing stops it."""
        return self.recipe.epochs * self.loader.steps_per_epoch

    def lines(self) -> list[str]:
        """What a person should know before the first step."""
        official = "" if self.data.official else ", not the official files"
        own = f"{self.optimizer.name} sets or scales its learning rate itself, beside --schedule {self.recipe.schedule}"
        return [
            f"data: {self.data.name} from {self.data.source}{official}: {len(self.train.labels):,} to train, "
            f"{len(self.val.labels):,} to choose by, {len(self.data.test.labels):,} to test",
            f"network: {self.recipe.arch}, {parameters(self.model):,} parameters",
            f"recipe: {', '.join(f'{key}={value}' for key, value in self.recipe.differing().items()) or 'defaults'}",
            *([f"optimizer: {own}"] if self.optimizer.kind.own_schedule else []),
        ]

    def step(self, function: LossAndHits) -> Step:
        """The training step around `function`, which is compiled or not."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.choice.precision == "fp16")
        return training_step(function, self.optimizer, self.clip, self.meter, self.ema, scaler)

    def fast_step(self) -> Step:
        """The step as this machine runs it fastest, compiled and captured; its state is untouched by that."""
        function = loss_and_hits(self.forward, self.recipe.label_smoothing)
        plain = self.step(function)
        batch_size = self.recipe.batch_size
        example = (
            torch.zeros(batch_size, 3, 32, 32, dtype=torch.uint8, device=self.device).contiguous(
                memory_format=torch.channels_last
            ),
            torch.zeros(batch_size, dtype=torch.int64, device=self.device),
        )
        self.model.train()
        self.meter.bad.fill_(1)  # the warm-up updates nothing: state outside the graph could not be put back
        fast = self.step(capture.compiled(function, self.recipe.compile_mode)) if self.choice.compile else plain
        if self.choice.cuda_graph:
            fast = capture.graphed(fast, example, self.tensors())
        elif self.choice.compile:
            fast = capture.warmed(fast, example, self.tensors())
        self.meter.bad.zero_()
        next(self.loader.batches(0))  # the loader compiles its kernel too, and starts after the capture
        return capture.by_batch_size(fast, plain, batch_size)

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        average = self.ema.tensors() if self.ema else []
        return [*self.model.state_dict().values(), *self.optimizer.tensors(), *self.meter.tensors(), *average]

    def validate(self) -> dict[str, float | None]:
        """The validation columns of metrics.csv: None without a split, or without an average."""
        row: dict[str, float | None] = {"val_loss": None, "val_acc": None, "ema_val_acc": None}
        if len(self.val.labels):
            scores = evaluate(self.model, self.forward, self.val, self.device)
            row["val_loss"], row["val_acc"] = scores.loss, scores.accuracy
            if self.ema:
                with self.ema.applied():
                    row["ema_val_acc"] = evaluate(self.model, self.forward, self.val, self.device).accuracy
        return row

    def test(self, best: Path) -> tuple[Scores, float | None]:
        """The test set, once: scores of the weights the recipe names, and the accuracy of the average beside it.

        The model is left with the weights that were tested.
        """
        average = None
        if self.ema:
            with self.ema.applied():
                scores = evaluate(self.model, self.forward, self.data.test, self.device)
            average = scores.accuracy
            if self.recipe.weights == "ema":
                self.ema.copy_to_live()
                return scores, average
        if self.recipe.weights == "best":
            checkpoint.load_weights(self.model, checkpoint.load(best)["model"], best)
        return evaluate(self.model, self.forward, self.data.test, self.device), average

    def state(self, step: int, epoch: int, best: float | None) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": list(self.data.classes),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(self.model) if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": step,
            "epoch": epoch,
            "best": best,
        }


def assemble(recipe: Recipe, choice: Choice) -> Parts:
    """The parts of a run by `recipe` on the device of `choice`.

    Errors: those of each room, before anything is written.
    """
    device = torch.device(choice.device)
    if device.type == "cpu":
        capture.keep_freed_memory()
    ops = parse(recipe.augment)
    loader_kind = pick(LOADERS, choice.loader, "loader")
    mean, std = normalisation(recipe)
    with torch.device("meta"):  # refuse a wrong network before a download, not after it
        network(recipe, cifar.DATASETS[recipe.dataset].classes)
    data = cifar.load(recipe.data, recipe.dataset)
    torch.manual_seed(recipe.seed)
    model = place(network(recipe, len(data.classes)), device)
    optimizer = Optimizer(model, recipe)
    choice = settled(choice, recipe, optimizer)
    train, val = split_off(data.train, recipe.val_size, recipe.val_seed)
    takes = inspect.signature(loader_kind).parameters
    own = {"compile": choice.compile, "workers": recipe.workers}
    loader = loader_kind(
        train.images,
        train.labels,
        batch_size=recipe.batch_size,
        augment=ops,
        seed=recipe.seed,
        device=device,
        fill=mean_colour(recipe),
        drop_last=recipe.drop_last,
        **{name: value for name, value in own.items() if name in takes},
    )
    return Parts(
        recipe=recipe,
        choice=choice,
        device=device,
        data=data,
        train=train,
        val=val,
        loader=loader,
        model=model,
        optimizer=optimizer,
        ema=Ema(model, recipe.ema) if recipe.ema else None,
        meter=Meter(device),
        forward=forward_pass(model, mean, std, choice.precision, device),
        schedule=Schedule(recipe, loader.steps_per_epoch),
        clip=clipper(recipe.clip, optimizer.parameters),
    )


def settled(choice: Choice, recipe: Recipe, optimizer: Optimizer) -> Choice:
    """`choice` without a CUDA graph where the optimizer cannot be captured.

    Errors: `DeviceError` where the graph was asked for.
    """
    if optimizer.kind.capturable or not choice.cuda_graph:
        return choice
    reason = f"{optimizer.name} counts its steps in Python and cannot be captured"
    if recipe.cuda_graph:
        raise DeviceError(f"--cuda-graph: {reason}", f"leave it out, or choose from {', '.join(OPTIMIZERS)}")
    return replace(choice, cuda_graph=False, reasons={**choice.reasons, "cuda_graph": reason})


def network(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's network, freshly initialised. Errors: `UsageError`, also when it is over the budget."""
    model = build(recipe.arch, num_classes, **{knob: getattr(recipe, knob) for knob in KNOBS})
    check_budget(recipe.arch, model, recipe.max_params)
    if recipe.fused_ops:
        fuse(model)
    return model


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on the device, its convolutions channels_last."""
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def normalisation(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""
    return cifar.normalisation(normalisation_name(recipe))


def normalisation_name(recipe: Recipe) -> str:
    """What `auto` means: the data set's own, but on CIFAR-10 what the coconut networks were published with."""
    if recipe.normalise != "auto":
        return recipe.normalise
    return "kuangliu" if recipe.dataset == "cifar10" and recipe.arch.startswith("coconut") else recipe.dataset


def mean_colour(recipe: Recipe) -> Fill:
    """What augmentations fill with, 0..255 for each channel: it is 0 after normalisation."""
    red, green, blue = (round(255 * value) for value in normalisation(recipe)[0])
    return red, green, blue


def split_off(train: Split, val_size: int, val_seed: int) -> tuple[Split, Split]:
    """The training images without the validation split, and the split."""
    if val_size == 0:
        return train, Split(train.images[:0], train.labels[:0])
    train_index, val_index = cifar.split(train.labels, val_size, val_seed)
    return (
        Split(train.images[train_index], train.labels[train_index]),
        Split(train.images[val_index], train.labels[val_index]),
    )
