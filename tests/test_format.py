"""Formatting of numbers, times and option values."""

from __future__ import annotations

import io
import time
import tomllib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from fastcifar.format import (
    KeyValueTable,
    NumericTable,
    add_wrap_points,
    csv_cell,
    format_count,
    format_decimal,
    format_differences,
    format_duration,
    format_mean_std,
    format_memory,
    format_option_value,
    format_options,
    format_percent,
    format_short_number,
    format_timestamp,
    format_toml_value,
    one_line,
    option_flag,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_percent(0.9399), "93.99 %"),
        (format_percent(0.0), "0.00 %"),
        (format_percent(0.984, 0), "98 %"),
        (format_decimal(1234.5, 2), "1,234.50"),
        (format_decimal(-0.00004, 4), "-0.0000"),
        (format_decimal(0.91234, 1, 100), "91.2"),
        (format_count(4_697_742), "4,697,742"),
        (format_count(0), "0"),
        (format_count(7.5), "7.5"),
        (format_count(np.float64(12)), "12"),
        (format_short_number(12345.6), "12,346"),
        (format_short_number(100.4), "100"),
        (format_short_number(99.44), "99.4"),
        (format_short_number(0.012345), "0.0123"),
        (format_short_number(-1234), "-1,234"),
        (format_mean_std(0.9399, 0.00123, scale=100), "93.99 ± 0.12"),
        (format_mean_std(2300.94, 220.31, 1), "2300.9 ± 220.3"),
        (format_mean_std(0.3, None, scale=100), "30.00"),
        (format_memory(3 * 2**30 // 2), "1.50 GiB"),
        (format_duration(0), "0.0 s"),
        (format_duration(9.49), "9.5 s"),
        (format_duration(9.5), "0:00:10"),
        (format_duration(7300.4), "2:01:40"),
        (format_timestamp(1_795_238_422.9), "2026-11-21T05:20:22Z"),
        (format_timestamp(1_795_238_422.9, for_file_name=True), "20261121T052022Z"),
        (option_flag("save_every_epochs"), "--save-every-epochs"),
        (add_wrap_points("crop:4:zero,flip,1,2"), "crop:4:zero, flip,1,2"),
        (one_line("  a\n\tb\x00\u202ec\x1b[1m "), r"a b\x00\u202ec\x1b[1m"),
    ],
)
def test_formatted_text(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@a", "'@a"), ("\t=1", "'\t=1"), ("\r=1", "'\r=1"),
        (-1, -1), (-0.5, -0.5), (None, None), ("a=1", "a=1"), ("", ""), ("'=1", "'=1"),
    ],
)  # fmt: skip
def test_fault43_texts_that_a_spreadsheet_would_execute_are_neutralized(cell: object, expected: object) -> None:
    assert csv_cell(cell) == expected
    assert type(csv_cell(cell)) is type(expected)


def test_missing_values_are_dashes() -> None:
    functions = (format_percent, format_count, format_short_number, format_duration, format_option_value, format_memory)
    assert {format_decimal(None, 2, 100), *(function(None) for function in functions)} == {"-"}


def test_timestamp_is_the_current_time_in_utc_in_every_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    before = time.time()
    texts = [format_timestamp(0), format_timestamp(before), format_timestamp(), format_timestamp(time.time())]
    monkeypatch.undo()
    time.tzset()
    assert texts[0] == "1970-01-01T00:00:00Z"
    assert sorted(texts) == texts


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "on"),
        (False, "off"),
        ("value:0.1", "value:0.1"),
        (5_000_000, "5000000"),
        (5e-4, "0.0005"),
        (200.0, "200"),
        (np.float64(0.1234567), "0.1234567"),
        ((4, 4, 3), "4,4,3"),
        ([], ""),
        ({"nesterov": True, "momentum": 0.9, "betas": [0.9, 0.99]}, "nesterov=true, momentum=0.9, betas=[0.9, 0.99]"),
        ({}, "-"),
        (["two\nlines", "b"], "two lines,b"),
    ],
)
def test_formatted_option_values(value: Any, expected: str) -> None:
    assert format_option_value(value) == expected
    assert format_option_value(value, "unset") == (expected if value != {} else "unset")


@pytest.mark.medium
@given(st.floats(allow_nan=False))
def test_different_numbers_have_different_texts(value: float) -> None:
    assert float(format_option_value(value)) == value


def test_formatted_options_and_differences() -> None:
    options = {"arch": "se68", "blocks": (4, 4, 3), "bias_decay": False}
    assert format_options(options) == "arch=se68, blocks=4,4,3, bias_decay=off"
    assert format_options(options, separator=" ") == "arch=se68 blocks=4,4,3 bias_decay=off"
    assert format_options({}) == format_differences({}, {}, []) == ""
    before, after = {"lr": 0.1, "blocks": [4, 4, 3], "width": None}, {"lr": 0.5, "blocks": [1], "width": 2.0, "seed": 1}
    assert format_differences(before, after, ["lr", "width"]) == "lr 0.1, not 0.5, width unset, not 2"
    assert format_differences(before, after, ["seed"]) == "seed unset, not 1"
    assert format_differences(before, after, ["blocks"], str.upper) == "BLOCKS 4,4,3, not 1"


def printed(renderable: RenderableType, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(renderable, crop=False)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_columns_of_a_table_are_left_out_to_fit_the_width() -> None:
    table = NumericTable(["what"], ("images/s", "range", "unmeasured", "GB/s", "of copy"), num_required=1)
    table.add_row("loader", "5,000", "4,500-6,000", "-", "-", "-")
    table.add_row("step [bold] eager", "160", "144-192", "", "12.3", "30 %")
    full = ["what               images/s        range  GB/s  of copy",
            "loader                5,000  4,500-6,000     -        -",
            "step [bold] eager       160      144-192  12.3     30 %"]  # fmt: skip
    assert printed(table, 80) == printed(table, len(full[0])) == full
    narrow = [line[:40] for line in full]
    note = ["left out to fit 54 columns: of copy; --json prints all", "values"]
    assert printed(table, 54) == [line[:46] for line in full] + note
    assert printed(table, 40)[:3] == narrow
    assert printed(table, 12)[2:4] == ["step [bold]            160", "eager"]  # a text column keeps 16 characters


@given(st.lists(st.text("abc d", min_size=1), min_size=1, max_size=4), st.integers(30, 100))
def test_tables_cut_no_text(names: list[str], width: int) -> None:
    table = NumericTable(["name"], ("first", "second"), num_required=1, path="path")
    for name in names:
        table.add_row(name, "12,345", "1.5", f"/tmp/{'x' * 40}/{len(name)}")
    lines = printed(table, width)
    words = [word for line in lines for word in line.split()]
    assert not {word for name in names for word in name.split()} - set(words)
    assert words.count("12,345") == len(names)
    assert {f"/tmp/{'x' * 40}/{len(name)}" for name in names} <= set(words)
    lines = printed(KeyValueTable(dict(zip("abcd", names, strict=False))), width)
    assert not {word for name in names for word in name.split()} - {word for line in lines for word in line.split()}
    assert all(len(line) <= width or " " not in line[3:].strip() for line in lines)


# values that a recipe or sweep file can hold; surrogates cannot occur in a UTF-8 file
TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
NUMBERS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
TOML_VALUES = st.recursive(
    NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(TOML_VALUES)
def test_toml_values_round_trip(value: Any) -> None:
    assert tomllib.loads(f"key = {format_toml_value(value)}\n") == {"key": value}
    assert format_toml_value((value, (1,))) == format_toml_value([value, [1]])
