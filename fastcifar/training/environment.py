"""The environment of a run: env.json. It is read without torch."""

from pathlib import Path

from pydantic import Field, ValidationError

from fastcifar.device import Environment
from fastcifar.files import read_regular_file


class LaunchEnvironment(Environment):
    """The environment of a process that trained a run, its command line and its start time."""

    command: list[str] = Field(default_factory=list)
    started: str = ""


class RunEnvironment(LaunchEnvironment):
    """The content of env.json: the recipe's name and the processes that started and that resumed the run."""

    recipe: str = ""
    resumed: list[LaunchEnvironment] = Field(default_factory=list)


def read_environment(folder: Path) -> RunEnvironment:
    """Return env.json of a run folder; an empty environment if the file is missing or invalid."""
    try:
        return RunEnvironment.model_validate_json(read_regular_file(folder / "env.json"))
    except (OSError, ValidationError):
        return RunEnvironment()
