"""The rows of MODELS in the two forms that tests can afford: without memory, and narrow."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fastcifar.models import MODELS, build_model


def on_meta(arch: str, **knobs: Any) -> nn.Module:
    """The row's network on the meta device: shapes only."""
    with torch.device("meta"):
        return build_model(arch, **knobs)


def small(arch: str, **knobs: Any) -> nn.Module:
    """The row at an eighth of its width, or as it is if it takes none."""
    width = {"width": 0.125} if "width" in inspect.signature(MODELS[arch]).parameters else {}
    return build_model(arch, **{**width, **knobs})
