"""Networks for the shortest schedules: a stem that whitens the training images, then few wide layers that pool early.

The filters of the stem are computed from the data (`init_whitening`) and are not trained; neither are the weights of
BatchNorm. Convolutions start by passing their inputs on (Dirac initialization); the logits are divided by the number of
features. So activations are well scaled from the first step on, and learning rates far above the usual ones work.
After Page (2019) and the airbench networks of Jordan (2024).
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

PATCH_SIZE = 2  # height and width of the whitened patches in pixels
WHITENING_EPS = 5e-4  # added to the variance along each direction, so that directions of noise are not amplified
BATCH_NORM_MOMENTUM = 0.4  # larger than the default, because a run has only a few hundred steps
MAX_GROUPS = 4  # each halves height and width: a fifth would leave no pixels of 32x32 images
SE_PER_GROUP = {"none": False, "block": True}


class ConvGroup(nn.Module):
    """conv, 2x2 max pooling, BN, act, then depth - 1 times conv, BN, act, then [SE].

    [n, C_in, H, W] -> [n, C, H/2, W/2].
    `residual`: if depth > 2, the result of the first convolution is added to that of the others.
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
    """Whitening stem, groups that pool once each, global max pooling, linear; [n, 3, H, W] -> [n, num_classes]."""

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
        """Sets the filters of the stem to the principal components of the patches of `images`, and to their negatives.

        Each is scaled to a response of variance 1. No random numbers are drawn: the same images give the same filters.
        `images`: training images, float [n, 3, H, W], normalized like the network's inputs.
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


def dirac_init(block: ConvBlock) -> ConvBlock:
    """`block` with its first C_in output channels initialized to the identity, and a BatchNorm weight fixed at 1."""
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
    """A network with `blocks[i]` convolutions of `channels[i]` channels in group i; the first halves height and width.

    width: multiplier of all channels, see `scale_channels`. se: `none` or `block` (at the end of each group), with
    C / se_reduction hidden channels. residual: see `ConvGroup`. dropout: probability before the linear layer, at least
    0 and below 1. Raises `UsageError` for invalid values. After the airbench networks of Jordan (2024).
    """
    check_stages(blocks, channels)
    if len(blocks) > MAX_GROUPS:
        raise UsageError(
            f"{len(blocks)} stages are too many for 32x32 images: each halves their size", f"give at most {MAX_GROUPS}"
        )
    check_dropout(dropout)
    check_se_reduction(se_reduction)
    reduction = se_reduction if lookup(SE_PER_GROUP, se, "SE placement") else 0
    act = lookup(ACTIVATIONS, activation, "activation")
    return AirbenchNet(num_classes, blocks, scale_channels(channels, width), act, reduction, residual, dropout)
