"""Small real edit loops for tests: a two-layer model, edited by gradient steps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import stabilitylab as sl

CANARY = torch.linspace(-1, 1, 24).reshape(3, 8)


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(16, 4))


def edit_once(model: nn.Module, rate: float = 0.1) -> Tensor:
    """One gradient step on random data, in place, as FT does; returns the logits before it."""
    logits: Tensor = model(torch.randn(2, 5, 8))
    gradients = torch.autograd.grad(logits.pow(2).mean(), list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= rate * gradient
    return logits.detach()


def hooks_on(model: nn.Module) -> int:
    """Every hook that the model carries, whoever put it there."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    accumulated = sum(len(tensor._post_accumulate_grad_hooks or ()) for tensor in model.parameters())
    steps = len(_global_optimizer_pre_hooks)
    return accumulated + steps + sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def healthy_run(folder: Path, edits: int = 12) -> Path:
    """Small steps."""
    model = make_model()
    with sl.attach(model, "[03]", folder, canary=CANARY, trace=False) as monitor:
        for edit in range(edits):
            with monitor.edit(label=f"edit {edit}"):
                edit_once(model, rate=0.01)
    return folder


def dying_run(folder: Path) -> Path:
    """Steps with a rate that is far too high: each gradient is larger than the last, until NaN."""
    model = make_model()
    with sl.attach(model, "[03]", folder, canary=CANARY, trace=False) as monitor:
        for edit in range(14):
            with monitor.edit(label=f"edit {edit}"):
                edit_once(model, rate=1e3)
    return folder
