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

from fastcifar.errors import UsageError, nearest, pick
from fastcifar.recipe import WHERE_KEPT, Recipe, option, parsed_toml, read_toml, toml_value

COPY = "sweep.toml"  # in a sweep's folder: what was asked
OF_THE_SWEEP = {
    "seed": "write seeds = [0, 1, 2], beside the axes",
    "out": "every trial has a folder of its own; give the sweep's --out",
    "resume": "a sweep goes on by itself",
}

# kind of range -> its value at u, uniform in [0, 1); `ends`: the lowest and the highest, or the choices
RANGES: dict[str, Callable[[float, Sequence[Any]], Any]] = {
    "uniform": lambda u, ends: rounded(ends[0] + u * (ends[1] - ends[0])),
    "log": lambda u, ends: rounded(ends[0] * (ends[1] / ends[0]) ** u),
    "integer": lambda u, ends: ends[0] + int(u * (ends[1] - ends[0] + 1)),
    "choice": lambda u, choices: choices[int(u * len(choices))],
}


def rounded(value: float) -> float:
    """To four digits, so that the label of a trial holds its very value."""
    return float(f"{value:.4g}")


def _seeds(value: Any) -> Any:
    """`3` as [0, 1, 2], also as text; `"4,5"` as the command line spells a list."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if "," in value else int(value)
    return range(value) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value


def _row(value: dict[str, Any]) -> dict[str, Any]:
    """A row of [[list]], whose label and recipe are text."""
    for name in ("label", "recipe"):
        if not isinstance(value.get(name, ""), str):
            raise ValueError(f"{name} should be text")
    return value


class Draws(BaseModel):
    """[random]: `n` points, drawn from a range for each other key. Range: `lr.log = [0.01, 1.0]`, a row of RANGES."""

    model_config = ConfigDict(extra="allow", frozen=True)

    n: int = Field(gt=0)
    sampler_seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def ranges(self) -> dict[str, tuple[str, list[Any]]]:
        """Knob -> the kind of its range, and the range's ends or choices. Errors: `UsageError`."""
        return {name: _range(name, value) for name, value in (self.model_extra or {}).items()}


class StudyDraws(Draws):
    """[study]: the same, but Optuna chooses the points, and a pruner (a row of study.PRUNERS) ends hopeless ones."""

    pruner: str = "median"


class Asked(BaseModel):
    """A sweep file. `rows`: its [[list]]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str | None = None
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_seeds), Field(min_length=1)
    ] = (0,)
    base: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    rows: list[Annotated[dict[str, Any], AfterValidator(_row)]] = Field(default=[], alias="list")
    random: Draws | None = None
    study: StudyDraws | None = None

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
        lines = [f"{name} = {toml_value(value)}" for name, value in document.items() if name not in tables]
        for head, table in [
            *((f"[{name}]", table) for name, table in tables.items()),
            *(("[[list]]", row) for row in rows),
        ]:
            lines += ["", head, *(f"{name} = {toml_value(value)}" for name, value in table.items())]
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Ticket:
    """A trial's place in an Optuna study: what a process needs to report to it. `file`: the journal."""

    file: str
    study: str
    number: int
    pruner: str


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    key     names its folder; it lasts as long as label, seed and recipe do
    label   the row it belongs to: everything but the seed
    knobs   what differs from the sweep's base
    name    its recipe's, for tables
    """

    key: str
    label: str
    knobs: dict[str, Any]
    name: str
    recipe: Recipe
    ticket: Ticket | None = None

    def within(self, folder: Path) -> Trial:
        """The same with its run folder in the sweep's, where it goes on if it has begun."""
        out = str(folder / "runs" / self.key)
        return replace(self, recipe=self.recipe.model_copy(update={"out": out, "resume": "auto"}))


def read(source: str, seeds: str | None = None, flags: Mapping[str, Any] | None = None) -> tuple[Asked, str]:
    """What the shipped sweep or the file `source` asks for, under `flags` (knobs, None where not given), and its name.

    A flag stands above every recipe and [base]; above an axis it cannot, and is refused. A sweep's folder stands for
    the copy in it. Errors: `UsageError`.
    """
    path = shipped().get(source) or Path(source)
    path = path / COPY if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"no sweep {source!r}", f"{nearest(source, list(shipped()))} or give a TOML file")
    values = parsed_toml(path)
    known = [field.alias or name for name, field in Asked.model_fields.items()]
    for name in values:
        if name not in known:
            raise UsageError(f"{path}: unknown key {name!r}", f"{nearest(name, known)} A knob belongs under [base]")
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    asked = _validated(path, values if seeds is None else {**values, "seeds": seeds})
    for name in asked.axes() & given.keys():
        raise UsageError(f"{option(name)}: {name} is an axis of this sweep", "leave it out, or change the file")
    rows = [_located(row, path.parent) for row in asked.rows]
    top = _located({"recipe": asked.recipe} if asked.recipe else {}, path.parent)
    changes = {**top, "base": {**asked.base, **given}, "rows": rows}
    return asked.model_copy(update=changes), path.parent.name if path.name == COPY else path.stem


def _validated(path: Path, values: dict[str, Any]) -> Asked:
    try:
        return Asked.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
        raise UsageError(f"{path}: {where} {message} (got {problem['input']!r})") from None


def _located(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`row` with a recipe file that lies beside the sweep file by its whole path."""
    source = row.get("recipe")
    beside = folder / str(source)
    return (
        {**row, "recipe": str(beside.absolute())} if source and source.endswith(".toml") and beside.is_file() else row
    )


def shipped() -> dict[str, Path]:
    """The sweeps that come with the package: name -> TOML file."""
    folder = Path(str(resources.files("fastcifar"))) / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def expand(asked: Asked, name: str) -> list[Trial]:
    """Every trial of a sweep called `name`, seed by seed, so that a sweep cut short has each row as often as another.

    Errors: `UsageError` for the first recipe that is none, with its label.
    """
    points = [
        *map(dict, itertools.product(*([(key, value) for value in values] for key, values in asked.grid.items())))
    ]
    drawn = list(_drawn(asked.random)) if asked.random else [{}]
    trials: dict[str, Trial] = {}
    labels = set()
    for row in asked.rows or [{}]:
        settings = {key: value for key, value in row.items() if key not in ("label", "recipe")}
        title = row.get("label") or ", ".join(filter(None, (Path(row.get("recipe", "")).stem, spelt(settings))))
        if title in labels:
            raise UsageError(f"two rows of [[list]] are called {title!r}", "give each a label of its own")
        labels.add(title)
        for point, draw in itertools.product(points, drawn):
            label = ", ".join(filter(None, (title, spelt({**point, **draw})))) or "base"
            for seed in asked.seeds:
                trial = made(asked, name, label, {**settings, **point, **draw}, seed, row.get("recipe"))
                trials[trial.key] = trial
    return sorted(trials.values(), key=lambda trial: asked.seeds.index(trial.recipe.seed))


def made(
    asked: Asked,
    name: str,
    label: str,
    settings: dict[str, Any],
    seed: int,
    source: str | None = None,
    ticket: Ticket | None = None,
) -> Trial:
    """One trial. `source`: the row's own recipe, instead of the sweep's. Errors: `UsageError` with the label."""
    source = source or asked.recipe
    for key in (*asked.base, *settings):
        if key in OF_THE_SWEEP:
            raise UsageError(f"{key} is no knob of a sweep", OF_THE_SWEEP[key])
    base = {**(read_toml(source) if source else {}), **asked.base}
    common = {**(read_toml(asked.recipe) if asked.recipe else {}), **asked.base}
    try:
        recipe = Recipe.checked({**base, **settings, "seed": seed, "out": None, "resume": None})
        against = Recipe.checked({**common, "seed": seed, "out": None, "resume": None}).model_dump(mode="json")
    except UsageError as error:
        raise UsageError(f"{label}: {error.problem}", error.remedy) from None
    plain = recipe.model_dump(mode="json")
    knobs = {key: value for key, value in plain.items() if value != against[key] or key in settings}
    return Trial(_key(label, recipe), label, knobs, Path(source).stem if source else name, recipe, ticket)


def _key(label: str, recipe: Recipe) -> str:
    """`relu-s0-1a2b3c4d`: label and seed to read, and a hash of the knobs of the experiment not at their defaults."""
    experiment = {name: value for name, value in recipe.differing().items() if name not in WHERE_KEPT}
    told = json.dumps([label, experiment], sort_keys=True)
    slug = re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:60]
    return f"{slug}-s{recipe.seed}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def spelt(settings: Mapping[str, Any]) -> str:
    """`lr=0.1, blocks=1,1`: settings as a label."""
    return ", ".join(f"{name}={_spell(value)}" for name, value in settings.items())


def _spell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_spell(item)}" for name, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _drawn(draws: Draws) -> Iterator[dict[str, Any]]:
    """The points of [random]: the i-th depends on the seed and i alone, so that more of them are the same and more."""
    for index in range(draws.n):
        # Raw words, not `random`: numpy promises the bit stream for ever, the methods built on it only per version.
        words = np.random.Philox(key=[draws.sampler_seed, index]).random_raw(len(draws.ranges))
        units = (int(word) / 2**64 for word in np.atleast_1d(words))
        yield {name: RANGES[kind](u, ends) for u, (name, (kind, ends)) in zip(units, draws.ranges.items(), strict=True)}


def _range(name: str, value: Any) -> tuple[str, list[Any]]:
    """`{log = [0.01, 1.0]}` as its kind and ends. Errors: `UsageError`."""
    if name not in Recipe.model_fields:
        raise UsageError(f"unknown recipe key {name!r}", nearest(name, Recipe.model_fields))
    if not isinstance(value, dict) or len(value) != 1:
        raise UsageError(
            f"the range of {name} is {value!r}", f"write {name}.KIND = [LOW, HIGH], KIND {', '.join(RANGES)}"
        )
    ((kind, ends),) = value.items()
    pick(RANGES, kind, "kind of range")
    numbers = (int,) if kind == "integer" else (int, float)
    if kind == "choice":
        right = isinstance(ends, list) and bool(ends)
    else:
        right = isinstance(ends, list) and len(ends) == 2 and all(type(end) in numbers for end in ends)
        right = right and ends[0] < ends[1] and (kind != "log" or ends[0] > 0)
    if not right:
        raise UsageError(f"{name}.{kind} = {ends!r} is no range", f"such as {name}.log = [0.01, 1.0]")
    return kind, ends
