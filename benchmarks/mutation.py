"""Whether the tests see a change of the code: random mutants of `record` and `analysis`, and the share that is killed.

    python -m benchmarks.mutation [--mutants 50] [--seed 0] [--minutes 20] [--json FILE]

cosmic-ray makes the mutants; which are tried is drawn by the seed. Each meets the tests that run its line (all of TESTS
are run once to know them; of a line that runs at import, those that run what names what it defines), the narrowest
first, and then all others of their files, until one fails or `--most-seconds` of CPU time are over. A mutant has
survived if none has failed by then; what was left out is said. Everything happens in a copy. What has no effect at
run time (annotations, `__all__`, what only type checkers read) is not drawn. What no test runs has survived.

Goal: 85% killed. The interval is Wilson's. The share is a lower bound: not all of the suite is run (TESTS), nor what
the time leaves out: of a table of constants that is most, and the test that is about it may be among them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from rich.console import Console
from rich.progress import Progress
from scipy.stats import binomtest

from benchmarks import forked_tests

ROOT: Final = Path(__file__).resolve().parents[1]
ROOTS: Final = ("stabilitylab/record", "stabilitylab/analysis")
TESTS: Final = (
    "tests/unit/test_analysis_*.py",
    "tests/unit/test_record_*.py",
    "tests/unit/test_acknowledged.py",
    "tests/unit/test_announcing.py",
    "tests/unit/test_before_the_first_edit.py",
    "tests/unit/test_calibrating.py",
    "tests/unit/test_damage.py",
    "tests/unit/test_foretold.py",
    "tests/unit/test_grouping.py",
    "tests/unit/test_hostile_files.py",
    "tests/unit/test_leading.py",
    "tests/unit/test_making.py",
    "tests/unit/test_old_files.py",
    "tests/unit/test_operation.py",
    "tests/unit/test_pace.py",
    "tests/unit/test_packed.py",
    "tests/unit/test_records.py",
    "tests/unit/test_redaction.py",
    "tests/unit/test_reports_comparison.py",
    "tests/unit/test_reports_console.py",
    "tests/unit/test_reports_scan.py",
    "tests/unit/test_reports_text.py",
    "tests/unit/test_run.py",
    "tests/unit/test_scan_capacity.py",
    "tests/unit/test_scan_editors.py",
    "tests/unit/test_scan_kinds.py",
    "tests/unit/test_scan_precision.py",
    "tests/unit/test_store.py",
    "tests/unit/test_terminal.py",
    "tests/unit/test_unanswered.py",
    "tests/unit/test_waiting.py",
    "tests/oracle/test_analysis_*.py",
    "tests/oracle/test_drift.py",
    "tests/oracle/test_forecast.py",
    "tests/oracle/test_scan_trials.py",
    "tests/oracle/test_state.py",
)
GOAL: Final = 0.85
STEPS: Final = (25, 125)
"""The 25 narrowest tests in one process, the next 100 in another, then the rest: few need their files to be read."""
ANYWHERE: Final = 0
MOST_SECONDS_OF_ALL: Final = 1_800.0
MOST_FAILING: Final = 0.01
"""Of the tests, as they are, in the copy: some look for what it lacks."""
_COPIED: Final = ("stabilitylab", "probes", "reports", "tests", "benchmarks", "examples", "docs")
_FILES: Final = ("setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "Makefile", "SECURITY.md")

Place = tuple[str, int]
"""A file below the copy, and a line of it; `ANYWHERE` for any."""


@dataclass(frozen=True)
class Tried:
    """One mutant. failed_by: the test that killed it, or what else did. left_out: how many tests were not run."""

    file: str
    line: int
    change: str
    failed_by: str | None
    ran: int
    left_out: int
    cpu_seconds: float
    diff: str

    @property
    def is_killed(self) -> bool:
        return self.failed_by is not None

    @property
    def words(self) -> str:
        if self.is_killed:
            return f"killed by {self.failed_by}"
        left_out = f", {self.left_out} left out" if self.left_out else ""
        return f"survived {self.ran} tests{left_out}" if self.ran else "no test runs it"


class _Bare(ast.NodeTransformer):
    """Takes away what has no effect at run time: annotations, which are strings here, and what type checkers read."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        self.generic_visit(node)
        if any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list):
            return None
        node.returns = None
        for argument in [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]:
            argument.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Constant(value=None)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if ast.unparse(node.targets[0]) == "__all__" else node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def _effect(code: str) -> str:
    return ast.dump(_Bare().visit(ast.parse(code)))


def copy_of_the_tree(folder: Path) -> Path:
    """Where mutants are made. The two packages that setup.cfg has elsewhere are linked to where they are installed."""
    for name in _COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copy(ROOT / name, folder / name)
    for name in ("probes", "reports"):
        (folder / "stabilitylab" / name).symlink_to(folder / name, target_is_directory=True)
    (folder / "home").mkdir()
    (folder / "tmp").mkdir()
    return folder


def environment(copy: Path) -> dict[str, str]:
    """So that a mutant finds nothing but the copy to write to."""
    return {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HOME": str(copy / "home"), "TMPDIR": str(copy / "tmp")}


class _Contexts:
    """A pytest plugin: `coverage` is told which test runs, its fixtures with it. Which ones fail is written down."""

    def __init__(self, data: Path, failed: Path) -> None:
        self.data, self.failed = data, failed
        self.coverage: Any = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.write_text(f"{self.failed.read_text()}{report.nodeid}\n")

    def pytest_configure(self) -> None:
        from coverage import Coverage

        self.coverage = Coverage(data_file=str(self.data), source=list(ROOTS), config_file=False)
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.switch_context("")

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        self.coverage.stop()
        self.coverage.save()


def covered(copy: Path) -> dict[Place, list[str]]:
    """The tests that run each line, the narrowest first."""
    from coverage import CoverageData

    files = [str(file.relative_to(copy)) for pattern in TESTS for file in sorted(copy.glob(pattern))]
    data, failed = copy / "contexts.coverage", copy / "failed.txt"
    failed.write_text("")
    ended = forked_tests.run_each(copy, list(dict.fromkeys(files)), _Contexts(data, failed), MOST_SECONDS_OF_ALL)
    fail = set(failed.read_text().splitlines())
    if len(fail) > MOST_FAILING * ended.ran or (ended.failed_by is not None and not fail):
        raise RuntimeError(f"the tests fail without any mutant: {ended.failed_by}\n{output_of(copy)}")
    if fail:
        print(f"left out, since they fail without any mutant here: {', '.join(sorted(fail))}", file=sys.stderr)
    found = contexts_of(CoverageData(str(data)), copy)
    return {place: [test for test in tests if test not in fail] for place, tests in found.items()}


def output_of(copy: Path) -> str:
    return (copy / "output.txt").read_text(errors="replace")[-2_000:]


def contexts_of(data: Any, copy: Path) -> dict[Place, list[str]]:
    """What coverage has seen, the tests that run the fewest lines in all first; any line's of a file by `ANYWHERE`."""
    data.read()
    found: dict[Place, list[str]] = {}
    for name in data.measured_files():
        file = str(Path(name).relative_to(copy))
        for line, contexts in data.contexts_by_lineno(name).items():
            found[file, line] = [context for context in contexts if context]
            found.setdefault((file, ANYWHERE), []).extend(found[file, line])
    width = Counter(context for (_, line), contexts in found.items() if line for context in contexts)
    return {place: sorted({*contexts}, key=lambda each: (width[each], each)) for place, contexts in found.items()}


def tests_for(file: str, line: int, copy: Path, tests: dict[Place, list[str]]) -> list[str]:
    """The tests that can see a line, the narrowest first, and then the others of their files, which share fixtures."""
    statement = statement_at(ast.parse((copy / file).read_text()), line)
    found = [test for at in lines_of(statement) for test in tests.get((file, at), [])]
    if not found:
        own = [(file, at) for at in range(statement.lineno, (statement.end_lineno or 0) + 1)]
        found = [test for place in [*own, *naming(statement, copy)] for test in tests.get(place, [])]
    found = found or tests.get((file, ANYWHERE), [])
    rank = {test: number for number, test in enumerate(in_order(tests))}
    direct = sorted(set(found), key=rank.__getitem__)
    files = {test.partition("::")[0] for test in direct}
    return [*direct, *(test for test in rank if test.partition("::")[0] in files and test not in set(direct))]


def in_order(tests: dict[Place, list[str]]) -> list[str]:
    """All tests there are, the narrowest first."""
    width = Counter(test for (_, line), these in tests.items() if line != ANYWHERE for test in these)
    return sorted(width, key=lambda each: (width[each], each))


def statement_at(tree: ast.AST, line: int) -> ast.stmt:
    """The innermost statement that holds a line."""
    holding = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and _first_line(node) <= line <= (node.end_lineno or node.lineno)
    ]
    return min(holding, key=lambda node: (node.end_lineno or node.lineno) - _first_line(node))


def _first_line(node: ast.stmt) -> int:
    """Decorators stand before it."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def lines_of(statement: ast.stmt) -> range:
    """Its own, without those of what it holds: of a loop or a branch its head."""
    body = getattr(statement, "body", [])
    return range(statement.lineno, _first_line(body[0]) if body else (statement.end_lineno or statement.lineno) + 1)


def naming(statement: ast.stmt, copy: Path) -> list[Place]:
    """Where the code names what a statement defines."""
    names = [str(getattr(statement, "name", ""))]
    for target in [*getattr(statement, "targets", []), getattr(statement, "target", None)]:
        names += [node.id for node in ast.walk(target) if isinstance(node, ast.Name)] if target is not None else []
    word = re.compile(r"\b(?:" + "|".join(re.escape(name) for name in names if name) + r")\b")
    if not any(names):
        return []
    return [
        (str(file.relative_to(copy)), number)
        for file in sources(copy)
        for number, text in enumerate(file.read_text().splitlines(), 1)
        if word.search(text)
    ]


def sources(copy: Path) -> list[Path]:
    return sorted(file for root in ROOTS for file in (copy / root).rglob("*.py"))


def every_mutant(copy: Path) -> list[Any]:
    """All that cosmic-ray knows, in order."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    with use_db(str(copy / "mutants.sqlite"), WorkDB.Mode.create) as database:
        init(sources(copy), database, {})
        items = [item.mutations[0] for item in database.work_items]
    return sorted(items, key=lambda each: (str(each.module_path), each.start_pos, each.operator_name, each.occurrence))


def mutated(mutant: Any) -> str | None:
    """The file's text with it; None if that is no Python, or nothing else happens."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    code = Path(mutant.module_path).read_text()
    operator = cosmic_ray.plugins.get_operator(mutant.operator_name)(**mutant.operator_args)
    changed = mutate_code(code, operator, mutant.occurrence)
    with contextlib.suppress(SyntaxError):
        return changed if changed is not None and _effect(changed) != _effect(code) else None
    return None


@contextlib.contextmanager
def written(file: Path, text: str) -> Iterator[None]:
    """For a while; then as it was, and with its time, by which Python knows what is compiled already."""
    before, status = file.read_text(), file.stat()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(before)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def try_out(mutant: Any, copy: Path, tests: dict[Place, list[str]], most_seconds: float) -> Tried:
    """Run the tests that can see one mutant, until one does."""
    path, line = Path(mutant.module_path), mutant.start_pos[0]
    file, text = str(path.relative_to(copy)), mutated(mutant) or ""
    nodes = tests_for(file, line, copy, tests)
    failed_by, ran, seconds = None, 0, 0.0
    with written(path, text):
        for begin, end in zip((0, *STEPS), (*STEPS, len(nodes)), strict=True):
            if failed_by is None and begin < len(nodes) and seconds < most_seconds:
                ended = forked_tests.run_tests(copy, nodes[begin:end], most_seconds - seconds)
                failed_by, ran, seconds = ended.failed_by, ran + ended.ran, seconds + ended.cpu_seconds
    change = f"{mutant.operator_name.rpartition('/')[2]} {mutant.occurrence}"
    diff = "\n".join(difflib.unified_diff(path.read_text().splitlines(), text.splitlines(), n=1, lineterm=""))
    return Tried(file, line, change, failed_by, ran, len(nodes) - ran, round(seconds, 2), diff)


def drawn(mutants: Sequence[Any], seed: int) -> Iterator[Any]:
    """In the order of the seed, those that change anything: a longer sample begins with the shorter one."""
    order = list(mutants)
    random.Random(seed).shuffle(order)
    return (each for each in order if mutated(each) is not None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=50, help="how many at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no further one is begun")
    parser.add_argument("--most-seconds", type=float, default=12.0, help="CPU time of one mutant's tests")
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
        tempfile.tempdir = None
        forked_tests.warm_up()
        tests, mutants = covered(copy), every_mutant(copy)
        os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
        until = time.monotonic() + 60 * options.minutes
        # Refreshed by hand: a thread that draws must not hold a lock while a process forks.
        with Progress(console=errors, disable=not errors.is_terminal, transient=True, auto_refresh=False) as progress:
            task = progress.add_task("mutants", total=options.mutants)
            for mutant in drawn(mutants, options.seed):
                if len(tried) >= options.mutants or time.monotonic() > until:
                    break
                tried.append(try_out(mutant, copy, tests, options.most_seconds))
                progress.update(task, advance=1, refresh=True)
                if wanted is not None:
                    wanted.write_text(json.dumps([asdict(each) for each in tried], indent=2) + "\n")
    return shown(tried, len(mutants), out)


def shown(tried: Sequence[Tried], of: int, out: Console) -> int:
    killed = sum(each.is_killed for each in tried)
    interval = binomtest(killed, max(1, len(tried))).proportion_ci(0.95, "wilson")
    for each in tried:
        if not each.is_killed:
            out.print(f"{each.file}:{each.line} {each.change}: {each.words}", highlight=False, markup=False)
            out.print(each.diff, highlight=False, markup=False, soft_wrap=True)
    share = killed / max(1, len(tried))
    seconds = sum(each.cpu_seconds for each in tried) / max(1, len(tried))
    out.print(
        f"{killed} of {len(tried)} mutants killed, of {of:,} there are: {share:.0%}"
        f" (95%: {interval.low:.0%} to {interval.high:.0%}); goal {GOAL:.0%}; {seconds:.1f} CPU seconds each;"
        f" {sum(each.left_out > 0 and not each.is_killed for each in tried)} survived the time, not all of their tests"
    )
    return int(share < GOAL)


if __name__ == "__main__":
    sys.exit(main())
