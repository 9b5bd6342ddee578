"""A sweep file as trials: rows, grid, random draws and seeds over a base, each with every other.

Every trial's recipe is checked here, by `Recipe` itself, before one is run. Nothing is run or written, and no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fastcifar.errors import UsageError, lookup, suggest_name
from fastcifar.files import load_toml
from fastcifar.format import format_toml_value, option_flag
from fastcifar.recipe import OUTPUT_OPTIONS, Recipe, load_recipe_values
from fastcifar.renamed import renaming_remedy

SPEC_FILE = "sweep.toml"  # in a sweep's folder: what was asked
RESERVED_OPTIONS = {
    "seed": "write seeds = [0, 1, 2], beside the axes",
    "out": "every trial has a folder of its own; give the sweep's --out",
    "resume": "a sweep goes on by itself",
}

# kind of range -> its value at u, uniform in [0, 1); `ends`: the lowest and the highest, or the choices
RANGE_SAMPLERS: dict[str, Callable[[float, Sequence[Any]], Any]] = {
    "uniform": lambda u, ends: round_to_4_digits(ends[0] + u * (ends[1] - ends[0])),
    "log": lambda u, ends: round_to_4_digits(ends[0] * (ends[1] / ends[0]) ** u),
    "integer": lambda u, ends: ends[0] + int(u * (ends[1] - ends[0] + 1)),
    "choice": lambda u, choices: choices[int(u * len(choices))],
}


def round_to_4_digits(value: float) -> float:
    """To four digits, so that the label of a trial holds its very value."""
    return float(f"{value:.4g}")


def _parse_seeds(value: Any) -> Any:
    """`3` as [0, 1, 2], also as text; `"4,5"` as the command line spells a list."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if "," in value else int(value)
    return range(value) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value


def _check_list_row(value: dict[str, Any]) -> dict[str, Any]:
    """A row of [[list]], whose label and recipe are text."""
    for name in ("label", "recipe"):
        if not isinstance(value.get(name, ""), str):
            raise ValueError(f"{name} should be text")
    return value


class RandomSearchSpec(BaseModel):
    """[random]: `n` points, drawn from a range for each other key. Range: `lr.log = [0.01, 1.0]`, a row of RANGES."""

    model_config = ConfigDict(extra="allow", frozen=True)

    n: int = Field(gt=0)
    sampler_seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def ranges(self) -> dict[str, tuple[str, list[Any]]]:
        """Knob -> the kind of its range, and the range's ends or choices. Errors: `UsageError`."""
        return {name: _parse_range(name, value) for name, value in (self.model_extra or {}).items()}


class StudySpec(RandomSearchSpec):
    """[study]: the same, but Optuna chooses the points, and a pruner (a row of study.PRUNERS) ends hopeless ones."""

    pruner: str = "median"


class SweepSpec(BaseModel):
    """A sweep file. `rows`: its [[list]]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str | None = None
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_parse_seeds), Field(min_length=1)
    ] = (0,)
    base: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    rows: list[Annotated[dict[str, Any], AfterValidator(_check_list_row)]] = Field(default=[], alias="list")
    random: RandomSearchSpec | None = None
    study: StudySpec | None = None

    def axes(self) -> set[str]:
        """The knobs that trials differ in by the file. Errors: `UsageError` for one that has two axes."""
        drawn = [name for draws in (self.random, self.study) if draws for name in draws.ranges]
        named = [*self.grid, *drawn, *{name for row in self.rows for name in row if name not in ("label", "recipe")}]
        for name in named:
            if named.count(name) > 1:
                raise UsageError(f"{name} has two axes", "leave it in one of [grid], [[list]], [random] and [study]")
        return set(named)

    def to_toml(self) -> str:
        """A file that `read` reads back as this."""
        document = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        rows = document.pop("list", [])
        tables = {name: value for name, value in document.items() if isinstance(value, dict)}
        lines = [f"{name} = {format_toml_value(value)}" for name, value in document.items() if name not in tables]
        for head, table in [
            *((f"[{name}]", table) for name, table in tables.items()),
            *(("[[list]]", row) for row in rows),
        ]:
            lines += ["", head, *(f"{name} = {format_toml_value(value)}" for name, value in table.items())]
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class TrialRef:
    """A trial's place in an Optuna study: what a process needs to report to it. `file`: the journal."""

    journal_path: str
    study_name: str
    trial_number: int
    pruner: str


@dataclass(frozen=True)
class SweepTrial:
    """One run of a sweep.

    key     names its folder; it lasts as long as label, seed and recipe do
    label   the row it belongs to: everything but the seed
    knobs   what differs from the sweep's base
    name    its recipe's, for tables
    """

    key: str
    label: str
    options: dict[str, Any]
    recipe_name: str
    recipe: Recipe
    trial_ref: TrialRef | None = None

    def with_sweep_folder(self, folder: Path) -> SweepTrial:
        """The same with its run folder in the sweep's, where it goes on if it has begun."""
        out = str(folder / "runs" / self.key)
        return replace(self, recipe=self.recipe.model_copy(update={"out": out, "resume": "auto"}))


def read_sweep_spec(
    source: str, seeds: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[SweepSpec, str]:
    """What the shipped sweep or the file `source` asks for, under `flags` (knobs, None where not given), and its name.

    A flag stands above every recipe and [base]; above an axis it cannot, and is refused. A sweep's folder stands for
    the copy in it. Errors: `UsageError`.
    """
    path = shipped_sweeps().get(source) or Path(source)
    path = path / SPEC_FILE if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"no sweep {source!r}", f"{suggest_name(source, list(shipped_sweeps()))} or give a TOML file")
    values = load_toml(path)
    known = [field.alias or name for name, field in SweepSpec.model_fields.items()]
    for name in values:
        if name not in known:
            raise UsageError(
                f"{path}: unknown key {name!r}", f"{suggest_name(name, known)} A knob belongs under [base]"
            )
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    asked = _validate_spec(path, values if seeds is None else {**values, "seeds": seeds})
    for name in asked.axes() & given.keys():
        raise UsageError(f"{option_flag(name)}: {name} is an axis of this sweep", "leave it out, or change the file")
    rows = [_resolve_recipe_path(row, path.parent) for row in asked.rows]
    top = _resolve_recipe_path({"recipe": asked.recipe} if asked.recipe else {}, path.parent)
    changes = {**top, "base": {**asked.base, **given}, "rows": rows}
    return asked.model_copy(update=changes), path.parent.name if path.name == SPEC_FILE else path.stem


def _validate_spec(path: Path, values: dict[str, Any]) -> SweepSpec:
    try:
        return SweepSpec.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
        raise UsageError(f"{path}: {where} {message} (got {problem['input']!r})") from None


def _resolve_recipe_path(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`row` with a recipe file that lies beside the sweep file by its whole path."""
    source = row.get("recipe")
    beside = folder / str(source)
    return (
        {**row, "recipe": str(beside.absolute())} if source and source.endswith(".toml") and beside.is_file() else row
    )


def shipped_sweeps() -> dict[str, Path]:
    """The sweeps that come with the package: name -> TOML file."""
    folder = Path(str(resources.files("fastcifar"))) / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def expand_trials(spec: SweepSpec, name: str) -> list[SweepTrial]:
    """Every trial of a sweep called `name`, seed by seed, so that a sweep cut short has each row as often as another.

    Errors: `UsageError` for the first recipe that is none, with its label.
    """
    points = [*map(dict, itertools.product(*([(key, value) for value in values] for key, values in spec.grid.items())))]
    drawn = list(_draw_random_points(spec.random)) if spec.random else [{}]
    trials: dict[str, SweepTrial] = {}
    labels = set()
    for row in spec.rows or [{}]:
        settings = {key: value for key, value in row.items() if key not in ("label", "recipe")}
        title = row.get("label") or ", ".join(
            filter(None, (Path(row.get("recipe", "")).stem, settings_label(settings)))
        )
        if title in labels:
            raise UsageError(f"two rows of [[list]] are called {title!r}", "give each a label of its own")
        labels.add(title)
        for point, draw in itertools.product(points, drawn):
            label = ", ".join(filter(None, (title, settings_label({**point, **draw})))) or "base"
            for seed in spec.seeds:
                trial = build_trial(spec, name, label, {**settings, **point, **draw}, seed, row.get("recipe"))
                trials[trial.key] = trial
    return sorted(trials.values(), key=lambda trial: spec.seeds.index(trial.recipe.seed))


def build_trial(
    spec: SweepSpec,
    name: str,
    label: str,
    settings: dict[str, Any],
    seed: int,
    source: str | None = None,
    trial_ref: TrialRef | None = None,
) -> SweepTrial:
    """One trial. `source`: the row's own recipe, instead of the sweep's. Errors: `UsageError` with the label."""
    source = source or spec.recipe
    for key in (*spec.base, *settings):
        if key in RESERVED_OPTIONS:
            raise UsageError(f"{key} is no knob of a sweep", RESERVED_OPTIONS[key])
    base = {**(load_recipe_values(source) if source else {}), **spec.base}
    common = {**(load_recipe_values(spec.recipe) if spec.recipe else {}), **spec.base}
    try:
        recipe = Recipe.from_dict({**base, **settings, "seed": seed, "out": None, "resume": None})
        against = Recipe.from_dict({**common, "seed": seed, "out": None, "resume": None}).model_dump(mode="json")
    except UsageError as error:
        raise UsageError(f"{label}: {error.problem}", error.remedy) from None
    plain = recipe.model_dump(mode="json")
    knobs = {key: value for key, value in plain.items() if value != against[key] or key in settings}
    return SweepTrial(_trial_key(label, recipe), label, knobs, Path(source).stem if source else name, recipe, trial_ref)


def _trial_key(label: str, recipe: Recipe) -> str:
    """`relu-s0-1a2b3c4d`: label and seed to read, and a hash of the knobs of the experiment not at their defaults."""
    experiment = {name: value for name, value in recipe.non_default_options().items() if name not in OUTPUT_OPTIONS}
    told = json.dumps([label, experiment], sort_keys=True)
    slug = re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:60]
    return f"{slug}-s{recipe.seed}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def settings_label(settings: Mapping[str, Any], separator: str = ", ") -> str:
    """Settings as a label: `lr=0.1, blocks=1,1, bias_decay=False`.

    The label is part of a trial's key and of the lines in trials.jsonl. Values therefore are written as Python prints
    them, and not by `format_option_value`: a trial keeps its key when the text in tables changes.
    """

    def value_text(value: Any) -> str:
        if isinstance(value, dict):
            return settings_label(value, separator=" ")
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return separator.join(f"{name}={value_text(value)}" for name, value in settings.items())


def _draw_random_points(spec: RandomSearchSpec) -> Iterator[dict[str, Any]]:
    """The points of [random]: the i-th depends on the seed and i alone, so that more of them are the same and more."""
    for index in range(spec.n):
        # Raw words, not `random`: numpy promises the bit stream for ever, the methods built on it only per version.
        words = np.random.Philox(key=[spec.sampler_seed, index]).random_raw(len(spec.ranges))
        units = (int(word) / 2**64 for word in np.atleast_1d(words))
        yield {
            name: RANGE_SAMPLERS[kind](u, ends)
            for u, (name, (kind, ends)) in zip(units, spec.ranges.items(), strict=True)
        }


def _parse_range(name: str, value: Any) -> tuple[str, list[Any]]:
    """`{log = [0.01, 1.0]}` as its kind and ends. Errors: `UsageError`."""
    if name not in Recipe.model_fields:
        raise UsageError(
            f"unknown recipe key {name!r}", renaming_remedy(name) or suggest_name(name, Recipe.model_fields)
        )
    if not isinstance(value, dict) or len(value) != 1:
        raise UsageError(
            f"the range of {name} is {value!r}", f"write {name}.KIND = [LOW, HIGH], KIND {', '.join(RANGE_SAMPLERS)}"
        )
    ((kind, ends),) = value.items()
    lookup(RANGE_SAMPLERS, kind, "kind of range")
    numbers = (int,) if kind == "integer" else (int, float)
    if kind == "choice":
        right = isinstance(ends, list) and bool(ends)
    else:
        right = isinstance(ends, list) and len(ends) == 2 and all(type(end) in numbers for end in ends)
        right = right and ends[0] < ends[1] and (kind != "log" or ends[0] > 0)
    if not right:
        raise UsageError(f"{name}.{kind} = {ends!r} is no range", f"such as {name}.log = [0.01, 1.0]")
    return kind, ends
