"""Fine-tuning on one edit at a time: Adam on the loss of the wanted answer, at one MLP matrix (FT).

With a constraint it is FT-L (Zhu et al., arXiv 2012.00363, section 3): after every step the weight is put back into a
ball around what it was before this edit. The ball moves along with the edits, as in the code that people use: a single
edit is bounded, the sum of all edits is not. (`stabilitylab.editors.regularized` bounds the sum.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Batch
from stabilitylab.editors.layers import edited_layers, mlp_layers
from stabilitylab.errors import UsageError, did_you_mean
from stabilitylab.watching.editor_report import EditorReport

Constraint = Literal["linf", "frobenius"]
STEPS = 50
LEARNING_RATE = 1e-3
RADII: dict[Constraint, float] = {"linf": 0.03, "frobenius": 0.3}
"""Radius of each constraint's ball, where none is given."""
LOSS_ENOUGH = 1e-2
"""The edit is done when its loss is below."""


class Finetune:
    """Edits by gradient descent. It knows nothing of earlier edits; Adam's state begins anew with each."""

    def __init__(
        self,
        sites: Sequence[str],
        *,
        batch_of: Callable[[Any], Batch],
        constraint: Constraint | None = None,
        radius: float | None = None,
        steps: int = STEPS,
        learning_rate: float = LEARNING_RATE,
    ) -> None:
        """
        Args:
            sites: names of the layers whose weights are trained.
            batch_of: makes the model's arguments, with labels, from a request.
            constraint: what stays within `radius`: ``"linf"``, the change of every single weight, or ``"frobenius"``,
                the norm of a layer's change as a share of the norm its weight had before the edit.
            radius: see there; `RADII` has the usual ones.
            steps: Adam's steps at most.
            learning_rate: Adam's.

        Raises:
            UsageError: an unknown constraint, or a radius without one or not above zero.
        """
        if constraint is not None and constraint not in get_args(Constraint):
            known = ", ".join(get_args(Constraint))
            raise UsageError(
                f"no constraint {constraint!r}; expected {known}, or None{did_you_mean(constraint, RADII)}"
            )
        if radius is not None and (constraint is None or not radius > 0):
            raise UsageError(f"radius={radius} with constraint={constraint!r}; expected a constraint, a radius above 0")
        self.sites: tuple[str, ...] = tuple(sites)
        self.batch_of = batch_of
        self.constraint: Constraint | None = constraint
        self.radius = RADII[constraint] if constraint is not None and radius is None else radius
        self.steps = steps
        self.learning_rate = learning_rate
        self.reports: dict[str, EditorReport] = {}
        """Of the last edit: the update of each site, float32, before it was cast to the weight's dtype."""

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        sites: Sequence[str] | None = None,
        *,
        batch_of: Callable[[Any], Batch],
        constraint: Constraint | None = None,
        radius: float | None = None,
        steps: int = STEPS,
        learning_rate: float = LEARNING_RATE,
    ) -> Finetune:
        """An editor of `sites` of `model`, by default the MLP's down matrix at two thirds of the decoder's depth.

        (EasyEdit takes one down matrix too, for most models layer 21 of 32.)

        Raises:
            SiteError: the model has no such layers.
            UsageError: see the constructor.
        """
        if sites is None:
            down = list(mlp_layers(model, "down").values())
            sites = [down[2 * len(down) // 3]]
        edited_layers(model, sites)
        return cls(
            sites,
            batch_of=batch_of,
            constraint=constraint,
            radius=radius,
            steps=steps,
            learning_rate=learning_rate,
        )

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """Train `request` into `model`, in place. If something is raised, the weights are as they were.

        Returns:
            The same model.
        """
        batch = self.batch_of(request)
        weights = [layer.parameter for layer in edited_layers(model, self.sites)]
        flags = [weight.requires_grad for weight in weights]
        before = [weight.detach().clone() for weight in weights]
        try:
            for weight in weights:
                weight.requires_grad_(True)
            self.reports = self._train(model, batch, weights)
        except BaseException:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
            raise
        finally:
            for weight, flag in zip(weights, flags, strict=True):
                weight.requires_grad_(flag)
        return model

    def _train(self, model: nn.Module, batch: Batch, weights: Sequence[nn.Parameter]) -> dict[str, EditorReport]:
        # In float16 Adam's epsilon of 1e-8 is zero: where the gradient's square underflows, its first step is a
        # division by zero, which makes most weights non-finite. So it steps on float32 masters.
        masters = [
            weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True) for weight in weights
        ]
        origins = [master.clone() for master in masters]
        optimiser = torch.optim.Adam(masters, lr=self.learning_rate)
        for _ in range(self.steps):
            with torch.enable_grad():
                loss = model(**batch).loss
                if loss < LOSS_ENOUGH:
                    break
                gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for master, gradient in zip(masters, gradients, strict=True):
                    master.grad = gradient.to(master.dtype)
                optimiser.step()
                for weight, master, origin in zip(weights, masters, origins, strict=True):
                    self._constrain(master, origin)
                    weight.copy_(master)
        return {
            site: EditorReport(update=master - origin)
            for site, master, origin in zip(self.sites, masters, origins, strict=True)
        }

    def _constrain(self, master: Tensor, origin: Tensor) -> None:
        """Put the weight back into the ball around `origin`, in place; NaN stays NaN."""
        if self.constraint is None or self.radius is None:
            return
        away = master - origin
        if self.constraint == "linf":
            away.clamp_(-self.radius, self.radius)
        else:
            norm = torch.linalg.vector_norm(away, dtype=torch.float64)
            most = self.radius * torch.linalg.vector_norm(origin, dtype=torch.float64)
            away *= (most / norm).clamp(max=1.0).nan_to_num(nan=1.0)
        torch.add(origin, away, out=master)
