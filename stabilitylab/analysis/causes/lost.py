"""Why edits do not land: they raise, are skipped, undone, cut to nothing or rounded away. The model is as it was."""

from __future__ import annotations

from stabilitylab.analysis.causes.dtypes import FP16_MAX
from stabilitylab.analysis.causes.evidence import Evidence
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.landing import FEWEST, Landing
from stabilitylab.analysis.words import number


def _lost(evidence: Evidence) -> Landing | None:
    """What is known of edits without effect; None where they have some, or the model has another fault."""
    landing = evidence.landing
    return None if landing.lost < FEWEST or evidence.is_past("drifting") else landing


def _failing(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None or lost.failed < lost.lost:
        return None
    words = f", mostly: {lost.words}" if lost.words else ""
    return Claim(f"each of the {lost.lost} edits since edit {lost.since} raised an exception{words}.", "high")


def _skipped(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None or lost.gradients_bad < lost.lost:
        return None
    return Claim(
        f"since edit {lost.since} gradients are not finite, and no edit moves a weight: something skips such edits"
        " without a word.",
        "medium",
    )


def _clipped(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None or lost.gradients < lost.lost or evidence.weights_dtype != "float16":
        return None
    if not evidence.gradient_total > FP16_MAX:
        return None
    return Claim(
        f"since edit {lost.since} gradients are finite, but their norm over all watched layers,"
        f" {number(evidence.gradient_total)}, is more than float16 holds: a norm that is infinite makes clipping"
        " multiply every gradient by 0.",
        "medium",
    )


def _undone(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None or lost.gradients < lost.lost or lost.written < lost.lost or not evidence.changes_inside:
        return None
    return Claim(
        f"since edit {lost.since} edits write the watched weights, the gradient changes from pass to pass within them,"
        " and after each every weight is as it was: it is put back before the edit ends.",
        "medium",
    )


def _unchanged(evidence: Evidence) -> Claim | None:
    lost = _lost(evidence)
    if lost is None:
        return None
    if not lost.landed:
        return Claim(f"none of {lost.tried} edits moved a watched layer.", "high")
    return Claim(f"edits moved the watched weights until edit {(lost.since or 1) - 1}, and none since.", "high")


RULES = (
    Rule(
        "edits-failing",
        "lost edits",
        "trigger",
        _failing,
        "Read the exception: the edit that raises changes nothing, and a loop that catches it goes on as if it had.",
        "An edit raises, the loop catches the exception, logs it or not, and takes the next request.",
        "Edits that failed, three or more in a row, up to the last one.",
        "A covariance with rows of zeros: each solve raises that its matrix is singular.",
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
        "No weight moves in edits whose gradients are finite and above zero, with float16 weights, and ‖g‖ over the"
        " watched layers above 65,504.",
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
