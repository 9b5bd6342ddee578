"""Networks for the shortest schedules: a stem that whitens the training images, then few wide layers that pool early.

The stem's filters are computed from the data (`start_from`) and never trained, nor are BatchNorm's scales; convolutions
start by passing their input on, the output is divided by its width. So the first step already has a sensible scale, and
rates far above the usual ones work. After Page (2019) and the airbench networks of Jordan (2024). Loading the data, and
the order of these things in a run, belong to others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.errors import UsageError, lookup
from fastcifar.models.resnet import (
    ACTIVATIONS,
    SqueezeExcitation,
    check_dropout,
    check_se_reduction,
    check_stages,
    dropout_layer,
    scale_channels,
)
from fastcifar.models.small_convnet import ConvBlock, global_max_pool

PATCH_SIZE = 2  # pixels a side of what is whitened
WHITENING_EPS = 5e-4  # added to the variance along each direction, so that those of mere noise are not blown up
BATCH_NORM_MOMENTUM = 0.4  # of BatchNorm's statistics: a run has only some hundred steps
MAX_GROUPS = 4  # a fifth pool would leave nothing of 32x32 pixels
SE_PER_GROUP = {"none": False, "block": True}


class ConvGroup(nn.Module):
    """conv, max pool 2, BN, act, then conv, BN, act for each further one, SE if any; [n, C_in, H, W] -> half of H, W.

    `residual`: where there are two convolutions or more after the first, they are added to what it gave.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        activation: Callable[[], nn.Module],
        se_reduction: int,
        residual: bool,
    ) -> None:
        super().__init__()
        self.first = dirac_init(ConvBlock(in_channels, channels, activation, pool=True))
        self.rest = nn.Sequential(
            *(dirac_init(ConvBlock(channels, channels, activation, pool=False)) for _ in range(depth - 1))
        )
        self.seblock = SqueezeExcitation(channels, se_reduction) if se_reduction else nn.Identity()
        self.residual = residual and depth > 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.seblock(self.rest(x))
        return out + x if self.residual else out


class AirbenchNet(nn.Module):
    """Whitening stem, groups that each pool once, maximum over the pixels, linear; [n, 3, H, W] -> [n, num_classes]."""

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int],
        channels: Sequence[int],
        activation: Callable[[], nn.Module],
        se_reduction: int,
        residual: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 2 * 3 * PATCH_SIZE**2, PATCH_SIZE)
        self.whiten.weight.requires_grad = False
        self.activation = activation()
        groups, in_channels = [], self.whiten.out_channels
        for depth, width in zip(blocks, channels, strict=True):
            groups.append(ConvGroup(in_channels, width, depth, activation, se_reduction, residual))
            in_channels = width
        self.groups = nn.Sequential(*groups)
        self.dropout = dropout_layer(dropout)
        self.linear = nn.Linear(in_channels, num_classes, bias=False)
        self.linear.weight.data /= self.linear.weight.data.std()

    def forward(self, images: Tensor) -> Tensor:
        x = self.groups(self.activation(self.whiten(images)))
        return self.linear(self.dropout(global_max_pool(x))) / self.linear.in_features

    @torch.no_grad()
    def init_whitening(self, images: Tensor) -> None:
        """Sets the stem's filters: the principal directions of the patches of `images`, scaled to a response of
        variance 1, and their negatives. Nothing is drawn: the same images give the same filters.

        `images`: of the training set, float [n, 3, H, W], normalised as the network will see them.
        """
        size = 3 * PATCH_SIZE**2
        products, count = torch.zeros(size, size, dtype=torch.float64, device=images.device), 0
        for part in images.split(500):
            patches = F.unfold(part, PATCH_SIZE).transpose(0, 1).flatten(1)  # rows in the order of a filter's weights
            products += (patches @ patches.T).double()
            count += patches.shape[1]
        variances, directions = torch.linalg.eigh((products / count).cpu())
        filters = directions.T / (variances[:, None] + WHITENING_EPS).sqrt()
        self.whiten.weight.copy_(torch.cat([filters, -filters]).view_as(self.whiten.weight))


def dirac_init(block: ConvBlock) -> ConvBlock:
    """`block` as it starts here: the first outputs pass the inputs on, and BatchNorm keeps a scale of 1."""
    nn.init.dirac_(block.conv.weight.data[: block.conv.in_channels])
    block.bn.momentum = BATCH_NORM_MOMENTUM
    block.bn.weight.requires_grad = False
    return block


def airbench_net(
    num_classes: int = 10,
    blocks: Sequence[int] = (2, 2, 2),
    channels: Sequence[int] = (64, 256, 256),
    width: float = 1.0,
    se: str = "none",
    se_reduction: int = 16,
    activation: str = "gelu",
    dropout: float = 0.0,
    residual: bool = False,
) -> AirbenchNet:
    """`blocks[i]` convolutions of `channels[i]` channels in group i, the first of which halves the map.

    width: multiplier of all channels, see `resnet.scaled`. se: `none` or `block`, one at the end of each group, of
    C/se_reduction hidden channels. residual: see `Group`. dropout: probability in [0, 1) before the linear layer.
    Raises UsageError for values that make no network.
    """
    check_stages(blocks, channels)
    if len(blocks) > MAX_GROUPS:
        raise UsageError(f"{len(blocks)} stages that halve 32x32 images leave none", f"give at most {MAX_GROUPS}")
    check_dropout(dropout)
    check_se_reduction(se_reduction)
    reduction = se_reduction if lookup(SE_PER_GROUP, se, "SE placement") else 0
    act = lookup(ACTIVATIONS, activation, "activation")
    return AirbenchNet(num_classes, blocks, scale_channels(channels, width), act, reduction, residual, dropout)
