"""What a run is made of, assembled from its recipe: data, network, optimizer, step, evaluation.

Every name and number of the recipe is checked here, before anything is written. The loop itself is in `train.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.data.augment import CIFAR_IMAGE_SIZE, AugmentOp, draw_mixer_params, split_mixer
from fastcifar.data.cifar import Dataset, Split
from fastcifar.data.loaders import Loader, mixed_batches
from fastcifar.data.mixers import MIXERS
from fastcifar.device import ExecutionPlan
from fastcifar.format import format_options
from fastcifar.models import (
    count_parameters,
)
from fastcifar.recipe import Recipe, parse_image_sizes
from fastcifar.training import checkpoint, compilation, cuda_graph
from fastcifar.training.distributed import World
from fastcifar.training.ema import Ema
from fastcifar.training.evaluate import MIN_IMAGES_TO_COMPILE, VIEWS, Scores, evaluate, optimize_forward
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.optimizers import OptimizerWrapper
from fastcifar.training.rng_state import collect_rng_state, preserve_state, restore_rng_state
from fastcifar.training.run_dir import Clock, TrainingProgress
from fastcifar.training.step import (
    BufferSnapshot,
    Forward,
    LossAndCorrect,
    Meter,
    TrainStep,
    build_step_function,
    loss_and_correct,
    mixed_loss_and_correct,
    resized_forward,
)


@dataclass(frozen=True)
class TestResult:
    """What the test set said: scores of the recipe's weights; accuracy of the average of the weights, if there is one,
    and of the recipe's weights over the views of `--tta`, if it was asked for."""

    scores: Scores
    ema_acc: float | None
    tta_acc: float | None


@dataclass
class Trainer:
    """The parts of one run, on its device. Shapes: images uint8 [n,3,32,32], labels int64 [n].

    `augment` is the whole list; the loader applies it but for a mixer, which is the step's.
    """

    recipe: Recipe
    execution: ExecutionPlan
    augment_ops: tuple[AugmentOp, ...]
    device: torch.device
    data: Dataset
    train_split: Split
    val_split: Split
    loader: Loader
    model: nn.Module
    optimizer: OptimizerWrapper
    ema: Ema | None
    meter: Meter
    forward: Forward
    eval_forward: Forward  # the same pass as evaluation runs it: `forward` itself until `fast_step` makes a faster one
    schedule: LRSchedule
    clip_gradients: Callable[[], object]
    scaler: torch.amp.GradScaler
    prepare_s: float = 0.0  # of what needed the training images: the loader's copy of them, the network's start
    progress: TrainingProgress = field(default_factory=TrainingProgress)

    @property
    def world(self) -> World:
        """The processes of this run."""
        return self.meter.world

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, if nothing stops it."""
        return self.recipe.epochs * self.loader.steps_per_epoch

    def summary_lines(self) -> list[str]:
        """What a person should know before the first step."""
        official = "" if self.data.is_official else ", not the official files"
        own = f"{self.optimizer.name} sets or scales its learning rate itself, beside --schedule {self.recipe.schedule}"
        return [
            f"data: {self.data.name} from {self.data.source}{official}: {len(self.train_split.labels):,} to train, "
            f"{len(self.val_split.labels):,} to choose by, {len(self.data.test.labels):,} to test",
            f"network: {self.recipe.arch}, {count_parameters(self.model):,} parameters",
            f"recipe: {format_options(self.recipe.non_default_options()) or 'defaults'}",
            *([f"optimizer: {own}"] if self.optimizer.spec.self_scheduled else []),
        ]

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The epoch's batches from `start_step` on, as a step takes them."""
        return mixed_batches(self.loader, self.augment_ops, epoch, self.recipe.seed, self.device, start_step)

    def warm_up_loader(self) -> None:
        """One batch of the loader, so that its kernel is compiled and its threads run.

        The last batch of an epoch: one that is left before its end would end DALI's threads again.
        """
        for _ in self.batches(0, self.loader.steps_per_epoch - 1):
            pass

    def example_batch(self, batch_size: int | None = None) -> tuple[Tensor, ...]:
        """A batch of the shapes of `batches`, full unless its `size` is given: black images."""
        batch_size = batch_size or self.loader.slicing.local_batch_size
        images = torch.zeros(batch_size, 3, CIFAR_IMAGE_SIZE, CIFAR_IMAGE_SIZE, dtype=torch.uint8, device=self.device)
        labels = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        _, mixer = split_mixer(self.augment_ops)
        drawn = (
            [torch.from_numpy(draw_mixer_params(self.augment_ops, batch_size, 0, self.recipe.seed)).to(self.device)]
            if mixer
            else []
        )
        return images.contiguous(memory_format=torch.channels_last), labels, *drawn

    def build_loss_function(self, image_size: int = CIFAR_IMAGE_SIZE) -> LossAndCorrect:
        """What a step computes before it goes back: of mixed images, if the recipe has a mixer, resized to `size`."""
        _, mixer = split_mixer(self.augment_ops)
        forward = self.forward if image_size == CIFAR_IMAGE_SIZE else resized_forward(self.forward, image_size)
        if mixer:
            return mixed_loss_and_correct(forward, self.recipe.label_smoothing, MIXERS[mixer.name].apply)
        return loss_and_correct(forward, self.recipe.label_smoothing)

    def build_step(self, loss_function: LossAndCorrect) -> TrainStep:
        """The training step around `function`, which is compiled or not."""
        statistics = BufferSnapshot(self.model)
        return build_step_function(
            loss_function,
            self.optimizer,
            self.clip_gradients,
            self.meter,
            self.ema,
            self.scaler,
            statistics,
            self.world,
        )

    def build_train_step(self, compile_mode: str = "auto") -> TrainStep:
        """The step as this machine runs it fastest, compiled and captured; its state is untouched by that.

        Of each size of image one, made here, of which a call takes that of the running epoch. `mode`: the compiler's
        effort, where the recipe leaves it open.
        """
        sizes = dict.fromkeys(size for size, _ in parse_image_sizes(self.recipe.image_size))
        fast = {size: self.build_step_block(1, compile_mode, size) for size in sizes}
        last = {size: self.build_last_step(size) for size in sizes}
        self.eval_forward = self.build_eval_forward()
        self.warm_up_loader()  # after the capture
        share = self.loader.slicing.local_batch_size
        steps = {size: cuda_graph.dispatch_by_batch_size(fast[size], last[size], share) for size in sizes}
        return lambda *batch: steps[self.recipe.image_size_at(self.progress.epoch)](*batch)

    def build_step_block(
        self, num_steps: int, compile_mode: str = "auto", image_size: int = CIFAR_IMAGE_SIZE
    ) -> Callable[..., None]:
        """`count` steps on full batches as one function of all their tensors (see `cuda_graph.in_blocks`)."""
        function, example = self.build_loss_function(image_size), self.example_batch() * num_steps
        compile_mode = compile_mode if self.recipe.compile_mode == "auto" else self.recipe.compile_mode
        self.model.train()
        with self.preserve_state():
            step = self.build_step(
                compilation.compile_function(function, compile_mode) if self.execution.compile else function
            )
            block = step if num_steps == 1 else cuda_graph.unroll_steps(step, num_steps)
            if self.execution.cuda_graph:
                return cuda_graph.cuda_graphed(block, example, self.state_tensors())
            return compilation.precompile(block, example, self.state_tensors()) if self.execution.compile else block

    def build_last_step(self, image_size: int = CIFAR_IMAGE_SIZE) -> TrainStep:
        """The step of an epoch's last batch, which may be short: once an epoch repays no compilation, but it is
        captured where the others are."""
        step = self.build_step(self.build_loss_function(image_size))
        count = self.loader.slicing.local_count(self.loader.steps_per_epoch - 1)
        if not self.execution.cuda_graph or count == self.loader.slicing.local_batch_size:
            return step
        self.model.train()
        with self.preserve_state():
            return cuda_graph.cuda_graphed(step, self.example_batch(count), self.state_tensors())

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Whatever steps run inside, the run is afterwards as before: they update nothing, for not every optimizer's
        state could be put back."""
        scale = self.scaler.state_dict()
        with preserve_state(self.state_tensors(), self.device):
            self.meter.found_inf.fill_(1)
            yield
        self.scaler.load_state_dict(scale)

    def build_eval_forward(self) -> Forward:
        """`forward` for evaluation: captured where the step is, compiled where the whole run's evaluations repay it."""
        images = self.recipe.epochs * self.images_per_validation + self.images_per_test
        repaid = self.execution.compile and images >= MIN_IMAGES_TO_COMPILE
        return optimize_forward(
            self.model, self.forward, self.device, repaid, self.execution.cuda_graph, self.recipe.compile_mode
        )

    @property
    def images_per_validation(self) -> int:
        """Images through the network at the end of an epoch."""
        return (2 if self.ema else 1) * len(self.val_split.labels)

    @property
    def images_per_test(self) -> int:
        """Images through the network at the end of the run."""
        views = len(VIEWS[self.recipe.tta]) if self.recipe.tta != "none" else 0
        return ((2 if self.ema else 1) + views) * len(self.data.test.labels)

    def state_tensors(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        average = self.ema.state_tensors() if self.ema else []
        return [
            *self.model.state_dict().values(),
            *self.optimizer.state_tensors(),
            *self.meter.state_tensors(),
            *average,
        ]

    def validate(self) -> dict[str, float | None]:
        """The validation columns of metrics.csv, as rank 0 finds them: None without a split, or without an average."""
        return self.world.broadcast_object(self._compute_validation_metrics() if self.world.is_main_process else None)

    def _compute_validation_metrics(self) -> dict[str, float | None]:
        row: dict[str, float | None] = {"val_loss": None, "val_acc": None, "ema_val_acc": None}
        if len(self.val_split.labels):
            scores = evaluate(self.model, self.eval_forward, self.val_split, self.device)
            row["val_loss"], row["val_acc"] = scores.loss, scores.accuracy
            if self.ema:
                with self.ema.averaged_weights():
                    row["ema_val_acc"] = evaluate(self.model, self.eval_forward, self.val_split, self.device).accuracy
        return row

    def evaluate_test_set(self, best_checkpoint: Path) -> TestResult:
        """The test set, once, by the weights the recipe names; the model is left with them."""
        test, averaged = self.data.test, None
        if self.ema:
            with self.ema.averaged_weights():
                averaged = evaluate(self.model, self.eval_forward, test, self.device)
            if self.recipe.eval_weights == "ema":
                self.ema.copy_to_model()
        if self.recipe.eval_weights == "best":
            checkpoint.load_weights(self.model, checkpoint.load_checkpoint(best_checkpoint)["model"], best_checkpoint)
        scores = averaged if averaged and self.recipe.eval_weights == "ema" else None
        scores = scores or evaluate(self.model, self.eval_forward, test, self.device)
        tta = None
        if self.recipe.tta != "none":
            tta = evaluate(self.model, self.eval_forward, test, self.device, self.recipe.tta).accuracy
        return TestResult(scores, averaged.accuracy if averaged else None, tta)

    def checkpoint_state(self, clock: Clock) -> dict[str, Any]:
        """What a checkpoint holds: all that the rest of the run depends on."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": list(self.data.classes),
            "samples": len(self.train_split.labels),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(self.model) if self.ema else None,
            "ema_updates": self.ema.num_updates if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.sums,
            "random": self.world.all_gather_object(collect_rng_state(self.device)),
            "clock": clock.state_dict(),
            **asdict(self.progress),
        }

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """A checkpoint of the same run into the tensors that are there; the clock is its owner's."""
        checkpoint.load_weights(self.model, state["model"], "the checkpoint")
        if self.ema:
            self.ema.load_state_dict(state["ema"], state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_sums(state["meter"])
        of_ranks = state["random"]
        if len(of_ranks) != self.world.world_size:
            warnings.warn(
                f"the run had {len(of_ranks)} processes and goes on with {self.world.world_size}: another random state, and "
                "statistics of BatchNorm over other shares",
                stacklevel=2,
            )
        restore_rng_state(of_ranks[self.world.rank % len(of_ranks)], self.device)
        self.progress = TrainingProgress.from_checkpoint(state)

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint will need on the disk."""
        return sum(tensor.nbytes for tensor in self.state_tensors())
