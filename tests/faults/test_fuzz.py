"""Every file reader with damaged files; recipes with arbitrary values."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from tests.faults.fuzz import READERS, fuzz_reader, mutate, mutate_types

OPTIONS = sorted(Recipe.model_fields)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.text(string.printable, max_size=12),
    st.sampled_from(["auto", "1e", "500s", "4,4,3", "a=1", "best", "se68", "cosine:0.5", "value:0.1"]),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(string.ascii_letters, max_size=5), st.integers(), max_size=2),
)


@pytest.mark.parametrize("name", READERS)
def test_fault08_fault09_fault10_damaged_files_are_rejected_or_read(name: str, tmp_path: Path) -> None:
    seeds = READERS[name][0]
    assert fuzz_reader(name, iter(seeds))["read"] == len(seeds)
    rng = random.Random(name)
    assert fuzz_reader(name, (mutate(rng, seeds) for _ in range(250)))["inputs"] == 250


@pytest.mark.parametrize("name", ["manifest", "env.json", "events.jsonl", "summary.json of a report",
                                  "trials.jsonl of a report"])  # fmt: skip
def test_fault38_documents_of_other_types_are_rejected_or_read(name: str) -> None:
    rng = random.Random(name)
    assert fuzz_reader(name, (mutate_types(rng, READERS[name][0]) for _ in range(250)))["inputs"] == 250


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*OPTIONS, "lrr", "batchsize"]), VALUES, max_size=4))
def test_fault15_arbitrary_recipe_values_are_accepted_or_rejected_in_one_line(values: dict[str, Any]) -> None:
    message, recipe = "", None
    try:
        recipe = Recipe(**{name: value for name, value in values.items() if value is not None})
    except UsageError as error:
        message = str(error)
    assert "\n" not in message
    assert recipe is None or Recipe(**recipe.model_dump(mode="json")) == recipe


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), key=st.sampled_from(["data", "out", "resume", "loader"]))
def test_any_text_survives_a_recipe_file_round_trip(
    tmp_path_factory: pytest.TempPathFactory, text: str, key: str
) -> None:
    recipe = Recipe(**{key: text})
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.make(str(path)) == recipe
