"""Exit codes and messages of errors; lookup of names in tables with suggestions."""

from __future__ import annotations

import pytest

from fastcifar import errors


def test_exit_codes_are_those_documented() -> None:
    codes = {
        error_type.__name__: error_type.exit_code
        for error_type in errors.UserError.__subclasses__()
        if error_type.exit_code != 1
    }
    assert codes == {
        "UsageError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "NonFiniteError": 5,
        "InsufficientMemoryError": 6,
        "DiskError": 7,
        "DeviceError": 8,
    }
    assert errors.Interrupted("SIGTERM", 143, 7, "last.pt").exit_code == 143


def test_a_warning_is_one_line_without_its_position_in_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    errors.print_warning(UserWarning("odd"), UserWarning, "file.py", 3)
    assert capsys.readouterr().err == "fastcifar: warning: odd\n"


def test_message_is_the_problem_and_the_remedy() -> None:
    assert str(errors.UsageError("a", "b")) == "a; b"
    assert str(errors.UsageError("a")) == "a"


@pytest.mark.parametrize(
    ("name", "remedy"), [("se86", "did you mean 'se68'?"), ("zzz", "choose from coconut, se68")]
)  # fmt: skip
def test_lookup_suggests_the_most_similar_name(name: str, remedy: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        errors.lookup({"se68": 1, "coconut": 2}, name, "architecture")
    assert caught.value.problem == f"unknown architecture {name!r}"
    assert caught.value.remedy == remedy
    assert errors.lookup({"se68": 1}, "se68", "architecture") == 1
