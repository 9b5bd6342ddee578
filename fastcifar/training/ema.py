"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The exponential moving average of the weights and running statistics of `model`, updated on the device.

    Update t has the weight max(1 - `decay`, 9 / (10 + t)), as in TensorFlow.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model_tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.average = {name: value.clone() for name, value in self.model_tensors.items()}
        self.min_update_weight = 1 - decay
        self.num_updates = torch.zeros((), device=next(iter(self.model_tensors.values())).device)

    def update(self, skip: Tensor | float = 0.0) -> None:
        """Update the average after a step. `skip`: float32 scalar on the device; 1 leaves the average unchanged."""
        self.num_updates += 1 - skip
        weight = (9 / (10 + self.num_updates)).clamp(min=self.min_update_weight) * (1 - skip)
        average = list(self.average.values())
        change = torch._foreach_sub(list(self.model_tensors.values()), average)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(average, change)

    def copy_to_model(self) -> None:
        torch._foreach_copy_(list(self.model_tensors.values()), list(self.average.values()))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the model the averaged weights within the `with` block."""
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
