"""Independent forward passes of the published networks, from a state dict and torch.nn.functional.

They follow the definitions of the source projects and use nothing of `fastcifar.models`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """A state dict as functions of the field: convolution, normalization in eval mode, linear layer."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)

    def bn(self, x: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (
            self.state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def shortcut(self, x: Tensor, block: str, stride: int) -> Tensor:
        if f"{block}.shortcut.0.weight" not in self.state:
            return x
        return self.bn(self.conv(x, f"{block}.shortcut.0", stride), f"{block}.shortcut.1")

    def squeeze(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.conv1.weight" not in self.state:
            return x
        gate = self.conv(F.adaptive_avg_pool2d(x, 1), f"{name}.conv1").clamp(min=0)
        return x * torch.sigmoid(self.conv(gate, f"{name}.conv2"))


def se_resnet_by_hand(state: dict[str, Tensor], x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    w = Weights(state)
    x = w.squeeze(w.bn(w.conv(x, "conv1"), "bn1").clamp(min=0), "seblock")
    for stage, depth in enumerate(blocks):
        for index in range(depth):
            block, stride = f"residual_layers.{stage}.{index}", 2 if stage and not index else 1
            out = w.bn(w.conv(x, f"{block}.conv1", stride), f"{block}.bn1").clamp(min=0)
            out = w.squeeze(w.bn(w.conv(out, f"{block}.conv2"), f"{block}.bn2"), f"{block}.seblock")
            x = (out + w.shortcut(x, block, stride)).clamp(min=0)
    return w.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1), "linear")


def coconut_by_hand(state: dict[str, Tensor], x: Tensor, blocks: tuple[int, ...], leaky: tuple[int, ...]) -> Tensor:
    w = Weights(state)
    for number in (1, 2):
        x = w.bn(w.conv(x, f"conv{number}"), f"bn{number}").clamp(min=0)
    for stage, depth in enumerate(blocks, start=1):
        slope = 0.01 if stage in leaky else 0.0
        for index in range(depth):
            block, stride = f"layer{stage}.{index}", 2 if stage > 1 and not index else 1
            out = F.leaky_relu(w.bn(w.conv(x, f"{block}.conv1"), f"{block}.bn1"), slope)
            out = w.conv(out, f"{block}.conv2", stride)
            if f"{block}.pointwise.weight" in state:
                out = w.conv(out, f"{block}.pointwise")
            out = F.leaky_relu(w.bn(out, f"{block}.bn2"), slope)
            out = w.bn(w.conv(out, f"{block}.conv3"), f"{block}.bn3") + w.shortcut(x, block, stride)
            if f"{block}.se_block.fc1.weight" in state:
                hidden = w.linear(out.mean((2, 3)), f"{block}.se_block.fc1").clamp(min=0)
                out = out * torch.sigmoid(w.linear(hidden, f"{block}.se_block.fc2"))[:, :, None, None]
            x = F.leaky_relu(out, slope)
    return w.linear(F.avg_pool2d(x, 4).flatten(1), "linear")


FORWARDS: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "se68": lambda state, x: se_resnet_by_hand(state, x, (4, 4, 3)),
    "se55": lambda state, x: se_resnet_by_hand(state, x, (2, 2, 2, 2)),
    "se68_block": lambda state, x: se_resnet_by_hand(state, x, (4, 4, 3)),
    "coconut_leaky": lambda state, x: coconut_by_hand(state, x, (2, 4, 6, 2), leaky=(3, 4)),
    "coconut_se": lambda state, x: coconut_by_hand(state, x, (2, 4, 6, 2), leaky=()),
    "coconut_2452": lambda state, x: coconut_by_hand(state, x, (2, 4, 5, 2), leaky=(3, 4)),
    "coconut_sep": lambda state, x: coconut_by_hand(state, x, (3, 4, 6, 3), leaky=()),
}
