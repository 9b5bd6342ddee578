"""A sweep file becomes its trials: how many, under which names, by which recipes; or is refused beforehand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.sweep.sweep_spec import SweepTrial, expand_trials, read_sweep_spec, shipped_sweeps


def trials(folder: Path, text: str, seeds: str | None = None, **flags: Any) -> list[SweepTrial]:
    """The trials of a sweep file of this text."""
    (folder / "mine.toml").write_text(text)
    asked, name = read_sweep_spec(str(folder / "mine.toml"), seeds, flags)
    return expand_trials(asked, name)


def test_axes_multiply_seed_by_seed(tmp_path: Path) -> None:
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
    found = trials(tmp_path, text)
    assert len(found) == len({trial.key for trial in found}) == 2 * 2 * 2 * 2
    assert [trial.recipe.seed for trial in found] == [3] * 8 + [1] * 8
    assert {trial.label for trial in found[:8]} == {trial.label for trial in found[8:]}
    first, last = found[0], found[-1]
    assert first.label == "plain, lr=0.1, blocks=1,1"
    assert last.label == "row1, weight_decay=0.0, lr=0.2, blocks=2,2"
    assert (first.recipe_name, last.recipe_name) == ("quick", "row1")
    quick, row1 = Recipe.make("quick"), Recipe.make("row1")
    mine = {"epochs": 7, "lr": 0.1, "blocks": (1, 1), "arch": "resnet", "seed": 3}
    assert first.recipe == quick.model_copy(update=mine)
    mine = {"epochs": 7, "lr": 0.2, "blocks": (2, 2), "weight_decay": 0.0, "seed": 1}
    assert last.recipe == row1.model_copy(update=mine)
    assert first.options == {"arch": "resnet", "lr": 0.1, "blocks": [1, 1]}
    assert last.options.items() >= {"arch": "se55", "batch_size": 32, "optimizer": "lookahead:sgd", "lr": 0.2}.items()
    assert "epochs" not in last.options


def test_flags_stand_above_recipes_and_base_but_not_above_an_axis(tmp_path: Path) -> None:
    text = "recipe = 'quick'\n[base]\nepochs = 7\n[grid]\nlr = [0.1]\n[[list]]\nrecipe = 'row1'"
    (found,) = trials(tmp_path, text, epochs="3", batch_size="256")
    assert (found.recipe.arch, found.recipe.epochs, found.recipe.batch_size) == ("se55", 3, 256)
    assert found.options.keys() >= {"arch"}
    assert not {"epochs", "batch_size"} & found.options.keys()
    with pytest.raises(UsageError, match="--lr: lr is an axis of this sweep; leave it out"):
        trials(tmp_path, text, lr="0.3")
    assert [trial.recipe.seed for trial in trials(tmp_path, text, seeds="3")] == [0, 1, 2]
    assert [trial.recipe.seed for trial in trials(tmp_path, text, seeds="5,2")] == [5, 2]


def test_random_points_are_of_their_seed_and_range_and_more_of_them_begin_with_the_fewer(tmp_path: Path) -> None:
    ranges = "lr.log = [0.001, 1.0]\ndropout.uniform = [0.0, 0.5]\nbatch_size.integer = [3, 5]\n"
    ranges += "optimizer.choice = ['sgd', 'adamw']\n"
    found = trials(tmp_path, f"[random]\nn = 200\nsampler_seed = 4\n{ranges}")
    assert len(found) == 200
    recipes = [trial.recipe for trial in found]
    assert {recipe.batch_size for recipe in recipes} == {3, 4, 5}
    assert {recipe.optimizer for recipe in recipes} == {"sgd", "adamw"}
    assert all(0 <= (recipe.dropout or 0) < 0.5 for recipe in recipes)
    logs = [math.log10(recipe.lr) for recipe in recipes]
    assert all(-3 <= value <= 0 for value in logs)
    assert abs(sum(logs) / 200 + 1.5) < 4 * (3 / math.sqrt(12)) / math.sqrt(200)  # four standard errors of the mean
    fewer = trials(tmp_path, f"[random]\nn = 20\nsampler_seed = 4\n{ranges}")
    assert [trial.key for trial in fewer] == [trial.key for trial in found[:20]]
    other = trials(tmp_path, f"[random]\nn = 20\nsampler_seed = 5\n{ranges}")
    assert not {trial.key for trial in other} & {trial.key for trial in fewer}
    assert float(found[0].label.split("lr=")[1].split(",")[0]) == found[0].recipe.lr


def test_a_key_lasts_as_long_as_label_seed_and_experiment_do(tmp_path: Path) -> None:
    text = "[grid]\nlr = [0.1, 0.05]\n[[list]]\nlabel = 'a / b'\n"
    first, second = trials(tmp_path, text)
    assert first.key == "a-b-lr=0.1-s0-303cdab2"  # another one would have every sweep that was begun run anew
    assert [t.key for t in trials(tmp_path, text, save_every_epochs="5", batch_size="128")] == [first.key, second.key]
    changed = [trials(tmp_path, text, **flags)[0].key for flags in ({"epochs": "9"}, {"batch_size": "64"})]
    assert len({first.key, *changed}) == 3
    assert trials(tmp_path, text.replace("a / b", "c"))[0].key != first.key


def test_the_copy_in_the_sweeps_folder_asks_for_the_same(tmp_path: Path) -> None:
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
    found = trials(tmp_path, text, max_params="6000000", augment="none")
    asked, _ = read_sweep_spec(str(tmp_path / "mine.toml"), None, {"max_params": "6000000", "augment": "none"})
    folder = tmp_path / "sweeps" / "mine"
    folder.mkdir(parents=True)
    (folder / "sweep.toml").write_text(asked.to_toml())
    again, name = read_sweep_spec(str(folder))
    assert (expand_trials(again, name), name) == (found, "mine")
    assert len(found) == 2 * 2 * 3 * 2
    assert found[0].recipe.arch == "se55"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[base]\nlrr = 0.1", "unknown recipe key 'lrr'; did you mean 'lr'?"),
        ("[grid]\nactivaton = ['relu']", "unknown recipe key 'activaton'; did you mean 'activation'?"),
        ("[grid]\nactivation = ['relu', 'rely']", "activation=rely: --activation should be 'relu'"),
        ("[grid]\nlr = []", "grid.lr "),
        ("[[list]]\nlabel = 1", "list.0 label should be text (got {'label': 1})"),
        ("[[list]]\nlr = 0.1\n[[list]]\nrecipe = 1", "list.1 recipe should be text (got {'recipe': 1})"),
        ("[[list]]\nlr = 0.1\n[[list]]\nlr = -1", "lr=-1: --lr should be greater than 0"),
        ("[[list]]\nlr = 0.1\n[[list]]\nlr = 0.1", "two rows of [[list]] are called 'lr=0.1'"),
        ("[[list]]\nrecipe = 'row11'", "no recipe 'row11'; did you mean"),
        ("[grid]\nlr = [0.1]\n[[list]]\nlr = 0.2", "lr has two axes"),
        ("[grid]\nseed = [1, 2]", "seed is no knob of a sweep; write seeds"),
        ("[base]\nout = 'here'", "out is no knob of a sweep"),
        ("seed = 3", "unknown key 'seed'; did you mean 'seeds'?"),
        ("seeds = []", "seeds "),
        ("seeds = -1", "seeds "),
        ("[random]\nlr.log = [1, 2]", "random.n "),
        ("[random]\nn = 2\nlr.log = [0, 2]", "lr.log = [0, 2] is no range"),
        ("[random]\nn = 2\nlr.lgo = [1, 2]", "unknown kind of range 'lgo'; did you mean 'log'?"),
        ("[random]\nn = 2\nlr = 3", "the range of lr is 3"),
        ("[random]\nn = 2\nbatch_size.integer = [1.5, 2]", "is no range"),
        ("[random", "is not a readable TOML file"),
    ],
)
def test_fault15_what_is_wrong_in_a_sweep_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        trials(tmp_path, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sweep 'row'; did you mean 'rows'"):
        read_sweep_spec("row")


def test_the_shipped_sweeps() -> None:
    counts = {name: len(expand_trials(*read_sweep_spec(name))) for name in shipped_sweeps()}
    assert counts == {"rows": 7 * 3, "rows-small": 7 * 3, "res512-activations": 5 * 3, "res512-optimizers": 8 * 3}
    rows = expand_trials(*read_sweep_spec("rows"))
    for number in range(7):
        assert rows[number].label == rows[number].recipe_name == f"row{number + 1}"
        assert rows[number].recipe == Recipe.make(f"row{number + 1}")
