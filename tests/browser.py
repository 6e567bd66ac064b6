"""A page in headless Chromium, driven by Playwright, with what it wrote to its console and what it asked the network.

Needs Debian's package `chromium`; Playwright's own browsers are not used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; `apt install chromium`, then `make test-browser`"),
]
"""For a module's `pytestmark`."""
SCREENSHOTS = Path(os.environ.get("STABILITYLAB_SCREENSHOTS", "build/screenshots"))
"""Where pictures are kept for a person to look at."""

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Visit:
    """An open page. said: what it wrote to its console, and errors that it did not catch. asked: addresses."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def keep(self, name: str) -> Path:
        """A picture of the whole page, kept as `name`.png."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path, full_page=True)
        return path

    def violations(self, impacts: Sequence[str] = ("serious", "critical")) -> list[str]:
        """What axe-core finds wrong for people with disabilities, of these impacts."""
        found: list[dict[str, Any]] = Axe().run(self.page)["violations"]
        return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found if each["impact"] in impacts]


@contextmanager
def visit(
    address: str | Path, *, width: int = 1280, height: int = 900, dark: bool = False, javascript: bool = True
) -> Iterator[Visit]:
    """Open a file or an address, wait until it is loaded, and close it at the end. Needs `CHROMIUM`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                java_script_enabled=javascript,
            )
            seen = Visit(page)
            page.on("console", lambda message: seen.said.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: seen.said.append(f"error: {error}"))
            page.on("request", lambda request: seen.asked.append(request.url))
            page.goto(address.absolute().as_uri() if isinstance(address, Path) else address)
            yield seen
        finally:
            browser.close()
