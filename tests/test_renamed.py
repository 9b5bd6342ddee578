"""Old names of options: refused on the command line and in recipe files, translated in runs and sweeps on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastcifar.cli.app import app
from fastcifar.cli.exit import report_error
from fastcifar.errors import UsageError
from fastcifar.evaluation.evaluate_run import EvalResult, evaluate_run
from fastcifar.format import format_toml_value, option_flag
from fastcifar.recipe import Recipe
from fastcifar.renamed import renamed_options, upgrade_options
from fastcifar.reporting.report import build_report
from fastcifar.reporting.runs import list_runs
from fastcifar.sweep.sweep import run_sweep
from fastcifar.training.checkpoint import load_checkpoint
from fastcifar.training.train import train
from tests.faults.runs import assert_equal_runs

# old name -> new names, written out again
RENAMED = {
    "bias_lr": ["bias_lr_mult"],
    "clip": ["clip_grad"],
    "decay_on": ["bias_decay"],
    "ema": ["ema_decay"],
    "head_lr": ["head_lr_mult"],
    "lr_min": ["min_lr"],
    "normalise": ["normalize"],
    "opt": ["optimizer_arg"],
    "save_every": ["save_every_epochs", "save_every_steps"],
    "weights": ["eval_weights"],
}
RENAMED_OF_COMMANDS = {"sweep": {"on": ["executor"]}, "speedrun": {"on": ["eval_split"]}}

# options that all differ from their defaults, by their current and by their old names
OPTIONS: dict[str, Any] = {
    "augment": "crop:4:zero,flip,erase:0.1:gray",
    "bias_decay": False,
    "bias_lr_mult": 2.0,
    "clip_grad": "norm:1",
    "ema_decay": 0.9,
    "eval_weights": "ema",
    "head_lr_mult": 0.5,
    "min_lr": 0.01,
    "normalize": "cifar10",
    "optimizer": "sgd",
    "optimizer_arg": {"momentum": 0.8},
}
OLD_OPTIONS: dict[str, Any] = {
    "augment": "crop:4:zero,flip,erase:0.1:grey",
    "decay_on": "weights",
    "bias_lr": 2.0,
    "clip": "norm:1",
    "ema": 0.9,
    "weights": "ema",
    "head_lr": 0.5,
    "lr_min": 0.01,
    "normalise": "cifar10",
    "optimizer": "sgd",
    "opt": {"momentum": 0.8},
    "save_every": "1e",
}


def test_the_table_holds_these_names_and_no_others() -> None:
    assert renamed_options() == RENAMED
    for command, names in RENAMED_OF_COMMANDS.items():
        assert renamed_options(command) == {**RENAMED, **names}
    for new_names in RENAMED.values():
        assert set(new_names) <= Recipe.model_fields.keys()
    assert not RENAMED.keys() & Recipe.model_fields.keys()


@pytest.mark.medium
@pytest.mark.parametrize("command", [("train",), ("eval", "run"), ("sweep", "lr"), ("speedrun",)])
@pytest.mark.parametrize("old_name", [*RENAMED, "on"])
def test_old_names_are_refused_on_the_command_line(
    command: tuple[str, ...], old_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = CliRunner().invoke(app, (*command, option_flag(old_name), "1"), standalone_mode=False).exception
    assert isinstance(error, Exception)
    assert report_error(error) == 2
    message = capsys.readouterr().err
    new_names = {**RENAMED, **RENAMED_OF_COMMANDS.get(command[0], {})}.get(old_name)
    if new_names:
        remedy = f"it was renamed: use {' or '.join(map(option_flag, new_names))}"
        assert message == f"fastcifar: no such option: {option_flag(old_name)}; {remedy}\n"
    else:  # an old name of other commands
        assert "renamed" not in message


def test_old_names_are_refused_in_recipe_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    for old_name, new_names in RENAMED.items():
        file.write_text(f"{old_name} = 1\n")
        message = f"unknown recipe key '{old_name}'; it was renamed: use {' or '.join(new_names)}$"
        with pytest.raises(UsageError, match=message):
            Recipe.make(str(file))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"decay_on": "all"}, {"bias_decay": True}),
        ({"decay_on": "weights"}, {"bias_decay": False}),
        ({"save_every": "1e"}, {"save_every_epochs": 1}),
        ({"save_every": "5e"}, {"save_every_epochs": 5}),
        ({"save_every": "500s"}, {"save_every_epochs": 0, "save_every_steps": 500}),
        ({"augment": "erase:0.1:grey,flip"}, {"augment": "erase:0.1:gray,flip"}),
        ({"lr": 0.1, "unknown": 1}, {"lr": 0.1, "unknown": 1}),
        (OLD_OPTIONS, {**OPTIONS, "save_every_epochs": 1}),
    ],
)
def test_saved_options_are_translated(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert upgrade_options(old) == new
    assert upgrade_options(new) == new


def with_old_names(options: dict[str, Any]) -> dict[str, Any]:
    """Return a complete set of options, OPTIONS among them, as an earlier version wrote it."""
    new_names = OPTIONS.keys() | {"save_every_epochs", "save_every_steps"}
    return {name: value for name, value in options.items() if name not in new_names} | OLD_OPTIONS


def rewrite_run_with_old_names(folder: Path) -> None:
    """Rewrite recipe.toml, summary.json and the checkpoints of a run folder, and their checksums, with old names."""
    checkpoints = folder / "checkpoints"
    options = with_old_names(load_checkpoint(checkpoints / "last.pt")["recipe"])
    text = "".join(f"{name} = {format_toml_value(value)}\n" for name, value in options.items() if value is not None)
    (folder / "recipe.toml").write_text(text)
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text())
        summary["config"] = with_old_names(summary["config"])
        summary["weights"] = summary.pop("eval_weights")
        (folder / "summary.json").write_text(json.dumps(summary))
    manifest = {}
    for path in checkpoints.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        torch.save({**state, "recipe": with_old_names(state["recipe"])}, path)
        content = path.read_bytes()
        manifest[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoints / "manifest.json").write_text(json.dumps(manifest))


def listed(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of `runs ls` without what depends on the bytes and the time of the files."""
    entries = json.loads(json.dumps(list_runs(folder)))
    return [{name: value for name, value in entry.items() if name not in ("bytes", "date")} for entry in entries]


def evaluated(folder: Path) -> EvalResult:
    return evaluate_run(str(folder), device="cpu", precision="fp32", compile=False)


@pytest.fixture
def tiny_with_renamed_options(tiny: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Return a function like `tiny`, whose recipes set every renamed option."""
    return lambda **changes: tiny(**{**OPTIONS, **changes})


@pytest.mark.medium
def test_a_finished_run_of_an_earlier_version_is_listed_reported_and_evaluated(
    tiny_with_renamed_options: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny_with_renamed_options())
    expected = listed(tmp_path), build_report([run])[0], evaluated(run)
    rewrite_run_with_old_names(run)
    assert 'normalise = "cifar10"' in (run / "recipe.toml").read_text()
    assert json.loads((run / "summary.json").read_text())["config"]["save_every"] == "1e"
    assert listed(tmp_path)[0]["state"] == "finished"
    assert (listed(tmp_path), build_report([run])[0], evaluated(run)) == expected


@pytest.mark.medium
def test_a_stopped_run_of_an_earlier_version_is_resumed_to_bit_identical_weights(
    tiny_with_renamed_options: Callable[..., Recipe], tmp_path: Path
) -> None:
    stopped, uninterrupted = tmp_path / "stopped", tmp_path / "uninterrupted"
    train(tiny_with_renamed_options(out=str(stopped), max_steps=7))
    rewrite_run_with_old_names(stopped)
    assert "ema_decay" not in torch.load(stopped / "checkpoints" / "last.pt", weights_only=True)["recipe"]
    train(Recipe(resume=str(stopped)))
    train(tiny_with_renamed_options(out=str(uninterrupted)))
    assert_equal_runs(stopped, uninterrupted)
    assert "normalise" not in (stopped / "recipe.toml").read_text()


@pytest.mark.medium
def test_a_sweep_of_an_earlier_version_is_reported_and_not_continued(
    tiny_with_renamed_options: Callable[..., Recipe], tmp_path: Path
) -> None:
    source, folder = tmp_path / "sweep.toml", tmp_path / "sweep"
    base = tiny_with_renamed_options(out=None, epochs=1).non_default_options()
    axis = f"[grid]\nmin_lr = [{base.pop('min_lr')}]\n"
    source.write_text(f"{axis}[base]\n" + "".join(f"{k} = {format_toml_value(v)}\n" for k, v in base.items()))
    run_sweep(str(source), folder)
    expected = json.dumps([build_report([folder])[0], listed(folder)])
    for run in list(folder.glob("runs/*")):
        rewrite_run_with_old_names(run)
        run.rename(run.with_name(run.name.replace("min_lr", "lr_min")))
    lines = (folder / "trials.jsonl").read_text()
    assert '"knobs":{"min_lr":0.01}' in lines
    (folder / "trials.jsonl").write_text(lines.replace("min_lr", "lr_min"))
    report = json.dumps([build_report([folder])[0], listed(folder)])
    assert "lr_min=0.01" in report  # labels and names of folders are kept
    assert report.replace("lr_min=", "min_lr=") == expected
    with pytest.raises(UsageError, match=r"earlier version.*cannot be continued, only reported: choose another --out"):
        run_sweep(str(source), folder)
