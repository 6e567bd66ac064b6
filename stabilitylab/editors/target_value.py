"""The value to write: a shift of a module's output at one token, found by gradient steps, that brings the answer.

Meng et al., NeurIPS 2022, arXiv 2202.05262, section 3.1, eq. 4, for the output of an MLP; Meng et al., ICLR 2023, arXiv
2210.07229, section 4.1, eq. 16, for the output of a decoder layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabilitylab.editors.at_token import last_used, mean_at, shifted
from stabilitylab.editors.base import Batch, Located
from stabilitylab.errors import UsageError


@dataclass(frozen=True)
class Search:
    """How the shift δ is looked for: Adam steps on loss + kl · KL(before ‖ now at the kept rows) + decay · ‖δ‖ / ‖v₀‖².

    clamp: after each step ‖δ‖ is cut to clamp · ‖v₀‖. enough: the search ends once the answer's loss (mean negative log
    likelihood per token) is below. The paper's code has 0.05. The reserve is for rows that get less than the whole
    shift after the edit: one fact that MEMIT missed on SmolLM2-135M had a loss of 2.3 at 0.05, and of 0.7 at 0.02.
    """

    steps: int = 25
    lr: float = 0.5
    kl: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0
    enough: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"{self.steps} steps; expected at least 1")


@dataclass(frozen=True, eq=False)
class TargetValue:
    """initial: float64 [units], the module's output at the token, mean over the rows. shift: float64 [units].

    clamp_hits: steps after which the shift was cut. losses: of the answer, before each step.
    """

    initial: Tensor
    shift: Tensor
    clamp_hits: int
    losses: tuple[float, ...]

    @property
    def target(self) -> Tensor:
        """v* or, of a decoder layer, z: float64 [units]."""
        return self.initial + self.shift


def target_value(model: nn.Module, module: str, units: int, located: Located, search: Search) -> TargetValue:
    """Look for the shift of the output of `module` at the located token that makes the model give the wanted answer.

    The shift is float32 whatever the model's dtype. The model must be `still`; nothing is left on it.

    Args:
        model: stays as it is.
        module: the name of a matrix or of a decoder layer, whose output may be a tuple.
        units: how many outputs it has.
        located: the request.
        search: the settings.
    """
    shift = torch.zeros(units, device=next(model.parameters()).device, requires_grad=True)
    adam = torch.optim.Adam([shift], lr=search.lr)
    initial = before = None
    losses: list[float] = []
    hits = 0
    with torch.enable_grad():
        for _ in range(search.steps):
            with shifted(model, module, located.subject, shift) as seen:
                loss = model(**located.batch).loss.float()
            initial = mean_at(seen[0], located.subject) if initial is None else initial
            size = float(torch.linalg.vector_norm(initial))
            losses.append(float(loss.detach()))
            if losses[-1] < search.enough:
                break
            if located.kept is not None:
                assert located.kept_subject is not None
                with shifted(model, module, located.kept_subject, shift):
                    now = _last_log_probabilities(model, located.kept)
                before = now.detach() if before is None else before
                loss = loss + search.kl * nn.functional.kl_div(now, before, reduction="batchmean", log_target=True)
            loss = loss + search.decay * torch.linalg.vector_norm(shift) / size**2
            (shift.grad,) = torch.autograd.grad(loss, shift)
            adam.step()
            norm = float(torch.linalg.vector_norm(shift.detach()))
            if norm > search.clamp * size:
                shift.detach().mul_(search.clamp * size / norm)
                hits += 1
    assert initial is not None
    return TargetValue(initial, shift.detach().double(), hits, tuple(losses))


def _last_log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """float32 [rows, words] at each row's last token."""
    logits = model(**batch).logits
    rows = torch.arange(logits.shape[0], device=logits.device)
    return torch.log_softmax(logits[rows, last_used(batch).to(logits.device)].float(), dim=-1)
