"""Residual networks of basic blocks with optional squeeze-and-excitation (SE): `se_resnet`.

The layers that the other architectures share are here too. The state-dict keys are those of the published checkpoints
and may not change. Forward passes keep channels_last and have no data-dependent control flow, because they are compiled
and captured as one CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.errors import UsageError, lookup
from fastcifar.models.fused_ops import norm_relu

# In place where autograd needs only the output: it saves the memory of one feature map for each activation.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, negative_slope=0.01, inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}
# Locations of squeeze-and-excitation: (after the stem, in every block).
SE_PLACEMENTS = {"none": (False, False), "stem": (True, False), "block": (False, True)}
# Whether the convolutions of the blocks are depthwise-separable.
CONV_TYPES = {"full": False, "separable": True}
# Locations of dropout: (after every block, before the linear layer).
DROPOUT_PLACEMENTS = {"all": (True, True), "head": (False, True)}


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu et al., 2018): scales each channel by a gate computed from the means of all channels.

    [n, C, H, W] -> [n, C, H, W]. The hidden layer has C / reduction channels, rounded down, at least 1.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        gate = self.conv2(F.relu(self.conv1(means))).sigmoid()
        return x * gate


def se_parameters(seblock: nn.Module) -> tuple[Tensor, ...]:
    """Weight and bias of the two layers of a `SqueezeExcitation`, as `norm_relu` takes them; () for an identity."""
    return tuple(seblock.parameters())


# A feature map twice, for the two places that use it: see `norm_relu`.
TensorPair = tuple[Tensor, Tensor]


class BasicBlockConfig(NamedTuple):
    """What all blocks of a network have in common; `se_reduction` 0 means no squeeze-and-excitation in the blocks."""

    activation: Callable[[], nn.Module]
    dropout: float
    kernel: int
    shortcut_kernel: int
    separable: bool
    se_reduction: int


class BasicBlock(nn.Module):
    """conv-BN-act-conv-BN, [SE], shortcut addition, act, [dropout]; [n, C_in, H, W] -> [n, C, H/stride, W/stride].

    With separable convolutions, `conv1` and `conv2` are depthwise, and `pointwise1` and `pointwise2` follow them.
    """

    uses_fused_ops = False  # set by `enable_fused_ops`

    def __init__(self, in_channels: int, channels: int, stride: int, config: BasicBlockConfig) -> None:
        super().__init__()
        self.conv1, self.pointwise1 = block_conv(in_channels, channels, config.kernel, stride, config.separable)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2, self.pointwise2 = block_conv(channels, channels, config.kernel, 1, config.separable)
        self.bn2 = nn.BatchNorm2d(channels)
        self.seblock = SqueezeExcitation(channels, config.se_reduction) if config.se_reduction else nn.Identity()
        self.shortcut = shortcut_layer(in_channels, channels, stride, config.shortcut_kernel)
        self.activation = config.activation()
        self.dropout = dropout_layer(config.dropout)

    def forward(self, x: Tensor | TensorPair) -> Tensor | TensorPair:
        x, shortcut_input = x if isinstance(x, tuple) else (x, x)
        if self.uses_fused_ops and self.training:
            out, _ = norm_relu(self.pointwise1(self.conv1(x)), self.bn1)
            out = self.pointwise2(self.conv2(out))
            return norm_relu(out, self.bn2, se_parameters(self.seblock), self.shortcut(shortcut_input))
        out = self.activation(self.bn1(self.pointwise1(self.conv1(x))))
        out = self.seblock(self.bn2(self.pointwise2(self.conv2(out))))
        out = self.activation(out + self.shortcut(shortcut_input))
        return self.dropout(out)


class SEResNet(nn.Module):
    """Stem, stages of basic blocks, global average pooling, linear; [n, 3, H, W] -> [n, num_classes].

    For 32x32 images the pooling equals that of the published networks (8x8 after three stages, 4x4 after four).
    """

    uses_fused_ops = False  # set by `enable_fused_ops`

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int],
        channels: Sequence[int],
        config: BasicBlockConfig,
        stem_se_reduction: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.activation = config.activation()
        self.seblock = SqueezeExcitation(channels[0], stem_se_reduction) if stem_se_reduction else nn.Identity()
        stages, in_channels = [], channels[0]
        for index, (depth, width) in enumerate(zip(blocks, channels, strict=True)):
            first = BasicBlock(in_channels, width, 1 if index == 0 else 2, config)
            stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1, config) for _ in range(depth - 1))))
            in_channels = width
        self.residual_layers = nn.Sequential(*stages)
        self.dropout = dropout_layer(dropout)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.residual_layers(self.forward_stem(images))
        x = x[0] if isinstance(x, tuple) else x
        return self.linear(self.dropout(x.mean((2, 3))))

    def forward_stem(self, images: Tensor) -> Tensor | TensorPair:
        """Images [n, 3, H, W] to the input of the first block, [n, channels[0], H, W]."""
        x = self.conv1(images)
        if self.uses_fused_ops and self.training:
            return norm_relu(x, self.bn1)
        return self.seblock(self.activation(self.bn1(x)))


def se_resnet(
    num_classes: int = 10,
    blocks: Sequence[int] = (4, 4, 3),
    channels: Sequence[int] = (64, 128, 256),
    se: str = "none",
    se_reduction: int = 16,
    width: float = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "all",
    activation: str = "relu",
    kernel: int = 3,
    shortcut_kernel: int = 1,
    conv: str = "full",
) -> SEResNet:
    """An SE-ResNet with `blocks[i]` basic blocks of `channels[i]` channels in stage i, with PyTorch's initialization.

    Every stage but the first halves height and width.
    se: `none`, `stem` (after the stem) or `block` (in every block, before the addition), with C / se_reduction hidden
    channels. width: multiplier of all channels, see `scale_channels`. dropout: probability, at least 0 and below 1;
    dropout_at: `all` (after every block and before the linear layer) or `head` (only before the linear layer). kernel,
    shortcut_kernel: odd kernel sizes of the block convolutions and of the projection shortcuts. conv: `full` or
    `separable` block convolutions.
    Raises `UsageError` for invalid values. Source: the published SEResNet68 (se68, se55).
    """
    check_stages(blocks, channels)
    check_dropout(dropout)
    check_se_reduction(se_reduction)
    check_kernel_size("--kernel", kernel)
    check_kernel_size("--shortcut-kernel", shortcut_kernel)
    in_stem, in_blocks = lookup(SE_PLACEMENTS, se, "SE placement")
    after_blocks, before_linear = lookup(DROPOUT_PLACEMENTS, dropout_at, "dropout placement")
    config = BasicBlockConfig(
        activation=lookup(ACTIVATIONS, activation, "activation"),
        dropout=dropout if after_blocks else 0.0,
        kernel=kernel,
        shortcut_kernel=shortcut_kernel,
        separable=lookup(CONV_TYPES, conv, "convolution"),
        se_reduction=se_reduction if in_blocks else 0,
    )
    return SEResNet(
        num_classes,
        blocks,
        scale_channels(channels, width),
        config,
        stem_se_reduction=se_reduction if in_stem else 0,
        dropout=dropout if before_linear else 0.0,
    )


def enable_fused_ops(model: nn.Module) -> None:
    """Makes `model` use `norm_relu` in training mode: in every block, and after the stem unless the stem has an SE.

    State-dict keys, weights and evaluation mode do not change.
    Raises `UsageError` unless `model` is an `SEResNet` with ReLU and without dropout in its blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    supported = all(isinstance(b.activation, nn.ReLU) and isinstance(b.dropout, nn.Identity) for b in blocks)
    if not (isinstance(model, SEResNet) and supported):
        raise UsageError(
            "--fused-ops supports only SE-ResNets with ReLU and no dropout in their blocks", "leave it out"
        )
    for block in blocks:
        block.uses_fused_ops = True
    model.uses_fused_ops = isinstance(model.seblock, nn.Identity)


def block_conv(
    in_channels: int, channels: int, kernel: int, stride: int, separable: bool
) -> tuple[nn.Conv2d, nn.Conv2d | nn.Identity]:
    """A convolution without bias, [n, in_channels, H, W] -> [n, channels, H/stride, W/stride], as two modules in order.

    If separable, the depthwise and the pointwise convolution; otherwise the whole convolution and an identity.
    """
    if not separable:
        return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False), nn.Identity()
    depthwise = nn.Conv2d(in_channels, in_channels, kernel, stride, kernel // 2, groups=in_channels, bias=False)
    return depthwise, nn.Conv2d(in_channels, channels, 1, bias=False)


def shortcut_layer(in_channels: int, channels: int, stride: int, kernel: int = 1) -> nn.Module:
    """The shortcut of a block: an identity if the shape does not change, otherwise a convolution and a BatchNorm.

    [n, in_channels, H, W] -> [n, channels, H/stride, W/stride].
    """
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def dropout_layer(probability: float) -> nn.Module:
    """Dropout, or an identity for probability 0."""
    return nn.Dropout(probability) if probability else nn.Identity()


def scale_channels(channels: Sequence[int], width: float) -> tuple[int, ...]:
    """`channels` times `width`, rounded to the nearest multiples of 8 (halves up), at least 8; unchanged for width 1.

    Raises `UsageError` unless `width` is finite and positive.
    """
    if not (math.isfinite(width) and width > 0):
        raise UsageError(f"--width {width} is not a positive finite number", "give a positive number, such as 0.5")
    if width == 1:
        return tuple(channels)
    return tuple(max(8, 8 * math.floor(count * width / 8 + 0.5)) for count in channels)


def check_stages(blocks: Sequence[int], channels: Sequence[int]) -> None:
    """Raises `UsageError` unless there are two to five stages with positive numbers of blocks and of channels."""
    if len(blocks) != len(channels):
        raise UsageError(
            f"{len(blocks)} stages of blocks but {len(channels)} of channels",
            "give --blocks and --channels one number for each stage",
        )
    if not 2 <= len(blocks) <= 5:
        raise UsageError(f"{len(blocks)} stages: there must be 2 to 5", "give --blocks and --channels 2 to 5 numbers")
    for option, counts in (("--blocks", blocks), ("--channels", channels)):
        if min(counts) < 1:
            values = ",".join(str(count) for count in counts)
            raise UsageError(f"{option} {values} contains a number below 1", "each number must be 1 or more")


def check_dropout(probability: float) -> None:
    """Raises `UsageError` unless `probability` is at least 0 and below 1."""
    if not 0 <= probability < 1:
        raise UsageError(f"--dropout {probability} is out of range", "give a probability of at least 0 and below 1")


def check_se_reduction(reduction: int) -> None:
    """Raises `UsageError` unless `reduction` is 1 or more."""
    if reduction < 1:
        raise UsageError(f"--se-reduction {reduction} is out of range", "give 1 or more")


def check_kernel_size(option: str, size: int) -> None:
    """Raises `UsageError` unless `size`, the value of the command-line `option`, is odd and positive."""
    if size < 1 or size % 2 == 0:
        raise UsageError(f"{option} {size} is not a positive odd number", "give an odd number, such as 3")
