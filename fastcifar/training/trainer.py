"""What a run is made of, assembled from its recipe: data, network, optimizer, step, evaluation.

Every name and number of the recipe is checked here, before anything is written. The loop itself is in `train.py`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.data import cifar
from fastcifar.data.augment import SIDE, Op, draw_mix, parse, split_mixer
from fastcifar.data.cifar import Dataset, Split
from fastcifar.data.loaders import LOADERS, Loader, mixed_batches
from fastcifar.data.mixers import MIXERS
from fastcifar.device import Choice, deterministic_only
from fastcifar.errors import DeviceError, UsageError, pick
from fastcifar.models import KNOBS, build, check_budget, fuse, macs, parameters
from fastcifar.recipe import Recipe, image_sizes
from fastcifar.training import checkpoint, cuda_graph
from fastcifar.training.build_data import loader_of, normalisation, normalised, split_off
from fastcifar.training.distributed import World, world
from fastcifar.training.evaluate import COMPILE_FROM, VIEWS, Scores, evaluate, fast_forward
from fastcifar.training.lr_schedule import Schedule
from fastcifar.training.optimizers import OPTIMIZERS, Ema, Optimizer, clipper
from fastcifar.training.rng_state import random_state, seed_all, set_random_state
from fastcifar.training.run_dir import Clock, Progress
from fastcifar.training.step import (
    Forward,
    LossAndHits,
    Meter,
    Statistics,
    Step,
    forward_pass,
    loss_and_hits,
    mixed_loss_and_hits,
    resized,
    training_step,
)

FIRST = 5000  # training images that a network may start from


@dataclass(frozen=True)
class Tested:
    """What the test set said: scores of the recipe's weights; accuracy of the average of the weights, if there is one,
    and of the recipe's weights over the views of `--tta`, if it was asked for."""

    scores: Scores
    ema_acc: float | None
    tta_acc: float | None


@dataclass
class Parts:
    """The parts of one run, on its device. Shapes: images uint8 [n,3,32,32], labels int64 [n].

    `augment` is the whole list; the loader applies it but for a mixer, which is the step's.
    """

    recipe: Recipe
    choice: Choice
    augment: tuple[Op, ...]
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
    inference: Forward  # the same pass as evaluation runs it: `forward` itself until `fast_step` makes a faster one
    schedule: Schedule
    clip: Callable[[], object]
    scaler: torch.amp.GradScaler
    prepare_s: float = 0.0  # of what needed the training images: the loader's copy of them, the network's start
    progress: Progress = field(default_factory=Progress)

    @property
    def world(self) -> World:
        """The processes of this run."""
        return self.meter.world

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

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The epoch's batches from `start_step` on, as a step takes them."""
        return mixed_batches(self.loader, self.augment, epoch, self.recipe.seed, self.device, start_step)

    def start_loader(self) -> None:
        """One batch of the loader, so that its kernel is compiled and its threads run.

        The last batch of an epoch: one that is left before its end would end DALI's threads again.
        """
        for _ in self.batches(0, self.loader.steps_per_epoch - 1):
            pass

    def example(self, size: int | None = None) -> tuple[Tensor, ...]:
        """A batch of the shapes of `batches`, full unless its `size` is given: black images."""
        size = size or self.loader.steps.share
        images = torch.zeros(size, 3, SIDE, SIDE, dtype=torch.uint8, device=self.device)
        labels = torch.zeros(size, dtype=torch.int64, device=self.device)
        _, mixer = split_mixer(self.augment)
        drawn = [torch.from_numpy(draw_mix(self.augment, size, 0, self.recipe.seed)).to(self.device)] if mixer else []
        return images.contiguous(memory_format=torch.channels_last), labels, *drawn

    def function(self, size: int = SIDE) -> LossAndHits:
        """What a step computes before it goes back: of mixed images, if the recipe has a mixer, resized to `size`."""
        _, mixer = split_mixer(self.augment)
        forward = self.forward if size == SIDE else resized(self.forward, size)
        if mixer:
            return mixed_loss_and_hits(forward, self.recipe.label_smoothing, MIXERS[mixer.name].apply)
        return loss_and_hits(forward, self.recipe.label_smoothing)

    def step(self, function: LossAndHits) -> Step:
        """The training step around `function`, which is compiled or not."""
        statistics = Statistics(self.model)
        return training_step(
            function, self.optimizer, self.clip, self.meter, self.ema, self.scaler, statistics, self.world
        )

    def fast_step(self, mode: str = "auto") -> Step:
        """The step as this machine runs it fastest, compiled and captured; its state is untouched by that.

        Of each size of image one, made here, of which a call takes that of the running epoch. `mode`: the compiler's
        effort, where the recipe leaves it open.
        """
        sizes = dict.fromkeys(size for size, _ in image_sizes(self.recipe.image_size))
        fast = {size: self.fast_block(1, mode, size) for size in sizes}
        last = {size: self.last_step(size) for size in sizes}
        self.inference = self.fast_inference()
        self.start_loader()  # after the capture
        share = self.loader.steps.share
        steps = {size: cuda_graph.by_batch_size(fast[size], last[size], share) for size in sizes}
        return lambda *batch: steps[self.recipe.size_at(self.progress.epoch)](*batch)

    def fast_block(self, count: int, mode: str = "auto", size: int = SIDE) -> Callable[..., None]:
        """`count` steps on full batches as one function of all their tensors (see `cuda_graph.in_blocks`)."""
        function, example = self.function(size), self.example() * count
        mode = mode if self.recipe.compile_mode == "auto" else self.recipe.compile_mode
        self.model.train()
        with self.untouched():
            step = self.step(cuda_graph.compiled(function, mode) if self.choice.compile else function)
            block = step if count == 1 else cuda_graph.in_blocks(step, count)
            if self.choice.cuda_graph:
                return cuda_graph.graphed(block, example, self.tensors())
            return cuda_graph.warmed(block, example, self.tensors()) if self.choice.compile else block

    def last_step(self, size: int = SIDE) -> Step:
        """The step of an epoch's last batch, which may be short: once an epoch repays no compilation, but it is
        captured where the others are."""
        step = self.step(self.function(size))
        count = self.loader.steps.count(self.loader.steps_per_epoch - 1)
        if not self.choice.cuda_graph or count == self.loader.steps.share:
            return step
        self.model.train()
        with self.untouched():
            return cuda_graph.graphed(step, self.example(count), self.tensors())

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever steps run inside, the run is afterwards as before: they update nothing, for not every optimizer's
        state could be put back."""
        scale = self.scaler.state_dict()
        with cuda_graph.untouched(self.tensors(), self.device):
            self.meter.bad.fill_(1)
            yield
        self.scaler.load_state_dict(scale)

    def fast_inference(self) -> Forward:
        """`forward` for evaluation: captured where the step is, compiled where the whole run's evaluations repay it."""
        images = self.recipe.epochs * self.validation_images + self.test_images
        repaid = self.choice.compile and images >= COMPILE_FROM
        return fast_forward(
            self.model, self.forward, self.device, repaid, self.choice.cuda_graph, self.recipe.compile_mode
        )

    @property
    def validation_images(self) -> int:
        """Images through the network at the end of an epoch."""
        return (2 if self.ema else 1) * len(self.val.labels)

    @property
    def test_images(self) -> int:
        """Images through the network at the end of the run."""
        views = len(VIEWS[self.recipe.tta]) if self.recipe.tta != "none" else 0
        return ((2 if self.ema else 1) + views) * len(self.data.test.labels)

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        average = self.ema.tensors() if self.ema else []
        return [*self.model.state_dict().values(), *self.optimizer.tensors(), *self.meter.tensors(), *average]

    def validate(self) -> dict[str, float | None]:
        """The validation columns of metrics.csv, as rank 0 finds them: None without a split, or without an average."""
        return self.world.told(self._validation() if self.world.leads else None)

    def _validation(self) -> dict[str, float | None]:
        row: dict[str, float | None] = {"val_loss": None, "val_acc": None, "ema_val_acc": None}
        if len(self.val.labels):
            scores = evaluate(self.model, self.inference, self.val, self.device)
            row["val_loss"], row["val_acc"] = scores.loss, scores.accuracy
            if self.ema:
                with self.ema.applied():
                    row["ema_val_acc"] = evaluate(self.model, self.inference, self.val, self.device).accuracy
        return row

    def test(self, best: Path) -> Tested:
        """The test set, once, by the weights the recipe names; the model is left with them."""
        test, averaged = self.data.test, None
        if self.ema:
            with self.ema.applied():
                averaged = evaluate(self.model, self.inference, test, self.device)
            if self.recipe.weights == "ema":
                self.ema.copy_to_live()
        if self.recipe.weights == "best":
            checkpoint.load_weights(self.model, checkpoint.load(best)["model"], best)
        scores = averaged if averaged and self.recipe.weights == "ema" else None
        scores = scores or evaluate(self.model, self.inference, test, self.device)
        tta = None
        if self.recipe.tta != "none":
            tta = evaluate(self.model, self.inference, test, self.device, self.recipe.tta).accuracy
        return Tested(scores, averaged.accuracy if averaged else None, tta)

    def state(self, clock: Clock) -> dict[str, Any]:
        """What a checkpoint holds: all that the rest of the run depends on."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": list(self.data.classes),
            "samples": len(self.train.labels),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(self.model) if self.ema else None,
            "ema_updates": self.ema.updates if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.sums,
            "random": self.world.gathered(random_state(self.device)),
            "clock": clock.state_dict(),
            **asdict(self.progress),
        }

    def load(self, state: dict[str, Any]) -> None:
        """A checkpoint of the same run into the tensors that are there; the clock is its owner's."""
        checkpoint.load_weights(self.model, state["model"], "the checkpoint")
        if self.ema:
            self.ema.load_state_dict(state["ema"], state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load(state["meter"])
        of_ranks = state["random"]
        if len(of_ranks) != self.world.ranks:
            warnings.warn(
                f"the run had {len(of_ranks)} processes and goes on with {self.world.ranks}: another random state, and "
                "statistics of BatchNorm over other shares",
                stacklevel=2,
            )
        set_random_state(of_ranks[self.world.rank % len(of_ranks)], self.device)
        self.progress = Progress.of(state)

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint will need on the disk."""
        return sum(tensor.nbytes for tensor in self.tensors())


def assemble(recipe: Recipe, choice: Choice) -> Parts:
    """The parts of a run by `recipe` on the device of `choice`.

    Errors: those of each room, before anything is written.
    """
    if recipe.deterministic:
        deterministic_only()
    else:
        torch.backends.cudnn.benchmark = True  # a run has few shapes, and each is met thousands of times
    device, here = torch.device(choice.device), world()
    if device.type == "cpu":
        cuda_graph.keep_freed_memory()
    if choice.compile:
        cuda_graph.keep_compiled_code()
    ops = parse(recipe.augment)
    pixel_ops, mixer = split_mixer(ops)
    if mixer and recipe.batch_size < 2 * here.ranks:
        raise UsageError(
            f"--augment {mixer.name} mixes the images of a batch", f"use a --batch-size of {2 * here.ranks} or more"
        )
    pick(VIEWS, recipe.tta, "test-time augmentation")
    pick(LOADERS, choice.loader, "loader")
    mean, std = normalisation(recipe)
    with torch.device("meta"):  # refuse a wrong network before a download, not after it
        require_sizes(network(recipe, cifar.DATASETS[recipe.dataset].classes), recipe)
    data = cifar.load(recipe.data, recipe.dataset)
    seed_all(recipe.seed)  # the same weights on every rank
    model = place(network(recipe, len(data.classes)), device)
    if not here.leads:
        seed_all(recipe.seed + here.rank)  # but draws of its own
    optimizer = Optimizer(model, recipe)
    choice = settled(choice, recipe, optimizer)
    forward = forward_pass(model, mean, std, choice.precision, device)
    train, val = split_off(data.train, recipe.val_size, recipe.val_seed)
    started = time.perf_counter()
    loader = loader_of(train, pixel_ops, recipe, choice, here)
    first_look(model, train, recipe)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was sent is there
    prepare_s = time.perf_counter() - started
    return Parts(
        recipe=recipe,
        choice=choice,
        augment=ops,
        device=device,
        data=data,
        train=train,
        val=val,
        loader=loader,
        model=model,
        optimizer=optimizer,
        ema=Ema(model, recipe.ema) if recipe.ema else None,
        meter=Meter(device, here),
        forward=forward,
        inference=forward,
        schedule=Schedule(recipe, loader.steps_per_epoch),
        clip=clipper(recipe.clip, optimizer.parameters),
        scaler=torch.amp.GradScaler(device.type, enabled=choice.precision == "fp16"),
        prepare_s=prepare_s,
    )


def require_sizes(model: nn.Module, recipe: Recipe) -> None:
    """Errors: `UsageError` where the network does not take images of each size of the recipe."""
    for size in {size for size, _ in image_sizes(recipe.image_size)} - {SIDE}:
        try:
            macs(model, (3, size, size))
        except RuntimeError:
            raise UsageError(
                f"--image-size {recipe.image_size}: {recipe.arch} takes no images of {size}x{size}",
                "leave that size out",
            ) from None


def first_look(model: nn.Module, train: Split, recipe: Recipe) -> None:
    """Shows the first training images to a network that starts from them (it has `start_from`); to no other."""
    if start_from := getattr(model, "start_from", None):
        few = Split(train.images[:FIRST], train.labels[:FIRST])
        start_from(normalised(few, recipe, next(model.parameters()).device))


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
