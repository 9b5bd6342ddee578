"""The examples in the README run, and its lists of files, commands, recipes and options are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fastcifar.cli.app import app
from fastcifar.sweep.executors import EXECUTORS
from fastcifar.sweep.sweep_spec import expand_trials, read_sweep_spec, shipped_sweeps
from fastcifar.training.lr_schedule import SCHEDULES
from fastcifar.training.optimizers import OPTIMIZERS, SELF_SCHEDULED_OPTIMIZERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code) == 1
    run = subprocess.run(
        [sys.executable, "-c", code[0]], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "torch.Size([100, 3, 32, 32]) torch.uint8" in run.stdout
    assert (tmp_path / run.stdout.split()[-1] / "summary.json").is_file()


def test_the_tree_lists_exactly_the_files_of_the_package() -> None:
    tree = TEXT.split("```\nfastcifar/\n")[1].split("```")[0]
    package = tree.split("\nbench/")[0]
    listed = set(re.findall(r"^ +(\w+\.py)", package, re.MULTILINE))
    existing = {path.name for path in (ROOT / "fastcifar").rglob("*.py") if not path.name.startswith("__")}
    assert listed == existing
    for name in re.findall(r"^(\S+?)/? ", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_every_command_is_in_the_table() -> None:
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    for group, commands in {"": app, **groups}.items():
        assert commands is not None
        for command in commands.registered_commands:
            assert command.callback is not None
            name = " ".join(filter(None, ("fastcifar", group, command.name or command.callback.__name__)))
            assert f"`{name}" in TEXT, name


def test_the_shipped_recipes_are_listed() -> None:
    for path in (ROOT / "fastcifar" / "recipes").glob("*.toml"):
        assert f"`{path.stem}`" in TEXT or f"--recipe {path.stem}" in TEXT


def test_the_sweep_examples_are_valid_and_the_shipped_sweeps_are_listed(tmp_path: Path) -> None:
    section = TEXT.split("## Sweeps")[1].split("\n## ")[0]
    first, study = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    (tmp_path / "first.toml").write_text(first)
    assert len(expand_trials(*read_sweep_spec(str(tmp_path / "first.toml")))) == 2 * 2 * 10 * 3
    (tmp_path / "study.toml").write_text(study)
    spec, _ = read_sweep_spec(str(tmp_path / "study.toml"))
    assert spec.study is not None
    assert spec.study.ranges.keys() == {"lr", "optimizer"}
    assert all(f"`{name}`" in section for name in (*shipped_sweeps(), *EXECUTORS))


def test_the_optimizers_and_schedules_are_complete() -> None:
    section = TEXT.split("## Optimizers and schedules")[1].split("\n## ")[0]
    yes = {True: "yes", False: "no"}
    for name, spec in OPTIMIZERS.items():
        row = f"| `{name}` | {yes[spec.fused]} | {yes[spec.capturable]} | {yes[spec.self_scheduled]} |"
        assert row in section, row
    other = section.split("| any other of")[1].splitlines()[0]
    listed = set(re.findall(r"`(\w+)(?:\.\.\.)?`", other.split("|")[3]))
    assert {
        next(name for name in listed if optimizer.startswith(name)) for optimizer in SELF_SCHEDULED_OPTIMIZERS
    } == listed
    schedules = section.split("| schedule |")[1]
    assert re.findall(r"`(\w+)(?::[\d.]+)?`", schedules) == list(SCHEDULES)
    for name, schedule in SCHEDULES.items():
        assert schedule.default_arg is None or f"`{name}:{schedule.default_arg:g}`" in schedules
