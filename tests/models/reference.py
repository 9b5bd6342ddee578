"""Independent forward passes of the published networks, from a state dict and torch.nn.functional.

They follow the definitions of the source projects and use nothing of `fastcifar.models`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """A state dict as functions of the field: convolution, normalization in eval mode, linear layer.

    `used` collects the keys that these functions read.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.used: set[str] = set()

    def get(self, key: str) -> Tensor:
        self.used.add(key)
        return self.state[key]

    def conv(self, x: Tensor, name: str, stride: int = 1, has_bias: bool = False) -> Tensor:
        weight = self.get(f"{name}.weight")
        bias = self.get(f"{name}.bias") if has_bias else None
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    def bn(self, x: Tensor, name: str) -> Tensor:
        self.get(f"{name}.num_batches_tracked")
        mean, variance, scale, shift = (
            self.get(f"{name}.{part}").view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.get(f"{name}.weight").T + self.get(f"{name}.bias")

    def shortcut(self, x: Tensor, block: str, stride: int, changes_shape: bool) -> Tensor:
        if not changes_shape:
            return x
        return self.bn(self.conv(x, f"{block}.shortcut.0", stride), f"{block}.shortcut.1")

    def squeeze(self, x: Tensor, name: str) -> Tensor:
        gate = self.conv(F.adaptive_avg_pool2d(x, 1), f"{name}.conv1", has_bias=True).clamp(min=0)
        return x * torch.sigmoid(self.conv(gate, f"{name}.conv2", has_bias=True))


def se_resnet_by_hand(w: Weights, x: Tensor, blocks: tuple[int, ...], se: str) -> Tensor:
    x = w.bn(w.conv(x, "conv1"), "bn1").clamp(min=0)
    x = w.squeeze(x, "seblock") if se == "stem" else x
    for stage, depth in enumerate(blocks):
        for index in range(depth):
            block, stride = f"residual_layers.{stage}.{index}", 2 if stage and not index else 1
            out = w.bn(w.conv(x, f"{block}.conv1", stride), f"{block}.bn1").clamp(min=0)
            out = w.bn(w.conv(out, f"{block}.conv2"), f"{block}.bn2")
            out = w.squeeze(out, f"{block}.seblock") if se == "block" else out
            x = (out + w.shortcut(x, block, stride, stride == 2)).clamp(min=0)
    return w.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1), "linear")


def coconut_by_hand(
    w: Weights, x: Tensor, blocks: tuple[int, ...], se: tuple[int, ...] = (), leaky: tuple[int, ...] = (),
    separable: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    for number in (1, 2):
        x = w.bn(w.conv(x, f"conv{number}"), f"bn{number}").clamp(min=0)
    for stage, depth in enumerate(blocks, start=1):
        slope = 0.01 if stage in leaky else 0.0
        for index in range(depth):
            block, stride = f"layer{stage}.{index}", 2 if stage > 1 and not index else 1
            out = F.leaky_relu(w.bn(w.conv(x, f"{block}.conv1"), f"{block}.bn1"), slope)
            out = w.conv(out, f"{block}.conv2", stride)
            out = w.conv(out, f"{block}.pointwise") if stage in separable else out
            out = F.leaky_relu(w.bn(out, f"{block}.bn2"), slope)
            out = w.bn(w.conv(out, f"{block}.conv3"), f"{block}.bn3") + w.shortcut(x, block, stride, index == 0)
            if stage in se:
                hidden = w.linear(out.mean((2, 3)), f"{block}.se_block.fc1").clamp(min=0)
                out = out * torch.sigmoid(w.linear(hidden, f"{block}.se_block.fc2"))[:, :, None, None]
            x = F.leaky_relu(out, slope)
    return w.linear(F.avg_pool2d(x, 4).flatten(1), "linear")


FORWARDS: dict[str, Callable[[Weights, Tensor], Tensor]] = {
    "se68": lambda w, x: se_resnet_by_hand(w, x, (4, 4, 3), "stem"),
    "se55": lambda w, x: se_resnet_by_hand(w, x, (2, 2, 2, 2), "stem"),
    "se68_block": lambda w, x: se_resnet_by_hand(w, x, (4, 4, 3), "block"),
    "se68_none": lambda w, x: se_resnet_by_hand(w, x, (4, 4, 3), "none"),
    "coconut_leaky": lambda w, x: coconut_by_hand(w, x, (2, 4, 6, 2), leaky=(3, 4)),
    "coconut_se": lambda w, x: coconut_by_hand(w, x, (2, 4, 6, 2), se=(3,)),
    "coconut_2452": lambda w, x: coconut_by_hand(w, x, (2, 4, 5, 2), se=(3, 4), leaky=(3, 4)),
    "coconut_sep": lambda w, x: coconut_by_hand(w, x, (3, 4, 6, 3), separable=(3, 4)),
    "coconut_over": lambda w, x: coconut_by_hand(w, x, (2, 4, 6, 2), se=(3, 4)),
}
