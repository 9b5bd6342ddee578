"""Residual networks of basic blocks, with or without squeeze-and-excitation: every SE-ResNet of the project.

One function, `se_resnet`, builds them all; the rows of `MODELS` bind its arguments. The state-dict keys are those of
the published checkpoints and may not change. No op here may leave channels_last or branch on the data: the forward pass
is compiled and captured as one graph. Moving, casting and counting belong to other files.
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

# In place where autograd needs only the output: one activation map less to keep for each.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, negative_slope=0.01, inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}
# Where the squeeze-and-excitation sits: (after the stem, in every block).
SE_PLACEMENTS = {"none": (False, False), "stem": (True, False), "block": (False, True)}
# Are the convolutions of the blocks depthwise then pointwise?
CONV_TYPES = {"full": False, "separable": True}
# Which dropout layers exist: (after every block, before the linear layer).
DROPOUT_PLACEMENTS = {"all": (True, True), "head": (False, True)}


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the channels' means (Hu et al., 2018); [n, C, H, W] -> the same.

    `reduction` divides the channels of the hidden layer, rounded down, at least 1.
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
    """Weight and bias of the two layers of a squeeze-and-excitation, as `norm_relu` takes them; none of an identity."""
    return tuple(seblock.parameters())


# A map for two uses, each with its own: see `norm_relu`.
TensorPair = tuple[Tensor, Tensor]


class BasicBlockConfig(NamedTuple):
    """What all blocks of one network share; `se_reduction` 0 means no squeeze-and-excitation in the blocks."""

    activation: Callable[[], nn.Module]
    dropout: float
    kernel: int
    shortcut_kernel: int
    separable: bool
    se_reduction: int


class BasicBlock(nn.Module):
    """conv-BN-act-conv-BN, [SE], add the shortcut, act, [dropout]; [n, C_in, H, W] -> [n, C, H/stride, W/stride].

    A separable convolution keeps the name of the full one for its depthwise half; `pointwise1` and `pointwise2` follow.
    """

    uses_fused_ops = False  # see `fuse`

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
        x, again = x if isinstance(x, tuple) else (x, x)
        if self.uses_fused_ops and self.training:
            out, _ = norm_relu(self.pointwise1(self.conv1(x)), self.bn1)
            return norm_relu(
                self.pointwise2(self.conv2(out)), self.bn2, se_parameters(self.seblock), self.shortcut(again)
            )
        out = self.activation(self.bn1(self.pointwise1(self.conv1(x))))
        out = self.seblock(self.bn2(self.pointwise2(self.conv2(out))))
        out = self.activation(out + self.shortcut(again))
        return self.dropout(out)


class SEResNet(nn.Module):
    """Stem, stages of basic blocks, mean over the pixels, linear; images [n, 3, H, W] -> logits [n, num_classes].

    On 32x32 images the mean equals the sources' average pool (8 after three stages, 4 after four); other sizes work.
    """

    uses_fused_ops = False  # see `fuse`

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
        """Images to the map of the first block."""
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
    """An SE-ResNet: `blocks[i]` basic blocks of `channels[i]` channels in stage i; all but the first halve the map.

    se: `none`, `stem` (one after the stem) or `block` (in each block, before the addition), of C/se_reduction hidden
    channels. width: multiplier of the channels, see `scaled`. dropout: probability in [0, 1), after every block and
    before the linear layer, or only there (`dropout_at` "head"). kernel, shortcut_kernel: odd sizes of the convolutions
    of the blocks and of the projections. conv: `full` or `separable` block convolutions. PyTorch's default
    initialisation.
    Raises UsageError for values that make no network. Source of the family: the published SEResNet68 (se68, se55).
    """
    check_stages(blocks, channels)
    check_dropout(dropout)
    check_se_reduction(se_reduction)
    check_kernel_size("--kernel", kernel)
    check_kernel_size("--shortcut-kernel", shortcut_kernel)
    in_stem, in_blocks = lookup(SE_PLACEMENTS, se, "SE placement")
    after_blocks, before_linear = lookup(DROPOUT_PLACEMENTS, dropout_at, "dropout placement")
    style = BasicBlockConfig(
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
        style,
        stem_se_reduction=se_reduction if in_stem else 0,
        dropout=dropout if before_linear else 0.0,
    )


def enable_fused_ops(model: nn.Module) -> None:
    """Has `model` train through `norm_relu`: in every block, and after the stem unless an SE follows its ReLU.

    Keys, weights and evaluation stay as they are. Raises UsageError for what is no SE-ResNet of ReLUs without dropout
    in its blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    fits = all(isinstance(block.activation, nn.ReLU) and isinstance(block.dropout, nn.Identity) for block in blocks)
    if not (isinstance(model, SEResNet) and fits):
        raise UsageError("--fused-ops is for SE-ResNets of ReLUs without dropout in their blocks", "leave it out")
    for block in blocks:
        block.uses_fused_ops = True
    model.uses_fused_ops = isinstance(model.seblock, nn.Identity)


def block_conv(
    in_channels: int, channels: int, kernel: int, stride: int, separable: bool
) -> tuple[nn.Conv2d, nn.Conv2d | nn.Identity]:
    """The convolution of a block, no bias, and what follows it: the pointwise half if separable, else nothing."""
    if not separable:
        full = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
        return full, nn.Identity()
    depthwise = nn.Conv2d(in_channels, in_channels, kernel, stride, kernel // 2, groups=in_channels, bias=False)
    return depthwise, nn.Conv2d(in_channels, channels, 1, bias=False)


def shortcut_layer(in_channels: int, channels: int, stride: int, kernel: int = 1) -> nn.Module:
    """The shortcut: the identity, or conv + BN where the shape changes."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def dropout_layer(probability: float) -> nn.Module:
    """Dropout, or the identity at probability 0."""
    return nn.Dropout(probability) if probability else nn.Identity()


def scale_channels(channels: Sequence[int], width: float) -> tuple[int, ...]:
    """`channels` times `width`, each rounded to the nearest multiple of 8 (halves up), at least 8; at 1 just as given.

    Raises UsageError unless `width` is finite and positive.
    """
    if not (math.isfinite(width) and width > 0):
        raise UsageError(f"a width of {width} makes no network", "give --width a positive number, such as 0.5")
    if width == 1:
        return tuple(channels)
    return tuple(max(8, 8 * math.floor(count * width / 8 + 0.5)) for count in channels)


def check_stages(blocks: Sequence[int], channels: Sequence[int]) -> None:
    """Raises UsageError unless there are two to five stages, each with a positive number of blocks and of channels."""
    if len(blocks) != len(channels):
        raise UsageError(
            f"{len(blocks)} stages of blocks but {len(channels)} of channels",
            "give --blocks and --channels one number for each stage",
        )
    if not 2 <= len(blocks) <= 5:
        raise UsageError(f"{len(blocks)} stages do not fit 32x32 images", "give --blocks and --channels 2 to 5 numbers")
    for option, counts in (("--blocks", blocks), ("--channels", channels)):
        if min(counts) < 1:
            given = ",".join(str(count) for count in counts)
            raise UsageError(f"{option} {given} has a stage without any", "each number must be 1 or more")


def check_dropout(probability: float) -> None:
    """Raises UsageError unless `probability` is in [0, 1)."""
    if not 0 <= probability < 1:
        raise UsageError(f"--dropout {probability} is no probability below 1", "give a number in [0, 1)")


def check_se_reduction(reduction: int) -> None:
    """Raises UsageError unless the hidden layer keeps a channel: `reduction` is 1 or more."""
    if reduction < 1:
        raise UsageError(f"--se-reduction {reduction} divides no channels", "give 1 or more")


def check_kernel_size(option: str, size: int) -> None:
    """Raises UsageError unless the kernel `size` of the command-line `option` is odd and positive."""
    if size < 1 or size % 2 == 0:
        raise UsageError(f"{option} {size} has no centre pixel", "give an odd number, such as 3")
