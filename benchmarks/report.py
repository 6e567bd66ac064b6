"""What the HTML report costs: its size, the time to make it, and when a browser has painted it and is ready.

    python -m benchmarks.report [--edits N] [--sites N] [--visits N] [--json FILE]

The run is made up, as in benchmarks/analysis.py: every metric of the default probes at each site, growing from its
middle on, which is more readings than any real loop gives. Making is told in seconds of one thread's CPU time and of
the clock, apart for loading, diagnosis and page. The page is opened in Debian's chromium, headless, afresh for each
visit: first paint, and ready, when everything that is shown has been drawn; the median of the visits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import sync_playwright

from benchmarks.analysis import rows_of
from stabilitylab.probes.registry import probes_of
from stabilitylab.record.run import load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports.html import write_report

FLAGS: Final = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
PATIENCE: Final = 60_000


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what it returns, CPU seconds, seconds by the clock)."""
    cpu, clock = time.process_time(), time.perf_counter()
    made = work()
    return made, time.process_time() - cpu, time.perf_counter() - clock


def visit(page_file: Path) -> dict[str, float]:
    """Milliseconds from the start of loading to the first paint, and to being ready."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(page_file.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached", timeout=PATIENCE)
            return {
                "first_paint_ms": page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"),
                "ready_ms": page.evaluate("performance.getEntriesByName('stabilitylab-ready')[0].startTime"),
            }
        finally:
            browser.close()


def measure(edits: int, sites: int, visits: int) -> dict[str, float]:
    """Size, times of making, and times in the browser."""
    metrics = tuple(metric for probe in probes_of("default") for metric in probe.metrics)
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder) / "run", {"closed": True}, metrics)
        for row in rows_of("growing", edits, sites, metrics):
            writer.append(row)
        writer.close()
        found: dict[str, float] = {}
        run, found["load_cpu_s"], found["load_s"] = timed(lambda: load(Path(folder) / "run"))
        _, found["diagnosis_cpu_s"], found["diagnosis_s"] = timed(run.diagnosis)
        out, found["page_cpu_s"], found["page_s"] = timed(lambda: write_report(run, Path(folder) / "report.html"))
        found["html_mb"] = out.stat().st_size / 1e6
        found["json_mb"] = out.with_suffix(".json").stat().st_size / 1e6
        seen = [visit(out) for _ in range(visits)]
        for name in seen[0] if seen else ():
            found[name] = statistics.median(each[name] for each in seen)
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--visits", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.edits, arguments.sites, arguments.visits)
    for name, value in found.items():
        print(f"{name:20} {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
