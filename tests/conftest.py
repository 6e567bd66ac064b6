"""One thread and a fixed seed for every test; hypothesis without deadlines, since the machine is noisy."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("stabilitylab", deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("stabilitylab")
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes runs only where it is asked for."""
    if "exhaustive" not in config.option.markexpr:
        skipped = pytest.mark.skip(reason="all of torch's operators; run with: make test-exhaustive")
        for item in items:
            if "exhaustive" in item.keywords:
                item.add_marker(skipped)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
