"""Fine-tuning: initial weights from another run or file (`--init`), and layers that are not trained (`--freeze`)."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastcifar.data.cifar_files import DATASETS, Dataset, split_digest
from fastcifar.data.normalization import normalization_mean_std, with_normalization
from fastcifar.data.splits import stratified_split
from fastcifar.errors import CheckpointError, UsageError
from fastcifar.format import format_option_value, option_flag
from fastcifar.models import MODEL_OPTIONS, build_for_inspection, model_options
from fastcifar.pretrained import is_pretrained
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.distributed import get_world


class LoadedInit(NamedTuple):
    """What a run records of the weights that it starts from, and lines for the user about what was loaded."""

    sha256: str | None = None  # `state_dict_sha256` of the weights; None for random ones
    lines: tuple[str, ...] = ()


def load_init(model: nn.Module, recipe: Recipe, classes: Sequence[str], initial: InitialWeights | None) -> LoadedInit:
    """Load `initial`, unless it is None, into `model`, a network for `classes`.

    The head keeps its random values unless the weights are of a network for the same classes in the same order, or for
    the same number of classes if they do not name them. Everything else must fit.
    """
    if initial is None:
        return LoadedInit()
    state, head = model.state_dict(), find_head(recipe, model, len(classes))
    if initial.classes:
        is_same_head = initial.classes == list(classes)
    else:
        is_same_head = all(key in initial.weights and initial.weights[key].shape == state[key].shape for key in head)
    new_head = () if is_same_head else head
    weights = initial.check_fit(model, recipe, new_head)
    model.load_state_dict({**state, **weights})
    lines = [f"init: {len(weights)} of {len(state)} tensors from {initial.path}"]
    if new_head:
        reason = f"{len(initial.classes)} other classes" if initial.classes else "another number of classes"
        lines.append(f"new head: {', '.join(new_head)}, because the initial weights are for {reason}")
    return LoadedInit(checkpoint.state_dict_sha256(initial.weights), tuple(lines))


@dataclass(frozen=True)
class InitialWeights:
    """The weights that `--init` selects."""

    path: Path
    weights: dict[str, Tensor]  # sorted by name, so that the order in the file does not change their SHA-256
    classes: list[str] | None  # None for weights of another project, which do not name them
    options: dict[str, Any]  # recipe of the run; empty for weights of another project
    data_digest: str | None = None  # of the data that the run was trained on; None if the file lacks it

    def check_fit(self, model: nn.Module, recipe: Recipe, ignored: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the weights by the keys of `model`, without those `ignored`; see `checkpoint.check_weights`."""
        source = f"--init {self.path} does not fit --arch {recipe.arch}: it"
        try:
            return checkpoint.check_weights(model, self.weights, source, ignored)
        except CheckpointError as error:
            saved = {name: self.options.get(name) for name in ("arch", *MODEL_OPTIONS)}
            options = [f"{option_flag(key)} {format_option_value(value)}" for key, value in saved.items() if value]
            is_same = all(value == recipe.model_dump(mode="json")[key] for key, value in saved.items())
            remedy = "check the architecture" if is_same or not options else f"use only {' '.join(options)}"
            raise CheckpointError(error.problem, remedy) from None


def absolute_init_path(init: str) -> str:
    """Return `--init` as an absolute path, if it is a path."""
    return init if init == "none" or is_pretrained(init) else os.path.abspath(os.path.expanduser(init))


def read_initial_weights(recipe: Recipe) -> InitialWeights | None:
    """Read, on rank 0, the weights that `recipe.init` selects: of a run, those that it evaluates on the test set.

    Returns None for random ones. Raises `CheckpointError` if the weights are missing, invalid or not finite.
    """
    if recipe.init == "none":
        return None
    world = get_world()
    return world.broadcast_object(_read_initial_weights(recipe) if world.is_main_process else None)


def _read_initial_weights(recipe: Recipe) -> InitialWeights:
    run = absolute_init_path(recipe.init)
    path = checkpoint.resolve_checkpoint_path(run)
    saved = dict[str, Any](checkpoint.load_checkpoint(path, allow_foreign=True))
    if checkpoint.is_fastcifar_checkpoint(saved):
        if saved["recipe"].get("eval_weights") == "best" and os.path.isdir(run):
            path = checkpoint.resolve_checkpoint_path(run, "best")
            saved = dict[str, Any](checkpoint.load_checkpoint(path))
        is_averaged = saved["recipe"].get("eval_weights") == "ema" and saved.get("ema")
        weights, options = saved["ema" if is_averaged else "model"], saved["recipe"]
    else:
        weights, options = checkpoint.find_weights(saved, path)[0], {}
    weights = {checkpoint.strip_wrapper_prefixes(name): value for name, value in sorted(weights.items())}
    if invalid := [name for name, value in weights.items() if not torch.isfinite(value.double()).all()]:
        raise CheckpointError(f"--init {path}: {invalid[0]} contains NaN or infinity", "choose other weights")
    classes = saved.get("classes") if options else None
    return InitialWeights(path, weights, classes, options, saved.get("data_digest"))


def overlap_lines(initial: InitialWeights | None, recipe: Recipe, data: Dataset) -> tuple[str, ...]:
    """Return a line for the user if `initial` was trained on validation images of a run of `recipe` on `data`.

    It says how many of them. There is none if the file of `initial` does not record its data, unless the package
    contains the weights, which were trained on all training images.
    """
    if initial is None or data.val is not None or not recipe.val_size:
        return ()
    labels = data.train.labels
    if is_pretrained(recipe.init) and split_digest(data.train) == DATASETS["cifar10"].split_digests["train"]:
        val_size, val_seed = 0, 0
    elif initial.data_digest == data.digest:
        val_size, val_seed = initial.options["val_size"], initial.options["val_seed"]
    else:
        return ()
    trained, _ = stratified_split(labels, val_size, val_seed)
    _, validation = stratified_split(labels, recipe.val_size, recipe.val_seed)
    if not (n := np.isin(validation, trained).sum()):
        return ()
    remedy = f"; --val-size {val_size} --val-seed {val_seed} avoids this" if val_size else ""
    images = f"{n:,} of the {recipe.val_size:,} validation images"
    return (f"the initial weights were trained on {images}, so val_acc is too high{remedy}",)


def with_initial_normalization(recipe: Recipe, initial: InitialWeights | None) -> Recipe:
    """Return `recipe` with the normalization of its initial weights for `auto`, as far as their file records it."""
    if recipe.normalize != "auto" or initial is None:
        return recipe
    saved = {name: initial.options[name] for name in ("arch", "dataset", "normalize") if name in initial.options}
    return with_normalization(recipe, normalization_mean_std(Recipe(**saved))) if saved else recipe


def find_head(recipe: Recipe, model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Return the names of the parameters and buffers whose shape depends on the number of classes of `model`.

    For a network with a fixed number of classes, they are those of the last linear layer, if any.
    """
    try:
        other = build_for_inspection(recipe.arch, num_classes + 1, **model_options(recipe)).state_dict()
    except UsageError:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return tuple(name for name in model.state_dict() if linear and name.startswith(f"{linear[-1]}."))
    return tuple(name for name, value in model.state_dict().items() if value.shape != other[name].shape)


def freeze(model: nn.Module, recipe: Recipe) -> None:
    """Exclude the layers and parameters that match a pattern of `recipe.freeze` from training.

    The parameters require no gradient. Normalization layers with running statistics stay in evaluation mode, whatever
    the mode of `model`, if they match or if all their parameters do. Raises `UsageError` if a pattern matches nothing
    or if no parameter is left to train.
    """
    if recipe.freeze == "none":
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen: set[str] = set()
    for pattern in recipe.freeze.split(","):
        # a pattern matches a layer with all that it contains, because `*` also matches dots
        matching = {
            name for name in (*modules, *parameters) for end in ("", ".*") if name and fnmatchcase(name, pattern + end)
        }
        if matching.isdisjoint(parameters):
            near = difflib.get_close_matches(pattern, (*modules, *parameters))
            first = dict.fromkeys(name.split(".")[0] for name in parameters)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(first)} and their parts"
            raise UsageError(f"--freeze {pattern} matches no layer with parameters of {recipe.arch}", remedy)
        frozen |= matching
    for name in frozen & parameters.keys():
        parameters[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in parameters.values()):
        problem = f"--freeze {recipe.freeze} leaves no parameter of {recipe.arch} to train"
        raise UsageError(problem, f"do not freeze its last layer, {list(parameters)[-1].rpartition('.')[0]}")
    for name, module in modules.items():
        own = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if "running_mean" in module._buffers and (name in frozen or (own and own <= frozen)):
            keep_in_eval_mode(module)


def keep_in_eval_mode(module: nn.Module) -> None:
    """Set evaluation mode; later calls of `train` on `module` or on a module that contains it have no effect on it."""
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]
