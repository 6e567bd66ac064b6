"""The canary's answer before anything was tried, and how far another answer is from it: as the probes of it measure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from stabilitylab.errors import UsageError
from stabilitylab.probes.canary_places import CanaryPlaces, canary_places
from stabilitylab.probes.logits_pass import CanaryPass, reduce_canary
from stabilitylab.watching.answer import Answer, forward, targets_of
from stabilitylab.watching.canary import Batch, Canary
from stabilitylab.watching.canary import of as canary_of


@dataclass(frozen=True)
class Distance:
    """Of an answer to the unedited model's, over the tokens that count (`probes.canary_places`).

    kl_nats: mean KL(original ‖ now) in nats, as ``canary.kl``; NaN or ∞ where the answer there is not finite.
    agreement: share of tokens with the same most likely successor, as ``canary.agreement``. is_finite: whether no
    logit, of any token, is NaN or infinite but by the original's design (a token that is never to come).
    """

    kl_nats: float
    agreement: float
    is_finite: bool

    def is_lost(self, limit: float) -> bool:
        """Whether it is not finite, or `limit` nats away or further."""
        return not (self.is_finite and self.kl_nats < limit)


@dataclass(frozen=True, eq=False)
class Original:
    """The unedited model's answer. canary: what was asked. places: the tokens that count, with the logits there.

    infinite: logits that are infinite or NaN in it.
    """

    canary: Canary
    places: CanaryPlaces
    infinite: float

    @property
    def is_sound(self) -> bool:
        """Whether its probabilities are numbers at all tokens that count."""
        return bool(self.places.logits.double().log_softmax(dim=-1).isnan().logical_not().all())

    def distance_of(self, model: nn.Module, batch: Batch | None = None) -> Distance:
        """Forward the canary on `model`, silently, and compare. batch: the same in another dtype, else the original's.

        Waits for an accelerator. Raises whatever the model raises, and ValueError where its output holds no logits.
        """
        answer = _answer(model, self.canary if batch is None else replace(self.canary, batch=batch))
        packed = reduce_canary(answer.logits, answer.mask, self.places)
        found = CanaryPass.from_host(packed.cpu().numpy())
        assert found.kl is not None
        assert found.agreement is not None
        # Rounding leaves a KL of two equal answers at minus some 1e-17.
        nats = found.kl if math.isnan(found.kl) else max(0.0, found.kl)
        return Distance(nats, found.agreement, found.nonfinite <= self.infinite and math.isfinite(nats))


def original_of(model: nn.Module, canary: Canary | Batch) -> Original:
    """The answer of `model` as it is now; one silent forward.

    Raises UsageError for a canary of no known form, for a replay, which has no original, and where it can't be
    answered.
    """
    given = canary_of(canary)
    if given is None or given.is_replay:
        raise UsageError("canary='replay' needs an edit to replay; a scan expects a batch, or a function of the model")
    try:
        answer = _answer(model, given)
    except Exception as error:
        says = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"the canary can't be forwarded: {says}") from error
    if answer.logits.shape[-1] == 1:
        raise UsageError("the canary's answer is one number a row: no distribution, whose distance could be told")
    places = canary_places(answer.logits, targets_of(model, given, answer), answer.mask)
    infinite = float((~answer.logits.isfinite()).sum())
    return Original(given, places, infinite)


def _answer(model: nn.Module, canary: Canary) -> Answer:
    answer = forward(model, canary, None)
    assert answer is not None  # only a replay has none
    return answer
