"""Residual networks of basic blocks with optional squeeze-and-excitation (SE), and the layers of all architectures.

The state-dict keys are those of the published checkpoints and may not change. Forward passes keep channels_last and
have no data-dependent control flow, because they are compiled and captured as one CUDA graph.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.errors import UsageError, lookup
from fastcifar.models.fused_ops import allow_in_compiled_graphs, norm_relu

Activation = Callable[[], nn.Module]
# `inplace` where autograd needs only the output, which saves the memory of one feature map for each activation.
ACTIVATIONS: dict[str, Activation] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, negative_slope=0.01, inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}
# Name -> whether squeeze-and-excitation layers are (after the stem, in every block).
SE_PLACEMENTS = {"none": (False, False), "stem": (True, False), "block": (False, True)}
# Whether the convolutions of the blocks are depthwise-separable.
CONV_TYPES = {"full": False, "separable": True}
# Name -> whether dropout is applied (after every block, before the linear layer).
DROPOUT_PLACEMENTS = {"all": (True, True), "head": (False, True)}

TensorPair = tuple[Tensor, Tensor]  # a feature map twice, for the two places that use it: see `norm_relu`


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu et al., 2018) with C / reduction hidden channels; [n, C, H, W] -> [n, C, H, W]."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.conv2(F.relu(self.conv1(means))).sigmoid()


class BasicBlock(nn.Module):
    """conv-BN-act-conv-BN, [SE], shortcut addition, act, [dropout]; [n, C_in, H, W] -> [n, C, H/stride, W/stride]."""

    uses_fused_ops = False  # set by `enable_fused_ops`

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        activation: Activation,
        dropout: float,
        kernel: int,
        shortcut_kernel: int,
        separable: bool,
        se_reduction: int,
    ) -> None:
        super().__init__()
        self.conv1, self.pointwise1 = block_conv(in_channels, channels, kernel, stride, separable)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2, self.pointwise2 = block_conv(channels, channels, kernel, 1, separable)
        self.bn2 = nn.BatchNorm2d(channels)
        self.seblock = se_layer(channels, se_reduction)
        self.shortcut = shortcut_layer(in_channels, channels, stride, shortcut_kernel)
        self.activation = activation()
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor | TensorPair) -> Tensor | TensorPair:
        x, shortcut_input = x if isinstance(x, tuple) else (x, x)
        if self.uses_fused_ops and self.bn1.training and self.bn2.training:
            out, _ = norm_relu(self.pointwise1(self.conv1(x)), self.bn1)
            out = self.pointwise2(self.conv2(out))
            return norm_relu(out, self.bn2, tuple(self.seblock.parameters()), self.shortcut(shortcut_input))
        out = self.activation(self.bn1(self.pointwise1(self.conv1(x))))
        out = self.seblock(self.bn2(self.pointwise2(self.conv2(out))))
        return self.dropout(self.activation(out + self.shortcut(shortcut_input)))


class SEResNet(nn.Module):
    """Stem, stages of basic blocks, global average pooling, linear; [n, 3, H, W] -> [n, num_classes].

    The options are those of `Recipe`. Source: the published SEResNet68 (se68, se55). For 32x32 images the pooling
    equals theirs (8x8 after three stages, 4x4 after four).
    """

    stem_layers = ("conv1", "bn1", "seblock")
    uses_fused_ops = False  # set by `enable_fused_ops`

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        check_stages(blocks, channels)
        for option, size in (("--kernel", kernel), ("--shortcut-kernel", shortcut_kernel)):
            if size % 2 == 0:
                raise UsageError(f"{option} {size} is not an odd number", "give an odd number, such as 3")
        in_stem, in_blocks = lookup(SE_PLACEMENTS, se, "SE placement")
        after_blocks, before_linear = lookup(DROPOUT_PLACEMENTS, dropout_at, "dropout placement")
        act = lookup(ACTIVATIONS, activation, "activation")
        block = partial(
            BasicBlock,
            activation=act,
            dropout=dropout * after_blocks,
            kernel=kernel,
            shortcut_kernel=shortcut_kernel,
            separable=lookup(CONV_TYPES, conv, "convolution"),
            se_reduction=se_reduction * in_blocks,
        )
        in_channels, *_ = widths = scale_channels(channels, width)
        self.conv1 = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.activation = act()
        self.seblock = se_layer(in_channels, se_reduction * in_stem)
        self.residual_layers = nn.Sequential()
        for depth, out_channels in zip(blocks, widths, strict=True):
            first = block(in_channels, out_channels, 2 if len(self.residual_layers) else 1)
            rest = (block(out_channels, out_channels, 1) for _ in range(depth - 1))
            self.residual_layers.append(nn.Sequential(first, *rest))
            in_channels = out_channels
        self.dropout = dropout_layer(dropout * before_linear)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        fused = self.uses_fused_ops and self.bn1.training
        x = norm_relu(x, self.bn1) if fused else self.seblock(self.activation(self.bn1(x)))
        x = self.residual_layers(x)
        x = x[0] if isinstance(x, tuple) else x
        return self.linear(self.dropout(x.mean((2, 3))))


def enable_fused_ops(model: nn.Module) -> None:
    """Make `model` use `norm_relu` in training mode: in every block, and after the stem unless the stem has an SE."""
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    supported = all(isinstance(b.activation, nn.ReLU) and isinstance(b.dropout, nn.Identity) for b in blocks)
    if not (isinstance(model, SEResNet) and supported):
        problem = "--fused-ops supports only SE-ResNets with ReLU and no dropout in their blocks"
        raise UsageError(problem, "omit --fused-ops")
    allow_in_compiled_graphs()
    for block in blocks:
        block.uses_fused_ops = True
    model.uses_fused_ops = isinstance(model.seblock, nn.Identity)


def block_conv(
    in_channels: int, channels: int, kernel: int, stride: int, separable: bool
) -> tuple[nn.Conv2d, nn.Conv2d | nn.Identity]:
    """Return the depthwise and the pointwise convolution if separable, otherwise a full convolution and an identity."""
    if not separable:
        return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False), nn.Identity()
    depthwise = nn.Conv2d(in_channels, in_channels, kernel, stride, kernel // 2, groups=in_channels, bias=False)
    return depthwise, nn.Conv2d(in_channels, channels, 1, bias=False)


def shortcut_layer(in_channels: int, channels: int, stride: int, kernel: int = 1) -> nn.Module:
    """Return an identity if the block does not change the shape, otherwise a convolution and a BatchNorm."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def se_layer(channels: int, reduction: int) -> nn.Module:
    """Return a `SqueezeExcitation`, or an identity for reduction 0."""
    return SqueezeExcitation(channels, reduction) if reduction else nn.Identity()


def dropout_layer(probability: float) -> nn.Module:
    """Return a dropout layer, or an identity for probability 0."""
    return nn.Dropout(probability) if probability else nn.Identity()


def scale_channels(channels: Sequence[int], width: float) -> tuple[int, ...]:
    """Return `channels` times `width`, rounded to multiples of 8 (halves up), at least 8; unchanged for width 1."""
    if width == 1:
        return tuple(channels)
    return tuple(max(8, 8 * math.floor(count * width / 8 + 0.5)) for count in channels)


def check_stages(blocks: Sequence[int], channels: Sequence[int], max_stages: int = 5) -> None:
    """Raise `UsageError` unless there are as many `blocks` as `channels`, from 2 to `max_stages`."""
    if len(blocks) != len(channels) or not 2 <= len(blocks) <= max_stages:
        problem = f"{len(blocks)} stages of blocks and {len(channels)} of channels"
        raise UsageError(problem, f"give --blocks and --channels the same number of values, 2 to {max_stages}")
