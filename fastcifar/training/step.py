"""One training step as a plain function of images and labels, and the counters that it updates.

It never synchronizes with the host, except in the update of an optimizer that cannot be captured. compilation.py and
cuda_graph.py compile and capture it from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.data.mixers import MixerApplyFn, mix_labels
from fastcifar.training.distributed import SINGLE_PROCESS, World
from fastcifar.training.ema import Ema
from fastcifar.training.optimizers import OptimizerWrapper

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

TrainStep = Callable[..., None]  # (images, labels) and, with a mixer, its parameters
Forward = Callable[[Tensor], Tensor]
LossAndCorrect = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Metrics:
    """Mean training metrics since the last reset of a meter, NaN before the first image.

    `nonfinite_steps`: number of steps from the first one with a NaN or Inf on, that step included; 0 if there is none.
    """

    loss: float
    accuracy: float
    images: int
    nonfinite_steps: int

    @property
    def all_finite(self) -> bool:
        return self.nonfinite_steps == 0


class Meter:
    """Sums of loss, correct predictions and images on the device, and whether any step had a NaN or Inf."""

    def __init__(self, device: torch.device, world: World = SINGLE_PROCESS) -> None:
        self.world = world
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, images, non-finite steps
        self.found_inf = torch.zeros((), device=device)  # 1 from the first step with a NaN or Inf on
        self.host_sums = torch.zeros(4, dtype=torch.float64, pin_memory=device.type == "cuda")

    def update(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Add one batch. `loss`: mean over its `images`; `correct`: how many of them were classified correctly."""
        count = torch.full_like(self.sums[0], images)
        self.sums += torch.stack((loss.detach().double() * images, correct.double(), count, self.found_inf.double()))

    def compute(self) -> Metrics:
        """Return the metrics since the reset, over all ranks; the host waits for the device."""
        sums = self.sums.clone()
        self.world.all_reduce_sum(sums)
        return _metrics_from_sums(sums.tolist())

    def compute_delayed(self) -> Metrics:
        """Return the metrics as of the previous call, whose copy to the host has finished by now, without waiting.

        Several ranks do wait, because they have to act on the same metrics in the same step.
        """
        if self.sums.device.type == "cpu" or self.world.world_size > 1:
            return self.compute()
        metrics = _metrics_from_sums(self.host_sums.tolist())
        self.host_sums.copy_(self.sums, non_blocking=True)
        return metrics

    def reset(self) -> None:
        self.sums.zero_()

    def load_sums(self, sums: Tensor) -> None:
        """Restore the sums of a checkpoint, which are finite."""
        self.compute()  # wait for the copy that compute_delayed may have started
        self.sums.copy_(sums)
        self.host_sums.copy_(sums)
        self.found_inf.zero_()

    def state_tensors(self) -> list[Tensor]:
        return [self.sums, self.found_inf]


def _metrics_from_sums(sums: list[float]) -> Metrics:
    loss, correct, images, nonfinite_steps = sums
    mean_loss, accuracy = (loss / images, correct / images) if images else (math.nan, math.nan)
    return Metrics(mean_loss, accuracy, int(images), int(nonfinite_steps))


class BufferSnapshot:
    """A copy of a network's running statistics, restored if the step that updated them had a NaN or Inf."""

    def __init__(self, model: nn.Module) -> None:
        empty = torch.zeros(0, device=next(model.parameters()).device)
        self.buffers = [value for value in model.buffers() if value.is_floating_point()] or [empty]
        self.sizes = [value.numel() for value in self.buffers]

    def take(self) -> Tensor:
        """Return all buffers, concatenated in a new tensor [n]."""
        return torch.cat([value.flatten() for value in self.buffers])

    def restore(self, saved: Tensor, found_inf: Tensor) -> None:
        """Restore the result of `take` if `found_inf` is 1, without arithmetic, because buffers may contain NaN."""
        values = torch.where(found_inf.bool(), saved, self.take()).split(self.sizes)
        torch._foreach_copy_(self.buffers, [new.view_as(old) for new, old in zip(values, self.buffers, strict=True)])


def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), both [1, 3, 1, 1], with which `pixels * scale + shift` normalizes pixels 0..255.

    `mean`, `std`: per channel, of pixels in [0, 1].
    """
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)


def build_forward(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], precision: str, device: torch.device
) -> Forward:
    """Return a function images [n, 3, h, w] of 0..255 -> float32 logits [n, classes], computed in `precision`.

    `mean`, `std`: per channel, of pixels in [0, 1].
    """
    dtype = DTYPES[precision]
    scale, shift = (part.to(device) for part in scale_and_shift(mean, std))

    def forward(images: Tensor) -> Tensor:
        inputs = (images * scale + shift).to(dtype)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(inputs)
        return logits.float()

    return forward


def resized_forward(forward: Forward, image_size: int) -> Forward:
    """Return `forward` on images resized to `image_size` pixels (bilinear, antialiased)."""

    def function(images: Tensor) -> Tensor:
        images = F.interpolate(images.float(), size=(image_size, image_size), mode="bilinear", antialias=True)
        return forward(images.contiguous(memory_format=torch.channels_last))

    return function


def loss_and_correct(forward: Forward, label_smoothing: float) -> LossAndCorrect:
    """Return a function (images, labels [n]) -> (mean cross-entropy, number of correct predictions)."""

    def function(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    return function


def mixed_loss_and_correct(forward: Forward, label_smoothing: float, mix: MixerApplyFn) -> LossAndCorrect:
    """Return a function (images, labels [n], mixer parameters) -> (mean cross-entropy, number of correct predictions).

    The target of a mixed image is the mixture of its labels; a prediction of the largest one is correct.
    """

    def function(images: Tensor, labels: Tensor, mixer_params: Tensor) -> tuple[Tensor, Tensor]:
        images, weights = mix(images, mixer_params)
        logits = forward(images)
        targets = mix_labels(labels, weights, logits.shape[1])
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        return loss, (logits.detach().argmax(1) == targets.argmax(1)).sum()

    return function


def build_step_function(
    loss_function: LossAndCorrect,
    optimizer: OptimizerWrapper,
    clip_gradients: Callable[[], object],
    meter: Meter,
    ema: Ema | None,
    scaler: torch.amp.GradScaler,
    buffer_snapshot: BufferSnapshot,
) -> TrainStep:
    """Return a step: forward, backward, gradient clipping, update, moving average, counters.

    On a NaN or Inf in the loss or a gradient, that update and all later ones are skipped. `scaler` scales the loss on
    the device and skips steps whose gradients overflow, which is normal in fp16; it is disabled in other precisions.
    """
    checked = [] if scaler.is_enabled() else optimizer.parameters

    def step(images: Tensor, labels: Tensor, *mixer_params: Tensor) -> None:
        optimizer.zero_grad()
        buffers = buffer_snapshot.take()
        loss, correct = loss_function(images, labels, *mixer_params)
        if scaler.is_enabled():  # it skips a step only if gradients overflow: make them overflow after a NaN or Inf
            scaler.scale(loss * torch.where(meter.found_inf.bool(), math.inf, 1.0)).backward()
        else:
            loss.backward()
        loss = meter.world.all_reduce_gradients(optimizer.parameters, loss, len(labels))
        scaler.unscale_(optimizer.inner)
        meter.found_inf.copy_(torch.maximum(meter.found_inf, compute_found_inf(loss, checked)))
        buffer_snapshot.restore(buffers, meter.found_inf)
        clip_gradients()
        optimizer.step(scaler, skip=meter.found_inf)
        scaler.update()
        if ema:
            ema.update(meter.found_inf)
        meter.update(loss, correct, len(labels))

    return step


def compute_found_inf(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return a float32 scalar on the device: 1 if the loss or any gradient contains a NaN or Inf, else 0."""
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    largest = nn.utils.get_total_norm(gradients, norm_type=math.inf) if gradients else torch.zeros_like(loss.detach())
    return (~torch.stack((loss.detach(), largest)).isfinite().all()).float()
