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

from fastcifar.device import optional
from fastcifar.errors import UsageError, UserError, pick
from fastcifar.sweep.sweep_spec import Asked, Ticket, Trial, made, rounded, spelt
from fastcifar.training.run_dir import Row, Sink

JOURNAL = "study.log"
REMEDY = "pip install 'fastcifar[sweep]'"

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


class Study:
    """The study that `asked` means, in `folder`; another question there is another study in the same journal.

    Errors: `UsageError` for what a study cannot have, and without Optuna.
    """

    def __init__(self, asked: Asked, name: str, folder: Path) -> None:
        assert asked.study is not None
        self.asked, self.name, self.draws = asked, name, asked.study
        self.optuna = library()
        if asked.grid or asked.rows or asked.random:
            raise UsageError("a [study] chooses all points itself", "leave [grid], [[list]] and [random] out")
        if len(asked.seeds) > 1:
            raise UsageError("a [study] takes one seed", "run its best points again, as a [[list]] with seeds")
        if any(trial.recipe.val_size == 0 for trial in self.corners()):
            raise UsageError("a [study] ranks by the validation split", "set val_size")
        pruner(self.optuna, self.draws.pruner)
        told = asked.model_copy(update={"study": self.draws.model_copy(update={"n": 1})}).to_toml()
        self.file = str((folder / JOURNAL).absolute())  # the journal's lock is a link, which must not be relative
        self.called = hashlib.sha256(told.encode()).hexdigest()[:8]

    def corners(self) -> list[Trial]:
        """Trials at the ends of the ranges, all of their lowest and all of their highest, and at each choice.

        Errors: `UsageError` for a value that its knob cannot have.
        """
        ranges = self.draws.ranges
        ends = [{name: values[at] for name, (_, values) in ranges.items()} for at in (0, -1)]
        choices = [{name: value} for name, (kind, values) in ranges.items() if kind == "choice" for value in values]
        return [made(self.asked, self.name, spelt(point), point, self.asked.seeds[0]) for point in (*ends, *choices)]

    def open(self) -> None:
        """Makes the journal, or goes on with the one that is there."""
        sampler = self.optuna.samplers.TPESampler(seed=self.draws.sampler_seed)
        self.study = self.optuna.create_study(
            study_name=self.called,
            storage=journal(self.optuna, self.file),
            direction="maximize",
            sampler=sampler,
            pruner=pruner(self.optuna, self.draws.pruner),
            load_if_exists=True,
        )

    def begun(self) -> list[Trial]:
        """The trials that were chosen so far, whatever came of them."""
        return [self._trial(known.number, known.params) for known in self._known()]

    def trials(self) -> Iterator[Trial]:
        """Those that a killed sweep left unfinished, then new ones, each chosen when asked for, up to n in all."""
        known = self._known()
        for left in known:
            if left.state == self.optuna.trial.TrialState.RUNNING:
                yield self._trial(left.number, left.params)
        ranges = self.draws.ranges.items()
        distributions = {name: DISTRIBUTIONS[kind](self.optuna, ends) for name, (kind, ends) in ranges}
        for _ in range(len(known), self.draws.n):
            # seeded anew for each, so that a study that was killed chooses as if it never was
            seed = self.draws.sampler_seed + len(self.study.trials)
            self.study.sampler = self.optuna.samplers.TPESampler(seed=seed % 2**32)
            chosen = self.study.ask(distributions)
            yield self._trial(chosen.number, chosen.params)

    def _known(self) -> list[Any]:
        """Optuna's trials, without those of which a killed sweep had not yet chosen every knob."""
        known = []
        for trial in self.study.trials:
            if trial.params.keys() == self.draws.ranges.keys():
                known.append(trial)
            else:
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
        return known

    def _trial(self, number: int, params: dict[str, Any]) -> Trial:
        settings = {name: rounded(value) if isinstance(value, float) else value for name, value in params.items()}
        ticket = Ticket(self.file, self.called, number, self.draws.pruner)
        try:
            label = f"{number}: {spelt({name: settings[name] for name in self.draws.ranges})}"
            return made(self.asked, self.name, label, settings, self.asked.seeds[0], ticket=ticket)
        except UserError:
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
            raise

    def tell(self, trial: Trial, state: str, summary: dict[str, Any] | None) -> None:
        """What came of a trial; nothing while it runs."""
        if state == "running":
            return
        assert trial.ticket is not None
        states = self.optuna.trial.TrialState
        ended = {"done": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[state]
        value = summary["val_acc"] if summary and state == "done" else None
        self.study.tell(trial.ticket.number, value, state=ended, skip_if_finished=True)


def reporter(ticket: Ticket, epochs: int) -> Sink:
    """A sink that reports each epoch's validation accuracy and answers "pruned" where the pruner says so.

    It is never asked about the last of `epochs`: that trial is complete.
    """
    optuna = library()
    study = optuna.load_study(
        study_name=ticket.study, storage=journal(optuna, ticket.file), pruner=pruner(optuna, ticket.pruner)
    )
    known = study.trials[ticket.number]
    trial = optuna.trial.Trial(study, known._trial_id)  # Optuna has no public way to a trial of another process

    def report(row: Row) -> str | None:
        if row["epoch"] not in known.intermediate_values:  # a resumed run may come by an epoch twice
            trial.report(row["val_acc"], row["epoch"])
        return "pruned" if row["epoch"] + 1 < epochs and trial.should_prune() else None

    return report


def library() -> Any:
    """Optuna, without its running commentary. Errors: `UsageError` with the install line."""
    optuna = optional("optuna", REMEDY)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def journal(optuna: Any, file: str) -> Any:
    """Optuna's storage in `file`, which processes and machines that share it may write at the same time."""
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file))


def pruner(optuna: Any, spec: str) -> Any:
    """`median`, `asha:3`, ... as Optuna's. Errors: `UsageError`."""
    name, colon, number = spec.partition(":")
    make = pick(PRUNERS, name, "pruner")
    if colon and not (number.isascii() and number.isdigit() and int(number) > (name == "asha")):
        raise UsageError(f"pruner {spec!r}: {number!r} is no number of trials", f"such as {name}:4")
    return make(optuna, int(number) if colon else None)
