"""Residual networks of bottlenecks with squeeze-and-excitation after the addition: the coconut rows.

Their place of the SE, their key names and their two-convolution stem differ from the SE-ResNets', so they are written
apart; what is the same comes from `resnet.py`. The state-dict keys are those of the published checkpoints.
No op here may leave channels_last or branch on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.errors import UsageError, lookup
from fastcifar.models.resnet import (
    ACTIVATIONS,
    block_conv,
    check_dropout,
    check_se_reduction,
    check_stages,
    dropout_layer,
    scale_channels,
    shortcut_layer,
)

EXPANSION = 4  # channels after a bottleneck, over its width
STAGE_NUMBERS = (1, 2, 3, 4)
# What --se asks for: the stages whose blocks have a squeeze-and-excitation.
SE_STAGES: dict[str, tuple[int, ...]] = {"none": (), "block": STAGE_NUMBERS}


class LinearSqueezeExcitation(nn.Module):
    """Squeeze-and-excitation by linear layers on [n, C]; [n, C, H, W] -> the same. The hidden layer has C/reduction."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class BottleneckConfig(NamedTuple):
    """What the blocks of one stage share; `se_reduction` 0 means no squeeze-and-excitation."""

    activation: Callable[[], nn.Module]
    dropout: float
    separable: bool
    se_reduction: int


class Bottleneck(nn.Module):
    """1x1-BN-act, 3x3-BN-act, 1x1-BN, add the shortcut, [SE on the sum], act, [dropout].

    [n, C_in, H, W] -> [n, 4 * width, H/stride, W/stride]. If separable, `conv2` is the depthwise half.
    """

    def __init__(self, in_channels: int, width: int, stride: int, config: BottleneckConfig) -> None:
        super().__init__()
        channels = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2, self.pointwise = block_conv(width, width, 3, stride, config.separable)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut_layer(in_channels, channels, stride)
        self.se_block = LinearSqueezeExcitation(channels, config.se_reduction) if config.se_reduction else nn.Identity()
        self.activation = config.activation()
        self.dropout = dropout_layer(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.activation(self.bn2(self.pointwise(self.conv2(out))))
        out = self.bn3(self.conv3(out)) + self.shortcut(x)
        return self.dropout(self.activation(self.se_block(out)))


class BottleneckResNet(nn.Module):
    """Two stem convolutions, four stages of bottlenecks, mean over the pixels, linear; [n, 3, H, W] -> [n, classes].

    On 32x32 images the mean equals the source's average pool 4; other sizes work too.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int],
        stem_channels: int,
        widths: Sequence[int],
        stem_activation: Callable[[], nn.Module],
        stage_configs: Sequence[BottleneckConfig],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.conv2 = nn.Conv2d(stem_channels, stem_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_channels)
        self.activation = stem_activation()
        ends = [EXPANSION * width for width in widths]
        self.layer1 = bottleneck_stage(stem_channels, widths[0], blocks[0], 1, stage_configs[0])
        self.layer2 = bottleneck_stage(ends[0], widths[1], blocks[1], 2, stage_configs[1])
        self.layer3 = bottleneck_stage(ends[1], widths[2], blocks[2], 2, stage_configs[2])
        self.layer4 = bottleneck_stage(ends[2], widths[3], blocks[3], 2, stage_configs[3])
        self.dropout = dropout_layer(stage_configs[3].dropout)
        self.linear = nn.Linear(ends[3], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(images)))
        x = self.activation(self.bn2(self.conv2(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.dropout(x.mean((2, 3))))


def bottleneck_resnet(
    num_classes: int = 10,
    blocks: Sequence[int] = (2, 4, 6, 2),
    channels: Sequence[int] = (32, 64, 128, 256),
    se_stages: Collection[int] = (),
    leaky_stages: Collection[int] = (),
    separable_stages: Collection[int] = (),
    se: str | None = None,
    se_reduction: int = 16,
    width: float = 1.0,
    dropout: float = 0.0,
    activation: str | None = None,
) -> BottleneckResNet:
    """Four stages of `blocks[i]` bottlenecks of inner width `channels[i]`, four times that outside; stem `channels[0]`.

    se_stages, leaky_stages, separable_stages: the stages (from 1) with an SE of C/se_reduction hidden features, with
    LeakyReLU(0.01) in place of ReLU, and with a depthwise-separable 3x3. se: `none` or `block` (every stage), in place
    of se_stages; activation: one for the whole network, in place of leaky_stages. width: multiplier of the channels,
    see `scaled`. dropout: probability in [0, 1), after every block and before the linear layer.
    Raises UsageError for values that make no network. Source: ECE7123-DL-Project1.
    """
    check_stages(blocks, channels)
    if len(blocks) != len(STAGE_NUMBERS):
        raise UsageError(
            f"a coconut network has {len(STAGE_NUMBERS)} stages, not {len(blocks)}", "give --blocks 4 numbers"
        )
    check_dropout(dropout)
    check_se_reduction(se_reduction)
    if se is not None:
        se_stages = lookup(SE_STAGES, se, "SE placement")
    names = {number: activation or ("leaky_relu" if number in leaky_stages else "relu") for number in STAGE_NUMBERS}
    styles = [
        BottleneckConfig(
            activation=lookup(ACTIVATIONS, names[number], "activation"),
            dropout=dropout,
            separable=number in separable_stages,
            se_reduction=se_reduction if number in se_stages else 0,
        )
        for number in STAGE_NUMBERS
    ]
    widths = scale_channels(channels, width)
    return BottleneckResNet(num_classes, blocks, widths[0], widths, ACTIVATIONS[activation or "relu"], styles)


def bottleneck_stage(in_channels: int, width: int, depth: int, stride: int, config: BottleneckConfig) -> nn.Sequential:
    """`depth` bottlenecks; the first changes the shape."""
    rest = (Bottleneck(EXPANSION * width, width, 1, config) for _ in range(depth - 1))
    return nn.Sequential(Bottleneck(in_channels, width, stride, config), *rest)
