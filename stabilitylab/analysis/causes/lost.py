"""Why edits do not land: they raise, are skipped, undone, cut to nothing, rounded away, or go where nobody looks."""

from __future__ import annotations

from typing import Final

from stabilitylab.analysis.causes.dtypes import rounded_away
from stabilitylab.analysis.causes.evidence import Evidence, Place
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.columns import kind_of
from stabilitylab.analysis.landing import FEWEST, Landing
from stabilitylab.analysis.ledger import FURTHEST
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import MODEL_SITE

_OF_WEIGHTS: Final = ("update", "drift", "weight")
SLIGHT: Final = 0.1
"""Distance from the original weight, as a share of its norm, beyond which that may be why the model changed."""
EDITS_FAILING: Final = "edits-failing"
"""The name of a cause that the verdict's sentence tells whole, with the exception."""
NEARLY_ALL: Final = 0.9
"""Of the edits without effect: as many must show a reason for it."""


def _lost(evidence: Evidence) -> Landing | None:
    """What is known of edits without effect; None where they have some, or the model has another fault."""
    landing = evidence.landing
    lost = (landing.lost >= FEWEST or landing.mostly_lost) and not landing.in_turn
    return landing if lost and not evidence.is_past("drifting") else None


def _failing(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None or lost.failed < NEARLY_ALL * lost.gone:
        return None
    if lost.tried == 1:
        return Claim(f"the only edit raised an exception: {lost.words}.", "high")
    words = f", mostly: {lost.words}" if lost.words else ""
    return Claim(f"each of {lost.gone} edits since edit {lost.first} raised an exception{words}.", "high")


def _others(evidence: Evidence) -> Claim | None:
    landing = evidence.landing
    if landing.lost < FEWEST or not landing.others_moved or landing.failed:
        return _others_too(evidence)
    return Claim(
        f"none of {landing.tried} edits moved {landing.what}, and the model's answers on the canary are"
        f" {number(landing.answers)} nats from the original's all the same: what is edited is not watched.",
        "high",
    )


def _others_too(evidence: Evidence) -> Claim | None:
    """What is watched is edited as well, and nothing is out of the ordinary there."""
    bad = evidence.first_bad
    if not evidence.besides or not evidence.is_past("drifting") or bad is None or bad.site != MODEL_SITE:
        return None
    if any(kind_of(each.metric) in _OF_WEIGHTS and each.rule != FURTHEST for each in evidence.findings):
        return None
    if evidence.latest is not None and evidence.latest.drift_ratio > SLIGHT:
        return None
    return Claim(
        "edits also write parameters that are not watched, and the model's answers leave the original's while no"
        " watched weight shows anything out of the ordinary.",
        "low",
    )


def _elsewhere(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None or not lost.elsewhere or lost.landed or lost.others_moved:
        return None
    return Claim(
        f"none of {lost.tried} edits ran the watched model or moved a watched layer: they are made on another model, or"
        " keep what they know outside of it.",
        "medium",
    )


def _skipped(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None or lost.gradients_bad < NEARLY_ALL * lost.gone:
        return None
    first = evidence.of("step-skipped")
    return Claim(
        f"since edit {lost.first} gradients are not finite, and no edit moves a weight: something skips such edits"
        " without a word.",
        "medium",
        None if first is None else Place(first.edit, first.metric, first.site),
    )


def _clipped(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None or lost.gradients < NEARLY_ALL * lost.gone:
        return None
    narrow = evidence.weights_dtype == "float16" and lost.huge >= NEARLY_ALL * lost.gone
    past = " Their norm over all watched layers is more than float16 holds, 65,504." if narrow else ""
    if lost.clipped >= NEARLY_ALL * lost.gone:
        return Claim(
            f"since edit {lost.first} gradients are finite and above zero after the backward, and exactly 0 when the"
            f" optimizer gets them: a norm that is infinite makes clipping multiply every gradient by 0.{past}",
            "high",
        )
    if not narrow:
        return None
    return Claim(
        f"since edit {lost.first} gradients are finite, but in edits without effect their norm over all watched layers"
        " is more than float16 holds, 65,504: a norm that is infinite makes clipping multiply every gradient by 0.",
        "medium",
    )


def _undone(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if (
        lost is None
        or lost.gradients < NEARLY_ALL * lost.gone
        or lost.written < NEARLY_ALL * lost.gone
        or not evidence.changes_inside
    ):
        return None
    return Claim(
        f"since edit {lost.first} edits write the watched weights, the gradient changes from pass to pass within them,"
        " and after each every weight is as it was: it is put back before the edit ends.",
        "medium",
    )


def _unchanged(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    why = (_failing, _others, _elsewhere, _skipped, _clipped, _undone, rounded_away)
    if lost is None or any(claim(evidence) is not None for claim in why):  # which say more
        return None
    if not lost.landed:
        return Claim(f"none of {lost.tried} edits moved {lost.what}.", "high")
    if not lost.nothing_lands:
        return Claim(f"only {lost.landed} of {lost.tried} edits moved {lost.what}.", "medium")
    return Claim(f"edits moved the watched weights until edit {(lost.since or 1) - 1}, and none since.", "high")


def _stalled(evidence: Evidence) -> Claim | None:
    found, dtype = evidence.of("site-stalled"), evidence.weights_dtype
    if found is None or evidence.is_past("drifting"):
        return None
    if dtype is None:
        return Claim(f"{found.site} is written by each edit and never moves, while other watched layers do.", "low")
    return Claim(
        f"{found.site} is written by each edit and never moves, while other watched layers do, and weights are kept in"
        f" {dtype}: a step that is small beside a weight is rounded away there, as it is beside gains of 1.",
        "medium",
        Place(1, found.metric, found.site),
    )


RULES = (
    Rule(
        "site-stalled",
        "lost edits",
        "limit",
        _stalled,
        "Keep that layer, or all of them, in float32; or leave it out of the sites if it is frozen on purpose.",
        "Weights of one size take the same step unless their dtype rounds it away: a gain of 1 in bfloat16 only moves"
        " in steps of 0.4%, while small weights beside it move freely.",
        "Ten edits that wrote this layer, of 16 bits, and moved others and never this one.",
        "Norm gains that stay exactly 1.0 when a model is trained in pure bfloat16.",
    ),
    Rule(
        EDITS_FAILING,
        "lost edits",
        "trigger",
        _failing,
        "Read the exception: the edit that raises changes nothing, and a loop that catches it goes on as if it had.",
        "An edit raises, the loop catches the exception, logs it or not, and takes the next request.",
        "Edits that failed, three or more in a row, or all that there were, up to the last one.",
        "A covariance with rows of zeros: each solve raises that its matrix is singular.",
    ),
    Rule(
        "others-edited",
        "lost edits",
        "trigger",
        _others,
        "Go back to the original model, and attach without `sites`, to have watched what the first edit is seen to"
        " move; or name the layers that are edited. A memory that the editor keeps beside the weights can be given as"
        " attach(editor=...).",
        "The watched layers are not those that are edited, so that nothing but the canary tells what becomes of the"
        " model.",
        "At three edits or more, from the first on, updates of exactly 0 at every watched layer, while the canary's"
        " answers leave the original's. With low confidence where watched weights move too, with nothing to be found"
        " in them and less than a tenth of their norm away, and three edits wrote to parameters beside them.",
        "The MLPs of the last blocks are watched, and the edits go into the attention of the first.",
    ),
    Rule(
        "another-model",
        "lost edits",
        "trigger",
        _elsewhere,
        "Attach to the model that is edited: the one that the editor holds or returns. Hand a copy over as it is made"
        " (edit.returns), and take care with editors that share an executor: it edits the first model that it was"
        " given.",
        "The editor has a model of its own: a deep copy, or that of another editor in the process. Editing by prompts"
        " (IKE) moves no model at all.",
        "Hooks were on the watched layers, none fired, the model was never called, and no watched weight moved, in"
        " three edits or more; the canary's answers, if there is one, are the original's.",
        "Two MEND editors in one process: their executor edits the first one's model.",
    ),
    Rule(
        "gradients-skipped",
        "lost edits",
        "trigger",
        _skipped,
        "Find why the gradients are not finite: start at the first bad site. Lower the initial loss scale, or edit in"
        " bfloat16; and make the loop say so when it skips an edit.",
        "A gradient scaler or an isfinite check leaves out steps whose gradients are not finite. If all are, the editor"
        " stops editing, and nothing says so.",
        "Gradients that are not finite and updates of exactly 0, at three edits in a row.",
        "torch.amp.GradScaler in float16: every step is skipped, and the loss looks steady.",
    ),
    Rule(
        "clip-overflow",
        "lost edits",
        "limit",
        _clipped,
        "Unscale gradients before they are clipped, keep them in float32 (or form their norm there:"
        " clip_grad_norm_ over float32 copies), and lower the loss scale.",
        "Clipping multiplies every gradient by limit / ‖g‖. In float16 ‖g‖ overflows from 65,504 on, although each"
        " entry is finite, and the factor is 0.",
        "No weight moves in edits whose gradients are finite and above zero after the backward and exactly 0 at the"
        " optimizer's step; or, where no step is seen, with float16 weights and ‖g‖ over the watched layers above"
        " 65,504.",
        "A loss scale of 4,096 and clip_grad_norm_ without unscale_.",
    ),
    Rule(
        "edits-undone",
        "lost edits",
        "trigger",
        _undone,
        "Look for what restores the weights inside the edit (a copy that is put back, keep_original_weight, a context"
        " manager), and evaluate before it does, or keep the edited copy.",
        "An edit is made and put back before it returns, so that what is evaluated is the unedited model.",
        "Weights that are written in an edit and of the same bits after it, and gradients that change from its first"
        " pass to its last.",
        "An edit function that restores the weights in its own finally block.",
    ),
    Rule(
        "weights-unchanged",
        "lost edits",
        "trigger",
        _unchanged,
        "Check that the watched sites are the layers that the editor edits, and that the model it returns is handed"
        " over (edit.returns). If edits did move them before, see whether the gradients are zero, or the update is"
        " smaller than the dtype can add (bfloat16 has 8 bits: 1 + 0.003 is 1); keep the edited layers in float32."
        " Adapters such as LoRA keep the weights as they are by design.",
        "Either other layers are edited than are watched, or the update is zero or rounded away.",
        "Updates of exactly 0 at every watched layer: at the first edit, or at three in a row after others did move"
        " them. Not claimed where a codebook or a side memory holds the edits.",
        "fc1 is watched, and ROME edits fc2.",
    ),
)
