"""Sweep files and their trials: the combinations of list entries, grid values, random points and seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from fastcifar.errors import UsageError, lookup, suggest_name
from fastcifar.files import load_toml
from fastcifar.format import format_toml_value, option_flag
from fastcifar.recipe import OUTPUT_OPTIONS, Recipe
from fastcifar.recipes import load_recipe_values
from fastcifar.renamed import renaming_remedy

MAX_TRIALS = 100_000  # more would be a mistake: a grid of six options with ten values each has a million
SPEC_FILE = "sweep.toml"  # copy of the sweep file in the sweep folder
RESERVED_OPTIONS = {
    "seed": "set seeds = [0, 1, 2] at the top level",
    "out": "each trial has its own run folder; use --out for the sweep folder",
    "resume": "a sweep resumes its trials automatically",
}

Options = dict[str, Any]  # recipe option -> value

# kind of range -> function that maps a uniform u in [0, 1) and the range, [lowest, highest] or choices, to a value
RANGE_SAMPLERS: dict[str, Callable[[float, Sequence[Any]], Any]] = {
    "uniform": lambda u, ends: round_in_range(ends[0] + u * (ends[1] - ends[0]), ends),
    "log": lambda u, ends: round_in_range(ends[0] * (ends[1] / ends[0]) ** u, ends),
    "integer": lambda u, ends: ends[0] + int(u * (ends[1] - ends[0] + 1)),
    "choice": lambda u, choices: choices[int(u * len(choices))],
}


def round_in_range(value: float, ends: Sequence[float]) -> float:
    """Round to 4 significant digits, or to a thousandth of the range if that is finer, but never out of the range.

    The label of a trial shows this value.
    """
    low, high = ends
    decimals = 3 - math.floor(math.log10(high - low))
    rounded = float(f"{value:.4g}")
    if decimals > 0 and abs(value - rounded) > 10**-decimals:
        rounded = round(value, decimals)
    return float(min(max(rounded, low), high))


def _parse_seeds(value: Any) -> Any:
    """Convert a number n, or its text, to the seeds 0..n-1, and a text of comma-separated seeds to a list."""
    if isinstance(value, str):
        value = value.split(",") if "," in value else int(value) if value.strip().isdecimal() else value
    if isinstance(value, str) or value == 0:
        raise ValueError("should be a positive number of seeds, or a list of seeds")
    if type(value) is int and value > MAX_TRIALS:
        raise ValueError(f"are more than {MAX_TRIALS:,}")
    return range(value) if type(value) is int and value > 0 else value


class ListEntry(BaseModel, extra="allow", frozen=True):
    """A [[list]] entry: further keys are options of the recipe."""

    label: str | None = None
    recipe: str | None = None

    @property
    def settings(self) -> Options:
        return self.model_extra or {}


class RandomSearchSpec(BaseModel, extra="allow", frozen=True):
    """[random]: `n` points, sampled from a range for each other key, such as `lr.log = [0.01, 1.0]`."""

    n: int = Field(gt=0)
    sampler_seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def ranges(self) -> dict[str, tuple[str, list[Any]]]:
        """Option -> kind of its range, and the two ends or the choices. Raises `UsageError` for an invalid range."""
        if not self.model_extra:
            raise UsageError("[random] or [study] has no range", "add one, such as lr.log = [0.01, 1.0]")
        return {name: _parse_range(name, value) for name, value in self.model_extra.items()}


class StudySpec(RandomSearchSpec, frozen=True):
    """[study]: ranges as in [random], from which Optuna samples, and a pruner (see `study.PRUNERS`)."""

    pruner: str = "median"


class SweepSpec(BaseModel, frozen=True):
    """The contents of a sweep file; `rows` are its [[list]] entries."""

    recipe: str | None = None
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_parse_seeds), Field(min_length=1)
    ] = (0,)
    base: Options = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    rows: list[ListEntry] = Field(default=[], alias="list")
    random: RandomSearchSpec | None = None
    study: StudySpec | None = None

    @cached_property
    def base_values(self) -> dict[str | None, Options]:
        """The options of every recipe of the sweep, overridden by [base]: name or path, or None -> options."""
        sources = {self.recipe, *(row.recipe for row in self.rows)}
        return {source: {**(load_recipe_values(source) if source else {}), **self.base} for source in sources}

    def axes(self) -> set[str]:
        """Return the options that the sweep varies. Raises `UsageError` if an option is varied twice."""
        sampled = [name for search in (self.random, self.study) if search for name in search.ranges]
        listed = {name for row in self.rows for name in row.settings}
        names = [*self.grid, *sampled, *listed]
        for name in names:
            if names.count(name) > 1:
                problem = f"{name} is in more than one of [grid], [[list]], [random] and [study]"
                raise UsageError(problem, "keep it in one of them")
        return set(names)

    def to_toml(self) -> str:
        """Return the text of a sweep file from which `read_sweep_spec` reads the same spec."""
        document = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        rows = document.pop("list", [])
        tables = {name: value for name, value in document.items() if isinstance(value, dict)}
        lines = [f"{name} = {format_toml_value(value)}" for name, value in document.items() if name not in tables]
        sections = [(f"[{name}]", table) for name, table in tables.items()] + [("[[list]]", row) for row in rows]
        for header, table in sections:
            lines += ["", header, *(f"{name} = {format_toml_value(value)}" for name, value in table.items())]
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class TrialRef:
    """A trial of an Optuna study, to which another process can report."""

    journal_path: str
    study_name: str
    trial_number: int
    pruner: str


@dataclass(frozen=True)
class SweepTrial:
    """One run of a sweep. Trials with equal labels differ only by the seed and form one row of a report."""

    key: str  # name of the run folder, a function of label, seed and recipe
    label: str
    options: Options  # those that differ from the base of the sweep
    recipe_name: str
    recipe: Recipe
    trial_ref: TrialRef | None = None

    def with_sweep_folder(self, folder: Path) -> SweepTrial:
        """Return the trial with its run folder in the sweep folder, where it resumes if the run exists."""
        out = str(folder / "runs" / self.key)
        return replace(self, recipe=self.recipe.model_copy(update={"out": out, "resume": "auto"}))


def read_sweep_spec(
    source: str, seeds: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[SweepSpec, str]:
    """Return the spec and the name of a sweep; the arguments are those of `run_sweep`."""
    path = shipped_sweeps().get(source) or Path(source)
    path = path / SPEC_FILE if path.is_dir() else path
    if not os.path.isfile(path):
        suggestion = suggest_name(source, list(shipped_sweeps()))
        raise UsageError(f"unknown sweep {source!r}", f"give a TOML file or the name of a built-in sweep; {suggestion}")
    values = load_toml(path)
    keys = [field.alias or name for name, field in SweepSpec.model_fields.items()]
    for name in sorted(values.keys() - keys):
        remedy = f"recipe options belong under [base]; {suggest_name(name, keys)}"
        raise UsageError(f"{path}: unknown key {name!r}", remedy)
    try:
        spec = SweepSpec.model_validate(values if seeds is None else {**values, "seeds": seeds})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise UsageError(f"{path}: {where} {message} (got {problem['input']!r})") from None
    base = {name: value for name, value in (overrides or {}).items() if value is not None}
    for name in spec.axes() & base.keys():
        raise UsageError(f"{option_flag(name)}: {name} is varied by the sweep", "leave it out, or edit the sweep file")
    rows = [row.model_copy(update={"recipe": _absolute_recipe(row.recipe, path.parent)}) for row in spec.rows]
    changes = {"recipe": _absolute_recipe(spec.recipe, path.parent), "base": {**spec.base, **base}, "rows": rows}
    return spec.model_copy(update=changes), path.parent.name if path.name == SPEC_FILE else path.stem


def _absolute_recipe(source: str | None, folder: Path) -> str | None:
    """Make the path of a recipe file absolute if the file is in the folder of the sweep file."""
    file = folder / str(source)
    return str(file.absolute()) if source and source.endswith(".toml") and os.path.isfile(file) else source


def shipped_sweeps() -> dict[str, Path]:
    """Return the sweeps that are part of the package: name -> TOML file."""
    folder = Path(str(resources.files("fastcifar"))) / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def expand_trials(spec: SweepSpec, name: str) -> list[SweepTrial]:
    """Return all trials of a sweep called `name`, ordered by seed: each point runs once before any runs again."""
    sizes = (max(1, len(spec.rows)), *map(len, spec.grid.values()), spec.random.n if spec.random else 1)
    if (num_trials := math.prod(sizes) * len(spec.seeds)) > MAX_TRIALS:
        problem = f"the sweep has {num_trials:,} trials, more than {MAX_TRIALS:,}"
        raise UsageError(problem, "give fewer values, or sample them with [random] or [study]")
    axes = [[(key, value) for value in values] for key, values in spec.grid.items()]
    grid_points = [dict(point) for point in itertools.product(*axes)]
    random_points = list(_draw_random_points(spec.random)) if spec.random else [{}]
    trials: dict[str, SweepTrial] = {}
    labels = set()
    for row in spec.rows or [ListEntry()]:
        row_label = row.label or ", ".join(filter(None, (Path(row.recipe or "").stem, settings_label(row.settings))))
        if row_label in labels:
            raise UsageError(f"two [[list]] entries have the label {row_label!r}", "give each entry a unique label")
        labels.add(row_label)
        for grid_point, random_point in itertools.product(grid_points, random_points):
            point = {**grid_point, **random_point}
            label = ", ".join(filter(None, (row_label, settings_label(point)))) or "base"
            for seed in spec.seeds:
                trial = build_trial(spec, name, label, {**row.settings, **point}, seed, row.recipe)
                trials[trial.key] = trial
    return sorted(trials.values(), key=lambda trial: spec.seeds.index(trial.recipe.seed))


def build_trial(
    spec: SweepSpec,
    name: str,
    label: str,
    settings: Options,
    seed: int,
    source: str | None = None,
    trial_ref: TrialRef | None = None,
) -> SweepTrial:
    """Build a trial; `source` replaces the recipe of the sweep. Raises `UsageError` with the label of the trial."""
    source, base_values = source or spec.recipe, spec.base_values
    for key in (*spec.base, *settings):
        if key in RESERVED_OPTIONS:
            raise UsageError(f"{key} cannot be set in a sweep file", RESERVED_OPTIONS[key])
    try:
        recipe = Recipe(**{**base_values[source], **settings, "seed": seed, "out": None, "resume": None})
        base_recipe = Recipe(**{**base_values[spec.recipe], "seed": seed, "out": None, "resume": None})
    except UsageError as error:
        raise UsageError(f"{label}: {error.problem}", error.remedy) from None
    values, unchanged = recipe.model_dump(mode="json"), base_recipe.model_dump(mode="json")
    options = {key: value for key, value in values.items() if value != unchanged[key] or key in settings}
    recipe_name = Path(source).stem if source else name
    # the key is such as `relu-s0-1a2b3c4d`; options that do not change what is trained are left out of its hash
    experiment = {key: value for key, value in recipe.non_default_options().items() if key not in OUTPUT_OPTIONS}
    identity = json.dumps([label, experiment], sort_keys=True)
    slug = re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:60]
    key = f"{slug}-s{seed}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    return SweepTrial(key, label, options, recipe_name, recipe, trial_ref)


def settings_label(settings: Mapping[str, Any], separator: str = ", ") -> str:
    """Format settings as a label: `lr=0.1, blocks=1,1, bias_decay=False`; it is part of a trial's key."""

    def value_text(value: Any) -> str:
        if isinstance(value, dict):
            return settings_label(value, separator=" ")
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return separator.join(f"{name}={value_text(value)}" for name, value in settings.items())


def _draw_random_points(spec: RandomSearchSpec) -> Iterator[Options]:
    """Yield the points of [random]; the i-th depends only on i and the seed, so that a larger `n` only adds points."""
    for index in range(spec.n):
        # NumPy guarantees that raw bits never change, but not the values of distribution methods such as `random`.
        words = np.random.Philox(key=[spec.sampler_seed, index]).random_raw(len(spec.ranges))
        uniform = (int(word) / 2**64 for word in np.atleast_1d(words))
        yield {
            name: RANGE_SAMPLERS[kind](u, ends)
            for u, (name, (kind, ends)) in zip(uniform, spec.ranges.items(), strict=True)
        }


def _parse_range(name: str, value: Any) -> tuple[str, list[Any]]:
    """Parse a range such as `{log = [0.01, 1.0]}` into its kind and ends. Raises `UsageError` if it is invalid."""
    if name not in Recipe.model_fields:
        remedy = renaming_remedy(name) or suggest_name(name, Recipe.model_fields)
        raise UsageError(f"unknown recipe key {name!r}", remedy)
    if not isinstance(value, dict) or len(value) != 1:
        kinds = ", ".join(RANGE_SAMPLERS)
        raise UsageError(f"invalid range {value!r} for {name}", f"write {name}.KIND = [LOW, HIGH], KIND one of {kinds}")
    ((kind, ends),) = value.items()
    lookup(RANGE_SAMPLERS, kind, "kind of range")
    is_valid = isinstance(ends, list) and bool(ends)
    if kind != "choice" and is_valid:
        number_types = (int,) if kind == "integer" else (int, float)
        is_valid = len(ends) == 2 and all(type(end) in number_types for end in ends) and ends[0] < ends[1]
        is_valid = is_valid and (kind != "log" or ends[0] > 0)
    if not is_valid:
        raise UsageError(f"invalid range {name}.{kind} = {ends!r}", f"write for example {name}.log = [0.01, 1.0]")
    return kind, ends
