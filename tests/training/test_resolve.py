"""`resolve`: every spelling is parsed and every name looked up before any data is read, by every command."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.benchmark.bench import bench
from fastcifar.benchmark.speedrun import speedrun
from fastcifar.data import cifar
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.sweep.sweep import plan_sweep
from fastcifar.training.build import build_trainer
from fastcifar.training.dry_run import dry_run
from fastcifar.training.evaluate import VIEWS
from fastcifar.training.lr_schedule import SCHEDULES
from fastcifar.training.optimizers import OPTIMIZERS
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer

PACKAGE = Path(__file__).parents[2] / "fastcifar"

WRONG = [
    ({"arch": "nope"}, "unknown architecture 'nope'"),
    ({"optimizer": "adm"}, "did you mean 'adam'"),
    ({"optimizer": "sgd", "optimizer_arg": {"nesterow": True}}, "did you mean 'nesterov'"),
    ({"optimizer": "sgd", "optimizer_arg": {"momentum": -1}}, "momentum"),
    ({"schedule": "cos"}, "did you mean 'cosine'"),
    ({"schedule": "plateau:3", "val_size": 0}, "--val-size"),
    ({"augment": "crop:4:zero,flop"}, "did you mean 'flip'"),
    ({"clip_grad": "0.1"}, "--clip-grad"),
    ({"normalize": "imagenet"}, "imagenet"),
    ({"tta": "5crop"}, "test-time augmentation"),
    ({"track": "neptune"}, "tracker"),
    ({"loader": "dalli"}, "did you mean 'dali'"),
    ({"channels": (512, 1024)}, "--max-params"),
]


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading or downloading a data set is an error."""

    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a data set was read")

    monkeypatch.setattr(cifar, "load_dataset", load)


@pytest.mark.parametrize(("values", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_fault15_every_command_refuses_before_reading_data(
    tiny: Callable[..., Recipe], no_data: None, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    """Without a folder or a file left behind."""
    sweep_file = tmp_path / "one.toml"

    def refuse(command: Callable[[Recipe], Any], values: dict[str, Any]) -> None:
        recipe = tiny(**values)
        base = re.sub(r"^seed = .*\n", "", recipe.model_copy(update={"out": None}).to_toml(), flags=re.MULTILINE)
        sweep_file.write_text(f"[base]\n{base}")
        command(recipe)

    for command in (resolve, train, dry_run, bench, lambda recipe: plan_sweep(str(sweep_file), tmp_path / "sweep")):
        with pytest.raises(UsageError, match=re.escape(words)):
            refuse(command, values)
    assert {path.name for path in tmp_path.iterdir()} <= {"one.toml"}
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(tiny().to_toml())
    with pytest.raises(UsageError, match=f"{re.escape(words)}|--schedule"):
        speedrun(recipe_name=str(recipe_file), **{**values, "out": str(tmp_path / "speedrun")})
    assert not (tmp_path / "speedrun").exists()


def test_parsed_values_reach_the_trainer(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(
        augment="flip,cutmix", image_size="24:1,28:1,32", epochs=4, clip_grad="norm:2", schedule="one_cycle:0.2"
    )
    resolved = resolve(recipe)
    assert [op.name for op in resolved.pixel_ops] == ["flip"]
    assert resolved.mixer is not None
    assert resolved.mixer.name == "cutmix"
    assert [phase.image_size for phase in resolved.phases] == [24, 28, 32, 32]
    assert resolved.clip_grad == ("norm", 2.0)
    assert resolved.schedule.arg == 0.2
    trainer = build_trainer(resolved)
    assert trainer.resolved == resolved
    assert trainer.schedule.spec is resolved.schedule


@pytest.mark.parametrize("optimizer", ["lookahead:sgd", "lion", "muon"])
def test_random_state_is_left_as_it_is(tiny: Callable[..., Recipe], optimizer: str) -> None:
    recipe, before = tiny(optimizer=optimizer, lr=0.01), torch.get_rng_state()
    resolve(recipe)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.medium
def test_recipe_strings_are_parsed_in_two_files_only() -> None:
    """The functions that parse a recipe's strings are called by resolve.py, and by commands that train nothing."""
    parsers = {
        "parse_augment",
        "parse_schedule",
        "parse_clip_grad",
        "parse_optimizer",
        "parse_image_sizes",
        "parse_tracker_names",
    }
    allowed = {"training/resolve.py", "recipe.py", "data/inspection.py", "api.py", "training/trackers.py"}
    for path in PACKAGE.rglob("*.py"):
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if str(path.relative_to(PACKAGE)) not in allowed:
            assert not calls & parsers, path


@pytest.mark.medium
@pytest.mark.parametrize(
    "options",
    [
        ("--clip-grad", "0.1"),
        ("--image-size", "12:1,32"),
        ("--schedule", "cosine:x:y"),
        ("--augment", "crop::,"),
        ("--lr", "-1"),
    ],
)
def test_malformed_values_are_refused_without_importing_torch(options: tuple[str, str]) -> None:
    code = (
        "import sys\nfrom fastcifar.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "train", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout == "2 False\n", run.stderr
    assert options[0] in run.stderr


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls that make up a step, in order, from here on."""
    calls: list[str] = []
    train_step = Trainer.train_step

    def recorded(self: Trainer, batch: Any) -> None:
        def spy(owner: Any, name: str) -> None:
            method = getattr(owner, name)
            if not hasattr(method, "recorded"):

                def call(*arguments: Any) -> Any:
                    calls.append(name)
                    return method(*arguments)

                call.recorded = True  # type: ignore[attr-defined]
                setattr(owner, name, call)

        spy(self.optimizer, "set_lr")
        spy(self.optimizer, "after_step")
        spy(self, "step")
        train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", recorded)
    return calls


@pytest.mark.medium
def test_train_speedrun_bench_and_dry_run_take_the_same_step(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = record_calls(monkeypatch)
    recipe = tiny(optimizer="lookahead:sgd")

    def bench_of(what: str) -> Callable[[Recipe], Any]:
        return lambda recipe: bench(recipe, what, trials=1, trial_s=0.01)

    file = tmp_path / "recipe.toml"
    file.write_text("".join(line for line in recipe.to_toml().splitlines(True) if not line.startswith("out")))
    commands: dict[str, Callable[[Recipe], Any]] = {
        "train": train,
        "dry run": dry_run,
        "bench step": bench_of("step"),
        "bench train": bench_of("train"),
        "speedrun": lambda recipe: speedrun(recipe_name=str(file), eval_split="val", out=str(tmp_path / "speedrun")),
    }
    for name, command in commands.items():
        calls.clear()
        command(recipe)
        assert len(calls) >= 3, name
        assert len(calls) % 3 == 0, name
        assert calls == ["set_lr", "step", "after_step"] * (len(calls) // 3), name


def test_building_a_step_changes_nothing_else(tiny: Callable[..., Recipe]) -> None:
    trainer = build_trainer(resolve(tiny(compile=False)))
    before = {name: value for name, value in vars(trainer).items() if name != "progress"}
    batches: list[int] = []
    trainer.loader.batches = lambda *arguments: batches.append(1) or iter(())  # type: ignore[method-assign]
    trainer.build_train_step()
    assert {name: value for name, value in vars(trainer).items() if name != "progress"} == before
    assert not batches  # the loader was not started


def test_the_help_of_options_names_every_built_in_value() -> None:
    for option, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("tta", VIEWS)):
        words = set(re.findall(r"\w+", Recipe.model_fields[option].description or ""))
        assert table.keys() <= words, option
