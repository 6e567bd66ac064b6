"""Five loops that together give every probe something to read, and what their user sees of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.watching.monitor import Edit
from tests.editor_fakes import GRACEAdapter, GradientTransform, WISEAdapter
from tests.gpt2_loop import TEXT, edit_gpt2, make_gpt2
from tests.loops import CANARY, edit_once, make_model


@dataclass(frozen=True)
class Loop:
    """make: the model. editor: whose state is read. edit: one edit, watched or not; gives what the user computed."""

    make: Callable[[], nn.Module]
    editor: Callable[[], object]
    edit: Callable[[Any, Any, Edit | None], list[Tensor]]
    sites: str
    canary: object


def steps(model: nn.Module, editor: object, edit: Edit | None) -> list[Tensor]:
    return [edit_once(model)]


def text(model: Any, editor: object, edit: Edit | None) -> list[Tensor]:
    return [*edit_gpt2(model, passes=2), *(parameter.grad.clone() for parameter in model.parameters())]


def scaled(model: nn.Module, editor: Any, edit: Edit | None) -> list[Tensor]:
    scaler = editor.scaler
    optimizer = torch.optim.SGD(model.parameters(), 0.1, maximize=True)
    optimizer.zero_grad()
    loss: Tensor = model(torch.randn(2, 5, 8)).pow(2).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


def narrow(model: nn.Module, editor: object, edit: Edit | None) -> list[Tensor]:
    loss: Tensor = model(torch.randn(2, 5, 8).bfloat16()).pow(2).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= 0.1 * gradient
    return [loss.detach()]


class Mend(GradientTransform):
    def __init__(self) -> None:
        super().__init__(8, 16)
        for buffer in (self.u_mean, self.u_std, self.v_mean, self.v_std):
            buffer.fill_(0.5)
        self.u_std[3] = 0.0
        self.k.fill_(500.0)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return (u - self.u_mean) / (self.u_std + 1e-7)


def editor_with_everything() -> object:
    """MEND's normaliser and rates, AlphaEdit's projection and key cache, MEMIT's covariances."""
    return SimpleNamespace(
        mend=Mend(),
        edit_lrs=nn.Parameter(torch.full((3,), 1e-3)),
        P=torch.eye(8)[None],
        cache_c=torch.eye(8)[None],
        COV_CACHE={("model", "layer"): torch.eye(8)},
    )


class Side(WISEAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted_model() -> nn.Module:
    torch.manual_seed(1)
    grace, wise = GRACEAdapter(nn.Linear(8, 16)), Side(nn.Linear(16, 4))
    grace.add_key(torch.ones(1, 8))
    grace.register_buffer("spoilt", torch.zeros(3))  # nobody reads it
    return nn.Sequential(grace, nn.ReLU(inplace=True), wise)


def closed_form(model: Any, editor: Any, edit: Edit | None) -> list[Tensor]:
    """A solved update of the first layer, with all that an editor may say of it."""
    x = torch.randn(2, 5, 8)
    logits = model(x)
    entered = editor.mend(x.reshape(-1, 8), torch.zeros(10, 16))
    system = entered.T @ entered + torch.eye(8)
    update = 0.01 * torch.linalg.solve(system, entered.T @ torch.randn(10, 16)).T
    model[0].spoilt.fill_(float("nan"))
    weight = model[0].layer.weight
    if edit is not None:
        edit.report(
            "0",
            sl.EditorReport(
                key=entered[0],
                direction=entered[1],
                target_value=torch.ones(16),
                initial_value=torch.full((16,), 2.0),
                clamp_hits=3,
                update=update,
            ),
        )
        edit.report("0.layer", sl.EditorReport(update=update))
    with torch.no_grad():
        weight += update
    return [logits.detach(), entered.detach(), update.detach()]


LOOPS = {
    "steps": Loop(make_model, lambda: None, steps, "[03]", CANARY),
    "scaled": Loop(make_model, lambda: SimpleNamespace(scaler=torch.amp.GradScaler("cpu")), scaled, "[03]", CANARY),
    "narrow": Loop(lambda: make_model().bfloat16(), lambda: None, narrow, "[03]", CANARY.bfloat16()),
    "text": Loop(make_gpt2, lambda: None, text, "*.mlp.*", TEXT),
    "closed form": Loop(adapted_model, editor_with_everything, closed_form, "*layer", CANARY),
}


@dataclass
class Ran:
    """What the user of a loop sees of it, edit by edit, and the model at its end."""

    model: nn.Module
    computed: list[list[Tensor]]
    random: list[Tensor]
    flags: list[bool]


def ran(loop: Loop, edits: int, folder: Path | None = None, probes: Any = (), **options: Any) -> Ran:
    model, editor = loop.make(), loop.editor()
    torch.manual_seed(5)
    computed, random = [], []
    monitor = None
    if folder is not None:
        options = {"editor": editor, "canary": loop.canary, "probes": probes, "trace": False} | options
        monitor = sl.attach(model, loop.sites, folder, **options)
    for _ in range(edits):
        if monitor is None:
            computed.append(loop.edit(model, editor, None))
        else:
            with monitor.edit() as edit:
                computed.append(loop.edit(model, editor, edit))
        random.append(torch.get_rng_state())
    if monitor is not None:
        monitor.close()
    flags = [p.requires_grad for p in model.parameters()] + [module.training for module in model.modules()]
    return Ran(model, computed, random, flags)


def same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)
