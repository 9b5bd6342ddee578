"""Run the commands and Python examples of README.md and docs/ in their order, with options that make them small.

A block that cannot run in a test has a comment `<!-- not run: REASON -->` above it in the page.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastcifar.cli.app import app
from fastcifar.data.augment import AUGMENTS
from fastcifar.device import AUTOMATIC_CHOICES
from fastcifar.models import MODELS, build_model
from fastcifar.models.imports import IMPORTED
from tests.data.image_folders import write_noise
from tests.documentation import PAGES, ROOT

BLOCK = re.compile(r"^(?:<!-- not run: (.+?) -->\n)?```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALL = "--val-size 20 --max-steps 2 --no-compile --device cpu"
# appended to the commands; an option that is given twice has its last value
APPENDED = {
    "train": f"{SMALL} --batch-size 20",
    "sweep": f"{SMALL} --seeds 1",
    "speedrun": "--n 1 --epochs 1 --image-size 32 --batch-size 50 --no-compile --device cpu",
    "bench": "--arch resnet --blocks 1,1 --channels 8,16 --batch-size 8 --trials 1 --no-compile --device cpu",
    "eval": "--device cpu --no-compile",
    "predict": "--device cpu --no-compile",
}
NUM_STEPS = itertools.count(3)  # a run is resumed for one more step each time


class Block(NamedTuple):
    """A block of code of a page."""

    page: str
    line: int
    language: str
    reason: str  # why it is not run; "" if it is
    code: str


def read_blocks() -> list[Block]:
    blocks = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            reason, language, code = match.groups(default="")
            blocks.append(Block(page.name, text.count("\n", 0, match.start(2)) + 1, language, reason, code))
    return blocks


BLOCKS = read_blocks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files that the examples of the manual assume, as the current folder."""
    folder = tmp_path_factory.mktemp("examples")
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    (folder / "photos").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).resize((60, 40)).save(folder / "photos" / f"{index}.png")
    write_noise(folder / "my_images", ("cat", "horse", "truck"), {"train": 20, "test": 4})
    kaggle = {b"data": images.transpose(0, 3, 1, 2).reshape(4, -1), b"ids": np.arange(4)}
    (folder / "cifar_test_nolabel.pkl").write_bytes(pickle.dumps(kaggle))
    # `--import` and the Python blocks add to these tables
    tables = (mock.patch.dict(table) for table in (IMPORTED, MODELS, AUGMENTS))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for table in tables:
            stack.enter_context(table)
        patch.chdir(folder)
        patch.setenv("FASTCIFAR_DATA", "synthetic:100")
        patch.setitem(AUTOMATIC_CHOICES, "compile", lambda device: (False, "this is a test"))
        for name in ("mine", "NAME"):
            run_line(f"fastcifar train --arch resnet --blocks 1,1 --channels 8,16 --out runs/{name}")
        for block in BLOCKS:  # a block whose first line is `# NAME.py` is that file
            if name := re.match(r"# (\w+\.py)\n", block.code):
                (folder / name[1]).write_text(block.code)
        torch.save({"net": build_model("coconut_leaky").state_dict()}, folder / "ckpt.pth")
        (folder / "ablation.toml").write_text('[grid]\nactivation = ["relu", "silu"]\n[base]\narch = "speednet"\n')
        run_line("fastcifar sweep ablation.toml --executor process")
        for name in "AB":
            run_line(f"fastcifar bench --what loader --json > {name}.json")
        yield folder


def run_line(line: str) -> None:
    """Run a command line of a block, with the options of `APPENDED`."""
    words = shlex.split(line, comments=True)
    target = words.pop() if ">" in words else None
    words = [word for word in words if word != ">"]
    if not words:
        return
    assert words[0] == "fastcifar", f"{line}: give a reason not to run the block"
    appended = APPENDED.get(words[1], "")
    if "--resume" in words and "auto" not in words:
        appended = f"--max-steps {next(NUM_STEPS)}"
    result = CliRunner().invoke(app, [*words[1:], *appended.split()])
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    if target:
        Path(target).write_text(result.stdout)


def describe(block: Block) -> Any:
    """Return the block as a test parameter with its cost: a process imports torch."""
    is_slow = "--executor processes" in block.code
    name = f"{block.page}:{block.line}"
    return pytest.param(block, id=name, marks=pytest.mark.slow if is_slow else pytest.mark.medium)


@pytest.mark.parametrize("block", [*map(describe, BLOCKS)])
def test_block_runs(block: Block, folder: Path) -> None:
    if block.reason:
        pytest.skip(f"not run: {block.reason}")
    if block.language == "python":  # the blocks of a page are one program
        program = [other for other in BLOCKS if (other.page, other.language) == (block.page, "python")]
        if block == program[-1]:
            exec(compile("".join(other.code for other in program), block.page, "exec"), {"__name__": block.page})
    else:
        for line in block.code.replace("\\\n", " ").splitlines():
            run_line(line)


def test_most_blocks_run() -> None:
    assert sum(not block.reason for block in BLOCKS) >= 12
    assert {page.name for page in PAGES} >= {block.page for block in BLOCKS}
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("not run:") <= 2
