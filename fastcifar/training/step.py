"""One training step as a plain function of images and labels, and the meter it adds to.

No compile, no graph, no feature branch: `capture.py` makes it fast from outside. It never reads a tensor back to the
host, but in the update of an optimizer that cannot be captured. What varies (clip, average, loss scale) is bound when
the step is built.
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

TrainStep = Callable[..., None]  # images, labels and, with a mixer, what it drew
Forward = Callable[[Tensor], Tensor]
LossAndCorrect = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Metrics:
    """What a meter held: sums since its reset. `loss` and `accuracy` are means (nan before the first image).

    `bad`: the steps since the first that was not finite, which is one of them.
    """

    loss: float
    accuracy: float
    images: int
    nonfinite_steps: int

    @property
    def is_finite(self) -> bool:
        return self.nonfinite_steps == 0


class Meter:
    """Loss, hits and images summed on the device, and whether any step was not finite; read once in a while."""

    def __init__(self, device: torch.device, world: World = SINGLE_PROCESS) -> None:
        self.world = world
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, hits, images, bad
        self.found_inf = torch.zeros((), device=device)  # 1 from the first step that was not finite
        self.host_sums = torch.zeros(4, dtype=torch.float64, pin_memory=device.type == "cuda")

    def update(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """`loss`: mean over the `images`; `hits`: how many of them were right."""
        count = torch.full_like(self.sums[0], images)
        self.sums += torch.stack((loss.detach().double() * images, correct.double(), count, self.found_inf.double()))

    def compute(self) -> Metrics:
        """The sums since the reset, over all ranks: the one place where the host waits for the device."""
        sums = self.sums.clone()
        self.world.all_reduce_sum(sums)
        return _metrics_from_sums(sums.tolist())

    def compute_delayed(self) -> Metrics:
        """The same some steps late, without waiting: what the last peek asked for has arrived by now.

        Several ranks do wait: what follows from a reading, they have to do in the same step.
        """
        if self.sums.device.type == "cpu" or self.world.world_size > 1:
            return self.compute()
        reading = _metrics_from_sums(self.host_sums.tolist())
        self.host_sums.copy_(self.sums, non_blocking=True)
        return reading

    def reset(self) -> None:
        self.sums.zero_()

    def load_sums(self, sums: Tensor) -> None:
        """The sums of a checkpoint, which are finite."""
        self.compute()  # what was peeked at is on its way until here
        self.sums.copy_(sums)
        self.host_sums.copy_(sums)
        self.found_inf.zero_()

    def state_tensors(self) -> list[Tensor]:
        return [self.sums, self.found_inf]


def _metrics_from_sums(sums: list[float]) -> Metrics:
    loss, hits, images, bad = sums
    return Metrics(loss / images if images else math.nan, hits / images if images else math.nan, int(images), int(bad))


class BufferSnapshot:
    """A network's running statistics, put back when the step that moved them was not finite."""

    def __init__(self, model: nn.Module) -> None:
        none = torch.zeros(0, device=next(model.parameters()).device)
        self.buffers = [value for value in model.buffers() if value.is_floating_point()] or [none]
        self.sizes = [value.numel() for value in self.buffers]

    def take(self) -> Tensor:
        """All of them as one new tensor [n]."""
        return torch.cat([value.flatten() for value in self.buffers])

    def restore(self, saved: Tensor, found_inf: Tensor) -> None:
        """What `read` gave, where `bad` is 1; `where` and no arithmetic, for they may be NaN by now."""
        chosen = torch.where(found_inf.bool(), saved, self.take())
        parts = [part.view_as(value) for part, value in zip(chosen.split(self.sizes), self.buffers, strict=True)]
        torch._foreach_copy_(self.buffers, parts)


def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """What normalises pixels 0..255: `pixels * scale + shift`, each [1,3,1,1]. `mean`, `std`: of pixels in [0, 1]."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)


def build_forward(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], precision: str, device: torch.device
) -> Forward:
    """Images [n,3,h,w] of 0..255 -> float32 logits [n,classes]: normalised, cast and run in `precision`.

    `mean`, `std`: per channel, of pixels in [0, 1].
    """
    dtype = DTYPES[precision]
    scale, shift = (part.to(device) for part in scale_and_shift(mean, std))

    def forward(images: Tensor) -> Tensor:
        normalised = (images * scale + shift).to(dtype)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(normalised)
        return logits.float()

    return forward


def resized_forward(forward: Forward, image_size: int) -> Forward:
    """`forward` of the images as `size` pixels a side: bilinear, antialiased where they shrink."""

    def smaller(images: Tensor) -> Tensor:
        images = F.interpolate(images.float(), size=(image_size, image_size), mode="bilinear", antialias=True)
        return forward(images.contiguous(memory_format=torch.channels_last))

    return smaller


def loss_and_correct(forward: Forward, label_smoothing: float) -> LossAndCorrect:
    """(images, labels [n]) -> (mean cross-entropy, how many labels were right): what is compiled."""

    def function(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    return function


def mixed_loss_and_correct(forward: Forward, label_smoothing: float, mix: MixerApplyFn) -> LossAndCorrect:
    """(images, labels [n], drawn) -> the same of mixed images: every label counts by its share of the image.

    The loss is the sum of the labels' cross-entropies by their shares; right is the class with the largest one.
    """

    def function(images: Tensor, labels: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        images, weights = mix(images, drawn)
        logits = forward(images)
        shares = mix_labels(labels, weights, logits.shape[1])
        loss = F.cross_entropy(logits, shares, label_smoothing=label_smoothing)
        return loss, (logits.detach().argmax(1) == shares.argmax(1)).sum()

    return function


def build_step_function(
    loss_function: LossAndCorrect,
    optimizer: OptimizerWrapper,
    clip_gradients: Callable[[], object],
    meter: Meter,
    ema: Ema | None,
    scaler: torch.amp.GradScaler,
    buffer_snapshot: BufferSnapshot,
    world: World = SINGLE_PROCESS,
) -> TrainStep:
    """forward, backward, clip, update, average, count. From the first step that is not finite nothing is updated.

    `scaler`: scales the loss on the device and skips steps whose gradients overflow, which in fp16 is no failure;
    disabled for every other precision, where it does nothing.
    """
    average = ema.update if ema else _skip_ema
    watched = [] if scaler.is_enabled() else optimizer.parameters
    spoilt = _poison_loss if scaler.is_enabled() else _unchanged_loss

    def step(images: Tensor, labels: Tensor, *drawn: Tensor) -> None:
        optimizer.zero_grad()
        kept = buffer_snapshot.take()
        loss, hits = loss_function(images, labels, *drawn)
        scaler.scale(spoilt(loss, meter.found_inf)).backward()
        loss = world.all_reduce_gradients(optimizer.parameters, loss, len(labels))
        scaler.unscale_(optimizer.inner)
        meter.found_inf.copy_(torch.maximum(meter.found_inf, compute_found_inf(loss, watched)))
        buffer_snapshot.restore(kept, meter.found_inf)
        clip_gradients()
        optimizer.step(scaler, skip=meter.found_inf)
        scaler.update()
        average(meter.found_inf)
        meter.update(loss, hits, len(labels))

    return step


def compute_found_inf(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """float32 scalar on the device: 1 if the loss or any gradient holds a NaN or an infinity, else 0."""
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    largest = nn.utils.get_total_norm(gradients, norm_type=math.inf) if gradients else torch.zeros_like(loss.detach())
    return (~torch.stack((loss.detach(), largest)).isfinite().all()).float()


def _poison_loss(loss: Tensor, found_inf: Tensor) -> Tensor:
    """A loss whose gradients overflow where `bad` is 1: an enabled scaler asks nobody else whether to skip."""
    return loss * torch.where(found_inf.bool(), math.inf, 1.0)


def _unchanged_loss(loss: Tensor, found_inf: Tensor) -> Tensor:
    return loss


def _skip_ema(found_inf: Tensor) -> None:
    """The average of a run without one."""
