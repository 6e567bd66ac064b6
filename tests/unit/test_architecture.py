"""Data flows one way: what each station may import, read from the source (shared/DESIGN.md's table). No circles.

All imports count, lazy ones inside functions too; only those under ``if TYPE_CHECKING`` don't.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "stabilitylab"
ROOTS = {PACKAGE: PACKAGE, "probes": f"{PACKAGE}.probes", "reports": f"{PACKAGE}.reports", "benchmarks": "benchmarks"}

DOOR: Final = ("record.display", "reports")
"""The one door that opens backwards: a run or a diagnosis shows itself in a notebook, by imports inside functions."""

VERSION_IS_SAID_BY = f"{PACKAGE}.commands.cli"

MAY: Final[Mapping[str, tuple[str, ...]]] = {
    "errors": (),
    "record": ("errors",),
    # A run is judged where it is read. Analysis itself takes of the record what a row is.
    "record.run": ("errors", "record", "analysis"),
    "record.following": ("errors", "record", "analysis"),
    "record.display": ("reports",),
    "analysis": (
        "errors",
        *(
            f"record.{name}"
            for name in ("readings", "packed", "serving", "note_kinds", "operations", "scanned", "display")
        ),
        # The one layer that looks at what others wrote.
        "record.checked",
        "record.plain_files",
    ),
    "analysis.calibrating": ("errors", "record.run", "analysis"),
    "probes": ("errors", "record.readings"),
    # Acting steps into an edit, and marks its own work there as watching does.
    "acting": (
        "errors",
        "record.operations",
        "record.readings",
        *(f"watching.{name}" for name in ("own_work", "calls", "reach", "snapshot")),
    ),
    # A scan looks at a model and its editor by the names and hooks that watching has.
    "acting.scanning": (
        "errors",
        "record.plain_files",
        "record.scanned",
        *(f"probes.{name}" for name in ("canary_places", "logits_pass", "weight_pass", "weight_spectrum")),
        *(f"watching.{name}" for name in ("adapted", "answer", "canary", "editor_parts", "reach", "sites")),
        *(f"watching.{name}" for name in ("snapshot", "undoing")),
    ),
    # What `stabilitylab.scan` gives: figures, and what they warn of.
    "acting.scanning.scanned": (
        "record.scanned",
        "record.display",
        "acting.scanning.scan",
        "analysis.caution",
        "analysis.cautions",
        "analysis.limits",
    ),
    # Watching hands its rows to the analyzer and keeps pace by it; how anything is decided is not its business.
    "watching": (
        "errors",
        "record",
        "probes",
        *(f"acting.{name}" for name in ("memory", "replay", "scanning.scan", "schedule", "tracer", "tracing")),
        *(f"analysis.{name}" for name in ("alertness", "analyzer", "caution", "cautions", "findings")),
        *(f"analysis.{name}" for name in ("pace", "restoring", "thresholds")),
        "reports.announcing",
        "reports.sinks",
        "reports.tensorboard",
    ),
    "reports": ("errors", "record", "analysis"),
    "integrations": (
        "errors",
        "record.note_kinds",
        "watching",
        "probes.base",
        "analysis.thresholds",
        "acting.schedule",
    ),
    "editors": ("errors", "watching.editor_report", "watching.sites"),
    "testbed": ("errors", "record", "probes", "watching", "analysis", "reports", "editors"),
    "commands": ("errors", "record", "probes", "analysis", "reports", "testbed", "acting.scanning"),
    "__main__": ("commands",),
}
"""What each station may import besides itself. A file listed by itself has that line instead of its station's."""

FOREIGN: Final[Mapping[str, tuple[str, ...]]] = {
    "errors": ("torch", "numpy"),
    "record": ("torch", "transformers", "rich", "jinja2", "matplotlib", "altair"),
    "analysis": ("torch", "transformers", "sqlite3", "rich", "jinja2", "matplotlib", "altair"),
    "probes": ("sqlite3", "transformers"),
    "acting": ("transformers", "sqlite3", "scipy", "rich"),
    "watching": ("transformers", "sqlite3", "scipy"),
    "reports": ("torch", "transformers", "scipy", "sqlite3"),
    "commands": ("torch", "transformers", "numpy", "scipy", "sqlite3"),
    "integrations": ("transformers",),
    "editors": ("transformers",),
}
"""Libraries that a station must never import: what it must never do needs them."""


@cache
def sources() -> Mapping[str, Path]:
    """Every file of the package and the benchmarks, by the name that it is imported as."""
    found = {}
    for root, name in ROOTS.items():
        for path in sorted((ROOT / root).rglob("*.py")):
            inside = path.relative_to(ROOT / root).with_suffix("").parts
            found[".".join([name, *(part for part in inside if part != "__init__")])] = path
    return found


@cache
def imports(path: Path, *, everywhere: bool = True) -> frozenset[str]:
    """The modules that a file imports, or with `everywhere` off: those that it imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing_only = [node for node in conditions if "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in typing_only for inner in ast.walk(node)}
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(inner) for function in functions for inner in ast.walk(function)}
    found: set[str] = set()
    for node in ast.walk(tree):
        assert not getattr(node, "level", 0), f"{path}:{node.lineno}: a relative import"
        if id(node) in skipped or (id(node) in inside and not everywhere):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in sources() else node.module or "" for name in names}
    return frozenset(found)


def under(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def of(*stations: str) -> tuple[str, ...]:
    return tuple(f"{PACKAGE}.{name}" for name in stations)


def rule_of(module: str) -> str | None:
    """The most particular line of `MAY` that speaks of a module; None for the package's own face."""
    lines = [line for line in MAY if under(module, *of(line))]
    return max(lines, key=len, default=None)


def own() -> Iterator[tuple[str, str, frozenset[str]]]:
    """Every file of the package with the line of `MAY` that speaks of it and what it imports."""
    for module, path in sources().items():
        line = rule_of(module)
        if line is not None:
            yield module, line, imports(path)


@pytest.mark.parametrize("line", MAY)
def test_a_station_imports_what_it_may_and_nothing_else(line: str) -> None:
    spoken_of = [(module, found) for module, whose, found in own() if whose == line]
    assert spoken_of, f"no module {line}: is the rule out of date?"
    itself = of(line.partition(".")[0]) if "." not in line else of(line)
    for module, found in spoken_of:
        ours = {name for name in found if under(name, PACKAGE) and not under(name, *itself)}
        ours -= {PACKAGE} if module == VERSION_IS_SAID_BY else set()
        assert not {name for name in ours if not under(name, *of(*MAY[line]))}, module


def test_every_file_of_the_package_is_of_a_station() -> None:
    homeless = [module for module in sources() if under(module, PACKAGE) and rule_of(module) is None]
    assert homeless == [PACKAGE]
    assert {path.name for path in (ROOT / PACKAGE).glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}


@pytest.mark.parametrize("station", FOREIGN)
def test_a_station_has_no_library_for_what_it_must_never_do(station: str) -> None:
    for module, path in sources().items():
        if under(module, *of(station)):
            assert not [name for name in imports(path) if under(name, *FOREIGN[station])], module


def test_there_is_no_circle_of_files() -> None:
    files = sources()
    door, behind = of(*DOOR)
    graph = {module: {name for name in imports(path) if name in files} for module, path in files.items()}
    graph[door] = {name for name in graph[door] if not under(name, behind)}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' → '.join(error.args[1])}")


def test_the_door_to_the_reports_opens_only_when_something_is_to_be_shown() -> None:
    door = sources()[of(DOOR[0])[0]]
    assert not [wrong for wrong in imports(door, everywhere=False) if under(wrong, PACKAGE)]
    assert any(under(found, *of(DOOR[1])) for found in imports(door))


FACES = of("analysis", "analysis.causes", "probes", "reports", "integrations", "watching", "record", "commands")


def test_nothing_inside_goes_through_a_face() -> None:
    """A package's face is for users: inside, a thing is imported from the module that defines it."""
    inside = [(module, found) for module, _, found in own() if sources()[module].name != "__init__.py"]
    through = {module: found & {*FACES, PACKAGE} for module, found in inside}
    assert {module for module, faces in through.items() if faces} == {VERSION_IS_SAID_BY}


def test_no_package_of_ours_imports_the_benchmarks_or_the_tests() -> None:
    for module, path in sources().items():
        if under(module, PACKAGE):
            assert not [name for name in imports(path) if under(name, "benchmarks", "tests")], module


def test_a_probe_never_reads_a_tensor_back_by_item_but_where_it_is_free_and_holds_no_hook() -> None:
    """`.item()` waits for an accelerator; on a CPU it is free, and only `weight_pass` branches on being there."""
    for module, path in sources().items():
        if under(module, *of("probes")):
            text = path.read_text(encoding="utf-8")
            assert ".item()" not in text or module in of("probes.weight_pass"), module
            assert "register_" not in text, module


def test_reading_judging_and_showing_a_run_need_no_torch_and_watching_no_transformers() -> None:
    """Not in the source only: whatever these modules bring in by way of others."""
    light = [
        module for module in sources() if under(module, *of("record", "analysis", "reports", "commands", "errors"))
    ]
    for without, modules in {
        "torch": [PACKAGE, *light],
        "transformers": [
            PACKAGE,
            *light,
            *(m for m in sources() if under(m, *of("watching", "probes", "integrations"))),
        ],
    }.items():
        code = f"import sys, {', '.join(modules)}; assert {without!r} not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
