"""The edit's own loss on the original weights: what the gradient would be if no edit had come before."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stabilitylab import canary as canaries
from stabilitylab.hooks import ModelCall, run_silently
from stabilitylab.instruments.bench import Bench
from stabilitylab.instruments.references import References
from stabilitylab.probes.feedback import FeedbackPass
from stabilitylab.probes.gradient_passes import Factors, inner_product
from stabilitylab.probes.weight_pass import norm_of
from stabilitylab.sites import Site, locate_readable


def _uses(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """(name, owner) of each parameter by its `id`; a tied one has several."""
    found: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for owner, module in model.named_modules():
        for name, tensor in module.named_parameters(owner, recurse=False, remove_duplicate=False):
            found[id(tensor)].append((name, module))
    return found


class FeedbackInstrument:
    """Runs the edit's first call of the model once more, forward and backward, with W₀ in place of the edited weights.

    The model's parameters and their gradients are not touched: the originals are put in by ``functional_call``.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def after(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        call: ModelCall | None,
        references: References,
        firsts: Mapping[str, Factors],
    ) -> None:
        """firsts: the factors of each layer's first pass in this edit."""
        if call is not None and any(self._bench.needed(FeedbackPass, name) for name in firsts):
            self._bench.safely("feedback", functools.partial(self._replay, model, sites, call, references, firsts))

    def _replay(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        call: ModelCall,
        references: References,
        firsts: Mapping[str, Factors],
    ) -> None:
        uses = _uses(model)
        wanted: dict[str, str] = {}
        originals: dict[str, Tensor] = {}
        for site in sites:
            found = locate_readable(model, site) if references.holds(site.name) else None
            if found is None:
                continue
            layer, tensor = found
            asked = site.name in firsts and self._bench.needed(FeedbackPass, site.name)
            # Of the live weight's dtype, in case the user has cast the model since.
            first = references.original(site.name, tensor).to(tensor.dtype).detach()
            for name, owner in uses[id(tensor)]:
                if asked and owner is layer:  # a leaf of its own: the gradient of a tied weight is told by layer
                    originals[name], wanted[name] = first.clone().requires_grad_(), site.name
                else:
                    originals.setdefault(name, first)
        if not wanted:
            return

        def run() -> tuple[Tensor | None, ...]:
            output = torch.func.functional_call(model, originals, call.args, call.kwargs, tie_weights=False)
            loss = canaries.loss_of(output)
            if loss is None:
                raise ValueError("the model's output holds no loss; give its call labels, or leave FeedbackShare out")
            if not loss.requires_grad:  # the edit has merged its adapters: the call passes none of the layers now
                return (None,) * len(wanted)
            return torch.autograd.grad(loss, [originals[name] for name in wanted], allow_unused=True)

        for name, gradient in zip(wanted, run_silently(model, run, gradients=True), strict=True):
            if gradient is not None:
                factors = firsts[wanted[name]]
                packed = torch.stack([inner_product(factors, factors), norm_of(gradient)])
                self._bench.add(wanted[name], packed, FeedbackPass.from_host)
