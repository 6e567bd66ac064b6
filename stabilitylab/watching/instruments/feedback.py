"""The edit's own loss on the original weights: what the gradient would be if no edit had come before."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stabilitylab.probes.feedback import FeedbackPass
from stabilitylab.probes.weight_pass import norm_of
from stabilitylab.watching.adapted import is_made
from stabilitylab.watching.answer import loss_of
from stabilitylab.watching.instruments.bench import Bench, full_precision
from stabilitylab.watching.instruments.references import References
from stabilitylab.watching.model_call import ModelCall
from stabilitylab.watching.one_hook import run_silently
from stabilitylab.watching.sites import Site, locate_readable


def _uses(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """(name, owner) of each parameter by its `id`; a tied one has several."""
    found: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for owner, module in model.named_modules():
        for name, tensor in module.named_parameters(owner, recurse=False, remove_duplicate=False):
            found[id(tensor)].append((name, module))
    return found


class FeedbackInstrument:
    """Runs the edit's first call of the model twice more, forward and backward: on the weights as the edit found them,
    and on the original ones. Both with the model's own loss and in evaluation mode, so that the two can be compared.

    The model's parameters and their gradients are not touched: both are put in by ``functional_call``.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def after(self, model: nn.Module, sites: Sequence[Site], call: ModelCall | None, references: References) -> None:
        """call: the edit's first of the model. W₋ must still be the weight before the edit."""
        if call is not None and any(map(self._asks, sites)):
            replay = functools.partial(self._replay, model, sites, call, references)
            self._bench.safely("feedback", replay, as_the_loop=True)

    def _asks(self, site: Site) -> bool:
        return site.orientation != "none" and self._bench.needed(FeedbackPass, site.name)

    def _replay(self, model: nn.Module, sites: Sequence[Site], call: ModelCall, references: References) -> None:
        call.check()
        before = self._gradients(model, sites, call, references, references.previous)
        original = self._gradients(model, sites, call, references, references.original)
        with full_precision():
            for name, norm in before.items():
                if name in original:
                    self._bench.add(name, torch.stack([norm, original[name]]), FeedbackPass.from_host)

    def _gradients(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        call: ModelCall,
        references: References,
        which: Callable[[str, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """The norms of the gradients by site, with the references that `which` gives in place of the weights."""
        uses = _uses(model)
        wanted: dict[str, str] = {}
        weights: dict[str, Tensor] = {}
        for site in sites:
            found = locate_readable(model, site) if references.holds(site.name) else None
            if found is None or is_made(*found):  # whose weight is no tensor that another can be put in place of
                continue
            layer, tensor = found
            asked = self._asks(site)
            # Of the live weight's dtype, in case the user has cast the model since.
            reference = which(site.name, tensor).to(tensor.dtype).detach()
            for name, owner in uses[id(tensor)]:
                if asked and owner is layer:  # a leaf of its own: the gradient of a tied weight is told by layer
                    weights[name], wanted[name] = reference.clone().requires_grad_(), site.name
                else:
                    weights.setdefault(name, reference)
        if not wanted:
            return {}

        def run() -> tuple[Tensor | None, ...]:
            output = torch.func.functional_call(model, weights, call.args, call.kwargs, tie_weights=False)
            loss = loss_of(output)
            if loss is None:
                raise ValueError("the model's output holds no loss; give its call labels, or leave FeedbackShare out")
            if not loss.requires_grad:  # the edit has merged its adapters: the call passes none of the layers now
                return (None,) * len(wanted)
            return torch.autograd.grad(loss, [weights[name] for name in wanted], allow_unused=True)

        found_gradients = zip(wanted, run_silently(model, run, gradients=True), strict=True)
        return {wanted[name]: norm_of(gradient) for name, gradient in found_gradients if gradient is not None}
