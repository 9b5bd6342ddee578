"""Residual networks of bottlenecks with squeeze-and-excitation (SE) after the shortcut addition: coconut_*."""

from collections.abc import Collection, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.errors import UsageError, lookup
from fastcifar.models.resnet import (
    ACTIVATIONS,
    Activation,
    block_conv,
    check_stages,
    dropout_layer,
    scale_channels,
    shortcut_layer,
)

EXPANSION = 4  # ratio of the output channels of a bottleneck to its width
# Values of --se: the stages whose blocks have a squeeze-and-excitation.
SE_STAGES: dict[str, tuple[int, ...]] = {"none": (), "block": (1, 2, 3, 4)}


class LinearSqueezeExcitation(nn.Module):
    """Squeeze-and-excitation with linear layers and C / reduction hidden features; [n, C, H, W] -> [n, C, H, W]."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class Bottleneck(nn.Module):
    """1x1-BN-act, 3x3-BN-act, 1x1-BN, shortcut addition, [SE], act, [dropout]; [n, C, H, W] -> [n, 4 * width, ...]."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        *,
        activation: Activation,
        dropout: float,
        separable: bool,
        se_reduction: int,
    ) -> None:
        super().__init__()
        channels = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2, self.pointwise = block_conv(width, width, 3, stride, separable)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut_layer(in_channels, channels, stride)
        self.se_block = LinearSqueezeExcitation(channels, se_reduction) if se_reduction else nn.Identity()
        self.activation = activation()
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.activation(self.bn2(self.pointwise(self.conv2(out))))
        out = self.bn3(self.conv3(out)) + self.shortcut(x)
        return self.dropout(self.activation(self.se_block(out)))


class BottleneckResNet(nn.Module):
    """Two stem convolutions, four stages of bottlenecks, global average pooling, linear.

    Images [n, 3, H, W] -> logits [n, num_classes]. The options are those of `Recipe`; `channels` are the widths of the
    bottlenecks. `se_stages`, `leaky_stages` and `separable_stages` are the stages (1 to 4) with SE, with LeakyReLU and
    with depthwise-separable 3x3 convolutions; `se` overrides `se_stages` and `activation` overrides `leaky_stages`.
    Source: ECE7123-DL-Project1. For 32x32 images the pooling equals the 4x4 average pooling of the published networks.
    """

    stem_layers = ("conv1", "bn1", "conv2", "bn2")

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        check_stages(blocks, channels)
        if len(blocks) != 4:
            raise UsageError(f"a coconut network has 4 stages, not {len(blocks)}", "give --blocks 4 numbers")
        if se is not None:
            se_stages = lookup(SE_STAGES, se, "SE placement")
        in_channels, *_ = widths = scale_channels(channels, width)
        self.conv1 = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(in_channels)
        self.activation = lookup(ACTIVATIONS, activation or "relu", "activation")()
        stages = []
        for number, depth, stage_width in zip((1, 2, 3, 4), blocks, widths, strict=True):
            block = partial(
                Bottleneck,
                activation=ACTIVATIONS[activation or ("leaky_relu" if number in leaky_stages else "relu")],
                dropout=dropout,
                separable=number in separable_stages,
                se_reduction=se_reduction if number in se_stages else 0,
            )
            first = block(in_channels, stage_width, 1 if number == 1 else 2)
            in_channels = EXPANSION * stage_width
            stages.append(nn.Sequential(first, *(block(in_channels, stage_width, 1) for _ in range(depth - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.dropout = dropout_layer(dropout)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(images)))
        x = self.activation(self.bn2(self.conv2(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.dropout(x.mean((2, 3))))
