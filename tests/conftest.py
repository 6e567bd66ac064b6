"""One thread and a fixed seed for every test; hypothesis without deadlines, since the machine is noisy."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from stabilitylab.probes.native_scan import ASKED, weight_pass
from stabilitylab.watching.attaching import attach

hypothesis.settings.register_profile("stabilitylab", deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("stabilitylab")
torch.set_num_threads(1)


TIERS = {
    "browser": "looks at pages in Chromium; run with: make test-browser",
    "pretrained": "edits a really pretrained model; run with: make test-pretrained",
    "gpu": "needs an accelerator; run with: make test-gpu",
    "triton": "needs triton, which interprets its kernels on a CPU; run with: make test-triton",
    "processes": "starts two and four processes; run with: make test-processes",
    "easyedit": "edits by EasyEdit itself; run with: make test-easyedit EASYEDIT=a checkout of it",
    "exhaustive": "all of torch's operators; run with: make test-exhaustive",
}
"""What needs more than a fresh machine has, or takes minutes: run only where it is asked for by its mark."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which weight pass the tests ran over on a CPU; those of the passes themselves take each that there is."""
    terminalreporter.write_line(f"weight pass: {weight_pass()}{_why_numpy()}")


def _why_numpy() -> str:
    if weight_pass() == "native":
        return ""
    if os.environ.get(ASKED) == "numpy":
        return f" ({ASKED} asks for it)"
    if importlib.util.find_spec("stabilitylab.probes._weight_scan") is None:
        return " (there is no native code: no compiler when this was installed)"
    return " (native code is of another source; to build it: python setup.py build_ext --inplace)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A tier that was not asked for is skipped, and says how to run it."""
    for tier, reason in TIERS.items():
        if tier not in config.option.markexpr:
            for item in items:
                if item.get_closest_marker(tier):  # the keywords hold the names of folders too
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """A shell's background jobs begin with Ctrl-C ignored, and so would all that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _measured_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a test's edits happen to take must not say what is measured; a test of budgets gives one."""
    monkeypatch.setitem(attach.__kwdefaults__, "budget", None)


@pytest.fixture(autouse=True)
def _nothing_was_compiled() -> Iterator[None]:
    """Calls are not watched in a process that has compiled anything: each test begins as in one that has not."""
    yield
    compiler = sys.modules.get("torch._dynamo.convert_frame")
    if compiler is not None:
        compiler.FRAME_COUNTER = 0  # type: ignore[attr-defined]
