"""Exit codes and messages of errors; lookup of names in tables with suggestions."""

from __future__ import annotations

import pytest

from fastcifar import errors


def test_exit_codes_are_those_documented() -> None:
    names = ["UsageError", "DataError", "CheckpointError", "NonFiniteError", "InsufficientMemoryError", "DiskError"]
    codes = {kind.__name__: kind.exit_code for kind in errors.UserError.__subclasses__() if kind.exit_code != 1}
    assert codes == {**dict(zip(names, range(2, 8), strict=True)), "DeviceError": 8}
    assert errors.Interrupted("SIGTERM", 143, 7, "runs/a").exit_code == 143


def test_messages_of_errors_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert [str(errors.UsageError("a", "b")), str(errors.UsageError("a"))] == ["a; b", "a"]
    errors.print_warning(UserWarning("odd"), UserWarning, "file.py", 3)
    assert capsys.readouterr().err == "fastcifar: warning: odd\n"


@pytest.mark.parametrize(
    ("name", "remedy"), [("se86", "did you mean 'se68'?"), ("zzz", "choose from coconut, se68")]
)  # fmt: skip
def test_lookup_suggests_the_most_similar_name(name: str, remedy: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        errors.lookup({"se68": 1, "coconut": 2}, name, "architecture")
    assert caught.value.problem == f"unknown architecture {name!r}"
    assert caught.value.remedy == remedy
    assert errors.lookup({"se68": 1}, "se68", "architecture") == 1
