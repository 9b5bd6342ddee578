"""Networks for short schedules: plain convolutions that pool early, so that little is computed at full resolution.

On a CPU the memory-bound work at 32x32 pixels (BatchNorm, activations) costs as much as the convolutions there; a
narrow stem and a pool inside the first convolution of each stage leave most of the work where the maps are small.
No shortcut, no branch on the data; channels_last throughout. Training recipes belong to recipes/*.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastcifar.errors import lookup
from fastcifar.models.resnet import ACTIVATIONS, check_dropout, check_stages, dropout_layer, scale_channels


class ConvBlock(nn.Module):
    """conv3x3, [max pool 2], BN, act; [n, C_in, H, W] -> [n, C, H, W], or half of both with `pool`."""

    def __init__(self, in_channels: int, channels: int, activation: Callable[[], nn.Module], pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.bn = nn.BatchNorm2d(channels)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.pool(self.conv(x))))


def global_max_pool(x: Tensor) -> Tensor:
    """The maximum over the pixels, [n, C, H, W] -> [n, C].

    By its index: `amax` goes back to whatever equals the maximum, and a compiled backward pass, which computes a bf16
    activation anew in float32, finds nothing that does and divides by 0.
    """
    return x.flatten(2).max(2).values


class SmallConvNet(nn.Module):
    """Stem, stages that each pool once, maximum over the pixels, linear; images [n, 3, H, W] -> [n, num_classes]."""

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
    """`blocks[i]` convolutions of `channels[i]` channels in stage i, the first of which halves the map.

    stem: channels of the full-resolution convolution. width: multiplier of all channels, see `resnet.scaled`. dropout:
    probability in [0, 1) before the linear layer. Raises UsageError for values that make no network.
    """
    check_stages(blocks, channels)
    check_dropout(dropout)
    stem_channels, *channels = scale_channels((stem_channels, *channels), width)
    return SmallConvNet(
        num_classes, stem_channels, blocks, channels, lookup(ACTIVATIONS, activation, "activation"), dropout
    )
