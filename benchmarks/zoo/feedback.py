"""Updates that grow by what earlier updates did, or are too large from the start."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.zoo import foreign, words
from benchmarks.zoo.scenario import Loop, Scenario
from stabilitylab.editors.finetune import Finetune


def _mend(precision: str, seed: int) -> Loop:
    model = foreign.digit_model(precision)
    mend = foreign.mend_of(model, floor=True)
    with torch.no_grad():
        mend.edit_lrs.mul_(float(foreign.draw(seed, "mend").uniform(0.3, 1.0)))
    steps = foreign.digit_steps(mend.edit, seed, 60)
    return Loop(model, mend.sites, foreign.digit_canary(), steps, onset=1, editor=mend, to_nonfinite=True)


def _mend_fp16(seed: int, **variant: Any) -> Loop:
    return _mend("fp16", seed)


def _mend_fp32(seed: int, **variant: Any) -> Loop:
    return _mend("fp32", seed)


def _mend_bf16(seed: int, **variant: Any) -> Loop:
    return _mend("bf16", seed)


def _rate_too_high(seed: int, *, rate: float | None = None, **variant: Any) -> Loop:
    """FT as FINDINGS section 4 has it: Adam at 1e-1, which learns each edit and forgets the rest."""
    model, sites = foreign.word_model(seed)
    rate = 0.3 * 2.0 ** float(foreign.draw(seed, "rate-too-high").uniform(0, 3)) if rate is None else rate
    tuner = Finetune(sites, batch_of=words.WordPrompts().edit_batch, learning_rate=rate, steps=10)
    return Loop(model, sites, words.canary(), foreign.word_steps(tuner.edit, seed), onset=1, editor=tuner)


def _norm_growth(seed: int, *, share: float | None = None, **variant: Any) -> Loop:
    """FT whose every edit may move the weight by a share of the norm that it has by then."""
    model, sites = foreign.word_model(seed)
    share = float(foreign.draw(seed, "norm-growth").uniform(0.07, 0.11)) if share is None else share
    tuner = Finetune(
        sites,
        batch_of=words.WordPrompts().edit_batch,
        constraint="frobenius",
        radius=share,
        learning_rate=0.05,
        steps=4,
    )
    return Loop(model, sites, words.canary(), foreign.word_steps(tuner.edit, seed, 400), onset=1, editor=tuner)


SCENARIOS = (
    Scenario(
        "mend-feedback-fp16",
        22,
        "feedback-growth",
        "super-exponential",
        "MEND, stds floored, edits its own results in float16: each edit's input is further from what it was trained"
        " on",
        "MEND",
        "digits, fp16",
        _mend_fp16,
    ),
    Scenario(
        "mend-feedback-bf16",
        22,
        "feedback-growth",
        "super-exponential",
        "the same in bfloat16",
        "MEND",
        "digits, bf16",
        _mend_bf16,
    ),
    Scenario(
        "mend-feedback-fp32",
        23,
        "feedback-growth",
        "super-exponential",
        "the same in float32: the canary is lost while every value is finite",
        "MEND",
        "digits, fp32",
        _mend_fp32,
    ),
    Scenario(
        "learning-rate-too-high",
        20,
        "learning-rate-too-high",
        "jump",
        "FT with Adam at a rate of 0.3 to 2.4: every edit is learned and the first ones destroy the rest",
        "FT",
        "words",
        _rate_too_high,
    ),
    Scenario(
        "slow-norm-growth",
        21,
        "norm-growth",
        "exponential",
        "FT whose ball is a share of the norm that the weight has by then: norms grow edit by edit",
        "FT",
        "words",
        _norm_growth,
    ),
)
