"""The edit's own loss on the original weights: what the gradient would be if no edit had come before."""

from __future__ import annotations

import functools
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
from stabilitylab.sites import Site, locate


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
        chosen = [
            site
            for site in sites
            if site.name in firsts and references.holds(site.name) and self._bench.needed(FeedbackPass, site.name)
        ]
        if chosen and call is not None:
            self._bench.safely("feedback", functools.partial(self._replay, model, chosen, call, references, firsts))

    def _replay(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        call: ModelCall,
        references: References,
        firsts: Mapping[str, Factors],
    ) -> None:
        names = {id(tensor): name for name, tensor in model.named_parameters(remove_duplicate=False)}
        originals: dict[str, Tensor] = {}
        places: dict[str, str] = {}
        for site in sites:
            found = locate(model, site)
            name = None if found is None else names.get(id(found[1]))
            if found is not None and name is not None:
                # Of the live weight's dtype, in case the user has cast the model since.
                first = references.original(site.name, found[1]).to(found[1].dtype)
                originals[name], places[name] = first.detach().requires_grad_(), site.name

        def run() -> tuple[Tensor | None, ...]:
            output = torch.func.functional_call(model, originals, call.args, call.kwargs)
            loss = canaries.loss_of(output)
            if loss is None or not loss.requires_grad:
                raise ValueError("the model's output holds no loss; give its call labels, or leave FeedbackShare out")
            return torch.autograd.grad(loss, list(originals.values()), allow_unused=True)

        for name, gradient in zip(originals, run_silently(model, run, gradients=True), strict=True):
            if gradient is not None:
                factors = firsts[places[name]]
                packed = torch.stack([inner_product(factors, factors), norm_of(gradient)])
                self._bench.add(places[name], packed, FeedbackPass.from_host)
