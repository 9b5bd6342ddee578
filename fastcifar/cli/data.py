"""Commands about data sets: `data verify` and `data show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastcifar.cli.options import DebugOption, JsonOption, recipe_options
from fastcifar.recipe import Recipe

data_app = typer.Typer(help="Verify a data set, or plot the effect of augmentations.", no_args_is_help=True)


@data_app.command("verify")
@recipe_options(("data", "dataset"))
def data_verify(as_json: JsonOption = False, debug: DebugOption = False, **options: Any) -> None:
    """Verify every file of a data set, and report its source, images and classes."""
    from fastcifar.cli.tables import dataset_table
    from fastcifar.data.inspection import verify_dataset

    result = verify_dataset(Recipe.make(**options))
    print(json.dumps(result)) if as_json else Console().print(dataset_table(result))


@data_app.command("show")
@recipe_options(("augment", "data", "dataset", "seed"))
def data_show(
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.png", help="image file to write; an existing one is overwritten")
    ],
    count: Annotated[int, typer.Option("--count", metavar="INT", help="number of images")] = 8,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Plot images before and after each augmentation in --augment, and after all of them."""
    from fastcifar.data.inspection import plot_augmentations

    result = plot_augmentations(Recipe.make(**options), out, count)
    print(json.dumps(result) if as_json else f"wrote {result['out']}")
