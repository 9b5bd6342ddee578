"""Python files and modules that define further architectures; only `--import` and `--arch MODULE:NAME` import them."""

import importlib
import importlib.util
import os
import shlex
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from fastcifar.errors import UsageError, first_message_line
from fastcifar.python_objects import active_objects


class ModelSource(NamedTuple):
    """What `import_models` takes, with an absolute path, so that another process can import the same."""

    source: str  # absolute path of a .py file, or the name of a module
    folder: str  # appended to sys.path: the folder of the file, or the one that contains the module


# name of a module, or of a file without .py -> its source and the imported module
IMPORTED: dict[str, tuple[ModelSource, ModuleType]] = {}


def import_models(source: str, folder: str | None = None) -> None:
    """Import a `.py` file or a module, once; `build_model` then finds the functions and classes in it by their name.

    Modules in the folder of the file, or for a module in `folder` (by default the working directory), can be imported
    too, but do not hide installed ones. Raises `UsageError` if there is no such file or module, or if it fails.
    """
    path = Path(source).absolute()
    is_file = path.suffix == ".py"
    name = path.stem if is_file else source
    origin = ModelSource(str(path), str(path.parent)) if is_file else ModelSource(source, folder or os.getcwd())
    if name in IMPORTED:
        if IMPORTED[name][0].source != origin.source:
            raise UsageError(f"--import: two files have the name {path.name}", "rename one of them")
        return
    if is_file and not path.is_file():
        raise UsageError(f"--import {source}: there is no such file", "specify a .py file or the name of a module")
    if origin.folder not in sys.path:
        sys.path.append(origin.folder)
    try:
        IMPORTED[name] = origin, _import_file(path) if is_file else importlib.import_module(source)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if is_file or not f"{source}.".startswith(f"{missing}."):
            remedy = f"install {missing}, or put it into {origin.folder}"
            raise UsageError(f"--import {source}: it imports {missing}, which is not installed", remedy) from error
        raise UsageError(f"--import {source}: there is no such module", "specify a .py file or a module") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"--import {source}: {describe_error(error, str(path))}", "correct the error") from error


def imported_sources() -> list[ModelSource]:
    """Return the sources of all imported files and modules, in the order of their import."""
    return [origin for origin, _ in IMPORTED.values()]


def import_options() -> str:
    """Return what a command needs to import the same again, such as ` --import my_net.py`, or "" for nothing."""
    here = Path.cwd()
    paths = [Path(origin.source) for origin in imported_sources()]
    return "".join(
        f" --import {shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))}" for path in paths
    )


def resume_command(folder: Path) -> str:
    """Return the command, or the call in Python, that resumes the run in `folder`."""
    if arguments := active_objects().arguments:
        return f"train(Recipe(resume={str(folder)!r}){arguments})"
    return f"fastcifar train --resume {shlex.quote(str(folder))}{import_options()}"


def describe_error(error: BaseException, *files: str) -> str:
    """Return the type and the message of `error` in one line, with its last line in `files` and imported modules."""
    files = (*files, *(module.__file__ or "" for _, module in IMPORTED.values()))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_message_line(error, 'no message')}{place}"


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name that hides no other module."""
    name = f"fastcifar_import_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
