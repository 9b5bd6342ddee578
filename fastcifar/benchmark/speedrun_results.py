"""The documents in the result folder of a speedrun, rewritten after each trial, and the table of its summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from rich.console import Group

from fastcifar.device import Environment, result_folder_name
from fastcifar.errors import DiskError, UsageError, disk_errors, first_message_line
from fastcifar.files import lock_folder, read_json_object, read_regular_file, write_atomically
from fastcifar.format import KeyValueTable, NumericTable, format_decimal, format_differences, format_percent, whole_line
from fastcifar.recipe import Recipe
from fastcifar.renamed import upgrade_options
from fastcifar.reporting.aggregate import MeanStd
from fastcifar.reporting.benchmark_tables import MACHINE_FIELDS

UNTIMED_PACKAGES = ("pydantic", "typer")  # packages that do not affect the timing


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    schema_version: Literal[1] = 1


class SpeedrunSettings(_Document):
    """What all trials of a result folder share."""

    target: str  # accuracy in percent
    recipe: str  # name of the recipe
    on: str  # split that the model is evaluated on, "test" or "val"
    config: Annotated[dict[str, Any], AfterValidator(upgrade_options)]  # options of the recipe without the seed


class RunCosts(BaseModel):
    """The costs of one run."""

    model_config = ConfigDict(frozen=True)

    params: int
    macs: int  # multiply-accumulates per image
    images: int  # training images, each counted once per epoch
    flops: int  # floating-point operations of the training


class SpeedrunRecipe(SpeedrunSettings):
    """The document recipe.json."""

    about: RunCosts


class SpeedrunEnvironment(Environment):
    """The document env.json."""

    chosen: dict[str, str | bool] = Field(default={})  # device, precision, loader and compilation of the runs
    started: str = ""

    def timing_items(self) -> dict[str, Any]:
        """Return the entries that affect timing: versions, chosen execution, device, processor and threads."""
        versions = {name: text for name, text in self.versions.items() if name not in UNTIMED_PACKAGES}
        machine = self.model_dump(include={*MACHINE_FIELDS, "cuda", "cudnn"}, exclude_unset=True)
        return {**versions, **self.chosen, **machine}


class SpeedrunTrial(_Document):
    """A line of trials.jsonl."""

    seed: int
    device: str | None = None
    precision: str | None = None
    loader: str | None = None
    compiled: bool | None = None
    winograd: bool | None = None
    flops: int | None = None  # floating-point operations of the training
    build_s: float  # seconds to build and compile the trainer, which are not part of the time of the run
    seconds: float  # time of the run: `prepare_s` plus `train_s`
    train_s: float
    prepare_s: float
    cold_start_s: float | None  # from the start of the process to the end of its first run; None for later runs
    acc: float
    acc_tta: float | None  # with test-time augmentation
    loss: float | None = None
    sha256: str = ""  # of the evaluated weights
    steps: int | None = None
    refused: str | None  # why the trial is invalid


class SampleStatistics(BaseModel, frozen=True):
    """Statistics of `trials`; `std` (of the sample), `stderr` and `ci95` (of the mean) need at least three of them."""

    mean: float
    std: float | None
    stderr: float | None
    ci95: tuple[float, float] | None = None  # confidence interval by Student's t distribution
    trials: list[float]

    @classmethod
    def from_values(cls, values: Sequence[float | None], **others: float) -> Self | None:
        """Return the statistics of `values`, or None if there are no values or one of them is None."""
        if (stats := MeanStd.from_values(values)) is None:
            return None
        document = {"mean": stats.mean, "std": stats.std, "stderr": stats.standard_error, "ci95": stats.ci95}
        return cls.model_validate({**document, "trials": values, **others})


class AccuracyStatistics(SampleStatistics, frozen=True):
    """`share` is the fraction of all trials, including invalid ones, that reach the target."""

    share: float


class SpeedrunSummary(_Document, RunCosts):
    """The document summary.json: statistics over the valid trials of a result folder."""

    folder: str = ""  # not part of the file
    target: float  # accuracy in [0, 1]
    recipe: str
    on: str
    arch: str
    epochs: int
    tta: str
    eval_weights: str
    n: int
    refused: int  # number of invalid trials
    seeds: list[int]
    acc: AccuracyStatistics | None
    acc_tta: AccuracyStatistics | None
    seconds: SampleStatistics | None
    train_s: SampleStatistics | None
    prepare_s: SampleStatistics | None
    build_s: SampleStatistics | None
    cold_start_s: list[float]
    reached: bool  # whether all trials are valid and the mean accuracy, with TTA if it is used, is at least `target`
    flops_to_target: int | None  # operations of a run, if the target is reached


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
            recipe = SpeedrunRecipe.model_validate_json(read_regular_file(folder / "recipe.json"))
            environment = SpeedrunEnvironment.model_validate(read_json_object(folder / "env.json"))
            lines = read_regular_file(folder / "trials.jsonl").splitlines(keepends=True)
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
        """Lock the folder `append`, or create a new folder: `out` or speedruns/<UTC>_<device>_<recipe>."""
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
                costs = [
                    f"{about.flops:,} operations on {about.images:,} images"
                    for about in (results.recipe.about, recipe.about)
                ]
                problem = f"{folder} has runs of {', not of '.join(costs)}"
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
        defaults = Recipe().model_dump(mode="json")  # for options that are newer than the folder
        saved, current = (
            {**defaults, **document.model_dump(include={"target", "recipe", "on"}), **document.config}
            for document in (self.recipe, settings)
        )
        for cause, before, after in (
            ("has another recipe", saved, current),
            ("was timed in another environment", self.environment.timing_items(), environment.timing_items()),
        ):
            differing = [name for name in after if name in before and before[name] != after[name]]
            if differing:
                differences = format_differences(before, after, differing)
                raise UsageError(f"{self.folder} {cause}: {differences}", "use --out to start a new folder")
        repeated = {trial.seed for trial in self.trials} & set(seeds)
        if repeated:
            problem = f"{self.folder} already has a trial with seed {min(repeated)}"
            raise UsageError(problem, f"start at --seed {self.next_seed}")

    def add_trial(self, trial: SpeedrunTrial) -> None:
        """Add a trial and write it to disk, together with the summary. Raises `DiskError` if that fails."""
        self.trials.append(trial)
        self._write_trials()
        self._write("summary.json", self.summary().model_dump_json(exclude={"folder"}, indent=1))

    def add_matmul_rates(self, rates: dict[str, float]) -> None:
        """Add the measured rates of matrix products to env.json."""
        self.environment = self.environment.model_copy(update={"matmul_tflop_per_s": rates})
        self._write("env.json", self.environment.model_dump_json(indent=1))

    def summary(self) -> SpeedrunSummary:
        """Return the statistics over all trials."""
        recipe, target = self.recipe, float(self.recipe.target) / 100
        valid = [trial for trial in self.trials if not trial.refused]
        acc, acc_tta = (
            AccuracyStatistics.from_values(
                values, share=sum(value is not None and value >= target for value in values) / len(self.trials)
            )
            for values in ([trial.acc for trial in valid], [trial.acc_tta for trial in valid])
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
            seconds=SampleStatistics.from_values([trial.seconds for trial in valid]),
            train_s=SampleStatistics.from_values([trial.train_s for trial in valid]),
            prepare_s=SampleStatistics.from_values([trial.prepare_s for trial in valid]),
            build_s=SampleStatistics.from_values([trial.build_s for trial in valid]),
            cold_start_s=[trial.cold_start_s for trial in self.trials if trial.cold_start_s is not None],
            reached=reached,
            flops_to_target=recipe.about.flops if reached else None,
        )

    def _write_trials(self) -> None:
        self._write("trials.jsonl", "\n".join(trial.model_dump_json() for trial in self.trials))

    def _write(self, name: str, content: str) -> None:
        with disk_errors(f"write to {self.folder}", "free some space"):
            write_atomically(self.folder / name, f"{content}\n".encode() if content else b"")


def speedrun_table(summary: SpeedrunSummary) -> Group:
    """Return a table of the statistics, and the accuracy and the time of each run."""
    table = NumericTable([""], ("mean", "std", "std. error", "95 % interval", f"over {100 * summary.target:g} %"))
    rows = (
        ("accuracy, %", summary.acc, 100),
        (f"with {summary.tta}, %", summary.acc_tta, 100),
        ("seconds", summary.seconds, 1),
        ("  training", summary.train_s, 1),
        ("  preparation", summary.prepare_s, 1),
        ("build, not timed", summary.build_s, 1),
    )
    trials = {}
    for heading, statistics, scale in rows:
        if statistics:
            values = (statistics.mean, statistics.std, statistics.stderr)
            share = format_percent(statistics.share, 0) if isinstance(statistics, AccuracyStatistics) else ""
            interval = "-".join(format_decimal(limit, 2, scale) for limit in statistics.ci95 or (None,))
            table.add_row(heading, *(format_decimal(value, 2, scale) for value in values), interval, share)
            trials[heading] = ", ".join(format_decimal(value, 2, scale) for value in statistics.trials)
    split = "test set" if summary.on == "test" else "validation split"
    cold_starts = "".join(
        f", {seconds:.1f} s from the start of a process to the end of its first run" for seconds in summary.cold_start_s
    )
    lines = [
        f"{summary.recipe} on the {split}, runs: {summary.n}, epochs: {summary.epochs}, "
        f"{summary.flops / 1e15:.3f} PFLOP per run{cold_starts}",
        *([f"{summary.refused} invalid runs are not in the means; see trials.jsonl"] if summary.refused else []),
    ]
    each_run = ["", KeyValueTable(trials, "values of each run")] if summary.n > 1 else []
    return Group(*lines, "", table, *each_run, "", whole_line(f"results: {summary.folder}"))
