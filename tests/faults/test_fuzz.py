"""Every file reader with damaged files; recipes with arbitrary values."""

from __future__ import annotations

import io
import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from fastcifar.data.predict_inputs import read_inputs
from fastcifar.errors import UsageError
from fastcifar.evaluation.prediction_files import read_predictions, write_predictions
from fastcifar.recipe import Recipe
from fastcifar.reporting import aggregate, records, runs
from fastcifar.reporting.table import TABLE_FORMATS, build_report_table
from tests.faults.fuzz import READERS, fuzz_reader, mutate, mutate_types
from tests.reporting.run_folders import write_run

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


@pytest.mark.medium
@pytest.mark.parametrize("name", READERS)
def test_fault08_fault09_fault10_damaged_files_are_rejected_or_read(name: str, tmp_path: Path) -> None:
    seeds = READERS[name][0]
    assert fuzz_reader(name, iter(seeds))["read"] == len(seeds)
    rng = random.Random(name)
    assert fuzz_reader(name, (mutate(rng, seeds) for _ in range(250)))["inputs"] == 250


@pytest.mark.medium
@pytest.mark.parametrize("name", ["manifest", "env.json", "metrics.csv", "events.jsonl", "recipe file", "checkpoint",
                                  *(name for name in READERS if name.endswith("of a report"))])  # fmt: skip
def test_fault38_documents_of_other_types_are_rejected_or_read(name: str) -> None:
    rng = random.Random(name)
    assert fuzz_reader(name, (mutate_types(rng, READERS[name][0]) for _ in range(250)))["inputs"] == 250


@pytest.mark.medium
@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*OPTIONS, "lrr", "batchsize"]), VALUES, max_size=4))
def test_fault15_arbitrary_recipe_values_are_accepted_or_rejected_in_one_line(values: dict[str, Any]) -> None:
    message, recipe = "", None
    try:
        recipe = Recipe(**{name: value for name, value in values.items() if value is not None})
    except UsageError as error:
        message = str(error)
    assert "\n" not in message
    assert recipe is None or Recipe(**recipe.model_dump(mode="json")) == recipe


@pytest.mark.medium
@settings(max_examples=100)
@given(text=st.text(max_size=30), key=st.sampled_from(["data", "out", "resume", "loader"]))
def test_any_text_survives_a_recipe_file_round_trip(
    tmp_path_factory: pytest.TempPathFactory, text: str, key: str
) -> None:
    recipe = Recipe(**{key: text})
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.make(str(path)) == recipe


# names of files of at most 200 bytes: any characters, some that terminals, markup, CSV, URIs and shells interpret
NAMES = st.text(
    st.one_of(
        st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]),
        st.sampled_from("\n\x1b[]%?#~=+-@;,'\" "),
    ),
    min_size=1,
    max_size=40,
).filter(lambda name: name not in (".", "..") and len(name.encode()) <= 200)


@pytest.mark.medium
@settings(max_examples=40)
@given(names=st.lists(NAMES, min_size=2, max_size=2, unique=True))
def test_fault31_runs_of_any_name_are_listed_and_reported(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        write_run(folder / "all" / name, [0.5])
    entries = runs.list_runs(folder)
    assert sorted(entry["name"] for entry in entries) == sorted(str(folder / "all" / name) for name in names)
    table = build_report_table(aggregate.group_runs(records.read_records([folder])))
    for render in TABLE_FORMATS.values():
        console = Console(record=True, width=80, file=io.StringIO())
        console.print(render(table), markup=False)
        assert "\x1b" not in console.export_text()


@settings(max_examples=40)
@given(names=st.lists(NAMES.filter(lambda name: not name.startswith(".")), min_size=1, max_size=4, unique=True))
def test_fault31_images_of_any_name_are_predicted_under_their_name(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("images")
    (folder / "images").mkdir()
    for name in names:
        Image.new("RGB", (32, 32)).save(folder / "images" / f"{name}.png")
    inputs = read_inputs(str(folder / "images"))
    assert sorted(map(str, inputs.ids)) == sorted(names)
    for file in ("a.csv", "a.jsonl"):
        write_predictions(folder / file, {"ID": inputs.ids, "Labels": [3] * len(names)})
    lines = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["ID"] for line in lines] == inputs.ids
    assert len(read_predictions(folder / "a.csv")) == len(names)
