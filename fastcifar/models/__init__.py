"""The table of architectures, `MODELS`, and the function that builds one, `build_model`.

An entry takes `num_classes` and some of `MODEL_OPTIONS` by keyword and returns a module: [n,3,32,32] -> [n,classes].
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastcifar.errors import UsageError, UserError, suggest_name
from fastcifar.format import option_flag
from fastcifar.models.coconut import BottleneckResNet
from fastcifar.models.convnets import AirbenchNet, SmallConvNet
from fastcifar.models.count import CIFAR_SHAPE, count_macs, count_parameters
from fastcifar.models.imports import IMPORTED, describe_error
from fastcifar.models.resnet import SEResNet, enable_fused_ops
from fastcifar.models.winograd import use_winograd
from fastcifar.python_objects import active_objects
from fastcifar.recipe import Recipe, section_fields

__all__ = [
    "MODELS", "build_model", "check_param_budget", "count_macs", "count_parameters", "enable_fused_ops", "use_winograd",
]  # fmt: skip

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet": SEResNet,
    "se68": partial(SEResNet, blocks=(4, 4, 3), channels=(64, 128, 256), se="stem"),
    "se55": partial(SEResNet, blocks=(2, 2, 2, 2), channels=(64, 128, 232, 268), se="stem"),
    "se68_block": partial(SEResNet, blocks=(4, 4, 3), channels=(64, 128, 256), se="block"),
    "se68_none": partial(SEResNet, blocks=(4, 4, 3), channels=(64, 128, 256), se="none"),
    "coconut_leaky": partial(BottleneckResNet, blocks=(2, 4, 6, 2), leaky_stages=(3, 4)),
    "coconut_se": partial(BottleneckResNet, blocks=(2, 4, 6, 2), se_stages=(3,)),
    "coconut_2452": partial(BottleneckResNet, blocks=(2, 4, 5, 2), se_stages=(3, 4), leaky_stages=(3, 4)),
    "coconut_sep": partial(BottleneckResNet, blocks=(3, 4, 6, 3), separable_stages=(3, 4)),
    # Follows the README of its source, which names no activation.
    "coconut_over": partial(BottleneckResNet, blocks=(2, 4, 6, 2), se_stages=(3, 4)),
    # Reconstructions within five million parameters: the README of their source, a class project without code, mentions
    # 512 channels in the last stage, LeakyReLU and one dropout layer, but not the exact widths or the probability.
    "res512a": partial(SEResNet, blocks=(1, 1, 1, 1), channels=(64, 128, 256, 512)),
    "res512b": partial(SEResNet, blocks=(2, 2, 2, 1), channels=(48, 96, 192, 512)),
    "res512c": partial(SEResNet, blocks=(4, 4, 1), channels=(64, 128, 512)),
    "res512d": partial(
        SEResNet,
        blocks=(1, 1, 1, 1),
        channels=(64, 128, 256, 512),
        activation="leaky_relu",
        dropout=0.2,
        dropout_at="head",
    ),
    "speednet": SmallConvNet,
    "speed94": AirbenchNet,
    "speed95": partial(AirbenchNet, blocks=(3, 3, 3), channels=(112, 312, 312), residual=True),
    "speed96": partial(AirbenchNet, blocks=(3, 4, 4), channels=(128, 256, 256), residual=True),
    "resnet18": partial(SEResNet, blocks=(2, 2, 2, 2), channels=(64, 128, 256, 512)),
}

# built-in architecture -> description in `fastcifar models`
DESCRIPTIONS = {
    "resnet": "an SE-ResNet from --blocks, --channels, --se and other options",
    "se68": "the default: 4, 4, 3 blocks, one SE layer after the stem",
    "se55": "four stages of two blocks, one SE layer after the stem",
    "se68_block": "se68 with an SE layer in every block",
    "se68_none": "se68 without SE",
    "coconut_leaky": "bottleneck blocks, LeakyReLU in stages 3 and 4",
    "coconut_se": "bottleneck blocks, SE in stage 3",
    "coconut_2452": "bottleneck blocks, SE and LeakyReLU in stages 3 and 4",
    "coconut_sep": "bottleneck blocks, separable convolutions in stages 3 and 4",
    "coconut_over": "bottleneck blocks, SE in stages 3 and 4",
    "res512a": "ResNet-10 with up to 512 channels",
    "res512b": "deeper and narrower than res512a",
    "res512c": "three stages, 512 channels in the last",
    "res512d": "res512a with LeakyReLU and dropout",
    "speednet": "early pooling, no shortcuts: for minutes on a CPU",
    "speed94": "whitening stem: for 94 % in the shortest time",
    "speed95": "whitening stem, wider: for 95 %",
    "speed96": "whitening stem, deeper: for 96 %",
    "resnet18": "the usual baseline",
}

# The options of a recipe that are keyword arguments of architectures; `build_model` accepts others too.
MODEL_OPTIONS = tuple(name for name in section_fields("network") if name not in ("arch", "max_params"))


def model_options(recipe: Recipe) -> dict[str, Any]:
    """Return the values of `MODEL_OPTIONS` in a recipe, as `build_model` takes them."""
    return {name: getattr(recipe, name) for name in MODEL_OPTIONS}


def build_model(arch: str, num_classes: int = 10, **overrides: Any) -> nn.Module:
    """Return the architecture `arch`, newly initialized on the default device, in training mode.

    `overrides` that are None leave the architecture's own values; `Recipe` checks the range of every number. A function
    or class without a `num_classes` parameter is called without it.
    """
    builder = find_architecture(arch)
    arguments = {name: value for name, value in overrides.items() if value is not None}
    parameters = _parameters(builder)
    for name in arguments:
        if name not in parameters and not _accepts_any(parameters):
            flags = ", ".join(option_flag(option) for option in MODEL_OPTIONS if option in parameters) or "none"
            raise UsageError(f"architecture {arch} has no option {option_flag(name)}", f"its options: {flags}")
    if "num_classes" in parameters or _accepts_any(parameters):
        arguments["num_classes"] = num_classes
    return builder(**arguments)


def has_fixed_classes(arch: str) -> bool:
    """Return whether the number of classes of the architecture cannot be given, as for an `nn.Module` from Python."""
    parameters = _parameters(find_architecture(arch))
    return not ("num_classes" in parameters or _accepts_any(parameters))


def _parameters(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function or class; none if Python does not know them, as for subclasses of dict."""
    try:
        return inspect.signature(builder).parameters
    except (ValueError, TypeError):
        return {}


def _accepts_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def find_architecture(arch: str) -> Callable[..., nn.Module]:
    """Return the entry `arch` of `MODELS`, or the function or class `NAME` or `MODULE:NAME` of an imported module.

    Where a network is given from Python, `arch` is its name in the recipe.
    """
    if (given := active_objects().model) is not None:
        return (lambda: given) if isinstance(given, nn.Module) else given
    found = _candidates(arch)
    if len(found) == 1:
        return next(iter(found.values()))
    module = arch.rpartition(":")[0]
    if found:
        named = " and ".join("a built-in one" if item == arch else item for item in found)
        raise UsageError(f"--arch {arch} is ambiguous: {named}", f"use --arch {list(found)[-1]}, or rename one")
    if module and module not in IMPORTED:
        raise UsageError(f"unknown architecture {arch!r}", f"give --import {module}")
    suggestion = suggest_name(arch, architecture_names())
    if IMPORTED:
        sources = " or ".join(origin.source for origin, _ in IMPORTED.values())
        raise UsageError(f"there is no architecture {arch!r}, neither built in nor in {sources}", suggestion)
    own = "give --import FILE.py for a network of your own, in Python model="
    remedy = f"{suggestion} (or {own})" if suggestion.startswith("did") else f"{own}, or {suggestion}"
    raise UsageError(f"unknown architecture {arch!r}", remedy)


def architecture_names() -> list[str]:
    """Return the names in `MODELS`, and those of the functions and classes in imported modules with `num_classes`."""
    names = list(MODELS)
    for module_name, (_, module) in IMPORTED.items():
        for name, value in vars(module).items():
            is_defined_there = callable(value) and getattr(value, "__module__", None) == module.__name__
            if is_defined_there and name[0] != "_" and "num_classes" in _parameters(value):
                names.append(name if len(_candidates(name)) == 1 else f"{module_name}:{name}")
    return list(dict.fromkeys(names))


def _candidates(arch: str) -> dict[str, Any]:
    """Return everything that `arch` may refer to. A name that a module has added to `MODELS` refers to that entry."""
    if arch in MODELS and arch not in DESCRIPTIONS:
        return {arch: MODELS[arch]}
    module_name, _, attribute = arch.rpartition(":")
    modules = {name: module for name, (_, module) in IMPORTED.items() if module_name in ("", name)}
    named: dict[str, Any] = {
        f"{name}:{attribute}": getattr(module, attribute, None) for name, module in modules.items()
    }
    found = {name: value for name, value in named.items() if callable(value)}
    return {arch: MODELS[arch], **found} if arch in MODELS else found


def is_built_in(arch: str) -> bool:
    """Return whether `arch` names an architecture of fastcifar."""
    return arch in DESCRIPTIONS and active_objects().model is None


def build_for_inspection(arch: str, num_classes: int = 10, **overrides: Any) -> nn.Module:
    """Return a network that takes no memory, on the meta device; one that is not built in is checked.

    If it does not support the meta device, it is on the CPU. Raises `UsageError` if it cannot be built, fails in a
    forward pass or does not return logits of `num_classes` classes, in training or in evaluation mode.
    """
    if is_built_in(arch):
        with torch.device("meta"):
            return build_model(arch, num_classes, **overrides)
    task, failure = "", None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]), torch.no_grad():
                task = "cannot be built"
                model = build_model(arch, num_classes, **overrides)
                if not isinstance(model, nn.Module):
                    raise UsageError(
                        f"architecture {arch} is a {type(model).__name__}", "it should return an nn.Module"
                    )
                if any(map(is_lazy, model.parameters())):
                    raise UsageError(f"architecture {arch} has lazy layers", "give layers their sizes, as in nn.Linear")
                model = copy.deepcopy(model).to(device)  # a module given from Python must not change
                task = "fails in a forward pass of 32x32 images"
                for mode in (False, True):
                    _check_logits(arch, model.train(mode)(torch.zeros(2, *CIFAR_SHAPE)), num_classes)
                return model
        except UserError:
            raise
        except Exception as error:
            failure = error
    assert failure is not None
    raise UsageError(f"architecture {arch} {task}: {describe_error(failure)}", "correct its code") from failure


def _check_logits(arch: str, output: Any, num_classes: int) -> None:
    if not isinstance(output, Tensor):
        returned = f"a {type(output).__name__}"
    elif output.shape != (2, num_classes) or not output.is_floating_point():
        returned = f"{str(output.dtype).removeprefix('torch.')} of shape {list(output.shape)}"
    else:
        return
    remedy = f"it should return logits of shape [n, {num_classes}], where {num_classes} is the number of classes"
    raise UsageError(f"architecture {arch} returns {returned} for 2 images", remedy)


def check_param_budget(arch: str, model: nn.Module, max_params: int) -> None:
    """Raise `UsageError` if `model` has more than `max_params` trainable parameters."""
    count = count_parameters(model)
    if count > max_params:
        problem = f"{arch} has {count:,} parameters, {count - max_params:,} over the budget of {max_params:,}"
        raise UsageError(problem, f"choose a smaller network, or allow it with --max-params {count}")
