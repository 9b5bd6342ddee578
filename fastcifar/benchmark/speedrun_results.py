"""The result folder of a speedrun (`recipe.json`, `env.json`, `trials.jsonl`, `summary.json`) and its statistics.

Each trial is written to disk as soon as it ends, and the summary is recomputed from all trials.
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
UNTIMED_PACKAGES = ("pydantic", "typer")  # packages that do not affect the timing


@dataclass
class SpeedrunResults:
    """A result folder and its trials, oldest first. As a context manager, it holds the lock of the folder.

    Args:
        document: what is run; keys "target", "recipe", "on" (the evaluation split) and "config" (the recipe options).
        run_stats: parameters, MACs, training images and FLOPs of one run.
        environment: contents of env.json, whose key "chosen" holds device, precision, loader and compilation.
    """

    folder: Path
    document: dict[str, Any]
    run_stats: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    lock: FolderLock | None = None

    @classmethod
    def read(cls, folder: Path) -> SpeedrunResults:
        """Read a result folder, without trials that are incomplete because their process was killed.

        Raises `UsageError` if it is not a result folder.
        """
        try:
            document = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
            run_stats = document.pop("about")
            env_file = folder / "env.json"
            environment = json.loads(env_file.read_text(encoding="utf-8")) if env_file.is_file() else {}
            lines = (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            problem = f"{folder} is not a result folder of a speedrun: {type(error).__name__}"
            raise UsageError(problem, "choose another folder") from None
        return cls(folder, document, run_stats, environment, [trial for line in lines if (trial := _parse_trial(line))])

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
        """Lock the folder `append`, or create a new folder: `out` or speedruns/<UTC>_<device>_<recipe>.

        Raises `UsageError` if the new folder exists or `require_compatible` fails, and `DiskError` if it cannot be
        created.
        """
        folder = append or Path(
            out or Path("speedruns") / result_folder_name(environment["device"], document["recipe"])
        )
        try:
            if not append:
                folder.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(f"{folder} already exists", f"use --append {folder} to add trials to it") from None
        except OSError as error:
            raise DiskError(f"cannot create {folder}: {error.strerror}", "choose another --out DIR") from None
        lock = lock_folder(folder)
        try:
            results = cls.read(folder) if append else cls(folder, document, run_stats, environment)
            # checked again under the lock, because another process may have added trials
            results.require_compatible(document, environment, seeds)
            if results.run_stats != run_stats:
                raise UsageError(f"{folder} has runs of {results.run_stats}, not {run_stats}", "use the same --data")
            results._write_all(environment)
        except UserError:
            lock.release()
            raise
        results.lock = lock
        return results

    def __enter__(self) -> SpeedrunResults:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.lock:
            self.lock.release()

    @property
    def next_seed(self) -> int:
        """The seed after the largest one in the folder."""
        return max((trial["seed"] for trial in self.trials), default=-1) + 1

    def require_compatible(self, document: dict[str, Any], environment: dict[str, Any], seeds: Sequence[int]) -> None:
        """Raise `UsageError` if the recipe or the environment differs, or a seed is already in the folder."""
        defaults = Recipe().model_dump(mode="json")  # for options that are newer than the folder
        saved, current = (
            {**defaults, **settings, **settings["config"], "config": None} for settings in (self.document, document)
        )
        differing = [key for key in current if current[key] != saved.get(key)]
        if differing:
            differences = format_differences(saved, current, differing)
            raise UsageError(f"{self.folder} has another recipe: {differences}", "use --out to start a new folder")
        saved, current = timing_environment(self.environment), timing_environment(environment)
        differing = [name for name in saved if name in current and saved[name] != current[name]]
        if differing:
            differences = format_differences(saved, current, differing)
            raise UsageError(
                f"{self.folder} was timed in another environment: {differences}", "use --out to start a new folder"
            )
        repeated = {trial["seed"] for trial in self.trials} & set(seeds)
        if repeated:
            raise UsageError(
                f"{self.folder} already has a trial with seed {min(repeated)}", f"start at --seed {self.next_seed}"
            )

    def add_trial(self, trial: dict[str, Any]) -> None:
        """Add a trial and write it to disk, together with the summary.

        Raises `DiskError` if the files cannot be written.
        """
        self.trials.append(trial)
        self._write_trials()
        self._write_files({"summary.json": json.dumps(self.summary(), indent=1) + "\n"})

    def summary(self) -> dict[str, Any]:
        """Return the statistics over all trials.

        These are mean, standard deviation, standard error, and the share of trials that reach the target. Invalid
        trials are left out of the means, count as misses in the share, and keep the target from being reached.
        """
        valid = [trial for trial in self.trials if not trial["refused"]]
        target = float(self.document["target"]) / 100
        metrics = {name: sample_statistics([trial[name] for trial in valid]) for name in TRIAL_METRICS}
        for name in ("acc", "acc_tta"):
            if accuracies := metrics[name]:
                accuracies["share"] = sum(value >= target for value in accuracies["trials"]) / len(self.trials)
        best = metrics["acc_tta"] or metrics["acc"]
        reached = best is not None and best["mean"] >= target and len(valid) == len(self.trials)
        config = self.document["config"]
        return {
            "target": target,
            "recipe": self.document["recipe"],
            "on": self.document["on"],
            **{name: config[name] for name in ("arch", "epochs", "tta", "eval_weights")},
            **self.run_stats,
            "n": len(self.trials),
            "refused": len(self.trials) - len(valid),
            "seeds": [trial["seed"] for trial in self.trials],
            **metrics,
            "cold_start_s": [trial["cold_start_s"] for trial in self.trials if trial["cold_start_s"] is not None],
            "reached": reached,
            "flops_to_target": self.run_stats["flops"] if reached else None,
        }

    def _write_all(self, environment: dict[str, Any]) -> None:
        files: dict[str, dict[str, Any]] = {"recipe.json": {**self.document, "about": self.run_stats}}
        if not (self.folder / "env.json").exists():
            files["env.json"] = {**environment, "started": format_timestamp()}
        self._write_files({name: json.dumps(content, indent=1) + "\n" for name, content in files.items()})
        self._write_trials()

    def _write_trials(self) -> None:
        self._write_files({"trials.jsonl": "".join(json.dumps(trial) + "\n" for trial in self.trials)})

    def _write_files(self, files: dict[str, str]) -> None:
        try:
            for name, content in files.items():
                write_atomically(self.folder / name, content.encode())
        except OSError as error:
            raise DiskError(f"cannot write to {self.folder}: {error.strerror}", "free some space") from None


def timing_environment(environment: dict[str, Any]) -> dict[str, Any]:
    """Return the part of env.json that affects timing: versions, chosen execution, device and threads."""
    versions = {name: text for name, text in environment.get("versions", {}).items() if name not in UNTIMED_PACKAGES}
    machine = {name: environment[name] for name in ("device", "threads", "cuda", "cudnn") if name in environment}
    return {**versions, **environment.get("chosen", {}), **machine}


def sample_statistics(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Return `mean`, sample standard deviation `std`, standard error of the mean `stderr`, and the values as `trials`.

    Returns None if there are no values or one of them is None. `std` and `stderr` of a single value are None.
    """
    mean_std = MeanStd.from_values(values)
    if mean_std is None:
        return None
    return {"mean": mean_std.mean, "std": mean_std.std, "stderr": mean_std.standard_error, "trials": list(values)}


def _parse_trial(line: str) -> dict[str, Any] | None:
    trial = parse_json_object(line)
    return trial if trial and "seed" in trial else None
