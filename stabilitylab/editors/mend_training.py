"""Training MEND: the edit must do what it should (edit loss) and nothing else (locality KL)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from stabilitylab.editors.base import Example
from stabilitylab.editors.factors import gradient_factors
from stabilitylab.editors.layers import edited_layers
from stabilitylab.editors.mend import Mend


def train(
    mend: Mend,
    model: nn.Module,
    examples: Iterator[Example],
    *,
    steps: int = 400,
    per_step: int = 4,
    first_look: int = 100,
    learning_rate: float = 1e-3,
    rate_learning_rate: float = 1e-4,
    edit_weight: float = 1.0,
    keep_weight: float = 1.0,
    validate: Callable[[Mend], float] | None = None,
    every: int = 50,
    progress: Callable[[int, int, str], None] | None = None,
) -> float:
    """Train `mend` for `model`, whose weights stay as they are, and leave it at its best validated state.

    The loss is ``edit_weight · mean(-log p_edited(wanted)) + keep_weight · mean KL(p_before ‖ p_edited)``. The
    normaliser sees the factors of `first_look` edits before the first step and of every edit after.

    Args:
        mend: the editor, changed in place.
        model: the model, in float32.
        examples: an endless iterator.
        steps: optimiser steps.
        per_step: edits per step.
        first_look: edits that only the normaliser sees.
        learning_rate: Adam's, for the hypernetworks.
        rate_learning_rate: Adam's, for the edit rates.
        edit_weight: weight of the edit loss.
        keep_weight: weight of the locality KL.
        validate: a figure of merit, greater is better, asked every `every` steps; without it the last state stays.
        every: steps between validations.
        progress: called with (steps done, steps, words).

    Returns:
        The best validated figure, or NaN without `validate`.
    """
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    mend.requires_grad_(True).train()
    hypernetworks = [parameter for name, parameter in mend.named_parameters() if name != "edit_lrs"]
    optimizer = torch.optim.Adam(
        [{"params": hypernetworks, "lr": learning_rate}, {"params": [mend.edit_lrs], "lr": rate_learning_rate}]
    )
    best, best_state = float("nan"), copy.deepcopy(mend.state_dict())
    try:
        for example in islice(examples, first_look):
            observe(mend, gradient_factors(model, mend.sites, example.edit)[0])
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            total = 0.0
            for example in islice(examples, per_step):
                loss = edit_loss(mend, model, example, edit_weight, keep_weight) / per_step
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(mend.parameters(), 1.0)
            optimizer.step()
            if validate is not None and (step % every == 0 or step == steps):
                figure = validate(mend)
                if not math.isnan(figure) and (math.isnan(best) or figure > best):
                    best, best_state = figure, copy.deepcopy(mend.state_dict())
            if progress is not None:
                progress(step, steps, f"MEND: loss {total:.2f}, best {best:.3f}")
        if validate is not None:
            mend.load_state_dict(best_state)
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        mend.requires_grad_(False).eval()
    return best


def observe(mend: Mend, factors: list[tuple[Tensor, Tensor]]) -> None:
    """Show raw factors to the normalisers."""
    for transform, _, u, v in mend.placed(factors):
        transform.observe(u, v)


def edit_loss(mend: Mend, model: nn.Module, example: Example, edit_weight: float, keep_weight: float) -> Tensor:
    """The loss of one edit, differentiable in the editor's parameters; the model is not changed."""
    factors, _ = gradient_factors(model, mend.sites, example.edit)
    observe(mend, factors)
    layers = edited_layers(model, mend.sites)
    edited = {
        f"{layer.name}.weight": layer.parameter.detach() + layer.as_held(update)
        for layer, update in zip(layers, mend.updates(factors), strict=True)
    }
    with torch.no_grad():
        before = model(**example.asked).logits[:, -1].float().log_softmax(-1)
    after = functional_call(model, edited, args=(), kwargs=dict(example.asked)).logits[:, -1].float().log_softmax(-1)
    wanted = len(example.wanted)
    learned = functional.nll_loss(after[:wanted], example.wanted)
    kept = functional.kl_div(after[wanted:], before[wanted:], log_target=True, reduction="batchmean")
    return edit_weight * learned + keep_weight * kept
