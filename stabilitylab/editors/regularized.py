"""Limits around any editor: a ball for its weights, a clip of its updates, a clamp of a hypernetwork's inputs.

Each is a remedy that people try against sequential edits that grow. The editor itself stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Editor, Prepared, Progress, Prompts, Remembering, quiet
from stabilitylab.editors.grace import Grace
from stabilitylab.errors import UsageError
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.sites import Site, find_sites, locate

LIMITS: dict[str, float] = {"ball": 0.25, "clip": 0.02, "clamp": 5.0}
"""The usual value of each limit: the best compromise for the shipped MEND on the digits' validation streams."""


class Regularized:
    """Another editor, `inner`, within limits; see `regularized`, which makes it."""

    def __init__(self, inner: Editor, *, ball: float | None, clip: float | None, clamp: float | None) -> None:
        self.inner = inner
        self.ball = ball
        self.clip = clip
        self.clamp = clamp
        self.reports: dict[str, EditorReport] = {}
        """The inner editor's of the last edit, without the update where a limit held it back."""
        self._sites: tuple[Site, ...] = ()
        self._origins: dict[str, Tensor] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """The inner editor's."""
        return self.inner.sites

    def __getattr__(self, name: str) -> Any:
        # Probes read statistics and caches off the editor (`watching.editor_parts`): it shows those of the inner.
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)  # before `__init__`, as in copying, whose protocol must be this object's own
        return getattr(self.inner, name)

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """Let the inner editor carry out `request`, then put every edited weight back within the limits, in place.

        What the inner editor raises passes through; nothing is limited then.

        Returns:
            What the inner editor returned: the same model, another or a wrapped one.
        """
        if not self._sites:
            self._sites = find_sites(model, self.inner.sites)
            self._origins = self._weights(model)
        before = self._weights(model) if self.clip is not None else {}
        with self._clamped():
            edited = self.inner.edit(model, request)
        reports = dict(getattr(self.inner, "reports", {}))
        moved = False
        for site in self._sites:
            weight = self._weight(edited, site)
            origin = self._origins[site.name]
            held = False
            if self.clip is not None:
                held |= put_back(weight, before[site.name], self.clip * norm_of(origin))
            if self.ball is not None:
                held |= put_back(weight, origin, self.ball * norm_of(origin))
            moved |= held
            report = reports.get(site.name)
            if held and report is not None and report.update is not None:
                # Else the update that was held back would look like one that was lost in rounding.
                reports[site.name] = dataclasses.replace(report, update=None)
        self.reports = reports
        if moved and isinstance(self.inner, Remembering):
            self.inner.take_over(edited)
        return edited

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of the edited weights by site, in their own dtype and on their own device."""
        return {site.name: self._weight(model, site).clone() for site in self._sites}

    @staticmethod
    def _weight(model: nn.Module, site: Site) -> Tensor:
        found = locate(model, site)
        if found is None:
            raise UsageError(f"no weight {site.parameter!r} is left to put a limit on; the editor took it out")
        return found[1].detach()

    @contextmanager
    def _clamped(self) -> Iterator[None]:
        """The clamp is on the inner editor's modules while it edits, and at no other time."""
        modules = clampable(self.inner) if self.clamp is not None else []
        before = [module.clamp for module in modules]
        try:
            for module in modules:
                module.clamp = self.clamp  # type: ignore[assignment]
            yield
        finally:
            for module, old in zip(modules, before, strict=True):
                module.clamp = old


class RegularizedPrepared(Regularized):
    """The same around an editor that must see data first; its state is the inner editor's, file and all."""

    inner: Prepared

    @property
    def file(self) -> str:
        """The inner editor's file name."""
        return self.inner.file

    @property
    def learned_with(self) -> Mapping[str, Any]:
        """The inner editor's."""
        return self.inner.learned_with

    def prepare(self, model: nn.Module, prompts: Prompts, *, seed: int, progress: Progress = quiet) -> None:
        """As the inner editor, without limits."""
        self.inner.prepare(model, prompts, seed=seed, progress=progress)

    def save(self, folder: str | Path) -> Path:
        """As the inner editor."""
        return self.inner.save(folder)

    def restore(self, folder: str | Path) -> None:
        """As the inner editor."""
        self.inner.restore(folder)


def regularized(
    editor: Editor, *, ball: float | None = None, clip: float | None = None, clamp: float | None = None
) -> Regularized:
    """`editor` within limits; `Prepared` exactly if `editor` is.

    Norms are Frobenius norms, taken in float64. ‖W₀‖ is that of a weight before the first edit through this wrapper,
    which keeps a copy W₀ of each edited weight on the weight's own device, in its own dtype. It holds for one chain
    of edits: make another wrapper for another model. Rounding to the weight's dtype may put a weight outside its
    limit by that much. A weight or an update with a NaN or Inf is left as it is: no projection can repair it, and the
    failure stays visible.

    Args:
        editor: any editor of weights.
        ball: after each edit every edited weight W is projected into ‖W − W₀‖ ≤ ball · ‖W₀‖.
        clip: of each edit, the update ΔW of every edited weight is scaled down to ‖ΔW‖ ≤ clip · ‖W₀‖. (A share of
            ‖W‖ would let weights grow exponentially; so they grow linearly at most.) It comes before the ball.
        clamp: what enters a hypernetwork (MEND, MALMEN) is clamped to ± this many standard deviations.

    Raises:
        UsageError: no limit, one not above zero, or one that the editor has no use for.
    """
    given = {name: value for name, value in (("ball", ball), ("clip", clip), ("clamp", clamp)) if value is not None}
    if not given:
        raise UsageError(f"no limit for {_name(editor)}; expected at least one of {', '.join(LIMITS)}")
    for name, value in given.items():
        if not value > 0:
            raise UsageError(f"{name}={value}; expected a number above 0")
    if isinstance(editor, Grace) and (ball is not None or clip is not None):
        raise UsageError("GRACE moves no weight: there is nothing for 'ball' or 'clip' to limit")
    if clamp is not None and not clampable(editor):
        raise UsageError(f"{_name(editor)} has no normalised inputs to clamp; expected MEND or MALMEN")
    kind = RegularizedPrepared if isinstance(editor, Prepared) else Regularized
    return kind(editor, ball=ball, clip=clip, clamp=clamp)


def clampable(editor: object) -> list[nn.Module]:
    """The modules of an editor, or of its attributes, whose normalised inputs can be clamped: with a ``clamp``."""
    held = [editor] if isinstance(editor, nn.Module) else [v for v in vars(editor).values() if isinstance(v, nn.Module)]
    return [module for top in held for module in top.modules() if hasattr(module, "clamp")]


def norm_of(weight: Tensor) -> float:
    """Frobenius norm, in float64."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


def put_back(weight: Tensor, centre: Tensor, radius: float) -> bool:
    """Project `weight` in place into the ball around `centre`; whether it was outside. Non-finite ones stay as is."""
    away = weight.double() - centre.to(weight.device).double()
    norm = norm_of(away)
    if not radius < norm < float("inf"):
        return False
    weight.copy_(centre + away * (radius / norm))
    return True


def _name(editor: object) -> str:
    return type(editor).__name__
