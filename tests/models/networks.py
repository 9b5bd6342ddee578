"""Small versions of the architectures for tests: on the meta device, and narrow."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fastcifar.models import MODELS, build_model


def on_meta(arch: str, **options: Any) -> nn.Module:
    """Return the network on the meta device."""
    with torch.device("meta"):
        return build_model(arch, **options)


def small(arch: str, **options: Any) -> nn.Module:
    """Return the network at an eighth of its width, or at full width if it has no such option."""
    width = {"width": 0.125} if "width" in inspect.signature(MODELS[arch]).parameters else {}
    return build_model(arch, **{**width, **options})
