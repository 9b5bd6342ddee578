"""Convolutional networks for short schedules, which pool early to compute little at full resolution.

`AirbenchNet`, for the shortest schedules, whitens image patches in its stem (`init_whitening`). Its other convolutions
start by copying their input channels (Dirac initialization), and logits are divided by the number of features. This
keeps activations well scaled from the first step on and allows large learning rates (Page, 2019; Jordan, 2024).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.errors import lookup
from fastcifar.models.max_pool import MaxPool2x2
from fastcifar.models.resnet import ACTIVATIONS, Activation, check_stages, dropout_layer, scale_channels, se_layer

PATCH_SIZE = 2  # height and width of the whitened patches in pixels
WHITENING_EPS = 5e-4  # added to the variance along each direction, so that directions of noise are not amplified
BATCH_NORM_MOMENTUM = 0.4  # larger than the default, because a run has only a few hundred steps
MAX_GROUPS = 4  # each group halves height and width, and a fifth group would leave no pixels of a 32x32 image
SE_PER_GROUP = {"none": False, "block": True}


class ConvBlock(nn.Module):
    """conv3x3, [2x2 max pooling], BN, act; [n, C_in, H, W] -> [n, C, H, W], or [n, C, H/2, W/2] with `pool`."""

    def __init__(self, in_channels: int, channels: int, activation: Activation, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.pool = MaxPool2x2() if pool else nn.Identity()
        self.bn = nn.BatchNorm2d(channels)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.pool(self.conv(x))))


class PaddedConvBlock(ConvBlock):
    """`ConvBlock` with pooling, [n, C_in, H, W] -> [n, C, H // 2, W // 2], with the same results at less cost.

    The pooling drops the last row of a map of odd height and the last column of one of odd width. This block does not
    compute them: it pads such a map only above and on the left.
    """

    def __init__(self, in_channels: int, channels: int, activation: Activation) -> None:
        super().__init__(in_channels, channels, activation, pool=True)
        self.conv.padding = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return super().forward(F.pad(x, (1, 1 - width % 2, 1, 1 - height % 2)))


class CroppedConvBlock(ConvBlock):
    """`PaddedConvBlock` without the last row and column of maps of odd size, in whose place the padding is.

    The results differ at the lower and right border. Where both forms were measured, on a CPU, it was faster (LOG.md).
    """

    def __init__(self, in_channels: int, channels: int, activation: Activation) -> None:
        super().__init__(in_channels, channels, activation, pool=True)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return super().forward(x[:, :, : height - height % 2, : width - width % 2])


ODD_MAPS = {"pad": PaddedConvBlock, "crop": CroppedConvBlock}  # first block of a `ConvGroup`


def global_max_pool(x: Tensor) -> Tensor:
    """Return the maximum of each channel, [n, C, H, W] -> [n, C]."""
    # Not `amax`: its backward pass compares the input with the maximum. When compiled, it recomputes a bf16 activation
    # in float32, finds no element equal to the maximum and divides by 0.
    return x.flatten(2).max(2).values


class SmallConvNet(nn.Module):
    """Stem, stages of convolutions that pool once each, global max pooling, linear; [n, 3, H, W] -> [n, classes]."""

    stem_layers = ("stem",)

    def __init__(
        self,
        num_classes: int = 10,
        blocks: Sequence[int] = (1, 2, 2),
        channels: Sequence[int] = (32, 128, 256),
        stem_channels: int = 16,
        width: float = 1.0,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        check_stages(blocks, channels)
        act = lookup(ACTIVATIONS, activation, "activation")
        in_channels, *widths = scale_channels((stem_channels, *channels), width)
        self.stem = ConvBlock(3, in_channels, act, pool=False)
        self.stages = nn.Sequential()
        for depth, out_channels in zip(blocks, widths, strict=True):
            first = ConvBlock(in_channels, out_channels, act, pool=True)
            rest = (ConvBlock(out_channels, out_channels, act, pool=False) for _ in range(depth - 1))
            self.stages.append(nn.Sequential(first, *rest))
            in_channels = out_channels
        self.dropout = dropout_layer(dropout)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.stem(images))
        return self.linear(self.dropout(global_max_pool(x)))


class ConvGroup(nn.Module):
    """conv, 2x2 max pooling, BN, act, depth - 1 times (conv, BN, act), [SE]; [n, C_in, H, W] -> [n, C, H//2, W//2]."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        activation: Activation,
        se_reduction: int,
        residual: bool,
        odd_maps: str,
    ) -> None:
        super().__init__()
        first = ODD_MAPS[odd_maps](in_channels, channels, activation)
        rest = [ConvBlock(channels, channels, activation, pool=False) for _ in range(depth - 1)]
        for block in (first, *rest):
            nn.init.dirac_(block.conv.weight.data[: block.conv.in_channels])
            block.bn.momentum = BATCH_NORM_MOMENTUM
            block.bn.weight.requires_grad = False
        self.first, self.rest = first, nn.Sequential(*rest)
        self.seblock = se_layer(channels, se_reduction)
        self.residual = residual and depth > 2  # add the output of `first` to the output of `rest`

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.seblock(self.rest(x))
        return out + x if self.residual else out


class AirbenchNet(nn.Module):
    """Whitening layer, groups, global max pooling, linear; [n, 3, H, W] -> [n, num_classes].

    Of the whitening layer, only the bias is trained.
    """

    stem_layers = ("whiten", "groups.0")  # those that `--freeze-stem-epochs` freezes

    def __init__(
        self,
        num_classes: int = 10,
        blocks: Sequence[int] = (2, 2, 2),
        channels: Sequence[int] = (64, 256, 256),
        width: float = 1.0,
        se: str = "none",
        se_reduction: int = 16,
        activation: str = "gelu",
        dropout: float = 0.0,
        residual: bool = False,
        odd_maps: str = "pad",
    ) -> None:
        super().__init__()
        check_stages(blocks, channels, MAX_GROUPS)
        reduction = se_reduction * lookup(SE_PER_GROUP, se, "SE placement")
        act = lookup(ACTIVATIONS, activation, "activation")
        in_channels = 2 * 3 * PATCH_SIZE**2
        self.whiten = nn.Conv2d(3, in_channels, PATCH_SIZE)
        self.whiten.weight.requires_grad = False
        self.activation = act()
        self.groups = nn.Sequential()
        for depth, out_channels in zip(blocks, scale_channels(channels, width), strict=True):
            self.groups.append(ConvGroup(in_channels, out_channels, depth, act, reduction, residual, odd_maps))
            in_channels = out_channels
        self.dropout = dropout_layer(dropout)
        self.linear = nn.Linear(in_channels, num_classes, bias=False)
        self.linear.weight.data /= self.linear.weight.data.std()

    def forward(self, images: Tensor) -> Tensor:
        x = self.groups(self.activation(self.whiten(images)))
        return self.linear(self.dropout(global_max_pool(x))) / self.linear.in_features

    @torch.no_grad()
    def init_whitening(self, images: Tensor) -> None:
        """Set the filters of the stem to the principal components of the patches of `images`, and to their negatives.

        Filters are scaled to outputs of mean square about 1. `images`: normalized training images, float [n, 3, H, W].
        """
        size = 3 * PATCH_SIZE**2
        products, count = torch.zeros(size, size, dtype=torch.float64, device=images.device), 0
        for part in images.split(500):
            patches = F.unfold(part, PATCH_SIZE).transpose(0, 1).flatten(1)  # rows ordered like a filter's weights
            products += (patches @ patches.T).double()
            count += patches.shape[1]
        variances, directions = torch.linalg.eigh((products / count).cpu())
        filters = directions.T / (variances[:, None] + WHITENING_EPS).sqrt()
        self.whiten.weight.copy_(torch.cat([filters, -filters]).view_as(self.whiten.weight))
