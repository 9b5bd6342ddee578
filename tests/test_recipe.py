"""The recipe: defaults, syntax on the command line and in files, bounds, and error messages."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcifar.errors import UsageError
from fastcifar.recipe import SECTION_STARTS, Recipe, default_val_size, section_fields
from fastcifar.recipes import load_recipe_values, shipped_recipes


def test_defaults_are_row_3_with_a_validation_split() -> None:
    recipe = Recipe()
    assert (recipe.arch, recipe.epochs, recipe.batch_size, recipe.val_size) == ("se68", 200, 128, None)
    assert (default_val_size(50_000), default_val_size(1000), default_val_size(5)) == (5000, 100, 1)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == ("lookahead:sgd", 0.1, 5e-4)
    assert (recipe.schedule, recipe.min_lr, recipe.clip_grad) == ("cosine", 0.0, "value:0.1")
    assert recipe.eval_weights == "last"


def test_command_line_syntax_and_file_syntax_are_equivalent() -> None:
    from_command_line = Recipe.make(
        blocks="4,4,3", lr="0.2", compile=True, optimizer_arg=["nesterov=true", "momentum=.9", "betas=[.9,.99]"]
    )
    from_file = Recipe.make(blocks=[4, 4, 3], lr=0.2, compile=True,
                        optimizer_arg={"nesterov": True, "momentum": 0.9, "betas": [0.9, 0.99]})  # fmt: skip
    assert from_command_line == from_file
    assert from_command_line.blocks == (4, 4, 3)


def test_none_is_not_an_override_and_defaults_are_not_listed(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("lr = 0.3\narch = 'se68'\n")
    assert Recipe.make(str(file), lr=None).non_default_options() == {"lr": 0.3}
    assert Recipe.make(str(file), lr=0.4).non_default_options() == {"lr": 0.4}


VALUES = st.builds(
    dict,
    lr=st.floats(1e-6, 100),
    epochs=st.integers(1, 1000),
    seed=st.integers(0, 2**63 - 1),
    blocks=st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.none() | st.text(st.characters(codec="utf-8"), max_size=20),
    drop_last=st.booleans(),
    optimizer_arg=st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.booleans() | st.integers(0, 9)),
)


@pytest.mark.parametrize("name", ["out", "data", "resume"])
def test_fault31_a_path_that_is_not_utf8_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(**{name: "caf\udce9"})
    assert str(caught.value) == rf"--{name} caf\udce9 is not UTF-8; use a name in UTF-8"


@pytest.mark.parametrize(
    ("source", "options", "expected", "message"),
    [
        ("quick", {"epochs": "1"}, {"warmup_epochs": 0.2}, "from 12 epochs to 1: --warmup-epochs 0.2 instead of 2.4"),
        ("quick", {"epochs": 24}, {"warmup_epochs": 4.8}, "--warmup-epochs 4.8 instead of 2.4"),
        ("quick", {"epochs": 12}, {"warmup_epochs": 2.4}, ""),
        ("quick", {"epochs": 1, "warmup_epochs": 0.5}, {"warmup_epochs": 0.5}, ""),
        ("speed94", {"epochs": 2}, {"image_size": "32"}, "--image-size 32 instead of 24:3,28:2,32"),
        ("speed94", {"epochs": 18}, {"image_size": "24:6,28:4,32"}, "--image-size 24:6,28:4,32 instead of"),
        ("speed94", {"epochs": 2, "image_size": "16:1,32"}, {"image_size": "16:1,32"}, ""),
        # its schedule is deliberately longer than the run
        ("mini", {"epochs": 3}, {"epochs": 3, "schedule_epochs": 200}, ""),
        # a resumed run keeps its own options; with auto, those of the recipe are the ones that it has to have
        ("quick", {"epochs": 24, "resume": "runs/a"}, {"warmup_epochs": 2.4}, ""),
        ("quick", {"epochs": 24, "resume": "auto"}, {"warmup_epochs": 4.8}, "--warmup-epochs 4.8 instead of 2.4"),
        (None, {"epochs": 3}, {"epochs": 3, "warmup_epochs": 0.0}, ""),
    ],
)
def test_a_recipe_is_scaled_to_another_number_of_epochs(
    source: str | None, options: dict, expected: dict, message: str
) -> None:
    recipe = Recipe.make(source, **options)
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert recipe.epochs == int(options["epochs"])
    text = Recipe.describe_scaling(source, **options)
    assert message in text if message else text == ""


@pytest.mark.medium
@given(VALUES)
def test_toml_round_trip(values: dict) -> None:
    recipe = Recipe(**{key: value for key, value in values.items() if value is not None})
    assert Recipe(**tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": "-1"}, ["--lr", "greater than 0", "-1"]),
        ({"lr": "fast"}, ["--lr", "number"]),
        ({"lr": "nan"}, ["--lr", "finite"]),
        ({"epochs": 0}, ["--epochs"]),
        ({"batch_sise": 3}, ["batch_sise", "did you mean 'batch_size'?"]),
        ({"conv": "sep"}, ["--conv", "'full' or 'separable'"]),
        ({"blocks": "4,x"}, ["--blocks"]),
        ({"blocks": "4,0"}, ["--blocks"]),
        ({"channels": [8, -8]}, ["--channels"]),
        ({"width": 0}, ["--width"]),
        ({"dropout": 1}, ["--dropout"]),
        ({"se_reduction": 0}, ["--se-reduction"]),
        ({"optimizer_arg": ["momentum"]}, ["--optimizer-arg", "key=value"]),
        ({"optimizer_arg": ["eps=1e999"]}, ["--optimizer-arg", "numbers, text, true or false", "eps=inf"]),
        ({"optimizer_arg": {"betas": [0.9, float("nan")]}}, ["--optimizer-arg", "betas="]),
        ({"optimizer_arg": ["eps=None"]}, ["--optimizer-arg", "eps=None"]),
        ({"val_size": 0, "eval_weights": "best"}, ["--eval-weights best", "--val-size"]),
        ({"val_size": 0, "patience": 3}, ["--patience", "--val-size"]),
        ({"eval_weights": "ema"}, ["--eval-weights ema", "--ema-decay"]),
    ],
)
def test_fault15_invalid_values_are_refused_in_one_line(values: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.make(**values)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_fault15_invalid_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "quikc.toml"
    with pytest.raises(UsageError, match=r"no recipe .*quikc.toml.* give the path of a TOML file"):
        Recipe.make(str(file))
    for content, message in (("lr = = 3", "not a readable TOML file"), ("epoch = 3", "did you mean 'epochs'")):
        file.write_text(content)
        with pytest.raises(UsageError, match=message):
            Recipe.make(str(file))


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_list_only_non_default_options(name: str) -> None:
    assert Recipe.make(name).non_default_options().keys() == load_recipe_values(name).keys()


def test_sections_cover_every_field_once_and_every_field_has_a_description() -> None:
    assert [field for name in SECTION_STARTS for field in section_fields(name)] == list(Recipe.model_fields)
    assert [name for name, field in Recipe.model_fields.items() if not field.description] == []
