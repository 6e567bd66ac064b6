"""The report in a real browser. Run with `make test-browser`; needs Debian's package `chromium`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from stabilitylab.reports.html import write_report
from synthetic import HOSTILE, make_run

from stabilitylab.run import load

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; `apt install chromium`, then `make test-browser`"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    return write_report(load(make_run(folder / "run", edits=20, dies_at=14)), folder / "report.html")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    made = make_run(folder / "run", edits=10, dies_at=6, sites=len(HOSTILE), hostile_labels=True)
    return write_report(load(made), folder / "report.html")


def chromium(page: Path, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def screenshot(page: Path, tmp_path: Path, width: int, height: int, *options: str) -> np.ndarray:
    """Pixels as float32 of shape [height, width, 3]."""
    out = tmp_path / "screen.png"
    done = chromium(page, tmp_path, f"--screenshot={out}", f"--window-size={width},{height}", *options)
    assert not console_lines(done.stderr)
    return np.asarray(imread(out))[:, :, :3]


def console_lines(log: str) -> list[str]:
    """What the page itself had to complain about: blocked styles, missing pictures."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def share_of(pixels: np.ndarray, colour: str) -> float:
    wanted = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return float((np.abs(pixels - wanted).max(axis=2) < 0.02).mean())


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_and_its_pictures_are_drawn(page: Path, tmp_path: Path, width: int) -> None:
    pixels = screenshot(page, tmp_path, width, 6_000)
    assert pixels.shape[1] == width
    assert share_of(pixels, "#fefefe") > 0.2  # cards
    assert share_of(pixels, "#b3123f") > 0.001  # non-finite cells and first bad edits, within the pictures
    assert share_of(pixels, "#0072b2") > 0.0001  # the first line of a chart


def test_it_is_dark_for_those_who_prefer_that(page: Path, tmp_path: Path) -> None:
    pixels = screenshot(page, tmp_path, 1280, 6_000, "--blink-settings=preferredColorScheme=0")
    assert share_of(pixels, "#fefefe") < 0.001
    assert share_of(pixels, "#181e26") > 0.2
    assert share_of(pixels, "#56b0ea") > 0.0001


def test_nothing_runs_and_nothing_is_asked_for(hostile_page: Path, tmp_path: Path) -> None:
    done = chromium(hostile_page, tmp_path, "--dump-dom", f"--log-net-log={tmp_path / 'net.json'}")
    assert "<title>Non-finite: run · stability report</title>" in done.stdout
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in done.stdout
    assert "<script" not in done.stdout
    assert "onerror=alert(1)&gt;" in done.stdout
    assert not console_lines(done.stderr)
    assert "example.org" not in (tmp_path / "net.json").read_text(errors="replace")
