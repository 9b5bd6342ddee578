"""`Trainer`: the objects that one run trains with, and the methods that train, evaluate and save them."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastcifar.data.augment import CIFAR_IMAGE_SIZE, draw_mixer_params
from fastcifar.data.cifar import Dataset, Split
from fastcifar.data.loaders import Loader
from fastcifar.data.mixers import MIXERS
from fastcifar.device import ExecutionPlan
from fastcifar.errors import NonFiniteError
from fastcifar.format import format_options
from fastcifar.models import count_parameters, use_winograd
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, compilation, cuda_graph
from fastcifar.training.checkpoint import TrainingCheckpoint
from fastcifar.training.distributed import SINGLE_PROCESS, World
from fastcifar.training.evaluate import MIN_IMAGES_TO_COMPILE, VIEWS, Scores, evaluate, optimize_forward
from fastcifar.training.fallback import run_stage, run_with_fallback
from fastcifar.training.fine_tuning import LoadedInit
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.metrics_file import ValidationMetrics
from fastcifar.training.multi_tensor import share_kernels_between_layers
from fastcifar.training.optimizers import OptimizerWrapper
from fastcifar.training.phases import DEFAULT_PHASE, Phase, not_trained, untrained_parameters
from fastcifar.training.resolve import Resolved
from fastcifar.training.rng_state import collect_rng_state, preserve_state, restore_rng_state
from fastcifar.training.run_dir import Clock, TrainingProgress
from fastcifar.training.step import (
    DTYPES,
    Ema,
    Forward,
    LossAndCorrect,
    Meter,
    TrainStep,
    build_gradient_function,
    build_selection,
    build_update_function,
    loss_and_correct,
)

T = TypeVar("T")


@dataclass
class Trainer:
    """The objects that one run trains with, on its device; `build_trainer` builds it from a recipe.

    A batch is a tuple of images (uint8 [n, 3, 32, 32]), labels (int64 [n]) and, with a mixer, its parameters.
    """

    resolved: Resolved
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
    eval_forward: Forward  # `forward` in evaluation mode; compiled and captured by `optimize`
    schedule: LRSchedule
    clip_gradients: Callable[[], object]
    scaler: torch.amp.GradScaler
    build_loader: Callable[[Resolved], Loader]  # builds `loader` again for another execution plan
    num_params: int  # `count_parameters` without `--freeze`
    init: LoadedInit
    prepare_s: float = 0.0  # seconds spent to build the loader and to initialize a whitening layer
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    untrained_parameters: dict[Phase, list[nn.Parameter]] = field(init=False)
    step: TrainStep = field(init=False)  # forward, backward and update of one batch; eager until `optimize`

    def __post_init__(self) -> None:
        self.step = self.build_train_step(eager=True)

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def execution(self) -> ExecutionPlan:
        return self.resolved.execution

    @property
    def world(self) -> World:
        return self.meter.world

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.loader.steps_per_epoch

    @property
    def planned_steps(self) -> int:
        """The number of steps after which training stops: `total_steps`, or fewer with `--max-steps`."""
        return min(self.total_steps, self.recipe.max_steps or self.total_steps)

    def summary_lines(self) -> list[str]:
        trained = f", {count_parameters(self.model):,} of them trained" if self.recipe.freeze != "none" else ""
        scheduled = f"{self.optimizer.spec.name} schedules its learning rate itself, in addition to --schedule"
        return [
            *self.data.format_lines(self.train_split, self.val_split),
            f"network: {self.recipe.arch}, {self.num_params:,} parameters{trained}",
            *self.init.lines,
            f"recipe: {format_options(self.recipe.non_default_options()) or 'defaults'}",
            *([f"optimizer: {scheduled} {self.recipe.schedule}"] if self.optimizer.spec.self_scheduled else []),
        ]

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        return self.loader.batches(epoch, start_step)

    def train_step(self, batch: Sequence[Tensor]) -> None:
        progress, phase = self.progress, self.resolved.phases[self.progress.epoch]
        self.optimizer.set_lr(self.schedule.lr_at(progress.step))
        with not_trained(self.untrained_parameters[phase]):
            self.step(*batch)
            progress.step, progress.epoch_step = progress.step + 1, progress.epoch_step + 1
            self.optimizer.after_step(progress.step, self.meter.found_inf)

    def optimize(self, compile_mode: str = "auto", start_loader: bool = True) -> None:
        """Compile and capture the step and the evaluation without changing the run's state.

        `compile_mode` is used if that of the recipe is "auto". Without `start_loader`, the caller must then call
        `warm_up_loader` after the last call: the loader's threads could invalidate a capture. `execution` is changed as
        `run_with_fallback` describes if compilation or a capture fails.
        """
        run_with_fallback(self._optimize, self.execution, self.recipe, compile_mode, self.world)
        if start_loader:
            self.warm_up_loader()

    def _optimize(self, execution: ExecutionPlan, compile_mode: str) -> None:
        if execution != self.execution:
            self.resolved = replace(self.resolved, execution=execution)
            self.loader = self.build_loader(self.resolved)
        self.optimizer.inner.zero_grad()  # a failed attempt may have left gradients in the memory of its graph
        self.run_stage("winograd", lambda: use_winograd(self.model, execution.winograd))
        self.step = self.build_train_step(compile_mode)
        self.eval_forward = self.build_eval_forward()

    def run_stage(self, option: str, function: Callable[[], T]) -> T:
        """Return the result of a function that compiles or captures; see `fallback.run_stage`."""
        return run_stage(option, function, self.device, self.world)

    def warm_up_loader(self) -> None:
        """Load one batch to compile the loader's kernel and to start its threads; see `optimize` for failures."""
        run_with_fallback(self._warm_up_loader, self.execution, self.recipe, world=self.world)

    def _warm_up_loader(self, execution: ExecutionPlan, compile_mode: str) -> None:
        if execution != self.execution:
            self._optimize(execution, compile_mode)
        if execution.compile:
            self.run_stage("compile", self._load_batch)
        else:
            self._load_batch()

    def _load_batch(self) -> None:
        for _ in self.batches(0, self.loader.steps_per_epoch - 1):  # the last one: leaving an epoch early stops DALI
            pass

    def example_batch(self, batch_size: int | None = None) -> tuple[Tensor, ...]:
        """Return a batch of black images with the shapes and types of `batches`, by default a full one."""
        batch_size = batch_size or self.loader.slicing.local_batch_size
        images = torch.zeros(batch_size, 3, CIFAR_IMAGE_SIZE, CIFAR_IMAGE_SIZE, dtype=torch.uint8, device=self.device)
        labels = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        batch = (images.contiguous(memory_format=torch.channels_last), labels)
        if not self.resolved.mixer:
            return batch
        params = draw_mixer_params(self.resolved.augment_ops, batch_size, 0, self.recipe.seed)
        return *batch, torch.from_numpy(params).to(self.device)

    def build_loss_function(self, image_size: int = CIFAR_IMAGE_SIZE) -> LossAndCorrect:
        """Return the forward pass and loss of a step, which mixes images, selects them and resizes to `image_size`."""
        mix = MIXERS[self.resolved.mixer.name].apply if self.resolved.mixer else None
        select = build_selection(self.forward, self.model, self.recipe)
        return loss_and_correct(self.forward, self.recipe.label_smoothing, mix, image_size, select)

    def build_step(self, loss_function: LossAndCorrect) -> TrainStep:
        """Return a function that computes the gradients of a batch and updates the weights."""
        return self._join_step(self._build_gradients(loss_function))

    def _build_gradients(self, loss_function: LossAndCorrect) -> TrainStep:
        return build_gradient_function(loss_function, self.model, self.optimizer, self.meter, self.scaler)

    def _join_step(self, compute_gradients: TrainStep) -> TrainStep:
        update = build_update_function(self.optimizer, self.clip_gradients, self.meter, self.ema, self.scaler)

        def step(*batch: Tensor) -> None:
            compute_gradients(*batch)
            update()

        return step

    def build_train_step(self, compile_mode: str = "auto", eager: bool = False) -> TrainStep:
        """Return a step that calls a separate function for each phase and for a smaller last batch.

        A last batch is smaller on all ranks or on none, although a rank's share of it may be as large as of the others:
        the ranks must build and call the same functions, because these contain collective operations.
        """
        phases = dict.fromkeys(self.resolved.phases)
        self.untrained_parameters = {phase: untrained_parameters(self.model, phase) for phase in phases}
        slicing, last_step = self.loader.slicing, self.loader.steps_per_epoch - 1
        full_size, last_size = slicing.local_batch_size, slicing.local_count(last_step)
        full = last = {phase: self.build_step(self.build_loss_function(phase.image_size)) for phase in phases}
        if not eager:
            full = {phase: self.build_step_block(1, compile_mode, phase) for phase in phases}
        if not eager and slicing.has_short_step:
            last = {phase: self.build_step_block(1, phase=phase, batch_size=last_size) for phase in phases}
        # the step that this rank cannot tell by the size of its share
        short_step = last_step if slicing.has_short_step and last_size == full_size else None

        def step(*batch: Tensor) -> None:
            is_full = len(batch[0]) == full_size and self.progress.epoch_step != short_step
            (full if is_full else last)[self.resolved.phases[self.progress.epoch]](*batch)

        return step

    def build_step_block(
        self,
        num_steps: int,
        compile_mode: str = "auto",
        phase: Phase = DEFAULT_PHASE,
        batch_size: int | None = None,
    ) -> Callable[..., None]:
        """Return a function that takes the tensors of `num_steps` batches, full by default, and trains on each one."""
        loss_function, example = self.build_loss_function(phase.image_size), self.example_batch(batch_size) * num_steps
        compile_mode = compile_mode if self.recipe.compile_mode == "auto" else self.recipe.compile_mode
        compiled = self.execution.compile and batch_size is None  # smaller batches are too rare to compile for
        self.model.train()
        with self.preserve_state(), not_trained(untrained_parameters(self.model, phase)):
            if compiled:
                loss_function = compilation.compile_function(loss_function, compile_mode)
            if compiled or self.execution.cuda_graph:
                dtype = DTYPES[self.execution.precision]
                loss_function = share_kernels_between_layers(loss_function, self.model, dtype, self.device)
            compute_gradients, inputs_per_step = self._build_gradients(loss_function), len(example) // num_steps

            def repeat(step: TrainStep) -> Callable[..., None]:
                def block(*tensors: Tensor) -> None:
                    for start in range(0, len(tensors), inputs_per_step):
                        step(*tensors[start : start + inputs_per_step])

                return block

            block = repeat(self._join_step(compute_gradients))
            if compiled:
                self.run_stage("compile", lambda: self._run_locally(block, example))
            run_capture = partial(self.run_stage, "cuda_graph")
            if self.execution.cuda_graph and self.optimizer.spec.capturable:
                block = cuda_graph.cuda_graphed(block, example, run_capture)
            elif self.execution.cuda_graph:
                weights, one_batch = self.optimizer.parameters, example[:inputs_per_step]
                captured = cuda_graph.cuda_graphed_gradients(compute_gradients, weights, one_batch, run_capture)
                block = repeat(self._join_step(captured))
            self.optimizer.inner.zero_grad()  # releases gradients, which are in memory that all graphs share
            return block

    def _run_locally(self, block: Callable[..., None], inputs: Sequence[Tensor]) -> None:
        """Run `block` without averaging gradients over the ranks, so that no rank waits for one that fails."""
        world, self.meter.world = self.meter.world, SINGLE_PROCESS
        try:
            block(*inputs)
        finally:
            self.meter.world = world

    @contextmanager
    def preserve_state(self, skip_updates: bool = True) -> Iterator[None]:
        """Restore the run's state after the `with` block. With `skip_updates`, steps in it leave weights unchanged."""
        scale, progress = self.scaler.state_dict(), replace(self.progress)
        with preserve_state(self.state_tensors(), self.device):
            if skip_updates:
                self.meter.found_inf.fill_(1)
            yield
        self.scaler.load_state_dict(scale)
        self.progress = progress

    def build_eval_forward(self) -> Forward:
        """Return `forward` for evaluation, captured like the step, and compiled if enough images are evaluated."""
        images, execution = self.recipe.epochs * self.images_per_validation + self.images_per_test, self.execution
        compiled, mode = execution.compile and images >= MIN_IMAGES_TO_COMPILE, self.recipe.compile_mode
        return optimize_forward(self.model, self.forward, self.device, compiled, execution.cuda_graph, mode, self.world)

    @property
    def images_per_validation(self) -> int:
        return (2 if self.ema else 1) * len(self.val_split.labels)

    @property
    def images_per_test(self) -> int:
        views = len(VIEWS[self.recipe.tta]) if self.recipe.tta != "none" else 0
        return ((2 if self.ema else 1) + views) * len(self.data.test.labels)

    def state_tensors(self) -> list[Tensor]:
        parts = (self.optimizer, self.meter, *([self.ema] if self.ema else []))
        return [*self.model.state_dict().values(), *(tensor for part in parts for tensor in part.state_tensors())]

    def validate(self) -> ValidationMetrics:
        """Evaluate on the validation split on rank 0; return the metrics, or raise `NonFiniteError`, on all ranks."""
        metrics: ValidationMetrics = {"val_loss": None, "val_acc": None, "ema_val_acc": None}
        error = None
        if len(self.val_split.labels) and self.world.is_main_process:
            try:
                scores = self._evaluate(self.val_split)
                metrics["val_loss"], metrics["val_acc"] = scores.loss, scores.accuracy
                if self.ema:
                    with self.ema.averaged_weights():
                        metrics["ema_val_acc"] = self._evaluate(self.val_split).accuracy
            except NonFiniteError as non_finite:
                error = non_finite
        metrics, error = self.world.broadcast_object((metrics, error))
        if error:
            raise error
        return metrics

    def _evaluate(self, split: Split, tta: str = "none") -> Scores:
        scores = evaluate(self.model, self.eval_forward, split, self.device, tta)
        if not math.isfinite(scores.loss):
            name = "validation" if split is self.val_split else "test"
            problem = f"the loss on the {name} images was not finite after step {self.progress.step}"
            raise NonFiniteError(problem, "use a smaller --lr, --precision fp32, or --on-nan rollback")
        return scores

    def test(self, best_checkpoint: Path) -> tuple[Scores | None, float | None, float | None]:
        """Return the test scores and the accuracies of the EMA and with TTA; leave the `eval_weights` in the model.

        All three are None if the data set has no test set.
        """
        weights, tta, averaged_scores = self.recipe.eval_weights, self.recipe.tta, None
        has_test_set = bool(len(self.data.test.labels))
        if self.ema:
            with self.ema.averaged_weights():
                averaged_scores = self._evaluate(self.data.test) if has_test_set else None
            if weights == "ema":
                self.ema.copy_to_model()
        if weights == "best":
            checkpoint.load_weights(self.model, checkpoint.load_checkpoint(best_checkpoint)["model"], best_checkpoint)
        if not has_test_set:
            return None, None, None
        scores = averaged_scores if weights == "ema" and averaged_scores else self._evaluate(self.data.test)
        tta_acc = self._evaluate(self.data.test, tta).accuracy if tta != "none" else None
        return scores, averaged_scores.accuracy if averaged_scores else None, tta_acc

    def state_dict(self, clock: Clock | None = None) -> TrainingCheckpoint:
        """Return all state that the rest of the run depends on. All ranks must call this to gather random states."""
        state = {
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": list(self.data.classes),
            "data_digest": self.data.digest,
            "init_sha256": self.init.sha256,
            "samples": len(self.train_split.labels),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(self.model) if self.ema else None,
            "ema_updates": self.ema.num_updates if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self._scaler_state_dict(),
            "meter": self.meter.total_sums(),
            "random": self.world.all_gather_object(collect_rng_state(self.device)),
            "clock": clock.state_dict() if clock else {},
            **asdict(self.progress),
        }
        return cast(TrainingCheckpoint, state)

    def _scaler_state_dict(self) -> dict[str, Any]:
        """Return the state of the scaler, whose `state_dict` would wait for the device, with tensors for two values."""
        if not self.scaler.is_enabled() or self.scaler._scale is None:
            return self.scaler.state_dict()
        return {
            "scale": self.scaler._scale,
            "growth_factor": self.scaler.get_growth_factor(),
            "backoff_factor": self.scaler.get_backoff_factor(),
            "growth_interval": self.scaler.get_growth_interval(),
            "_growth_tracker": self.scaler._growth_tracker,
        }

    def load_state_dict(self, state: TrainingCheckpoint) -> None:
        """Copy the result of `state_dict` to the existing tensors, which a captured step refers to."""
        checkpoint.load_weights(self.model, state["model"], "the checkpoint")
        if self.ema:
            self.ema.load_state_dict(cast(dict[str, Tensor], state["ema"]), cast(Tensor, state["ema_updates"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:
            self.scaler.load_state_dict({key: torch.as_tensor(value).item() for key, value in state["scaler"].items()})
        self.meter.load_total_sums(state["meter"])
        rng_states = state["random"]
        if len(rng_states) != self.world.world_size:
            problem = f"the checkpoint is from {len(rng_states)} processes and this run has {self.world.world_size}"
            warnings.warn(f"{problem}: random numbers and the statistics of BatchNorm will differ", stacklevel=2)
        restore_rng_state(rng_states[self.world.rank % len(rng_states)], self.device)
        self.progress = TrainingProgress.from_checkpoint(state)
        self.init = LoadedInit(state.get("init_sha256"))
