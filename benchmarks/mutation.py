"""Whether the tests see a change of the code: random mutants of `record` and `analysis`, and the share that is killed.

    python -m benchmarks.mutation [--mutants 50] [--seed 0] [--minutes 20] [--json FILE]

cosmic-ray makes the mutants and runs the tests on each; which are tried is drawn by the seed, and each meets the tests
that run its line and no others (`coverage` says which: all of TESTS are run once for that). Everything happens in a
copy. A mutant of which only annotations differ is none, and is not drawn. One that no test runs has survived.

Goal: 85% killed. The interval is Wilson's. Of the tests that run a line the `MOST_TESTS` narrowest are run, so that the
share is a lower bound: a wide test of whole runs may kill what they let live. It takes 10 to 20 CPU seconds a mutant;
400 of them are two hours.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress
from scipy.stats import binomtest

ROOT: Final = Path(__file__).resolve().parents[1]
ROOTS: Final = ("stabilitylab/record", "stabilitylab/analysis")
TESTS: Final = (
    "tests/unit/test_analysis_*.py",
    "tests/unit/test_leading.py",
    "tests/unit/test_foretold.py",
    "tests/unit/test_grouping.py",
    "tests/unit/test_pace.py",
    "tests/unit/test_packed.py",
    "tests/unit/test_store.py",
    "tests/unit/test_waiting.py",
    "tests/unit/test_run.py",
    "tests/unit/test_hostile_files.py",
    "tests/unit/test_making.py",
    "tests/unit/test_operation.py",
    "tests/unit/test_scan_kinds.py",
    "tests/unit/test_scan_precision.py",
    "tests/unit/test_reports_scan.py",
    "tests/oracle/test_drift.py",
    "tests/oracle/test_forecast.py",
)
GOAL: Final = 0.85
MOST_TESTS: Final = 25
"""Of those that run a line: the narrowest, which run the fewest lines in all, and are fast."""
ANYWHERE: Final = 0
_COPIED: Final = ("stabilitylab", "probes", "reports", "tests", "benchmarks", "setup.cfg", "pyproject.toml", "docs")
_SETTINGS: Final = "[run]\nbranch = True\ndynamic_context = test_function\ndata_file = {data}\nsource = {source}\n"


@dataclass(frozen=True)
class Tried:
    """One mutant. ended: "killed", "survived", "timed out" (which counts as killed) or "not run by any test"."""

    file: str
    line: int
    change: str
    ended: str
    diff: str
    seconds: float

    @property
    def is_killed(self) -> bool:
        return self.ended in ("killed", "timed out")


class _Bare(ast.NodeTransformer):
    """Takes away what has no effect at run time: annotations, here where all of them are strings."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        for argument in [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]:
            argument.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Constant(value=None)
        return node


def _effect(code: str) -> str:
    return ast.dump(_Bare().visit(ast.parse(code)))


def copy_of_the_tree(folder: Path) -> Path:
    """Where mutants are made."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def environment(copy: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def covered(copy: Path) -> dict[tuple[str, int], list[str]]:
    """The tests that run each line, by (file, line)."""
    from coverage import CoverageData

    data = copy / "contexts.coverage"
    (copy / "coverage.cfg").write_text(_SETTINGS.format(data=data, source=",".join(ROOTS)))
    files = [str(file.relative_to(copy)) for pattern in TESTS for file in sorted(copy.glob(pattern))]
    command = [sys.executable, "-m", "coverage", "run", "--rcfile=coverage.cfg", "-m", "pytest", "-q", *files]
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the tests fail without any mutant:\n{done.stdout[-2_000:]}")
    return contexts_of(CoverageData(str(data)), copy)


def contexts_of(data: Any, copy: Path) -> dict[tuple[str, int], list[str]]:
    """What coverage has seen, by (file below `copy`, line); the tests that run anything of a file by `ANYWHERE`."""
    data.read()
    found: dict[tuple[str, int], list[str]] = {}
    for name in data.measured_files():
        file = str(Path(name).relative_to(copy))
        for line, contexts in data.contexts_by_lineno(name).items():
            found[file, line] = [context for context in contexts if context]
            found.setdefault((file, ANYWHERE), []).extend(found[file, line])
    width = Counter(context for (_, line), contexts in found.items() if line for context in contexts)
    return {place: sorted({*contexts}, key=lambda each: (width[each], each)) for place, contexts in found.items()}


def node_of(context: str, copy: Path) -> str:
    """A test's name as pytest has it, for what coverage calls it: ``test_x.test_y``. Empty for what is none."""
    parts = context.split(".")
    place = next((number for number, part in enumerate(parts) if part.startswith("test_")), len(parts))
    files = [] if place == len(parts) else sorted((copy / "tests").rglob(f"{parts[place]}.py"))
    if len(files) != 1 or "<" in context:
        return ""
    return f"{files[0].relative_to(copy)}::{'::'.join(parts[place + 1 :])}"


def every_mutant(copy: Path) -> list[Any]:
    """All that cosmic-ray knows, in order."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    files = sorted(file for root in ROOTS for file in (copy / root).rglob("*.py"))
    with use_db(str(copy / "mutants.sqlite"), WorkDB.Mode.create) as database:
        init(files, database, {})
        items = [item.mutations[0] for item in database.work_items]
    return sorted(items, key=lambda each: (str(each.module_path), each.start_pos, each.operator_name, each.occurrence))


def has_effect(mutant: Any) -> bool:
    """Whether it is Python, and more than annotations is changed."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    code = Path(mutant.module_path).read_text()
    operator = cosmic_ray.plugins.get_operator(mutant.operator_name)(**mutant.operator_args)
    changed = mutate_code(code, operator, mutant.occurrence)
    with contextlib.suppress(SyntaxError):
        return changed is not None and _effect(changed) != _effect(code)
    return False


def try_out(mutant: Any, copy: Path, tests: dict[tuple[str, int], list[str]], most_seconds: float) -> Tried:
    """Run the tests of its line on one mutant."""
    from cosmic_ray.mutating import mutate_and_test

    file, line = str(Path(mutant.module_path).relative_to(copy)), mutant.start_pos[0]
    change = f"{mutant.operator_name.rpartition('/')[2]} {mutant.occurrence}"
    lines = range(line, mutant.end_pos[0] + 1)
    contexts = dict.fromkeys(each for at in lines for each in tests.get((file, at), []))
    contexts = contexts or dict.fromkeys(tests.get((file, ANYWHERE), []))  # what runs as the file is imported
    nodes = [node for each in contexts if (node := node_of(each, copy))][:MOST_TESTS]
    if not nodes:
        return Tried(file, line, change, "not run by any test", "", 0.0)
    command = " ".join([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *map(_quoted, nodes)])
    began = time.monotonic()
    result = mutate_and_test([mutant], command, most_seconds)
    seconds = time.monotonic() - began
    if "ERROR: not found" in str(result.output) or "file or directory not found" in str(result.output):
        raise RuntimeError(f"the tests of {file}:{line} are not found:\n{result.output}")
    outcome = "" if result.test_outcome is None else result.test_outcome.value
    ended = "timed out" if "timeout" in str(result.output).lower()[:20] else outcome
    return Tried(file, line, change, ended, result.diff or "", seconds)


def _quoted(word: str) -> str:
    return f"'{word}'"


def drawn(mutants: Sequence[Any], seed: int) -> Iterator[Any]:
    """In the order of the seed, those that change anything: a longer sample begins with the shorter one."""
    order = list(mutants)
    random.Random(seed).shuffle(order)
    return (each for each in order if has_effect(each))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=50, help="how many at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no further one is begun")
    parser.add_argument("--most-seconds", type=float, default=120.0, help="for the tests of one; longer is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the mutants and their ends there")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    wanted = None if options.json is None else options.json.resolve()  # before the folder changes
    out, errors = Console(), Console(stderr=True)
    tried: list[Tried] = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        copy = copy_of_the_tree(Path(scratch).resolve())
        os.chdir(copy)
        os.environ.update(environment(copy))
        tests, mutants = covered(copy), every_mutant(copy)
        until = time.monotonic() + 60 * options.minutes
        with Progress(console=errors, disable=not errors.is_terminal, transient=True) as progress:
            task = progress.add_task("mutants", total=options.mutants)
            for mutant in drawn(mutants, options.seed):
                if len(tried) >= options.mutants or time.monotonic() > until:
                    break
                tried.append(try_out(mutant, copy, tests, options.most_seconds))
                progress.advance(task)
    killed = sum(each.is_killed for each in tried)
    interval = binomtest(killed, max(1, len(tried))).proportion_ci(0.95, "wilson")
    for each in tried:
        if not each.is_killed:
            out.print(f"{each.file}:{each.line} {each.change}: {each.ended}", highlight=False, markup=False)
            out.print(each.diff, highlight=False, markup=False)
    share = killed / max(1, len(tried))
    out.print(
        f"{killed} of {len(tried)} mutants killed, of {len(mutants):,} there are: {share:.0%}"
        f" (95%: {interval.low:.0%} to {interval.high:.0%}); goal {GOAL:.0%}"
    )
    if wanted is not None:
        wanted.write_text(json.dumps([asdict(each) for each in tried], indent=2) + "\n")
    return int(share < GOAL)


if __name__ == "__main__":
    sys.exit(main())
