"""Data flows one way: what each station must never import, read from the source (shared/DESIGN.md's table)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "stabilitylab"
ROOTS = {"stabilitylab": PACKAGE, "probes": f"{PACKAGE}.probes", "reports": f"{PACKAGE}.reports"}


def module_name(path: Path) -> str:
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([ROOTS[first], *(part for part in rest if part != "__init__")])


def sources() -> dict[str, Path]:
    return {module_name(path): path for root in ROOTS for path in sorted((ROOT / root).rglob("*.py"))}


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """The modules that a file imports: at its top level, or with `everywhere` inside functions too."""
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
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def under(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def station(name: str) -> str:
    return f"{PACKAGE}.{name}"


MODEL_SIDE = tuple(
    map(station, ("sites", "hooks", "calls", "editor_parts", "instruments", "monitor", "attaching", "canary", "probes"))
)
TESTBED = (station("testbed"), station("editors"))
NEVER = {
    station("sites"): (station("hooks"), station("probes"), station("monitor"), station("store"), station("analysis")),
    station("hooks"): tuple(map(station, ("probes", "monitor", "store", "analysis", "instruments"))),
    station("probes"): (
        *map(station, ("hooks", "calls", "monitor", "instruments", "store", "run", "analysis", "reports")),
        "sqlite3",
    ),
    station("calls"): tuple(map(station, ("probes", "monitor", "store", "analysis", "instruments"))),
    station("editor_parts"): tuple(map(station, ("hooks", "probes", "monitor", "store", "analysis", "instruments"))),
    station("editor_report"): (PACKAGE,),
    station("instruments"): (station("store"), station("analysis"), station("monitor"), station("reports")),
    station("store"): ("torch", *MODEL_SIDE, station("analysis"), station("reports")),
    station("run"): ("torch", *MODEL_SIDE, station("reports")),
    station("following"): ("torch", *MODEL_SIDE, station("reports")),
    station("runfile"): ("torch", *MODEL_SIDE, station("analysis"), station("run"), station("reports")),
    station("readings"): ("torch", PACKAGE),
    station("packed"): ("torch", *MODEL_SIDE, *map(station, ("store", "run", "analysis", "reports"))),
    station("errors"): ("torch", PACKAGE),
    station("analysis"): ("torch", *MODEL_SIDE, station("store"), station("run"), station("reports"), "rich", "jinja2"),
    station("reports"): ("torch", *MODEL_SIDE, station("store")),
}


@pytest.mark.parametrize("who", sorted(NEVER))
def test_a_station_does_not_import_what_it_must_never(who: str) -> None:
    allowed_itself = [
        (module, wrong)
        for module, path in sources().items()
        if under(module, who)
        for wrong in imports(path, everywhere=True)
        if under(wrong, *NEVER[who]) and not under(wrong, who)
    ]
    assert not allowed_itself
    assert any(under(module, who) for module in sources()), f"no module {who}: is the rule out of date?"


def test_the_door_to_the_reports_opens_only_when_something_is_to_be_shown() -> None:
    """A run and a diagnosis reach `stabilitylab.reports` through `display` alone, which imports it inside functions."""
    door = sources()[station("display")]
    assert not [wrong for wrong in imports(door, everywhere=False) if under(wrong, PACKAGE)]
    inside = {found for found in imports(door, everywhere=True) if under(found, PACKAGE)}
    assert all(under(found, station("reports")) for found in inside)
    assert inside


def test_nothing_but_the_testbed_and_the_command_line_knows_the_testbed() -> None:
    for module, path in sources().items():
        if not under(module, *TESTBED):
            lazily = module == station("cli")
            found = imports(path, everywhere=not lazily)
            assert not [wrong for wrong in found if under(wrong, *TESTBED)], module


def test_a_probe_never_reads_a_tensor_back_by_item_but_where_it_is_free() -> None:
    """`.item()` waits for an accelerator; on a CPU it is free, and only `weight_pass` branches on being there."""
    for module, path in sources().items():
        if under(module, station("probes")) and module != station("probes.weight_pass"):
            assert ".item()" not in path.read_text(encoding="utf-8"), module


def test_reading_judging_and_reporting_a_run_need_no_torch() -> None:
    """Not in the source only: whatever these modules bring in by way of others."""
    without = ("store", "runfile", "run", "following", "readings", "errors", "cli", "analysis", "reports")
    light = [module for module in sources() if module == PACKAGE or under(module, *map(station, without))]
    code = f"import sys, {', '.join(light)}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
