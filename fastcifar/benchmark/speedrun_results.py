"""The result folder of a speedrun: `recipe.json`, `env.json`, `trials.jsonl`, `summary.json`; its arithmetic.

A trial is on the disk as soon as it ends, and the summary is made anew from all of them. Nothing is run or timed here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fastcifar.device import result_folder_name
from fastcifar.errors import DiskError, UsageError, UserError
from fastcifar.files import FolderLock, lock_folder, parse_json_object, write_atomically
from fastcifar.format import format_differences, format_timestamp
from fastcifar.recipe import Recipe
from fastcifar.reporting.aggregate import MeanStd

TRIAL_METRICS = ("acc", "acc_tta", "seconds", "train_s", "prepare_s", "build_s")
UNTIMED_PACKAGES = ("pydantic", "typer")  # packages that no second depends on


@dataclass
class SpeedrunResults:
    """A folder and its trials, oldest first. `document`: what is run (target, recipe, on, config). `about`: params,
    macs, images and flops of a run. `environment`: what env.json says, with what was `chosen` on that machine. A
    context, in which the folder is this process's own."""

    folder: Path
    document: dict[str, Any]
    run_stats: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    lock: FolderLock | None = None

    @classmethod
    def read(cls, folder: Path) -> SpeedrunResults:
        """What is in a folder; a line that a dying process cut short is not a trial. Errors: `UsageError`."""
        try:
            document = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
            about = document.pop("about")
            there = (folder / "env.json").is_file()
            environment = json.loads((folder / "env.json").read_text(encoding="utf-8")) if there else {}
            lines = (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{folder} holds no trials: {type(error).__name__}", "give a speedrun's folder") from None
        return cls(folder, document, about, environment, [trial for line in lines if (trial := _parse_trial(line))])

    @classmethod
    def open(
        cls,
        append: Path | None,
        out: str | None,
        document: dict[str, Any],
        run_stats: dict[str, Any],
        environment: dict[str, Any],
        seeds: Sequence[int],
    ) -> SpeedrunResults:
        """The folder `append` goes on with `seeds`; else a new one, `out` or speedruns/<UTC>_<device>_<recipe>.

        Errors: `UsageError` for a folder that is there already, and those of `require_same`; `DiskError`.
        """
        folder = append or Path(
            out or Path("speedruns") / result_folder_name(environment["device"], document["recipe"])
        )
        try:
            if not append:
                folder.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(f"{folder} is there already", f"--append {folder} adds to it") from None
        except OSError as error:
            raise DiskError(f"cannot make {folder}: {error.strerror}", "give --out DIR") from None
        lock = lock_folder(folder)
        try:
            trials = cls.read(folder) if append else cls(folder, document, run_stats, environment)
            trials.require_compatible(document, environment, seeds)  # also of what was added until it was locked
            if trials.run_stats != run_stats:
                raise UsageError(f"{folder} is of {trials.run_stats}, not {run_stats}", "give --data as it was")
            trials._write_all(environment)
        except UserError:
            lock.release()
            raise
        trials.lock = lock
        return trials

    def __enter__(self) -> SpeedrunResults:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.lock:
            self.lock.release()

    @property
    def next_seed(self) -> int:
        """The seed after those that are there."""
        return max((trial["seed"] for trial in self.trials), default=-1) + 1

    def require_compatible(self, document: dict[str, Any], environment: dict[str, Any], seeds: Sequence[int]) -> None:
        """Errors: `UsageError` that names what differs of the recipe or the clock, or a seed that is there already."""
        defaults = Recipe().model_dump(mode="json")  # of knobs that there were not yet when the folder was made
        mine, other = ({**defaults, **of, **of["config"], "config": None} for of in (self.document, document))
        differing = [key for key in other if other[key] != mine.get(key)]
        if differing:
            listed = format_differences(mine, other, differing)
            raise UsageError(f"{self.folder} is of another recipe: {listed}", "give --out for a result of its own")
        then, now = timing_environment(self.environment), timing_environment(environment)
        differing = [name for name in then if name in now and then[name] != now[name]]
        if differing:
            listed = format_differences(then, now, differing)
            raise UsageError(f"{self.folder} is of another clock: {listed}", "give --out for a result of its own")
        there = {trial["seed"] for trial in self.trials} & set(seeds)
        if there:
            raise UsageError(f"{self.folder} has seed {min(there)} already", f"begin at --seed {self.next_seed}")

    def add_trial(self, trial: dict[str, Any]) -> None:
        """Keeps a trial, and the summary with it. Errors: `DiskError`."""
        self.trials.append(trial)
        self._write_files({"trials.jsonl": "".join(json.dumps(trial) + "\n" for trial in self.trials)})
        self._write_files({"summary.json": json.dumps(self.summary(), indent=1) + "\n"})

    def summary(self) -> dict[str, Any]:
        """Of every trial: the figures' mean, standard deviation and standard error, and the share over the target.

        A refused trial counts among the runs, as one that missed the target, and is in no mean: where there is one,
        the target is not reached.
        """
        counted = [trial for trial in self.trials if not trial["refused"]]
        target = float(self.document["target"]) / 100
        figures = {name: sample_statistics([trial[name] for trial in counted]) for name in TRIAL_METRICS}
        for name in ("acc", "acc_tta"):
            if found := figures[name]:
                found["share"] = sum(value >= target for value in found["trials"]) / len(self.trials)
        best = figures["acc_tta"] or figures["acc"]
        reached = best is not None and best["mean"] >= target and len(counted) == len(self.trials)
        config = self.document["config"]
        return {
            "target": target,
            "recipe": self.document["recipe"],
            "on": self.document["on"],
            **{name: config[name] for name in ("arch", "epochs", "tta", "eval_weights")},
            **self.run_stats,
            "n": len(self.trials),
            "refused": len(self.trials) - len(counted),
            "seeds": [trial["seed"] for trial in self.trials],
            **figures,
            "cold_start_s": [trial["cold_start_s"] for trial in self.trials if trial["cold_start_s"] is not None],
            "reached": reached,
            "flops_to_target": self.run_stats["flops"] if reached else None,
        }

    def _write_all(self, environment: dict[str, Any]) -> None:
        now = {**environment, "started": format_timestamp()}
        files: dict[str, dict[str, Any]] = {"recipe.json": {**self.document, "about": self.run_stats}}
        if not (self.folder / "env.json").exists():
            files["env.json"] = now
        self._write_files({name: json.dumps(content, indent=1) + "\n" for name, content in files.items()})
        self._write_files({"trials.jsonl": "".join(json.dumps(trial) + "\n" for trial in self.trials)})

    def _write_files(self, files: dict[str, str]) -> None:
        try:
            for name, content in files.items():
                write_atomically(self.folder / name, content.encode())
        except OSError as error:
            raise DiskError(f"cannot write to {self.folder}: {error.strerror}", "free some space") from None


def timing_environment(environment: dict[str, Any]) -> dict[str, Any]:
    """What of an env.json seconds depend on: versions, what was chosen, and the device with its threads."""
    versions = {name: found for name, found in environment.get("versions", {}).items() if name not in UNTIMED_PACKAGES}
    machine = {name: environment[name] for name in ("device", "threads", "cuda", "cudnn") if name in environment}
    return {**versions, **environment.get("chosen", {}), **machine}


def sample_statistics(values: Sequence[float | None]) -> dict[str, Any] | None:
    """`mean`, sample standard deviation `std`, standard error of the mean `stderr` and the values as `trials`.

    None if there are no values, or if one is None. A single value has no deviation and no standard error.
    """
    found = MeanStd.from_values(values)
    if found is None:
        return None
    return {"mean": found.mean, "std": found.std, "stderr": found.standard_error, "trials": list(values)}


def _parse_trial(line: str) -> dict[str, Any] | None:
    trial = parse_json_object(line)
    return trial if trial and "seed" in trial else None
