"""Residual networks of bottlenecks with squeeze-and-excitation (SE) after the shortcut addition: coconut_*.

They differ from the SE-ResNets in the location of the SE, the names of the layers and the two convolutions of the stem;
the layers that are the same come from `resnet`. The state-dict keys are those of the published checkpoints and may not
change. Forward passes keep channels_last and have no data-dependent control flow.
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

EXPANSION = 4  # ratio of the output channels of a bottleneck to its width
STAGE_NUMBERS = (1, 2, 3, 4)
# Values of --se: the stages whose blocks have a squeeze-and-excitation.
SE_STAGES: dict[str, tuple[int, ...]] = {"none": (), "block": STAGE_NUMBERS}


class LinearSqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu et al., 2018) with linear layers; [n, C, H, W] -> [n, C, H, W].

    The hidden layer has C / reduction features, rounded down, at least 1.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class BottleneckConfig(NamedTuple):
    """What all blocks of a stage have in common; `se_reduction` 0 means no squeeze-and-excitation."""

    activation: Callable[[], nn.Module]
    dropout: float
    separable: bool
    se_reduction: int


class Bottleneck(nn.Module):
    """1x1-BN-act, 3x3-BN-act, 1x1-BN, shortcut addition, [SE on the sum], act, [dropout].

    [n, C_in, H, W] -> [n, 4 * width, H/stride, W/stride]. If separable, `conv2` is depthwise, followed by `pointwise`.
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
    """Two stem convolutions, four stages of bottlenecks, global average pooling, linear.

    Images [n, 3, H, W] -> logits [n, num_classes].
    For 32x32 images the pooling equals the 4x4 average pooling of the published networks.
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
        out_channels = [EXPANSION * width for width in widths]
        self.layer1 = bottleneck_stage(stem_channels, widths[0], blocks[0], 1, stage_configs[0])
        self.layer2 = bottleneck_stage(out_channels[0], widths[1], blocks[1], 2, stage_configs[1])
        self.layer3 = bottleneck_stage(out_channels[1], widths[2], blocks[2], 2, stage_configs[2])
        self.layer4 = bottleneck_stage(out_channels[2], widths[3], blocks[3], 2, stage_configs[3])
        self.dropout = dropout_layer(stage_configs[3].dropout)
        self.linear = nn.Linear(out_channels[3], num_classes)

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
    """Four stages of `blocks[i]` bottlenecks of width `channels[i]`, after a stem of `channels[0]` channels.

    A bottleneck has four times its width as output channels; every stage but the first halves height and width.
    se_stages, leaky_stages, separable_stages: the stages, counted from 1, with an SE of C / se_reduction hidden
    features, with LeakyReLU(0.01) instead of ReLU, and with a depthwise-separable 3x3 convolution. se: `none` or
    `block` (every stage); replaces se_stages. activation: that of the whole network; replaces leaky_stages. width:
    multiplier of all channels, see `scale_channels`. dropout: probability, at least 0 and below 1, after every block
    and before the linear layer.
    Raises `UsageError` for invalid values. Source: ECE7123-DL-Project1.
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
    activations = {
        number: activation or ("leaky_relu" if number in leaky_stages else "relu") for number in STAGE_NUMBERS
    }
    stage_configs = [
        BottleneckConfig(
            activation=lookup(ACTIVATIONS, activations[number], "activation"),
            dropout=dropout,
            separable=number in separable_stages,
            se_reduction=se_reduction if number in se_stages else 0,
        )
        for number in STAGE_NUMBERS
    ]
    widths = scale_channels(channels, width)
    return BottleneckResNet(num_classes, blocks, widths[0], widths, ACTIVATIONS[activation or "relu"], stage_configs)


def bottleneck_stage(in_channels: int, width: int, depth: int, stride: int, config: BottleneckConfig) -> nn.Sequential:
    """`depth` bottlenecks, the first with `stride`; [n, in_channels, H, W] -> [n, 4 * width, H/stride, W/stride]."""
    rest = (Bottleneck(EXPANSION * width, width, 1, config) for _ in range(depth - 1))
    return nn.Sequential(Bottleneck(in_channels, width, stride, config), *rest)
