"""What a run was made with: enough to make it again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.probes.native_scan import weight_pass
from stabilitylab.probes.triton_scan import is_there
from stabilitylab.watching.editor_parts import Named
from stabilitylab.watching.sites import Site, describe

_PACKAGES = ("stabilitylab", "torch", "transformers", "numpy", "scipy", "tensorboard", "matplotlib")


@cache
def _versions() -> dict[str, str]:
    """Of what this process has loaded, so that it is asked for once."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def git_state() -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it, of the repository around the working directory, if any."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {
        "commit": commit,
        # Without a lock: the user's git may be at work.
        "dirty": bool(_git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")),
    }


def _cwd() -> str | None:
    """The working directory; None where it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _class_name(thing: object) -> str:
    if isinstance(thing, ModuleType):
        return thing.__name__
    if isinstance(thing, Named):
        return f"dict of {', '.join(vars(thing))}"
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def of_sites(sites: Sequence[Site]) -> dict[str, Any]:
    """The part of the manifest that says what is watched."""
    return {"sites": [site.name for site in sites], "site_details": describe(sites)}


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    editor: object | None,
    canary: str | None,
    config: dict[str, Any],
    thresholds: Thresholds | None,
) -> dict[str, Any]:
    """The manifest of a run that begins now, as plain JSON values. thresholds: None for those of the package."""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters())
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "closed": False,
        "model_class": _class_name(model),
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "dtypes": dict(dtypes),
        "editor_class": None if editor is None else _class_name(editor),
        "canary": canary,
        "config": config,
        "seed": torch.initial_seed(),
        "versions": dict(_versions()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "weight_pass": weight_pass(),
        "device_pass": "triton" if is_there() else "torch",
        "command": list(sys.argv),
        "cwd": _cwd(),
        "git": git_state(),
        **of_sites(sites),
        **({} if thresholds is None else {"thresholds": thresholds.to_json()}),
    }
