"""pytest inside forks of one warm process: torch and its like are imported once, not before each handful of tests.

The process that forks must not have imported what is to be tested: each fork reads that anew, as it then stands in
the folder. This file knows no mutants.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import pytest

SLOW_TO_IMPORT: Final = (
    "torch",
    "numpy",
    "scipy.stats",
    "scipy.optimize",
    "hypothesis",
    "sqlite3",
    "transformers",
    "typer",
)
"""And `matplotlib`, which looks for a folder of its own as it is imported, and is therefore left to the forks."""
MINE: Final = ("stabilitylab", "benchmarks", "tests")
"""What a fork reads from the folder."""
SETTINGS: Final = (
    *("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp=basetemp"),
    "-Wignore:Module already imported:pytest.PytestAssertRewriteWarning",  # hypothesis is, on purpose
)
HANGING_SECONDS: Final = 30.0
"""CPU time beyond the limit, after which the last test is called hanging. Of the clock, five times both."""


@dataclass(frozen=True)
class Ended:
    """What a fork came to. failed_by: the first test that failed, or what else went wrong; None: nothing did."""

    failed_by: str | None
    ran: int
    cpu_seconds: float


def warm_up() -> None:
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)


def run_tests(folder: Path, nodes: Sequence[str], most_cpu_seconds: float) -> Ended:
    """These tests, in this order, until one fails or the time is over (after which no further one is begun)."""
    files = list(dict.fromkeys(node.partition("::")[0] for node in nodes))
    return _forked(folder, ["-x", *files], [_Order(nodes), _Limit(most_cpu_seconds)], most_cpu_seconds)


def run_each(folder: Path, files: Sequence[str], plugin: object, most_cpu_seconds: float) -> Ended:
    """All tests of these files, watched by a pytest plugin."""
    return _forked(folder, list(files), [plugin, _Limit(most_cpu_seconds)], most_cpu_seconds)


class _Order:
    """Of what was collected, these and no others, in their order. One that is gone is not missed: names may mutate."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self.ranks = {node: rank for rank, node in enumerate(nodes)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.ranks), key=lambda item: self.ranks[item.nodeid]
        )


class _Limit:
    """Counts the tests, keeps the first failure, and begins no further test when the time is over."""

    def __init__(self, most_cpu_seconds: float) -> None:
        self.most_cpu_seconds, self.ran, self.failed, self.is_over = most_cpu_seconds, 0, "", False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        result = yield
        self.ran += 1
        if _cpu_seconds() > self.most_cpu_seconds:
            self.is_over = True
            item.session.shouldstop = "the time is over"
        return result


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _forked(folder: Path, words: list[str], plugins: list[Any], most_cpu_seconds: float) -> Ended:
    """A fork of its own group, which is ended with all that it has started."""
    here, there = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    fork = context.Process(target=_inside, args=(folder, words, plugins, most_cpu_seconds, there))
    fork.start()
    there.close()
    fork.join(5 * (most_cpu_seconds + HANGING_SECONDS))
    has_ended = fork.exitcode is not None and fork.exitcode != -signal.SIGXCPU
    with here:
        try:
            ended = Ended(*here.recv()) if here.poll() else None
        except EOFError:
            ended = None
    _end_group(fork.pid or 0)
    fork.join()
    return ended or Ended("the process ends" if has_ended else "hangs", 0, most_cpu_seconds)


def _end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _inside(folder: Path, words: list[str], plugins: list[Any], most_cpu_seconds: float, answer: Connection) -> None:
    os.setsid()
    os.chdir(folder)
    most = int(most_cpu_seconds + HANGING_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    with open("output.txt", "w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in MINE]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    began = _cpu_seconds()
    limit = next(plugin for plugin in plugins if isinstance(plugin, _Limit))
    limit.most_cpu_seconds += began
    code = pytest.main([*SETTINGS, *words], plugins=plugins)
    is_sound = code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) or limit.is_over
    failed = limit.failed or (None if is_sound else f"pytest ends with {int(code)}")
    answer.send((failed, limit.ran, _cpu_seconds() - began))
    answer.close()
