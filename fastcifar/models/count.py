"""Parameters, multiply-accumulates (MACs) and layers of a network.

Layers are observed in a forward pass of one image on the meta device, where tensors have shapes but no data. The model
is left unchanged: its mode, weights and buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor, nn


class LayerRow(TypedDict):
    """One call of a layer with one image."""

    name: str
    kind: str  # class of the module
    output: list[int]  # [C, H, W] or [features]; [] for a module that is never called
    params: int  # trainable; a parameter counts in the first row it appears in
    macs: int


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    """Return the forward multiply-accumulates of one image of `shape` [C, H, W].

    Counts the calls of `nn.Conv2d` and `nn.Linear` modules; biases and all other operations count as 0.
    """
    return sum(row["macs"] for row in layer_table(model, shape))


def layer_table(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> list[LayerRow]:
    """Return one row for each call of a layer with an image of `shape` [C, H, W], in forward order.

    A layer is a module that has parameters of its own, or has no children and is not `nn.Identity`. Modules with
    parameters that are never called come last, so `params` adds up to `count_parameters(model)`.
    """
    model = unwrap_compiled(model)
    rows: list[LayerRow] = []
    counted: set[int] = set()
    own_params = {
        name: [p for p in module.parameters(recurse=False) if p.requires_grad] for name, module in model.named_modules()
    }

    def add_row(name: str, module: nn.Module, output: Any) -> None:
        shape = list(output.shape[1:]) if isinstance(output, Tensor) else []
        params = sum(p.numel() for p in own_params[name] if id(p) not in counted)
        counted.update(id(p) for p in own_params[name])
        macs = _layer_macs(module, output)
        rows.append({"name": name, "kind": type(module).__name__, "output": shape, "params": params, "macs": macs})

    run_on_meta_device(model, shape, add_row)
    for name, module in model.named_modules():
        if any(id(p) not in counted for p in own_params[name]):
            add_row(name, module, None)
    return rows


def run_on_meta_device(
    model: nn.Module, shape: tuple[int, int, int], layer_hook: Callable[[str, nn.Module, Any], None]
) -> None:
    """Run one image of `shape` [C, H, W] through `model` in evaluation mode on the meta device.

    Calls `layer_hook(name, layer, output)` after each call of a layer. The weights are replaced by float32 meta tensors
    for this call only, so their device and dtype do not matter.
    """
    model = unwrap_compiled(model)
    modes = {module: module.training for module in model.modules()}
    meta_tensors = {
        name: torch.empty_like(t, device="meta", dtype=torch.float32 if t.is_floating_point() else t.dtype)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    handles = [
        module.register_forward_hook(lambda module, _inputs, output, name=name: layer_hook(name, module, output))
        for name, module in model.named_modules()
        if _is_layer(module)
    ]
    try:
        model.eval()
        with torch.no_grad():
            torch.func.functional_call(model, meta_tensors, (torch.empty(1, *shape, device="meta"),))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of `torch.compile`, whose forward pass runs no hooks, or `model` itself."""
    return getattr(model, "_orig_mod", model)


def _is_layer(module: nn.Module) -> bool:
    has_own_params = next(module.parameters(recurse=False), None) is not None
    return has_own_params or not (isinstance(module, nn.Identity) or list(module.children()))


def _layer_macs(module: nn.Module, output: Any) -> int:
    if isinstance(output, Tensor) and isinstance(module, nn.Conv2d | nn.Linear):
        return output.numel() * module.weight[0].numel()
    return 0
