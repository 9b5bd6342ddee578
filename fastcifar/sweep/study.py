"""An Optuna study as a sweep: it chooses the points, one after the other, and its pruner ends the hopeless ones.

Optuna's journal in the sweep's folder is all of its state; points, pruning and their mathematics are Optuna's. What is
maximised is the accuracy on the validation split after each epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fastcifar.device import import_optional
from fastcifar.errors import UsageError, UserError, lookup
from fastcifar.sweep.sweep_spec import SweepSpec, SweepTrial, TrialRef, build_trial, round_to_4_digits, settings_label
from fastcifar.training.run_dir import EpochCallback, EpochRow

JOURNAL_FILE = "study.log"
OPTUNA_REMEDY = "pip install 'fastcifar[sweep]'"

# name -> Optuna's pruner; `median:5` compares with the median once 5 trials are complete, `asha:4` keeps one of 4
PRUNERS: dict[str, Callable[[ModuleType, int | None], Any]] = {
    "median": lambda optuna, number: optuna.pruners.MedianPruner(n_startup_trials=5 if number is None else number),
    "asha": lambda optuna, number: optuna.pruners.SuccessiveHalvingPruner(reduction_factor=number or 4),
    "none": lambda optuna, number: optuna.pruners.NopPruner(),
}

# kind of range (see trials.RANGES) -> Optuna's distribution
DISTRIBUTIONS: dict[str, Callable[[ModuleType, list[Any]], Any]] = {
    "uniform": lambda optuna, ends: optuna.distributions.FloatDistribution(*ends),
    "log": lambda optuna, ends: optuna.distributions.FloatDistribution(*ends, log=True),
    "integer": lambda optuna, ends: optuna.distributions.IntDistribution(*ends),
    "choice": lambda optuna, choices: optuna.distributions.CategoricalDistribution(choices),
}


class OptunaStudy:
    """The study that `asked` means, in `folder`; another question there is another study in the same journal.

    Errors: `UsageError` for what a study cannot have, and without Optuna.
    """

    def __init__(self, spec: SweepSpec, name: str, folder: Path) -> None:
        assert spec.study is not None
        self.spec, self.name, self.study_spec = spec, name, spec.study
        self.optuna = import_optuna()
        if spec.grid or spec.rows or spec.random:
            raise UsageError("a [study] chooses all points itself", "leave [grid], [[list]] and [random] out")
        if len(spec.seeds) > 1:
            raise UsageError("a [study] takes one seed", "run its best points again, as a [[list]] with seeds")
        if any(trial.recipe.val_size == 0 for trial in self.boundary_trials()):
            raise UsageError("a [study] ranks by the validation split", "set val_size")
        build_pruner(self.optuna, self.study_spec.pruner)
        told = spec.model_copy(update={"study": self.study_spec.model_copy(update={"n": 1})}).to_toml()
        self.journal_path = str(
            (folder / JOURNAL_FILE).absolute()
        )  # the journal's lock is a link, which must not be relative
        self.study_name = hashlib.sha256(told.encode()).hexdigest()[:8]

    def boundary_trials(self) -> list[SweepTrial]:
        """Trials at the ends of the ranges, all of their lowest and all of their highest, and at each choice.

        Errors: `UsageError` for a value that its knob cannot have.
        """
        ranges = self.study_spec.ranges
        ends = [{name: values[at] for name, (_, values) in ranges.items()} for at in (0, -1)]
        choices = [{name: value} for name, (kind, values) in ranges.items() if kind == "choice" for value in values]
        return [
            build_trial(self.spec, self.name, settings_label(point), point, self.spec.seeds[0])
            for point in (*ends, *choices)
        ]

    def open_study(self) -> None:
        """Makes the journal, or goes on with the one that is there."""
        sampler = self.optuna.samplers.TPESampler(seed=self.study_spec.sampler_seed)
        self.optuna_study = self.optuna.create_study(
            study_name=self.study_name,
            storage=journal_storage(self.optuna, self.journal_path),
            direction="maximize",
            sampler=sampler,
            pruner=build_pruner(self.optuna, self.study_spec.pruner),
            load_if_exists=True,
        )

    def existing_trials(self) -> list[SweepTrial]:
        """The trials that were chosen so far, whatever came of them."""
        return [self._to_sweep_trial(known.number, known.params) for known in self._sampled_trials()]

    def remaining_trials(self) -> Iterator[SweepTrial]:
        """Those that a killed sweep left unfinished, then new ones, each chosen when asked for, up to n in all."""
        known = self._sampled_trials()
        for left in known:
            if left.state == self.optuna.trial.TrialState.RUNNING:
                yield self._to_sweep_trial(left.number, left.params)
        ranges = self.study_spec.ranges.items()
        distributions = {name: DISTRIBUTIONS[kind](self.optuna, ends) for name, (kind, ends) in ranges}
        for _ in range(len(known), self.study_spec.n):
            # seeded anew for each, so that a study that was killed chooses as if it never was
            seed = self.study_spec.sampler_seed + len(self.optuna_study.trials)
            self.optuna_study.sampler = self.optuna.samplers.TPESampler(seed=seed % 2**32)
            chosen = self.optuna_study.ask(distributions)
            yield self._to_sweep_trial(chosen.number, chosen.params)

    def _sampled_trials(self) -> list[Any]:
        """Optuna's trials, without those of which a killed sweep had not yet chosen every knob."""
        known = []
        for trial in self.optuna_study.trials:
            if trial.params.keys() == self.study_spec.ranges.keys():
                known.append(trial)
            else:
                self.optuna_study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
        return known

    def _to_sweep_trial(self, number: int, params: dict[str, Any]) -> SweepTrial:
        settings = {
            name: round_to_4_digits(value) if isinstance(value, float) else value for name, value in params.items()
        }
        ticket = TrialRef(self.journal_path, self.study_name, number, self.study_spec.pruner)
        try:
            label = f"{number}: {settings_label({name: settings[name] for name in self.study_spec.ranges})}"
            return build_trial(self.spec, self.name, label, settings, self.spec.seeds[0], trial_ref=ticket)
        except UserError:
            self.optuna_study.tell(number, state=self.optuna.trial.TrialState.FAIL)
            raise

    def tell(self, trial: SweepTrial, state: str, summary: dict[str, Any] | None) -> None:
        """What came of a trial; nothing while it runs."""
        if state == "running":
            return
        assert trial.trial_ref is not None
        states = self.optuna.trial.TrialState
        ended = {"done": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[state]
        value = summary["val_acc"] if summary and state == "done" else None
        self.optuna_study.tell(trial.trial_ref.trial_number, value, state=ended, skip_if_finished=True)


def optuna_epoch_callback(trial_ref: TrialRef, epochs: int) -> EpochCallback:
    """A sink that reports each epoch's validation accuracy and answers "pruned" where the pruner says so.

    It is never asked about the last of `epochs`: that trial is complete.
    """
    optuna = import_optuna()
    study = optuna.load_study(
        study_name=trial_ref.study_name,
        storage=journal_storage(optuna, trial_ref.journal_path),
        pruner=build_pruner(optuna, trial_ref.pruner),
    )
    known = study.trials[trial_ref.trial_number]
    trial = optuna.trial.Trial(study, known._trial_id)  # Optuna has no public way to a trial of another process

    def report(row: EpochRow) -> str | None:
        if row["epoch"] not in known.intermediate_values:  # a resumed run may come by an epoch twice
            trial.report(row["val_acc"], row["epoch"])
        return "pruned" if row["epoch"] + 1 < epochs and trial.should_prune() else None

    return report


def import_optuna() -> Any:
    """Optuna, without its running commentary. Errors: `UsageError` with the install line."""
    optuna = import_optional("optuna", OPTUNA_REMEDY)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def journal_storage(optuna: Any, file: str) -> Any:
    """Optuna's storage in `file`, which processes and machines that share it may write at the same time."""
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file))


def build_pruner(optuna: Any, spec: str) -> Any:
    """`median`, `asha:3`, ... as Optuna's. Errors: `UsageError`."""
    name, colon, number = spec.partition(":")
    make = lookup(PRUNERS, name, "pruner")
    if colon and not (number.isascii() and number.isdigit() and int(number) > (name == "asha")):
        raise UsageError(f"pruner {spec!r}: {number!r} is no number of trials", f"such as {name}:4")
    return make(optuna, int(number) if colon else None)
