"""A sweep whose points are sampled by Optuna, one after the other, and whose unpromising trials are pruned.

The objective, which is maximized, is the accuracy on the validation split after each epoch.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from fastcifar.device import import_optional
from fastcifar.errors import UsageError, UserError, lookup
from fastcifar.sweep.sweep_spec import SweepSpec, SweepTrial, TrialRef, build_trial, round_in_range, settings_label
from fastcifar.training.metrics_file import EpochRow
from fastcifar.training.run_dir import EpochCallback
from fastcifar.training.summary import RunSummary

JOURNAL_FILE = "study.log"

# name -> pruner; `median:5` starts to prune after 5 completed trials, `asha:4` keeps one of 4 trials at each stage
PRUNERS: dict[str, Callable[[ModuleType, int | None], Any]] = {
    "median": lambda optuna, number: optuna.pruners.MedianPruner(n_startup_trials=5 if number is None else number),
    "asha": lambda optuna, number: optuna.pruners.SuccessiveHalvingPruner(reduction_factor=number or 4),
    "none": lambda optuna, number: optuna.pruners.NopPruner(),
}

# kind of range (a key of `RANGE_SAMPLERS`) -> Optuna distribution
DISTRIBUTIONS: dict[str, Callable[[ModuleType, list[Any]], Any]] = {
    "uniform": lambda optuna, ends: optuna.distributions.FloatDistribution(*ends),
    "log": lambda optuna, ends: optuna.distributions.FloatDistribution(*ends, log=True),
    "integer": lambda optuna, ends: optuna.distributions.IntDistribution(*ends),
    "choice": lambda optuna, choices: optuna.distributions.CategoricalDistribution(choices),
}


class OptunaStudy:
    """The Optuna study of a sweep, in a journal in the sweep folder.

    Its name is a hash of the sweep file without n. Increasing n therefore continues the study, and any other change
    starts a new study in the same journal. Raises `UsageError` if a study does not support the sweep file.
    """

    def __init__(self, spec: SweepSpec, name: str, folder: Path) -> None:
        assert spec.study is not None
        self.spec, self.name, self.study_spec = spec, name, spec.study
        self.optuna = import_optuna()
        if spec.grid or spec.rows or spec.random:
            raise UsageError("a [study] samples all points itself", "remove [grid], [[list]] and [random]")
        if len(spec.seeds) > 1:
            remedy = "rerun its best points as a [[list]] with several seeds"
            raise UsageError("a [study] supports only one seed", remedy)
        if any(trial.recipe.val_size == 0 for trial in self.boundary_trials()):
            raise UsageError("a [study] needs a validation split to rank its trials", "set val_size")
        build_pruner(self.optuna, self.study_spec.pruner)
        # absolute, because Optuna locks the journal with a symbolic link to this path
        self.journal_path = str((folder / JOURNAL_FILE).absolute())
        spec_without_n = spec.model_copy(update={"study": self.study_spec.model_copy(update={"n": 1})}).to_toml()
        self.study_name = hashlib.sha256(spec_without_n.encode()).hexdigest()[:8]

    def boundary_trials(self) -> list[SweepTrial]:
        """Return trials at both ends of all ranges and at each choice, to check the recipes."""
        ranges = self.study_spec.ranges
        ends = [{name: values[index] for name, (_, values) in ranges.items()} for index in (0, -1)]
        choices = [{name: value} for name, (kind, values) in ranges.items() if kind == "choice" for value in values]
        return [self._build_trial(settings_label(point), point) for point in (*ends, *choices)]

    def _build_trial(self, label: str, settings: dict[str, Any], trial_ref: TrialRef | None = None) -> SweepTrial:
        return build_trial(self.spec, self.name, label, settings, self.spec.seeds[0], trial_ref=trial_ref)

    @cached_property
    def optuna_study(self) -> Any:
        """The study, which is loaded if the journal exists."""
        storage = journal_storage(self.optuna, self.journal_path)
        return self.optuna.create_study(
            study_name=self.study_name, storage=storage, direction="maximize", load_if_exists=True
        )

    def existing_trials(self) -> list[SweepTrial]:
        """Return the trials that earlier processes have sampled."""
        trials = (self._to_sweep_trial(trial.number, trial.params) for trial in self._sampled_trials())
        return [trial for trial in trials if trial]

    def remaining_trials(self) -> Iterator[SweepTrial]:
        """Yield the unfinished trials of an earlier process, then sample and yield new trials, up to n in total."""
        sampled = self._sampled_trials()
        for trial in sampled:
            if trial.state == self.optuna.trial.TrialState.RUNNING and (
                unfinished := self._to_sweep_trial(trial.number, trial.params)
            ):
                yield unfinished
        ranges = self.study_spec.ranges.items()
        distributions = {name: DISTRIBUTIONS[kind](self.optuna, ends) for name, (kind, ends) in ranges}
        for _ in range(len(sampled), self.study_spec.n):
            # a new sampler for each trial, so that a resumed study samples the same points as an uninterrupted one
            seed = self.study_spec.sampler_seed + len(self.optuna_study.trials)
            self.optuna_study.sampler = self.optuna.samplers.TPESampler(seed=seed % 2**32)
            trial = self.optuna_study.ask(distributions)
            if new := self._to_sweep_trial(trial.number, trial.params):
                yield new

    def _sampled_trials(self) -> list[Any]:
        """Return Optuna's trials; those whose sampling was interrupted are left out and marked as failed."""
        sampled = []
        for trial in self.optuna_study.trials:
            if trial.params.keys() == self.study_spec.ranges.keys():
                sampled.append(trial)
            else:
                self.optuna_study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
        return sampled

    def _to_sweep_trial(self, number: int, params: dict[str, Any]) -> SweepTrial | None:
        """Return the trial, or None, with a warning, if its values, valid by themselves, do not fit together."""
        settings = {
            name: round_in_range(params[name], ends) if kind in ("uniform", "log") else params[name]
            for name, (kind, ends) in self.study_spec.ranges.items()
        }
        trial_ref = TrialRef(self.journal_path, self.study_name, number, self.study_spec.pruner)
        label = f"{number}: {settings_label(settings)}"
        try:
            return self._build_trial(label, settings, trial_ref)
        except UserError as error:
            self.optuna_study.tell(number, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
            warnings.warn(f"trial {label} is not run: {error}", UserWarning, stacklevel=2)
            return None

    def tell(self, trial: SweepTrial, state: str, summary: RunSummary | None) -> None:
        """Report the final state of a trial to Optuna; ignore running trials."""
        if state == "running":
            return
        assert trial.trial_ref is not None
        states = self.optuna.trial.TrialState
        optuna_state = {"done": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[state]
        value = summary.val_acc if summary and state == "done" else None
        self.optuna_study.tell(trial.trial_ref.trial_number, value, state=optuna_state, skip_if_finished=True)


def optuna_epoch_callback(trial_ref: TrialRef, epochs: int) -> EpochCallback:
    """Return a callback that reports the validation accuracy of each epoch and may prune the trial before the last."""
    optuna = import_optuna()
    study = optuna.load_study(
        study_name=trial_ref.study_name,
        storage=journal_storage(optuna, trial_ref.journal_path),
        pruner=build_pruner(optuna, trial_ref.pruner),
    )
    frozen_trial = study.trials[trial_ref.trial_number]
    trial = optuna.trial.Trial(study, frozen_trial._trial_id)  # no public API opens a trial of another process

    def report(row: EpochRow) -> str | None:
        if row["epoch"] not in frozen_trial.intermediate_values:  # a resumed run may repeat an epoch
            trial.report(row["val_acc"], row["epoch"])
        return "pruned" if row["epoch"] + 1 < epochs and trial.should_prune() else None

    return report


def import_optuna() -> Any:
    """Import Optuna and silence its progress messages. Raises `UsageError` if it is not installed."""
    optuna = import_optional("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def journal_storage(optuna: Any, file: str) -> Any:
    """Return the storage in the journal `file`, to which several processes and machines can write."""
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file))


def build_pruner(optuna: Any, spec: str) -> Any:
    """Build a pruner from text such as `median` or `asha:3`. Raises `UsageError` if the text is invalid."""
    name, colon, number = spec.partition(":")
    build = lookup(PRUNERS, name, "pruner")
    if colon and name == "none":
        raise UsageError(f"pruner {spec!r}: none takes no number", "use none")
    if colon and not (number.isascii() and number.isdigit() and int(number) > (name == "asha")):
        raise UsageError(f"pruner {spec!r}: {number!r} is not a valid number of trials", f"use for example {name}:4")
    return build(optuna, int(number) if colon else None)
