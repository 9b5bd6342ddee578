"""Parameters, multiply-accumulates (MACs) and layers of a network.

Layers are observed in a forward pass of one image on the meta device, where tensors have shapes but no data. The model
is left unchanged: its mode, weights and buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters; shared ones count once.

    Frozen parameters do not count: the whitening filters of `airbench_net`, and BatchNorm weights that stay 1.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    """Forward multiply-accumulates of one image of `shape` [C, H, W], in convolutions and linear layers.

    Counts the calls of `nn.Conv2d` and `nn.Linear` modules; biases and all other operations count as 0.
    """
    total = 0

    def add_macs(_name: str, module: nn.Module, output: Any) -> None:
        nonlocal total
        total += layer_macs(module, output)

    run_on_meta_device(model, shape, add_macs)
    return total


def layer_table(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> list[dict[str, Any]]:
    """One row for each call of a layer with an image of `shape` [C, H, W], in forward order.

    A row has the layer's `name`, `kind` (its class), `output` ([C, H, W] or [features], without the batch dimension),
    `params` (trainable) and `macs`. The layers are those of `is_layer`. A parameter counts in the first row it appears
    in; modules that are never called come last, with `output` []. So `params` and `macs` add up to
    `count_parameters(model)` and `count_macs(model)`.
    """
    model = unwrap_compiled(model)
    rows: list[dict[str, Any]] = []
    counted: set[int] = set()
    own_params = {
        name: [p for p in module.parameters(recurse=False) if p.requires_grad] for name, module in model.named_modules()
    }

    def add_row(name: str, module: nn.Module, output: Any) -> None:
        rows.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "output": list(output.shape[1:]) if isinstance(output, Tensor) else [],
                "params": sum(p.numel() for p in own_params[name] if id(p) not in counted),
                "macs": layer_macs(module, output),
            }
        )
        counted.update(id(p) for p in own_params[name])

    run_on_meta_device(model, shape, add_row)
    for name, module in model.named_modules():
        if any(id(p) not in counted for p in own_params[name]):
            add_row(name, module, None)
    return rows


def run_on_meta_device(
    model: nn.Module, shape: tuple[int, int, int], layer_hook: Callable[[str, nn.Module, Any], None]
) -> None:
    """Runs one image of `shape` [C, H, W] through `model` in evaluation mode on the meta device.

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
        if is_layer(module)
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


def is_layer(module: nn.Module) -> bool:
    """Whether `module` has parameters of its own, or has no children and is not `nn.Identity`."""
    if any(True for _ in module.parameters(recurse=False)):
        return True
    return not isinstance(module, nn.Identity) and not any(True for _ in module.children())


def layer_macs(module: nn.Module, output: Any) -> int:
    """Multiply-accumulates of one call of `module` that returned `output`; 0 unless `nn.Conv2d` or `nn.Linear`."""
    if not isinstance(output, Tensor):
        return 0
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return output.numel() * (module.in_channels // module.groups) * height * width
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    return 0


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, or `model` itself: hooks do not run in a compiled forward pass."""
    return getattr(model, "_orig_mod", model)
