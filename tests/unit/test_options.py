"""What hosts hand on to `attach` is all that it takes, and nothing else."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from stabilitylab.errors import UsageError
from stabilitylab.integrations import accelerate, easyedit
from stabilitylab.integrations.transformers import StabilityCallback
from stabilitylab.watching.attaching import attach
from stabilitylab.watching.options import Options

BY_THE_HOST = {"model", "sites", "run", "editor", "resume"}
"""What a host gives by itself, or has arguments of its own for."""


def test_they_are_the_arguments_of_attach() -> None:
    assert set(Options.__annotations__) == set(inspect.signature(attach).parameters) - BY_THE_HOST


@pytest.mark.parametrize("host", ["trainer", "accelerate", "easyedit"])
def test_one_that_is_none_is_refused_before_anything_is_done(host: str) -> None:
    wrong: dict[str, Any] = {"budgt": 0.1}
    with pytest.raises(UsageError, match=r"no argument 'budgt'.*budget"):
        if host == "trainer":
            StabilityCallback("runs/none", **wrong)
        elif host == "accelerate":
            accelerate.watch(SimpleNamespace(), nn.Linear(2, 2), "runs/none", **wrong)
        else:
            with easyedit.watch(SimpleNamespace(), "runs/none", **wrong):
                pass
