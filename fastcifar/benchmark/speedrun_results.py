"""The result folder of a speedrun: `recipe.json`, `env.json`, `trials.jsonl` and `summary.json`; and its table.

Each trial is written to disk as soon as it ends, and the summary is recomputed from all trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from rich.console import Group
from rich.table import Table

from fastcifar.device import Environment, result_folder_name
from fastcifar.errors import DiskError, UsageError, first_message_line
from fastcifar.files import lock_folder, read_json_object, write_atomically
from fastcifar.format import format_decimal, format_differences, format_percent
from fastcifar.recipe import Recipe
from fastcifar.renamed import upgrade_options
from fastcifar.reporting.aggregate import MeanStd

UNTIMED_PACKAGES = ("pydantic", "typer")  # packages that do not affect the timing


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    schema_version: Literal[1] = 1


class SpeedrunSettings(_Document):
    """What all trials of a result folder share.

    Args:
        target: target accuracy in percent.
        recipe: name of the recipe.
        on: split that the model is evaluated on, "test" or "val".
        config: the options of the recipe without the seed.
    """

    target: str
    recipe: str
    on: str
    config: Annotated[dict[str, Any], AfterValidator(upgrade_options)]


class RunCosts(BaseModel):
    """Parameters and multiply-accumulates per image of the network, training images and operations of one run."""

    model_config = ConfigDict(frozen=True)

    params: int
    macs: int
    images: int
    flops: int


class SpeedrunRecipe(SpeedrunSettings):
    """The document recipe.json."""

    about: RunCosts


class SpeedrunEnvironment(Environment):
    """The document env.json; `chosen` holds device, precision, loader and compilation of the runs."""

    chosen: dict[str, str | bool] = Field(default={})
    started: str = ""

    def timing_items(self) -> dict[str, Any]:
        """Return the entries that affect timing: versions, chosen execution, device and threads."""
        items = self.model_dump(exclude_unset=True)
        versions = {name: text for name, text in self.versions.items() if name not in UNTIMED_PACKAGES}
        machine = {name: items[name] for name in ("device", "threads", "cuda", "cudnn") if name in items}
        return {**versions, **self.chosen, **machine}


class SpeedrunTrial(_Document):
    """A line of trials.jsonl.

    Args:
        flops: floating-point operations of the training.
        build_s: seconds to build and compile the trainer, which are not part of the time of the run.
        seconds: the time of the run: the sum of `prepare_s` and `train_s`.
        cold_start_s: for the first run of a process, seconds from the start of the process to the end of training.
        acc: accuracy; `acc_tta` with test-time augmentation.
        sha256: digest of the evaluated weights.
        refused: why the trial is invalid, or None.
    """

    seed: int
    device: str | None = None
    precision: str | None = None
    loader: str | None = None
    compiled: bool | None = None
    flops: int | None = None
    build_s: float
    seconds: float
    train_s: float
    prepare_s: float
    cold_start_s: float | None
    acc: float
    acc_tta: float | None
    loss: float | None = None
    sha256: str = ""
    steps: int | None = None
    refused: str | None


class SampleStatistics(BaseModel):
    """Mean, sample standard deviation and standard error of the mean of `trials`; the latter two need two values."""

    model_config = ConfigDict(frozen=True)

    mean: float
    std: float | None
    stderr: float | None
    trials: list[float]


class AccuracyStatistics(SampleStatistics):
    """`share` is the fraction of all trials, including invalid ones, that reach the target."""

    share: float


class SpeedrunSummary(_Document, RunCosts):
    """The document summary.json: statistics over the trials of a result folder.

    Args:
        folder: the result folder; not part of the file.
        target: target accuracy in [0, 1].
        refused: number of invalid trials, which are not in the statistics.
        reached: whether all trials are valid and their mean accuracy, with test-time augmentation if it is used, is at
            least `target`.
        flops_to_target: floating-point operations of a run, if the target is reached.
    """

    folder: str = ""
    target: float
    recipe: str
    on: str
    arch: str
    epochs: int
    tta: str
    eval_weights: str
    n: int
    refused: int
    seeds: list[int]
    acc: AccuracyStatistics | None
    acc_tta: AccuracyStatistics | None
    seconds: SampleStatistics | None
    train_s: SampleStatistics | None
    prepare_s: SampleStatistics | None
    build_s: SampleStatistics | None
    cold_start_s: list[float]
    reached: bool
    flops_to_target: int | None


@dataclass
class SpeedrunResults:
    """A result folder and its trials, oldest first."""

    folder: Path
    recipe: SpeedrunRecipe
    environment: SpeedrunEnvironment
    trials: list[SpeedrunTrial] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> SpeedrunResults:
        """Read a result folder; ignore an incomplete last line. Raises `UsageError` if it is not a result folder."""
        try:
            recipe = SpeedrunRecipe.model_validate_json((folder / "recipe.json").read_bytes())
            environment = SpeedrunEnvironment.model_validate(read_json_object(folder / "env.json"))
            lines = (folder / "trials.jsonl").read_bytes().splitlines(keepends=True)
            trials = [SpeedrunTrial.model_validate_json(line) for line in lines if line.endswith(b"\n")]
        except (OSError, ValidationError) as error:
            problem = f"{folder} is not a result folder of a speedrun: {first_message_line(error)}"
            raise UsageError(problem, "choose another folder") from None
        return cls(folder, recipe, environment, trials)

    @classmethod
    @contextmanager
    def open(
        cls,
        append: Path | None,
        out: str | None,
        recipe: SpeedrunRecipe,
        environment: SpeedrunEnvironment,
        seeds: Sequence[int],
    ) -> Iterator[SpeedrunResults]:
        """Lock the folder `append`, or create a new folder: `out` or speedruns/<UTC>_<device>_<recipe>.

        Raises `UsageError` if the new folder exists or `require_compatible` fails, and `DiskError` if it cannot be
        created.
        """
        default = Path("speedruns") / result_folder_name(environment.device, recipe.recipe)
        folder = append or Path(out or default)
        try:
            if not append:
                folder.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(f"{folder} already exists", f"use --append {folder} to add trials to it") from None
        except OSError as error:
            raise DiskError(f"cannot create {folder}: {error.strerror}", "choose another --out DIR") from None
        with lock_folder(folder):
            results = cls.read(folder) if append else cls(folder, recipe, environment)
            # checked again under the lock, because another process may have added trials
            results.require_compatible(recipe, environment, seeds)
            if results.recipe.about != recipe.about:
                problem = f"{folder} has runs of {results.recipe.about}, not {recipe.about}"
                raise UsageError(problem, "use the same --data")
            results._write("recipe.json", recipe.model_dump_json(indent=1))
            if not (folder / "env.json").exists():
                results._write("env.json", environment.model_dump_json(indent=1))
            results._write_trials()
            yield results

    @property
    def next_seed(self) -> int:
        """The seed after the largest one in the folder."""
        return max((trial.seed for trial in self.trials), default=-1) + 1

    def require_compatible(
        self, settings: SpeedrunSettings, environment: SpeedrunEnvironment, seeds: Sequence[int]
    ) -> None:
        """Raise `UsageError` if the recipe or the environment differs, or a seed is already in the folder."""
        remedy = "use --out to start a new folder"
        defaults = Recipe().model_dump(mode="json")  # for options that are newer than the folder
        names = {"target", "recipe", "on"}
        saved, current = (
            {**defaults, **document.model_dump(include=names), **document.config}
            for document in (self.recipe, settings)
        )
        differing = [name for name in current if current[name] != saved[name]]
        if differing:
            differences = format_differences(saved, current, differing)
            raise UsageError(f"{self.folder} has another recipe: {differences}", remedy)
        saved, current = self.environment.timing_items(), environment.timing_items()
        differing = [name for name in saved if name in current and saved[name] != current[name]]
        if differing:
            differences = format_differences(saved, current, differing)
            raise UsageError(f"{self.folder} was timed in another environment: {differences}", remedy)
        repeated = {trial.seed for trial in self.trials} & set(seeds)
        if repeated:
            problem = f"{self.folder} already has a trial with seed {min(repeated)}"
            raise UsageError(problem, f"start at --seed {self.next_seed}")

    def add_trial(self, trial: SpeedrunTrial) -> None:
        """Add a trial and write it to disk, together with the summary.

        Raises `DiskError` if the files cannot be written.
        """
        self.trials.append(trial)
        self._write_trials()
        self._write("summary.json", self.summary().model_dump_json(exclude={"folder"}, indent=1))

    def summary(self) -> SpeedrunSummary:
        """Return the statistics over all trials."""
        recipe, target = self.recipe, float(self.recipe.target) / 100
        valid = [trial for trial in self.trials if not trial.refused]
        acc, acc_tta = (
            _accuracy_statistics([getattr(trial, name) for trial in valid], target, len(self.trials))
            for name in ("acc", "acc_tta")
        )
        best = acc_tta or acc
        reached = best is not None and best.mean >= target and len(valid) == len(self.trials)
        return SpeedrunSummary(
            folder=str(self.folder),
            target=target,
            recipe=recipe.recipe,
            on=recipe.on,
            **{name: recipe.config[name] for name in ("arch", "epochs", "tta", "eval_weights")},
            **recipe.about.model_dump(),
            n=len(self.trials),
            refused=len(self.trials) - len(valid),
            seeds=[trial.seed for trial in self.trials],
            acc=acc,
            acc_tta=acc_tta,
            seconds=sample_statistics([trial.seconds for trial in valid]),
            train_s=sample_statistics([trial.train_s for trial in valid]),
            prepare_s=sample_statistics([trial.prepare_s for trial in valid]),
            build_s=sample_statistics([trial.build_s for trial in valid]),
            cold_start_s=[trial.cold_start_s for trial in self.trials if trial.cold_start_s is not None],
            reached=reached,
            flops_to_target=recipe.about.flops if reached else None,
        )

    def _write_trials(self) -> None:
        self._write("trials.jsonl", "\n".join(trial.model_dump_json() for trial in self.trials))

    def _write(self, name: str, content: str) -> None:
        try:
            write_atomically(self.folder / name, f"{content}\n".encode() if content else b"")
        except OSError as error:
            raise DiskError(f"cannot write to {self.folder}: {error.strerror}", "free some space") from None


def sample_statistics(values: Sequence[float | None]) -> SampleStatistics | None:
    """Return the statistics of `values`, or None if there are no values or one of them is None."""
    mean_std = MeanStd.from_values(values)
    if mean_std is None:
        return None
    trials = [value for value in values if value is not None]
    return SampleStatistics(mean=mean_std.mean, std=mean_std.std, stderr=mean_std.standard_error, trials=trials)


def _accuracy_statistics(values: Sequence[float | None], target: float, num_trials: int) -> AccuracyStatistics | None:
    statistics = sample_statistics(values)
    if statistics is None:
        return None
    share = sum(value >= target for value in statistics.trials) / num_trials
    return AccuracyStatistics(**dict(statistics), share=share)


def speedrun_table(summary: SpeedrunSummary) -> Group:
    """Return a table of the mean, standard deviation, standard error, share above the target, and value of each run."""
    table = Table("", box=None, title_justify="left")
    for heading in ("mean", "std", "std. error", f"over {100 * summary.target:g} %", "each seed"):
        table.add_column(heading, justify="right")
    rows = (
        ("accuracy, %", summary.acc, 100),
        (f"with {summary.tta}, %", summary.acc_tta, 100),
        ("seconds", summary.seconds, 1),
        ("  training", summary.train_s, 1),
        ("  preparation", summary.prepare_s, 1),
        ("build, not timed", summary.build_s, 1),
    )
    for heading, statistics, scale in rows:
        if statistics:
            values = (statistics.mean, statistics.std, statistics.stderr, *statistics.trials)
            mean, std, stderr, *trials = (format_decimal(value, 2, scale) for value in values)
            share = format_percent(statistics.share, 0) if isinstance(statistics, AccuracyStatistics) else ""
            table.add_row(heading, mean, std, stderr, share, ", ".join(trials))
    split = "test set" if summary.on == "test" else "validation split"
    cold_starts = "".join(
        f", {seconds:.1f} s from the start of a process to the end of its first run" for seconds in summary.cold_start_s
    )
    lines = [
        f"{summary.recipe} on the {split}: {summary.n} runs of {summary.epochs} epochs, "
        f"{summary.flops / 1e15:.3f} PFLOP each{cold_starts}",
        *([f"{summary.refused} invalid runs are not in the means; see trials.jsonl"] if summary.refused else []),
    ]
    return Group(*lines, table, f"results: {summary.folder}")
