"""The training step: gradients, and an update that only synchronizes with the host if it cannot be captured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.data.augment import CIFAR_IMAGE_SIZE
from fastcifar.data.mixers import MixerApplyFn, mix_labels
from fastcifar.errors import NonFiniteError
from fastcifar.recipe import Recipe
from fastcifar.training.distributed import SINGLE_PROCESS, World
from fastcifar.training.optimizers import OptimizerWrapper

# `allow_tf32` distinguishes tf32 from fp32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}

TrainStep = Callable[..., None]  # (images, labels) and, with a mixer, its parameters
Forward = Callable[[Tensor], Tensor]
LossAndCorrect = Callable[..., tuple[Tensor, Tensor]]
# (images [n, 3, h, w], function that returns the targets of [n, classes] logits) -> indices of the selected images
SelectExamples = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True)
class Metrics:
    """Mean training metrics since the last reset of a meter, NaN before the first image."""

    loss: float
    accuracy: float
    images: int
    nonfinite_steps: int  # steps since the first one with a NaN or Inf, inclusive

    @classmethod
    def from_sums(cls, sums: Tensor) -> Metrics:
        loss, correct, images, nonfinite_steps = sums.tolist()
        mean_loss, accuracy = (loss / images, correct / images) if images else (math.nan, math.nan)
        return cls(mean_loss, accuracy, int(images), int(nonfinite_steps))

    @property
    def all_finite(self) -> bool:
        return self.nonfinite_steps == 0

    def require_finite(self, step: int) -> None:
        """Raise `NonFiniteError` if one of the steps up to `step`, the last one counted, had a NaN or Inf."""
        if not self.all_finite:
            problem = f"the loss or a gradient was not finite in step {step - self.nonfinite_steps + 1}"
            remedy = "use a smaller --lr, a --clip-grad, --precision fp32, or --on-nan rollback"
            raise NonFiniteError(problem, remedy)


class Meter:
    """Sums of loss, correct predictions and images on the device, and whether any step had a NaN or Inf."""

    def __init__(self, device: torch.device, world: World = SINGLE_PROCESS) -> None:
        self.world = world
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, images, non-finite steps
        self.found_inf = torch.zeros((), device=device)  # 1 during and after the first step with a NaN or Inf
        self.one = torch.ones((), device=device)
        self.host_sums = torch.zeros(4, dtype=torch.float64, pin_memory=device.type == "cuda")

    def update(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Add one batch. `loss`: mean over its `images`; `correct`: how many of them were classified correctly."""
        values = torch.stack((loss.detach(), self.one, correct, self.found_inf))
        self.sums[0::2].add_(values[:2], alpha=images)
        self.sums[1::2].add_(values[2:])

    def compute(self) -> Metrics:
        """Return the metrics of all ranks since the last reset. The host waits for the device."""
        return Metrics.from_sums(self.total_sums())

    def total_sums(self) -> Tensor:
        """Return the sums over all ranks, float64 [4]. All ranks count the same non-finite steps."""
        if self.world.world_size == 1:
            return self.sums
        total = self.world.all_reduce(self.sums)
        total[3] = self.sums[3]
        return total

    def compute_delayed(self) -> Metrics:
        """Return the metrics that the previous call copied to the host, without waiting for the device."""
        # with several ranks, the host waits, because all ranks must act on the same metrics in the same step
        if self.sums.device.type == "cpu" or self.world.world_size > 1:
            return self.compute()
        metrics = Metrics.from_sums(self.host_sums)
        self.host_sums.copy_(self.sums, non_blocking=True)
        return metrics

    def reset(self) -> None:
        self.sums.zero_()

    def load_total_sums(self, sums: Tensor) -> None:
        """Continue from the result of `total_sums`, which rank 0 takes as its own sums."""
        self.compute()  # wait for the copy that compute_delayed may have started
        self.sums.copy_(sums if self.world.is_main_process else torch.zeros_like(sums))
        self.host_sums.copy_(sums)
        self.found_inf.zero_()

    def state_tensors(self) -> list[Tensor]:
        return [self.sums, self.found_inf]


class Ema:
    """The exponential moving average of the weights and running statistics of `model`, updated on the device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model_tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.average = {name: value.clone() for name, value in self.model_tensors.items()}
        self.min_update_weight = 1 - decay
        self.num_updates = torch.zeros((), device=next(iter(self.model_tensors.values())).device)

    def update(self, skip: Tensor | float = 0.0) -> None:
        """Update the average after a step. `skip`: float32 scalar on the device; 1 leaves the average unchanged."""
        keep = 1 - skip
        self.num_updates += keep
        # max(1 - decay, 9 / (10 + t)) for update t, as in TensorFlow
        weight = (9 / (10 + self.num_updates)).clamp(min=self.min_update_weight) * keep
        average = list(self.average.values())
        change = torch._foreach_sub(list(self.model_tensors.values()), average)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(average, change)

    def copy_to_model(self) -> None:
        torch._foreach_copy_(list(self.model_tensors.values()), list(self.average.values()))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Replace the weights of the model by their averages within the `with` block."""
        original = [value.clone() for value in self.model_tensors.values()]
        self.copy_to_model()
        try:
            yield
        finally:
            torch._foreach_copy_(list(self.model_tensors.values()), original)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a state dict of `model` with the averaged weights; integer buffers are those of the model."""
        return {**model.state_dict(), **self.average}

    def load_state_dict(self, state: dict[str, Tensor], num_updates: Tensor) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])
        self.num_updates.copy_(num_updates)

    def state_tensors(self) -> list[Tensor]:
        return [*self.average.values(), self.num_updates]


def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) [1, 3, 1, 1] that normalize pixels in [0, 255]; `mean`, `std` are of pixels in [0, 1]."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale).view(1, 3, 1, 1), torch.tensor(shift).view(1, 3, 1, 1)


def build_forward(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], precision: str, device: torch.device
) -> Forward:
    """Return a function images [n, 3, h, w] of 0..255 -> float32 logits [n, classes], computed in `precision`."""
    dtype = DTYPES[precision]
    scale, shift = (part.to(device) for part in scale_and_shift(mean, std))

    def forward(images: Tensor) -> Tensor:
        inputs = (images * scale + shift).to(dtype)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(inputs)
        return logits.float()

    return forward


def resize_images(images: Tensor, size: int) -> Tensor:
    """Return images [n, 3, 32, 32] as [n, 3, size, size], float32 unless the size is the same."""
    if size == CIFAR_IMAGE_SIZE:
        return images
    images = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)


def build_selection(forward: Forward, model: nn.Module, recipe: Recipe) -> SelectExamples | None:
    """Return a function that selects the hard examples of a batch, at least one; None if all images are trained on.

    These are the images with the largest losses in an additional forward pass, which leaves the buffers of `model`
    unchanged. Training only on them is selective backpropagation (Jiang et al., 2019, https://arxiv.org/abs/1910.00762).
    """
    fraction, size, buffers = recipe.hard_example_fraction, recipe.hard_example_size, list(model.buffers())
    if fraction == 1:
        return None

    @torch.no_grad()
    def select(images: Tensor, targets_of: Callable[[Tensor], Tensor]) -> Tensor:
        saved = [value.clone() for value in buffers]
        logits = forward(resize_images(images, size))
        for value, original in zip(buffers, saved, strict=True):
            value.copy_(original)
        losses = F.cross_entropy(logits, targets_of(logits), label_smoothing=recipe.label_smoothing, reduction="none")
        return losses.topk(max(1, round(fraction * len(images))), sorted=False).indices

    return select


def loss_and_correct(
    forward: Forward,
    label_smoothing: float,
    mix: MixerApplyFn | None = None,
    image_size: int = CIFAR_IMAGE_SIZE,
    select: SelectExamples | None = None,
) -> LossAndCorrect:
    """Return a function (images, labels [n]) -> (mean cross-entropy, number of correct predictions), both float32.

    With `mix`, it also takes the mixer's parameters, and the label with the largest weight is the correct one. With
    `select`, the loss is that of the selected images, and the number is their accuracy times n.
    """

    def function(images: Tensor, labels: Tensor, *mixer_params: Tensor) -> tuple[Tensor, Tensor]:
        num_images, label_weights = len(labels), None
        if mix:
            images, label_weights = mix(images, *mixer_params)

        def targets_of(logits: Tensor) -> Tensor:
            return labels if label_weights is None else mix_labels(labels, label_weights, logits.shape[1])

        selected = select(images, targets_of) if select else slice(None)
        logits = forward(resize_images(images[selected], image_size))
        targets = targets_of(logits)[selected]
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        largest = targets if label_weights is None else targets.argmax(1)
        correct = (logits.detach().argmax(1) == largest).sum(dtype=torch.float32)
        return loss, correct * (num_images / len(targets)) if select else correct

    return function


def build_gradient_function(
    loss_function: LossAndCorrect,
    model: nn.Module,
    optimizer: OptimizerWrapper,
    meter: Meter,
    scaler: torch.amp.GradScaler,
) -> TrainStep:
    """Return the first part of a step: a function that computes the gradients of a batch and updates the meter.

    After a NaN or Inf in the loss or a gradient, this and later steps leave the buffers of `model` unchanged, and
    `meter.found_inf` makes the update skip. `scaler` is enabled only in fp16, where a gradient that is not finite makes
    it skip a single update and does not affect later steps.
    """
    checked = [] if scaler.is_enabled() else optimizer.parameters
    buffers = [value for value in model.buffers() if value.is_floating_point()] or [torch.zeros_like(meter.sums[:0])]
    sizes = [value.numel() for value in buffers]

    def compute_gradients(images: Tensor, labels: Tensor, *mixer_params: Tensor) -> None:
        optimizer.inner.zero_grad()
        saved_buffers = torch.cat([value.flatten() for value in buffers])
        loss, correct = loss_function(images, labels, *mixer_params)
        if scaler.is_enabled():  # it skips a step only if gradients overflow; after a NaN or Inf, make them overflow
            scaler.scale(loss / (1 - meter.found_inf)).backward()
        else:
            loss.backward(meter.one)
        loss = meter.world.all_reduce_gradients(optimizer.parameters, loss.detach(), len(labels))
        tensors = [loss, *(weight.grad for weight in checked if weight.grad is not None)]
        for dtype in {tensor.dtype for tensor in tensors}:
            # sets `found_inf` to 1 if a value is not finite, and multiplies by one
            same_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(same_dtype, meter.found_inf, meter.one)
        # restore the buffers after a NaN or Inf, without arithmetic, because they may contain NaN
        new_buffers = torch.cat([value.flatten() for value in buffers])
        values = torch.where(meter.found_inf.bool(), saved_buffers, new_buffers).split(sizes)
        torch._foreach_copy_(buffers, [value.view_as(old) for value, old in zip(values, buffers, strict=True)])
        meter.update(loss, correct, len(labels))

    return compute_gradients


def build_update_function(
    optimizer: OptimizerWrapper,
    clip_gradients: Callable[[], object],
    meter: Meter,
    ema: Ema | None,
    scaler: torch.amp.GradScaler,
) -> Callable[[], None]:
    """Return the second part of a step: a function that clips the gradients and updates weights and moving average."""

    def update() -> None:
        scaler.unscale_(optimizer.inner)
        clip_gradients()
        optimizer.step(scaler, skip=meter.found_inf)
        scaler.update()
        if ema:
            ema.update(meter.found_inf)

    return update
