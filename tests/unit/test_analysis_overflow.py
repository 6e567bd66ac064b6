"""A gradient that leaves float16's range on its way back: told from a loss that is not finite, and from wide dtypes."""

from __future__ import annotations

import math

from stabilitylab.record.readings import Key
from tests.synthetic_runs import diagnose, row

A, M = "decoder.layers.1.fc2", "model"
Reading = dict[Key, float]


def weights(limit: float) -> Reading:
    """Weights of a dtype that ends at `limit`."""
    return {("weight.max_abs", A): 0.3, ("weight.headroom_bits", A): math.log2(limit / 0.3), ("weight.nonfinite", A): 0}


def lost(loss: float) -> Reading:
    """An edit whose gradients are not finite, while all of its forward is."""
    return {
        ("activation.nonfinite", A): 0.0,
        ("logits.nonfinite", M): 0.0,
        ("logits.loss", M): loss,
        ("gradient.nonfinite", A): 90.0,
        ("gradient.norm", A): math.nan,
        ("weight.nonfinite", A): 90.0,
        ("weight.max_abs", A): math.nan,
    }


def cause_of(*edits: Reading) -> tuple[str, str]:
    found = diagnose(row(edit, readings) for edit, readings in enumerate(edits))
    return found.cause, found.confidence


def test_a_finite_loss_has_a_finite_derivative_which_float16_could_not_hold() -> None:
    assert cause_of(weights(65_504.0), lost(6.5)) == ("gradient-overflow", "medium")


def test_not_in_a_dtype_that_ends_far_off() -> None:
    assert cause_of(weights(3.4e38), lost(6.5)) == ("loss-not-finite", "low")


def test_not_where_the_loss_itself_is_not_finite_or_not_known() -> None:
    assert cause_of(weights(65_504.0), lost(math.inf))[0] != "gradient-overflow"
    unread = {key: value for key, value in lost(6.5).items() if key[0] != "logits.loss"}
    assert cause_of(weights(65_504.0), unread)[0] == "loss-not-finite"


def test_not_where_the_forward_was_not_finite_already() -> None:
    assert cause_of(weights(65_504.0), lost(6.5) | {("activation.nonfinite", A): 3.0})[0] != "gradient-overflow"


def test_what_later_passes_show_comes_after_the_first() -> None:
    """An edit of two steps: the first spoils the weights, and the second pass's outputs show it."""
    inside = {("gradient.nonfinite", A): 90.0, ("gradient.norm", A): math.nan, ("activation.nonfinite", A): 0.0}
    later = {("activation.nonfinite_passes", A): 1.0, ("activation.max_abs_last", A): math.nan}
    found = diagnose(row(edit, readings) for edit, readings in enumerate([weights(3.4e38), later | inside]))
    assert found.first_bad_metric == "gradient.nonfinite"
