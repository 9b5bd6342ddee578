"""Mutation test: change the code at random places, and count how many of the changes the tests find.

    python bench/mutation.py run --mutants 300 --out mutants.json [--seed 0 --module data/augment.py]
    python bench/mutation.py run --survivors-of mutants.json
    python bench/mutation.py table mutants.json [--record]

cosmic-ray (extra `dev`) makes the changes, such as another operator, comparison or number. The sample consists of
random places in the modules of `TESTS_OF_MODULE`, annotations excepted, with one random change of each. Each mutant is
one run of the tests of its module in a copy of the working tree, without torch.compile (TORCH_COMPILE_DISABLE=1).
`--out` is written after each mutant; the same command continues an interrupted run. After tests were added,
`--survivors-of` tries the mutants again that were not found. A mutant that no test could find is marked by hand: its
entry in the file gets `"equivalent": "REASON"`. `table` prints the counts of each module in Markdown and every
survivor; `--record` writes them to bench/results.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import results_folder
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec

from fastcifar.device import collect_environment

ROOT = Path(__file__).parents[1]
TESTS_OF_MODULE: dict[str, list[str]] = {  # in fastcifar/ and tests/
    "data/augment.py": [
        "data/test_augment.py",
        "data/test_random_erasing.py",
        "data/test_mixers.py",
        "data/test_policies.py",
    ],
    "data/image_ops.py": ["data/test_image_ops.py", "data/test_augment.py", "data/test_policies.py"],
    "data/policies.py": ["data/test_policies.py", "data/test_random_erasing.py"],
    "data/mixers.py": ["data/test_mixers.py", "training/test_mixing.py"],
    "training/lr_schedule.py": ["training/test_lr_schedule.py"],
    "training/optimizers.py": ["training/test_optimizers.py", "training/test_param_groups.py"],
    "training/optimizer_classes.py": ["training/test_optimizer_classes.py", "training/test_optimizers.py"],
    "training/step.py": ["training/test_step.py", "training/test_mixing.py"],  # contains the moving average of weights
    "training/checkpoint.py": ["training/test_checkpoint.py", "training/test_source_checkpoints.py"],
    "training/checkpoint_writer.py": ["training/test_checkpoint_writer.py"],
    "training/evaluate.py": ["training/test_evaluate.py"],
    "evaluation/metrics.py": ["evaluation/test_metrics.py"],
    "evaluation/evaluate_run.py": ["evaluation/test_evaluate_run.py"],
    "evaluation/corruptions.py": ["evaluation/test_corruptions.py"],
}
NEEDS_COMPILER = "compiled"  # in the names of tests that compile, which are left out
TIMEOUT_S = 300
IDENTITY = ("module", "operator", "code", "column")  # of a mutant, also after the lines above it have changed
Mutant = dict[str, Any]


def run(arguments: argparse.Namespace) -> None:
    """Try a sample of mutants, or the survivors of an earlier run again, and write the outcomes."""
    out: Path = arguments.survivors_of or arguments.out
    mutants = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    if arguments.survivors_of:
        mutants = relocate_survivors(mutants)
    elif not mutants:
        mutants = draw_sample(arguments.module or list(TESTS_OF_MODULE), arguments.mutants, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".*", "runs", "results", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ignored)
        os.environ |= {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
        os.chdir(tree)
        require_passing_tests({mutant["module"] for mutant in mutants if not mutant["outcome"]})
        for number, mutant in enumerate(mutants, start=1):
            if mutant["outcome"] is None:
                try_mutant(mutant)
                print(f"{number}/{len(mutants)} {mutant['outcome']}: {mutant['module']}:{mutant['line']}", flush=True)
                write(out, mutants)
    print_table(mutants)


def draw_sample(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """Return one mutant for each of `count` random places in the modules, in random order."""
    every = list_mutants(modules)
    places = [list(group) for _, group in groupby(every, key=lambda mutant: (mutant["module"], mutant["start"]))]
    rng = random.Random(seed)
    return [rng.choice(group) for group in rng.sample(places, min(count, len(places)))]


def relocate_survivors(mutants: list[Mutant]) -> list[Mutant]:
    """Return the mutants with each survivor at its present place in the code, to try again; others are unchanged."""
    candidates = list_mutants(sorted({mutant["module"] for mutant in mutants if is_survivor(mutant)}))
    result = []
    for mutant in mutants:
        if is_survivor(mutant):
            same = [other for other in candidates if all(other[key] == mutant[key] for key in IDENTITY)]
            if not same:
                print(f"the code of this mutant has changed, it is left out: {mutant['module']}: {mutant['code']}")
                continue
            mutant = min(same, key=lambda other: abs(other["line"] - mutant["line"]))
        result.append(mutant)
    return result


def list_mutants(modules: list[str]) -> list[Mutant]:
    """Return all mutants of the modules that cosmic-ray can make, except those of annotations, in order of place."""
    with use_db(":memory:", WorkDB.Mode.create) as database:
        init([ROOT / "fastcifar" / module for module in modules], database, {})
        specs = [item.mutations[0] for item in database.work_items]
    paths = {spec.module_path for spec in specs}
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in paths}
    ignored = {path: list(annotation_positions(path)) for path in paths}
    specs = [spec for spec in specs if not any(a <= spec.start_pos < b for a, b in ignored[spec.module_path])]
    specs.sort(key=lambda spec: (spec.module_path, spec.start_pos, spec.operator_name, spec.occurrence))
    return [
        {
            "module": str(spec.module_path.relative_to(ROOT / "fastcifar")),
            "line": spec.start_pos[0],
            "column": spec.start_pos[1],
            "code": lines[spec.module_path][spec.start_pos[0] - 1],
            "operator": spec.operator_name,
            "occurrence": spec.occurrence,
            "start": spec.start_pos,
            "end": spec.end_pos,
            "outcome": None,
        }
        for spec in specs
    ]


def annotation_positions(path: Path) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the (start, end) positions of annotations and of type aliases, which do nothing at run time."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        annotations: Iterable[ast.expr | None] = ()
        if isinstance(node, ast.FunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            annotations = [node.returns, *(argument.annotation for argument in every if argument)]
        elif isinstance(node, ast.AnnAssign):
            annotations = [node.annotation]
        for annotation in annotations:
            if annotation:
                assert annotation.end_lineno is not None
                assert annotation.end_col_offset is not None
                start = annotation.lineno, annotation.col_offset
                yield start, (annotation.end_lineno, annotation.end_col_offset)


def command_of(module: str) -> str:
    """Return the command that tests a module."""
    tests = [f"tests/{name}" for name in TESTS_OF_MODULE[module]]
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", f"not {NEEDS_COMPILER}"]
    return shlex.join([sys.executable, "-m", "pytest", *options, *tests])


def require_passing_tests(modules: set[str]) -> None:
    """Raise SystemExit if the tests of a module fail without a mutation, so that they would find every mutant."""
    for module in sorted(modules):
        outcome, output = run_tests(command_of(module), TIMEOUT_S)
        if outcome != "survived":
            raise SystemExit(f"the tests of {module} fail without a mutation:\n{output[-2000:]}")


def try_mutant(mutant: Mutant) -> None:
    """Apply the mutation, run the tests, and store "found" or "survived", and the change as a diff."""
    spec = MutationSpec(
        module_path=Path("fastcifar") / mutant["module"],
        operator_name=mutant["operator"],
        occurrence=mutant["occurrence"],
        start_pos=tuple(mutant["start"]),
        end_pos=tuple(mutant["end"]),
    )
    result = mutate_and_test([spec], command_of(mutant["module"]), TIMEOUT_S)
    if result.test_outcome is None or result.diff is None:
        raise SystemExit(f"cosmic-ray could not apply {mutant}: {result.output}")
    mutant["outcome"] = "survived" if result.test_outcome == "survived" else "found"
    lines = result.diff.splitlines()
    mutant["diff"] = [line for line in lines if line[:1] in "+-" and not line.startswith(("+++", "---"))]


def is_survivor(mutant: Mutant) -> bool:
    """Return whether no test found a mutant that changes what the code does."""
    return mutant["outcome"] == "survived" and "equivalent" not in mutant


def write(path: Path, mutants: list[Mutant]) -> None:
    """Replace the file of the mutants."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(map(json.dumps, mutants)) + "\n]\n", encoding="utf-8")
    temporary.replace(path)


def count_outcomes(mutants: list[Mutant]) -> dict[str, int]:
    """Return how many mutants were tried, found, equivalent to the original, and survived."""
    tried = [mutant for mutant in mutants if mutant["outcome"]]
    equivalent = sum("equivalent" in mutant for mutant in tried)
    survived = sum(map(is_survivor, tried))
    return {
        "tried": len(tried),
        "found": len(tried) - equivalent - survived,
        "equivalent": equivalent,
        "survived": survived,
    }


def print_table(mutants: list[Mutant]) -> None:
    """Print the counts of each module, and every survivor."""
    print("| module | tried | found | equivalent | survived |\n|---|---|---|---|---|")
    modules = Counter(mutant["module"] for mutant in mutants)
    groups = {module: [mutant for mutant in mutants if mutant["module"] == module] for module in sorted(modules)}
    for name, group in {**groups, "all": mutants}.items():
        print(f"| {name} | " + " | ".join(map(str, count_outcomes(group).values())) + " |")
    for mutant in filter(is_survivor, mutants):
        print(f"\n{mutant['module']}:{mutant['line']} {mutant['operator']}", *mutant["diff"], sep="\n")


def table(arguments: argparse.Namespace) -> None:
    """Print the table of a finished run, and record it."""
    mutants = json.loads(arguments.mutants.read_text(encoding="utf-8"))
    print_table(mutants)
    if arguments.record:
        counts = count_outcomes(mutants)
        share = counts["found"] / (counts["tried"] - counts["equivalent"])
        summary = {"what": "mutation", **counts, "found_share": share}
        print(results_folder.write("mutation", collect_environment("cpu"), summary, mutants))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run_parser = commands.add_parser("run", help="try mutants")
    run_parser.add_argument("--mutants", type=int, default=300, help="size of the sample")
    run_parser.add_argument("--seed", type=int, default=0, help="random seed of the sample")
    run_parser.add_argument("--module", action="append", choices=TESTS_OF_MODULE, help="module to change (repeatable)")
    run_parser.add_argument("--out", type=Path, default=Path("mutants.json"), help="file of the mutants")
    run_parser.add_argument("--survivors-of", type=Path, help="file of mutants of which to try the survivors again")
    run_parser.set_defaults(function=run)
    table_parser = commands.add_parser("table", help="print and record the outcomes")
    table_parser.add_argument("mutants", type=Path, help="file of the mutants")
    table_parser.add_argument("--record", action="store_true", help="write bench/results/*_mutation")
    table_parser.set_defaults(function=table)
    parsed = parser.parse_args()
    parsed.function(parsed)
