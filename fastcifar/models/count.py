"""What a network costs: parameters, multiply-accumulates, and a table of its layers.

Counts by running one image on the meta device, where nothing is computed and the weights are only shapes.
It must not change the model it looks at: not its mode, weights or buffers. It knows no architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters, the only ones that count anywhere here; tied ones count once.

    Frozen ones do not: filters that are computed from the images (`whitened`), BatchNorm's scales where they stay 1.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    """Forward multiply-accumulates of one image of `shape` [C, H, W]: convolutions and linear layers, nothing else.

    Counted where the modules `nn.Conv2d` and `nn.Linear` are called; a bias is an addition and counts nothing.
    """
    total = 0

    def count(_name: str, module: nn.Module, output: Any) -> None:
        nonlocal total
        total += layer_macs(module, output)

    run_on_meta_device(model, shape, count)
    return total


def layer_table(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> list[dict[str, Any]]:
    """One row for each call of a layer, in forward order: `name`, `kind`, `output`, `params`, `macs`.

    `output` is [C, H, W] or [features], without the batch. The layers are the modules without children or with
    parameters of their own; identities are left out. Parameters count at their first row, and those of modules that are
    never called come last, with no output: `params` and `macs` add up to `parameters(model)` and `macs(model)`.
    """
    model = unwrap_compiled(model)
    rows: list[dict[str, Any]] = []
    counted: set[int] = set()

    def add(name: str, module: nn.Module, output: Any) -> None:
        rows.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "output": list(output.shape[1:]) if isinstance(output, Tensor) else [],
                "params": sum(p.numel() for p in own[name] if id(p) not in counted),
                "macs": layer_macs(module, output),
            }
        )
        counted.update(id(p) for p in own[name])

    own = {name: [p for p in m.parameters(recurse=False) if p.requires_grad] for name, m in model.named_modules()}
    run_on_meta_device(model, shape, add)
    for name, module in model.named_modules():
        if any(id(p) not in counted for p in own[name]):
            add(name, module, None)
    return rows


def run_on_meta_device(
    model: nn.Module, shape: tuple[int, int, int], layer_hook: Callable[[str, nn.Module, Any], None]
) -> None:
    """Runs one image of `shape` through `model` in eval mode on the meta device; `see(name, layer, output)` at each.

    The weights are replaced by float32 shapes for the call only, so their device and dtype do not matter.
    """
    model = unwrap_compiled(model)
    modes = {module: module.training for module in model.modules()}
    shapes = {
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
            torch.func.functional_call(model, shapes, (torch.empty(1, *shape, device="meta"),))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def is_layer(module: nn.Module) -> bool:
    """A module that does something itself: a leaf other than the identity, or one that owns parameters."""
    if any(True for _ in module.parameters(recurse=False)):
        return True
    return not isinstance(module, nn.Identity) and not any(True for _ in module.children())


def layer_macs(module: nn.Module, output: Any) -> int:
    """Multiply-accumulates of one call of `module` that gave `output`; 0 unless a convolution or a linear layer."""
    if not isinstance(output, Tensor):
        return 0
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return output.numel() * (module.in_channels // module.groups) * height * width
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    return 0


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper: hooks on a compiled forward pass would not be seen."""
    return getattr(model, "_orig_mod", model)
