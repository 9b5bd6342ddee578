"""Objects given from Python in place of the names in a recipe: a network, a data set, transforms.

A recipe, and so a run folder and a checkpoint, records only names: `arch` is that of the network, `data` is "python",
and `augment` contains `transform:NAME` or `batch_transform:NAME`. Within `use_objects`, they stand for the objects.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

PYTHON_DATA = "python"  # `Recipe.data` of a data set given from Python


@dataclass(frozen=True)
class PythonObjects:
    """The objects given from Python; None: the recipe names a built-in one."""

    model: Any = None  # an nn.Module, or a function or class that returns one
    data: Any = None  # a function of the options `dataset`, `resize` and `val_seed` that returns a `Dataset`
    transform: Any = None  # of one image
    batch_transform: Any = None  # of a batch of images

    @property
    def arguments(self) -> str:
        """The arguments that give the objects, for messages: `, model=..., data=...`."""
        return "".join(f", {field.name}=..." for field in fields(self) if getattr(self, field.name) is not None)


_NO_OBJECTS = PythonObjects()
_ACTIVE: ContextVar[PythonObjects] = ContextVar("python_objects", default=_NO_OBJECTS)


def active_objects() -> PythonObjects:
    """Return the objects of the innermost `use_objects` of this thread."""
    return _ACTIVE.get()


@contextmanager
def use_objects(objects: PythonObjects) -> Iterator[None]:
    """Let the names in recipes refer to `objects` within the `with` block."""
    token = _ACTIVE.set(objects)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def object_name(value: Any) -> str:
    """Return the name of a function or class, or of the class of another object, in characters of identifiers."""
    named = getattr(value, "func", value)  # of functools.partial
    name = getattr(named, "__name__", None) or type(named).__name__
    return re.sub(r"\W", "", name)
