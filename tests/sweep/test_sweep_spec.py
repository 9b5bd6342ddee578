"""Sweep files: the number of trials, their names and recipes, and the errors in invalid files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.sweep.sweep_spec import SweepTrial, expand_trials, read_sweep_spec, shipped_sweeps


def expand(folder: Path, text: str, seeds: str | None = None, **overrides: Any) -> list[SweepTrial]:
    """Return the trials of a sweep file with this text."""
    (folder / "custom.toml").write_text(text)
    spec, name = read_sweep_spec(str(folder / "custom.toml"), seeds, overrides)
    return expand_trials(spec, name)


def test_axes_are_combined_and_trials_ordered_by_seed(tmp_path: Path) -> None:
    text = """
        recipe = "quick"
        seeds = [3, 1]
        [base]
        epochs = 7
        [grid]
        lr = [0.1, 0.2]
        blocks = [[1, 1], [2, 2]]
        [[list]]
        label = "plain"
        arch = "resnet"
        [[list]]
        recipe = "row1"
        weight_decay = 0.0
    """
    trials = expand(tmp_path, text)
    assert len(trials) == len({trial.key for trial in trials}) == 2 * 2 * 2 * 2
    assert [trial.recipe.seed for trial in trials] == [3] * 8 + [1] * 8
    assert {trial.label for trial in trials[:8]} == {trial.label for trial in trials[8:]}
    first, last = trials[0], trials[-1]
    assert first.label == "plain, lr=0.1, blocks=1,1"
    assert last.label == "row1, weight_decay=0.0, lr=0.2, blocks=2,2"
    assert (first.recipe_name, last.recipe_name) == ("quick", "row1")
    quick, row1 = Recipe.make("quick"), Recipe.make("row1")
    changes = {"epochs": 7, "lr": 0.1, "blocks": (1, 1), "arch": "resnet", "seed": 3}
    assert first.recipe == quick.model_copy(update=changes)
    changes = {"epochs": 7, "lr": 0.2, "blocks": (2, 2), "weight_decay": 0.0, "seed": 1}
    assert last.recipe == row1.model_copy(update=changes)
    assert first.options == {"arch": "resnet", "lr": 0.1, "blocks": [1, 1]}
    assert last.options.items() >= {"arch": "se55", "batch_size": 32, "optimizer": "lookahead:sgd", "lr": 0.2}.items()
    assert "epochs" not in last.options


def test_overrides_take_precedence_over_recipes_and_base_but_not_axes(tmp_path: Path) -> None:
    text = "recipe = 'quick'\n[base]\nepochs = 7\n[grid]\nlr = [0.1]\n[[list]]\nrecipe = 'row1'"
    (trial,) = expand(tmp_path, text, epochs="3", batch_size="256")
    assert (trial.recipe.arch, trial.recipe.epochs, trial.recipe.batch_size) == ("se55", 3, 256)
    assert trial.options.keys() >= {"arch"}
    assert not {"epochs", "batch_size"} & trial.options.keys()
    with pytest.raises(UsageError, match="--lr: lr is varied by the sweep; leave it out"):
        expand(tmp_path, text, lr="0.3")
    assert [trial.recipe.seed for trial in expand(tmp_path, text, seeds="3")] == [0, 1, 2]
    assert [trial.recipe.seed for trial in expand(tmp_path, text, seeds="5,2")] == [5, 2]


def test_random_points_depend_on_seed_and_range_but_not_on_n(tmp_path: Path) -> None:
    ranges = "lr.log = [0.001, 1.0]\ndropout.uniform = [0.0, 0.5]\nbatch_size.integer = [3, 5]\n"
    ranges += "optimizer.choice = ['sgd', 'adamw']\n"
    trials = expand(tmp_path, f"[random]\nn = 200\nsampler_seed = 4\n{ranges}")
    assert len(trials) == 200
    recipes = [trial.recipe for trial in trials]
    assert {recipe.batch_size for recipe in recipes} == {3, 4, 5}
    assert {recipe.optimizer for recipe in recipes} == {"sgd", "adamw"}
    assert all(0 <= (recipe.dropout or 0) < 0.5 for recipe in recipes)
    logs = [math.log10(recipe.lr) for recipe in recipes]
    assert all(-3 <= value <= 0 for value in logs)
    assert abs(sum(logs) / 200 + 1.5) < 4 * (3 / math.sqrt(12)) / math.sqrt(200)  # four standard errors of the mean
    fewer = expand(tmp_path, f"[random]\nn = 20\nsampler_seed = 4\n{ranges}")
    assert [trial.key for trial in fewer] == [trial.key for trial in trials[:20]]
    other = expand(tmp_path, f"[random]\nn = 20\nsampler_seed = 5\n{ranges}")
    assert not {trial.key for trial in other} & {trial.key for trial in fewer}
    assert float(trials[0].label.split("lr=")[1].split(",")[0]) == trials[0].recipe.lr


def test_key_depends_on_label_seed_and_experiment_only(tmp_path: Path) -> None:
    text = "[grid]\nlr = [0.1, 0.05]\n[[list]]\nlabel = 'a / b'\n"
    first, second = expand(tmp_path, text)
    assert first.key == "a-b-lr=0.1-s0-303cdab2"  # a different key would rerun the trials of existing sweeps
    assert [t.key for t in expand(tmp_path, text, save_every_epochs="5", batch_size="128")] == [first.key, second.key]
    changed = [expand(tmp_path, text, **overrides)[0].key for overrides in ({"epochs": "9"}, {"batch_size": "64"})]
    assert len({first.key, *changed}) == 3
    assert expand(tmp_path, text.replace("a / b", "c"))[0].key != first.key


def test_saved_sweep_file_expands_to_the_same_trials(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("arch = 'se55'\noptimizer_arg = { nesterov = true }\n")
    text = """
        recipe = "own.toml"
        seeds = 2
        [base]
        optimizer_arg = { momentum = 0.8 }
        [grid]
        blocks = [[1, 1], [2, 2]]
        [random]
        n = 3
        lr.log = [0.001, 1]
        [[list]]
        optimizer = "sgd"
        [[list]]
        label = 'the "other"'
        optimizer = "lookahead:sgd"
    """
    trials = expand(tmp_path, text, max_params="6000000", augment="none")
    spec, _ = read_sweep_spec(str(tmp_path / "custom.toml"), None, {"max_params": "6000000", "augment": "none"})
    folder = tmp_path / "sweeps" / "custom"
    folder.mkdir(parents=True)
    (folder / "sweep.toml").write_text(spec.to_toml())
    saved_spec, name = read_sweep_spec(str(folder))
    assert (expand_trials(saved_spec, name), name) == (trials, "custom")
    assert len(trials) == 2 * 2 * 3 * 2
    assert trials[0].recipe.arch == "se55"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[base]\nlrr = 0.1", "unknown recipe key 'lrr'; did you mean 'lr'?"),
        ("[grid]\nactivaton = ['relu']", "unknown recipe key 'activaton'; did you mean 'activation'?"),
        ("[grid]\nactivation = ['relu', 'rely']", "activation=rely: --activation should be 'relu'"),
        ("[grid]\nlr = []", "grid.lr "),
        ("[[list]]\nlabel = 1", "list.0.label should be a valid string (got 1)"),
        ("[[list]]\nlr = 0.1\n[[list]]\nrecipe = 1", "list.1.recipe should be a valid string (got 1)"),
        ("[[list]]\nlr = 0.1\n[[list]]\nlr = -1", "lr=-1: --lr should be greater than 0"),
        ("[[list]]\nlr = 0.1\n[[list]]\nlr = 0.1", "two [[list]] entries have the label 'lr=0.1'"),
        ("[[list]]\nrecipe = 'row11'", "no recipe 'row11'; did you mean"),
        ("[grid]\nlr = [0.1]\n[[list]]\nlr = 0.2", "lr is in more than one of [grid], [[list]], [random] and [study]"),
        ("[grid]\nseed = [1, 2]", "seed cannot be set in a sweep file; set seeds"),
        ("[base]\nout = 'here'", "out cannot be set in a sweep file"),
        ("seed = 3", "unknown key 'seed'; recipe options belong under [base]; did you mean 'seeds'?"),
        ("seeds = []", "seeds "),
        ("seeds = -1", "seeds "),
        ("[random]\nlr.log = [1, 2]", "random.n "),
        ("[random]\nn = 2\nlr.log = [0, 2]", "invalid range lr.log = [0, 2]"),
        ("[random]\nn = 2\nlr.lgo = [1, 2]", "unknown kind of range 'lgo'; did you mean 'log'?"),
        ("[random]\nn = 2\nlr = 3", "invalid range 3 for lr"),
        ("[random]\nn = 2\nbatch_size.integer = [1.5, 2]", "invalid range batch_size.integer = [1.5, 2]"),
        ("[random", "is not a readable TOML file"),
        ("[random]\nn = 100001\nlr.log = [1, 2]", "the sweep has 100,001 trials, more than 100,000; give fewer"),
        (
            f"seeds = 10\n[grid]\nlr = {[1, 2] * 50}\nmin_lr = {[0] * 101}\n[[list]]\nlabel = 'a'",
            "the sweep has 101,000 trials, more than 100,000",
        ),
        ("[random]\nn = 5", "[random] or [study] has no range; add one"),
        ("seeds = 'abc'", "seeds should be a positive number of seeds, or a list of seeds (got 'abc')"),
        ("seeds = 0", "seeds should be a positive number of seeds"),
        ("seeds = 1000000000", "seeds are more than 100,000 (got 1000000000)"),
    ],
)
def test_fault15_fault46_errors_in_a_sweep_file_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(tmp_path, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["uniform", "log"])
def test_random_points_of_a_narrow_range_are_different_and_within_it(tmp_path: Path, kind: str) -> None:
    trials = expand(tmp_path, f"[random]\nn = 40\nema_decay.{kind} = [0.9995, 0.99999]")
    values = [trial.recipe.ema_decay for trial in trials]
    assert len(set(values)) == len(values) == 40
    assert all(0.9995 <= value <= 0.99999 for value in values)
    assert all(f"ema_decay={value}" == trial.label for value, trial in zip(values, trials, strict=True))


def test_unknown_sweep(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown sweep 'row'; .*; did you mean 'rows'"):
        read_sweep_spec("row")


def test_shipped_sweeps() -> None:
    counts = {name: len(expand_trials(*read_sweep_spec(name))) for name in shipped_sweeps()}
    rows = {"rows": 7 * 3, "rows-small": 7 * 3}
    assert counts == {**rows, "res512-activations": 5 * 3, "res512-optimizers": 8 * 3, "speed94": 6 * 6}
    rows = expand_trials(*read_sweep_spec("rows"))
    for number, trial in enumerate(rows[:7], start=1):
        assert trial.label == trial.recipe_name == f"row{number}"
        assert trial.recipe == Recipe.make(f"row{number}")
