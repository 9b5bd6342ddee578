"""README and docs agree with the package: commands parse, examples run, and the names in the tables exist."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fastcifar import errors
from fastcifar._version import __version__
from fastcifar.cli.app import app
from fastcifar.recipe import Recipe
from fastcifar.recipes import shipped_recipes
from fastcifar.sweep.executors import EXECUTORS
from fastcifar.sweep.sweep_spec import expand_trials, read_sweep_spec, shipped_sweeps
from fastcifar.training.lr_schedule import SCHEDULES
from fastcifar.training.optimizers import OPTIMIZERS, SELF_SCHEDULED_OPTIMIZERS
from tests.documentation import DOCUMENTATION, PAGES, ROOT, section

PACKAGE = ROOT / "fastcifar"
CODE_BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENTATION, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```$", "", DOCUMENTATION, flags=re.DOTALL | re.MULTILINE)
INLINE_CODE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", PROSE)]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SHELL_LINES = "".join(block.replace("\\\n", " ") for language, block in CODE_BLOCKS if language == "bash").splitlines()
COMMAND_LINES = [line for line in SHELL_LINES if re.search(r"\bfastcifar ", line)]  # those that start fastcifar


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The Click command that `words` name, and the words after its name."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command, words


def parse_command_line(line: str) -> dict[str, Any]:
    """The parameters of a command line that starts fastcifar. Raises what Click and `Recipe` raise."""
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    start = next(number for number, word in enumerate(words) if Path(word).name == "fastcifar")
    command, arguments = find_command(words[start + 1 :])
    parameters = command.make_context(command.name, arguments).params
    options = {name: value for name, value in parameters.items() if name in Recipe.model_fields}
    Recipe.make(parameters.get("recipe"), **{**options, "out": None})
    return parameters


def command_flags(command: Any) -> set[str]:
    """All flags of a command, such as --lr, --no-compile and --help."""
    return {"--help"} | {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def all_commands() -> dict[str, Any]:
    """Every command by its full name, such as `runs ls`."""
    root: Any = typer.main.get_command(app)
    commands: dict[str, Any] = {}
    for name, command in root.commands.items():
        children = {f"{name} {child}": value for child, value in getattr(command, "commands", {}).items()}
        commands |= children or {name: command}
    return commands


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_of_code_blocks_parse(line: str) -> None:
    parse_command_line(line)


def test_code_blocks_contain_command_lines() -> None:
    assert len(COMMAND_LINES) >= 15
    assert parse_command_line("torchrun -m fastcifar train --batch-size 1024")["batch_size"] == "1024"
    with pytest.raises(Exception, match="Missing parameter: out"):
        parse_command_line("fastcifar predict runs/a images")


@pytest.mark.medium
def test_flags_of_inline_code_exist() -> None:
    root: Any = typer.main.get_command(app)
    flags = command_flags(root).union({"--install-completion"}, *map(command_flags, all_commands().values()))
    for path in [*(ROOT / "bench").rglob("*.py"), *(ROOT / "scripts").iterdir()]:
        flags.update(FLAG.findall(path.read_text(encoding="utf-8")))
    for code in INLINE_CODE:
        if code.startswith("pip "):
            continue
        assert set(FLAG.findall(code)) <= flags, code
        if re.match(r"(scripts/)?fastcifar [a-z]", code):
            command, words = find_command(code.split()[1:])
            assert set(FLAG.findall(" ".join(words))) <= command_flags(command), code


def test_every_command_and_shipped_recipe_is_in_the_tables() -> None:
    assert [name for name in all_commands() if f"| `fastcifar {name}" not in section("Commands")] == []
    assert [name for name in shipped_recipes() if f"`{name}`" not in section("Recipes")] == []


def test_sweep_file_and_shipped_sweeps(tmp_path: Path) -> None:
    text = section("Sweeps")
    first, study = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "first.toml").write_text(first)
    assert len(expand_trials(*read_sweep_spec(str(tmp_path / "first.toml")))) == 2 * 2 * 10 * 3
    (tmp_path / "study.toml").write_text(study)
    spec, _ = read_sweep_spec(str(tmp_path / "study.toml"))
    assert spec.study is not None
    assert spec.study.ranges.keys() == {"lr", "optimizer"}
    assert all(f"`{name}`" in text for name in (*shipped_sweeps(), *EXECUTORS))


def test_optimizers_and_schedules_are_those_of_the_tables() -> None:
    text = section("Optimizers and learning-rate schedules")
    yes_no = {True: "yes", False: "no"}
    for name, spec in OPTIMIZERS.items():
        row = f"| `{name}` | {yes_no[spec.fused]} | {yes_no[spec.capturable]} | {yes_no[spec.self_scheduled]} |"
        assert row in text, row
    other = text.split("| any other of")[1].splitlines()[0]
    named = set(re.findall(r"`(\w+)(?:\.\.\.)?`", other.split("|")[3]))
    assert {next(name for name in named if own.startswith(name)) for own in SELF_SCHEDULED_OPTIMIZERS} == named
    schedules = text.split("| schedule |")[1]
    assert re.findall(r"`(\w+)(?::[\d.]+)?`", schedules) == list(SCHEDULES)
    for name, spec in SCHEDULES.items():
        assert spec.arg_bounds is None or f"`{name}:{spec.arg:g}`" in schedules


def test_exit_codes_are_those_of_the_package() -> None:
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE)]
    of_errors = {1, *(kind.exit_code for kind in errors.UserError.__subclasses__())}
    assert listed == sorted({0, 129, 130, 141, 143} | of_errors)  # 128 + the number of SIGHUP, SIGINT, SIGPIPE, SIGTERM


def test_every_folder_is_in_the_code_layout() -> None:
    rows = dict(re.findall(r"^\| `(\w+)/` \|.*\| `([\w.-]+)` \|$", section("Code layout"), re.MULTILINE))
    assert rows.keys() == {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    for folder, first_file in rows.items():
        assert (PACKAGE / folder / first_file).is_file(), first_file


def test_layer_order_is_that_of_import_linter() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [item for item in project["tool"]["importlinter"]["contracts"] if item["type"] == "layers"]
    (listed,) = re.findall(r"```\n(cli\n.*?)```", section("Code layout"), re.DOTALL)
    assert listed.splitlines() == contract["layers"]


def test_every_table_that_can_be_extended_exists() -> None:
    rows = re.findall(r"^\| [^|]+ \| `([A-Z_]+)` \| `([\w/.]+)\.py` \|$", section("Code layout"), re.MULTILINE)
    assert len(rows) >= 20
    for table, path in rows:
        module = importlib.import_module(f"fastcifar.{path.removesuffix('/__init__').replace('/', '.')}")
        assert len(getattr(module, table)) > 0, table
    named = set(re.findall(r"^\| [^|]+ \| `([A-Z_]+)`", section("Code layout"), re.MULTILINE))
    assert named == {table for table, _ in rows}


def test_paths_of_files_exist() -> None:
    for code in INLINE_CODE:
        for name in re.findall(r"(?:^|python )((?:bench|scripts|tests|fastcifar)/[\w/.]+)", code):
            assert (ROOT / name).exists(), name


def test_changelog_lists_the_renamed_options() -> None:
    rows = re.findall(
        r"^\| `(\w+)`(?: of `(\w+)`)? \| (.+) \|$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    listed = {(command or "options", old): re.findall(r"`(\w+)`", new) for old, command, new in rows}
    renamed = tomllib.loads((PACKAGE / "renamed.toml").read_text("utf-8"))
    assert listed == {(section, old): new for section, names in renamed.items() for old, new in names.items()}


def test_citation_has_the_version_of_the_package() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_readme_is_short_and_its_links_exist() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and MkDocs make of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_to_sections_resolve() -> None:
    assert "where-a-number-comes-from" in anchors(ROOT / "docs" / "benchmarks.md")
    count = 0
    for page in [*PAGES, *ROOT.glob("*.md")]:
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text("utf-8")):
            assert anchor in anchors(page.parent / link if link else page), (page, link, anchor)
            count += 1
    assert count >= 20


def test_pictures_are_small_and_used() -> None:
    pictures = {*(ROOT / "docs" / "images").iterdir()}
    used = {
        page.parent / link for page in PAGES for link in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text("utf-8"))
    }
    assert used == pictures
    assert sum(picture.stat().st_size for picture in pictures) <= 400_000
