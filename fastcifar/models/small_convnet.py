"""Networks for short schedules: convolutions without shortcuts that pool early, to compute little at full resolution.

On a CPU the memory-bound operations at 32x32 pixels (BatchNorm, activations) take as long as the convolutions. With a
narrow stem, and max pooling directly after the first convolution of each stage, most operations are on small feature
maps. Forward passes keep channels_last and have no data-dependent control flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastcifar.errors import lookup
from fastcifar.models.resnet import ACTIVATIONS, check_dropout, check_stages, dropout_layer, scale_channels


class ConvBlock(nn.Module):
    """conv3x3, [2x2 max pooling], BN, act; [n, C_in, H, W] -> [n, C, H, W], or [n, C, H/2, W/2] with `pool`."""

    def __init__(self, in_channels: int, channels: int, activation: Callable[[], nn.Module], pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.bn = nn.BatchNorm2d(channels)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.pool(self.conv(x))))


def global_max_pool(x: Tensor) -> Tensor:
    """Global max pooling, [n, C, H, W] -> [n, C].

    It uses `max`, whose backward pass goes through the index of the maximum. That of `amax` compares the input with the
    maximum; a compiled backward pass recomputes a bf16 activation in float32, finds no equal element and divides by 0.
    """
    return x.flatten(2).max(2).values


class SmallConvNet(nn.Module):
    """Stem, stages that pool once each, global max pooling, linear; [n, 3, H, W] -> [n, num_classes]."""

    def __init__(
        self,
        num_classes: int,
        stem_channels: int,
        blocks: Sequence[int],
        channels: Sequence[int],
        activation: Callable[[], nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = ConvBlock(3, stem_channels, activation, pool=False)
        stages, in_channels = [], stem_channels
        for depth, width in zip(blocks, channels, strict=True):
            first = ConvBlock(in_channels, width, activation, pool=True)
            stages.append(nn.Sequential(first, *(ConvBlock(width, width, activation, False) for _ in range(depth - 1))))
            in_channels = width
        self.stages = nn.Sequential(*stages)
        self.dropout = dropout_layer(dropout)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.stem(images))
        return self.linear(self.dropout(global_max_pool(x)))


def small_convnet(
    num_classes: int = 10,
    blocks: Sequence[int] = (1, 2, 2),
    channels: Sequence[int] = (32, 128, 256),
    stem_channels: int = 16,
    width: float = 1.0,
    dropout: float = 0.0,
    activation: str = "relu",
) -> SmallConvNet:
    """A network with `blocks[i]` convolutions of `channels[i]` channels in stage i; the first halves height and width.

    stem_channels: channels of the stem, which has full resolution. width: multiplier of all channels, see
    `scale_channels`. dropout: probability before the linear layer, at least 0 and below 1.
    Raises `UsageError` for invalid values.
    """
    check_stages(blocks, channels)
    check_dropout(dropout)
    stem_channels, *channels = scale_channels((stem_channels, *channels), width)
    return SmallConvNet(
        num_classes, stem_channels, blocks, channels, lookup(ACTIVATIONS, activation, "activation"), dropout
    )
