"""Training a hypernetwork editor: the edit must do what it should (edit loss) and nothing else (locality KL)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from stabilitylab.editors.base import Example, Progress, quiet
from stabilitylab.editors.factors import joined
from stabilitylab.editors.layers import edited_layers, moved

if TYPE_CHECKING:
    from stabilitylab.editors.hypernetwork import HypernetworkEditor

VALIDATION_EXAMPLES = 48
"""Examples that `HypernetworkEditor.prepare` puts aside."""


@dataclass(frozen=True)
class Training:
    """How a hypernetwork is trained.

    steps: of the optimiser. groups: sets of edits per step; those of one set are carried out together. sizes: the
    least and the most edits of a set, drawn anew for each. first_look: edits that only the normaliser sees, before
    the first step. learning_rate: Adam's. rates: Adam's for the parameters whose name ends so. edit_weight,
    keep_weight: of the edit loss and of the locality KL. every: steps between validations.
    """

    steps: int = 150
    groups: int = 1
    sizes: tuple[int, int] = (1, 1)
    first_look: int = 100
    learning_rate: float = 5e-4
    rates: Mapping[str, float] = field(default_factory=dict)
    edit_weight: float = 1.0
    keep_weight: float = 30.0
    every: int = 50


def train(
    editor: HypernetworkEditor,
    model: nn.Module,
    examples: Iterator[Example],
    settings: Training,
    *,
    seed: int,
    validate: Callable[[Any], float] | None = None,
    progress: Progress = quiet,
) -> float:
    """Train `editor` for `model`, whose weights stay as they are, and leave it at its best validated state.

    The loss is ``edit_weight · mean(-log p_edited(wanted)) + keep_weight · mean KL(p_before ‖ p_edited)``. The
    normaliser sees the factors of every edit before the hypernetwork does.

    Args:
        editor: the editor, changed in place.
        model: the model, in float32.
        examples: an endless iterator.
        settings: how long and how fast.
        seed: of the sizes of the sets of edits.
        validate: a figure of merit of the editor, greater is better; without it the last state stays.
        progress: called with (steps done, steps, words).

    Returns:
        The best validated figure, or NaN without `validate`.
    """
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    editor.requires_grad_(True).train()
    optimizer = torch.optim.Adam(_parameter_groups(editor, settings))
    rng = np.random.default_rng(seed)
    best, best_state = float("nan"), copy.deepcopy(editor.state_dict())
    try:
        for example in islice(examples, settings.first_look):
            editor.observe(editor.factors(model, example.edit))
        for step in range(1, settings.steps + 1):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(settings.groups):
                least, most = settings.sizes
                group = list(islice(examples, int(rng.integers(least, most + 1))))
                total += backward(editor, model, group, settings, share=1 / settings.groups)
            torch.nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
            optimizer.step()
            if validate is not None and (step % settings.every == 0 or step == settings.steps):
                figure = validate(editor)
                if not math.isnan(figure) and (math.isnan(best) or figure > best):
                    best, best_state = figure, copy.deepcopy(editor.state_dict())
            progress(step, settings.steps, f"{editor.name}: loss {total:.2f}, best {best:.3f}")
        if validate is not None:
            editor.load_state_dict(best_state)
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        editor.requires_grad_(False).eval()
    return best


def _parameter_groups(editor: nn.Module, settings: Training) -> list[dict[str, Any]]:
    others = tuple(settings.rates)
    named = list(editor.named_parameters())
    found = [{"params": [p for name, p in named if not name.endswith(others)], "lr": settings.learning_rate}]
    for end, rate in settings.rates.items():
        found.append({"params": [p for name, p in named if name.endswith(end)], "lr": rate})
    return found


def backward(
    editor: HypernetworkEditor, model: nn.Module, group: Sequence[Example], settings: Training, share: float = 1.0
) -> float:
    """Add the gradient of edits that are carried out together to the editor's; returns their loss, times `share`.

    In two steps, as MALMEN's authors do (arXiv 2311.04661, §3.4): from the losses back to the weights' updates, one
    example's graph after the other, and from the updates' gradients back through the editor once.
    """
    factors = joined([editor.factors(model, example.edit) for example in group])
    editor.observe(factors)
    updates = editor.updates(factors)
    leaves = [update.detach().requires_grad_(True) for update in updates]
    layers = edited_layers(model, editor.sites)
    edited = {f"{layer.name}.weight": moved(layer, leaf) for layer, leaf in zip(layers, leaves, strict=True)}
    total = 0.0
    for example in group:
        loss = _loss(model, edited, example, settings) * (share / len(group))
        # The casts from `leaves` to `edited` are shared by all examples of the set.
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.autograd.backward(updates, [leaf.grad for leaf in leaves])
    return total


def _loss(model: nn.Module, edited: Mapping[str, Tensor], example: Example, settings: Training) -> Tensor:
    with torch.no_grad():
        before = _last(model(**example.asked))
    after = _last(functional_call(model, dict(edited), args=(), kwargs=dict(example.asked)))
    wanted = len(example.wanted)
    learned = functional.nll_loss(after[:wanted], example.wanted)
    kept = functional.kl_div(after[wanted:], before[wanted:], log_target=True, reduction="batchmean")
    return settings.edit_weight * learned + settings.keep_weight * kept


def _last(output: Any) -> Tensor:
    found: Tensor = output.logits[:, -1].float().log_softmax(-1)
    return found


def judge(model: nn.Module, examples: Sequence[Example], most: int) -> Callable[[HypernetworkEditor], float]:
    """A figure of merit from 0 to 1 on some examples, carried out in sets of at most `most`.

    It is the smaller of two shares: of the rows that are answered as wanted, and of the others whose answer stays.
    """

    @torch.no_grad()
    def figure(editor: HypernetworkEditor) -> float:
        right, kept = [], []
        for start in range(0, len(examples), most):
            group = examples[start : start + most]
            updates = editor.updates(joined([editor.factors(model, e.edit) for e in group]))
            layers = edited_layers(model, editor.sites)
            edited = {f"{layer.name}.weight": moved(layer, u) for layer, u in zip(layers, updates, strict=True)}
            for example in group:
                before = _last(model(**example.asked)).argmax(-1)
                logits = _last(functional_call(model, edited, args=(), kwargs=dict(example.asked)))
                after = torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
                wanted = len(example.wanted)
                right.append(after[:wanted] == example.wanted)
                kept.append(after[wanted:] == before[wanted:])
        return min(float(torch.cat(found).double().mean()) for found in (right, kept))

    return figure
