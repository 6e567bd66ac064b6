"""What went in: labels, masks, and what a hypernetwork normalises its inputs with."""

from __future__ import annotations

import math

from stabilitylab.analysis.causes.evidence import Evidence, FatalRow, Place
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.columns import kind_of
from stabilitylab.analysis.findings import Finding
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import MODEL_SITE

TOO_FEW_ROWS = ("no-row", "one-row", "spreadless")
"""The findings that a normaliser's statistics hold no spread, since one row has none."""

INSIDE = frozenset({"inputs", "activation", "attention", "logits", "gradient"})
"""Kinds of readings of what is computed inside an edit."""


def _given(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.verdict != "non-finite" or bad.edit != fatal.edit or not fatal.bad_inputs:
        return None
    if kind_of(bad.metric) not in INSIDE:
        return None
    return Claim(
        f"{number(fatal.bad_inputs)} entries of what the model was called with in edit {fatal.edit} were NaN or +∞"
        " already: it had nothing to go on from.",
        "high",
        Place(fatal.edit, "inputs.bad_entries", MODEL_SITE, fatal.bad_inputs),
    )


def _labels(evidence: Evidence) -> Claim | None:
    bad = evidence.first_bad
    if bad is None or bad.rule != "labels-masked":
        return None
    return Claim(
        f"the loss of edit {bad.edit} is NaN while every logit is finite: it is a mean over no label at all.", "high"
    )


def _mask(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.verdict != "non-finite" or bad.edit != fatal.edit:
        return None
    if kind_of(bad.metric) not in INSIDE or fatal.masked_rows == 0 or not fatal.unmasked_before:
        return None
    # Padding on the left masks rows in every edit: without one before, there is nothing that tells it from that.
    before = ", as in no edit before" if fatal.masks_before else ""
    return Claim(
        f"{number(fatal.masked_rows)} rows of edit {fatal.edit}'s attention mask see no real token{before}, and"
        f" {bad.metric} at {bad.site} is not finite in that edit: a softmax over nothing.",
        "medium" if fatal.masks_before else "low",
    )


def _no_loss(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.verdict != "non-finite" or bad.edit != fatal.edit:
        return None
    sent = evidence.sent_back
    if any(operation.module not in ("", MODEL_SITE) for operation in sent):
        return None  # a layer's own operation gave it: no loss did
    if fatal.sound_forward and fatal.gradient_overflowed is not None and fatal.gradient_is_nan and not evidence.narrow:
        return Claim(
            f"the gradient of {fatal.gradient_overflowed} at edit {fatal.edit} is NaN, while the layer's input and the"
            " gradient at its output are finite: the NaN reaches the weight on another way than through its layer. A"
            " term of the loss that is made of the weight itself does that, such as the root of its squared distance"
            " from the original, which has no derivative where that is 0; or a hook on its gradient, or another process"
            " that shares it.",
            "medium",
            Place(fatal.edit, "gradient.norm", fatal.gradient_overflowed),
        )
    traced = fatal.gradients_unread and bool(sent)
    if not fatal.sound_forward or not (fatal.no_gradients or fatal.later_gradients or traced):
        return None
    if fatal.loss is not None:
        return _no_loss_of_its_own(evidence, fatal)
    narrow = "" if not evidence.narrow else ", or, in float16, a gradient that is too large for it"
    return Claim(
        f"the loss of edit {fatal.edit} sends NaN or infinity to the watched layers, while their outputs and the"
        " logits are all finite: it is not finite itself, or has no gradient there (a mean over a mask that leaves no"
        f" token, a log of 0, a root at 0{narrow}).",
        "medium",
        None if fatal.weight is None else Place(fatal.edit, "weight.nonfinite", fatal.weight),
    )


def _no_loss_of_its_own(evidence: Evidence, fatal: FatalRow) -> Claim | None:
    """The model's own loss is sound. What was differentiated may be another, which was made of it or beside it."""
    if fatal.loss is None or not math.isfinite(fatal.loss) or evidence.weights_dtype == "float16":
        return None
    if not (fatal.no_gradients or fatal.gradients_unread):
        return None
    if fatal.loss_weight is not None and not math.isfinite(fatal.loss_weight):
        return Claim(
            f"the model's own loss of edit {fatal.edit} is finite ({number(fatal.loss)}), and its weight in what was"
            f" differentiated is {number(fatal.loss_weight)}: it was multiplied with, or divided by, what is not"
            " sound.",
            "high",
            None if fatal.weight is None else Place(fatal.edit, "weight.nonfinite", fatal.weight),
            Place(fatal.edit, "logits.loss_weight", MODEL_SITE, fatal.loss_weight),
        )
    return Claim(
        f"no gradient of edit {fatal.edit} is finite, while the outputs, the logits and the model's own loss"
        f" ({number(fatal.loss)}) are: what was differentiated is not that loss alone, and what is added to it or"
        " multiplied with it is not finite or has no finite derivative; or an operation between the logits and the"
        " watched layers has none.",
        "medium" if evidence.sent_back else "low",
        None if fatal.weight is None else Place(fatal.edit, "weight.nonfinite", fatal.weight),
    )


def _no_rate(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.metric != "gradient.learning_rate" or bad.edit != fatal.edit:
        return None
    # A rate that is made of the gradient or the loss is lost with them.
    if bad.verdict != "non-finite" or not fatal.sound_forward or not fatal.sound_gradients:
        return None
    what = "infinite" if math.isinf(bad.value) else "NaN"
    return Claim(
        f"the optimizer stepped with a learning rate that is {what} at edit {bad.edit}, whose outputs"
        " and gradients are all finite.",
        "high",
        Place(bad.edit, bad.metric, bad.site),
    )


def _few_rows(evidence: Evidence) -> Claim | None:
    bad, divided = evidence.first_bad, evidence.divided
    if bad is not None and bad.metric == "editor.nonfinite":
        found = evidence.at(bad.site, *TOO_FEW_ROWS)
        if found is not None and found.edit == bad.edit:
            return _few(found, "NaN", "so is all that it normalises", Place(bad.edit, bad.metric, bad.site))
    if divided is not None and divided.spreadless:
        found = evidence.at(divided.site, *TOO_FEW_ROWS)
        reached = f"a normalised input reached {number(divided.largest)} at edit {divided.edit}"
        if found is not None:
            return _few(found, "0", reached, Place(divided.edit, "editor.input_max", divided.site))
    return None


def _few(found: Finding, std: str, what: str, place: Place) -> Claim:
    made = {
        "no-row": f"was used at edit {found.edit} before it had seen any row",
        "one-row": f"was made from one row by edit {found.edit}, and a spread needs two",
        "spreadless": f"has a spread at no unit at edit {found.edit}, as if made from one row: a spread needs two",
    }
    says = f"the editor's normaliser at {found.site} {made[found.rule]}: its std is {std} at every unit, and {what}."
    # Where nothing is counted, rows that are all alike look like one.
    return Claim(says, "medium" if found.rule == "spreadless" else "high", place)


def _statistics(evidence: Evidence) -> Claim | None:
    bad = evidence.first_bad
    if bad is None or bad.metric != "editor.nonfinite" or _few_rows(evidence) is not None:
        return None
    spoilt = evidence.at(bad.site, "one-row-update")
    if spoilt is not None and spoilt.edit == bad.edit > 0:
        return Claim(
            f"the std of the editor's normaliser at {bad.site} is NaN at every unit from edit {bad.edit} on, while its"
            " means are finite: an update with a single row makes running statistics so, for good.",
            "high",
        )
    if bad.edit == 0:
        when = "before the first edit: never loaded, or spoilt before they were saved"
    elif bad.edit == 1:
        when = "by the end of edit 1: they came so into it, or it made them so"
    else:
        when = f"at edit {bad.edit}, and were finite until then: edits update them"
    return Claim(
        f"{number(bad.value)} statistics of the editor's normaliser at {bad.site} are NaN or infinite {when}.", "high"
    )


def _zero_std(evidence: Evidence) -> Claim | None:
    worst, few = evidence.divided, _few_rows(evidence)
    if worst is None or worst.std is None or (few is not None and worst.spreadless):
        return None
    unit = "a unit" if worst.unit is None else f"unit {worst.unit}"
    normaliser = f"{worst.state} normaliser" if worst.state else "normaliser"
    return Claim(
        f"{unit} of the editor's {normaliser} at {worst.site} was divided by a std of {number(worst.std)}: its"
        f" normalised input reached {number(worst.largest)} at edit {worst.edit}.",
        "high",
        Place(worst.edit, "editor.input_max", worst.site),
    )


def _restarted(evidence: Evidence) -> Claim | None:
    found, begins = evidence.of("statistics-restarted"), evidence.begins
    if found is None or begins is None or begins < found.edit:
        return None
    seen = (
        f"at {found.site} they had seen {number(found.threshold)} rows, and have now seen {number(found.value)}"
        if found.metric == "editor.seen_rows"
        else f"at {found.site} the smallest std was {number(found.threshold)} and is {number(found.value)}, and all the"
        " others jumped with it"
    )
    return Claim(
        f"the statistics of the editor's normaliser began anew at edit {found.edit}: {seen}.",
        "medium",
        Place(found.edit, found.metric, found.site),
    )


RULES = (
    Rule(
        "input-not-finite",
        "input",
        "trigger",
        _given,
        "Check that request before it is handed over: pixels after normalising (a std of 0, an image that failed to"
        " load), embeddings that are made outside of the model, a soft prompt that an earlier edit spoilt. Skip it, and"
        " restore the weights of before that edit.",
        "A NaN that goes into the first layer is in every output, every gradient and every updated weight.",
        "NaN or +∞ among the floating point arguments of the model's call, in the edit whose activations, attention,"
        " logits or gradients first are not finite.",
        "An image of one colour, normalised by its own standard deviation.",
    ),
    Rule(
        "labels-ignored",
        "input",
        "trigger",
        _labels,
        "Check the request's labels: at least one must differ from -100. A prompt that fills the whole length leaves no"
        " room for its answer; truncate the prompt, not the answer, and skip requests without a label.",
        "Cross-entropy is a mean over labels that are not -100. Where all of them are, it is 0/0.",
        "The loss is NaN in a forward whose logits are all finite.",
        "A tokenizer with truncation=True cuts the answer off the end of a long prompt.",
    ),
    Rule(
        "masked-row",
        "input",
        "trigger",
        _mask,
        "Check the attention mask of that request: drop empty rows, pad on the right, or use an attention"
        " implementation"
        ' that handles rows without keys (attn_implementation="sdpa" or "eager" of a recent transformers).',
        "A query that may attend to nothing has a softmax over nothing, which is 0/0. Left padding makes such rows;"
        " some attention implementations answer them with NaN.",
        "Masked rows for the first time in the edit whose activations, attention or logits first are NaN.",
        "A batch of two prompts, one of them empty, padded on the left.",
    ),
    Rule(
        "loss-not-finite",
        "input",
        "trigger",
        _no_loss,
        "Print the loss of that edit and the terms that it is made of. A mean over tokens: at least one token of the"
        " answer must be left after truncation; divide only where the count is above zero. A log: of a sum, by"
        " logsumexp or log_softmax, never log(softmax) or log(1 − p) of a certain answer. A root or a norm: add an eps"
        " inside. Skip a request whose loss is not finite, and say so.",
        "The model's outputs are sound and the loss made of them isn't, or its derivative: 0/0 in a mean over an empty"
        " mask, log 0, the root's infinite slope at 0 times 0.",
        "In the first pass of an edit no watched layer has a finite gradient, while all their outputs and the logits"
        " are finite; or the weight's own is NaN, out of float16, while what enters and leaves the layer is not. With"
        " low confidence where the model's own loss was read and is finite, for another may have been differentiated,"
        " unless the weights are in float16.",
        "A long prompt is truncated, no token of the answer is left, and (loss * mask).sum() / mask.sum() is NaN.",
    ),
    Rule(
        "learning-rate-not-finite",
        "input",
        "trigger",
        _no_rate,
        "Print what the schedule gives at that edit: a division by the number of steps, of warm-up steps or of tokens,"
        " which is 0 there; a root or a power of a negative number; a rate that is made of a loss or a norm. Go back to"
        " the weights of before that edit.",
        "A step is the rate times a direction. Where the rate is NaN or infinite, so is every weight after it, however"
        " sound the gradients were.",
        "A learning rate that is NaN or infinite, in the optimizer that steps with a watched weight, in the first edit"
        " that is not finite, while its outputs and gradients are.",
        "LambdaLR(optimizer, lambda step: 1 / (total - step)), stepped once too often.",
    ),
    Rule(
        "normaliser-too-few-rows",
        "input",
        "trigger",
        _few_rows,
        "Collect the normaliser's statistics over many rows before the first edit, or load them with the editor's"
        " checkpoint, and check its count (n in MALMEN and UltraEdit, k in MEND). Where edits update them, skip a batch"
        " that holds a single row, or wait until there are two. Restore what edits were made meanwhile.",
        "A standard deviation needs two rows. Of one it is 0/0, which is NaN, or 0 where it is not divided by n - 1; of"
        " none it is what the buffers began with. So it is at every unit, and all that is normalised with it is NaN, or"
        " ten million times its own size.",
        "No unit has a spread above 0 while every mean is finite, and the normaliser's count is 0 or 1, or it has none;"
        " its statistics are NaN, or an input over a std of 0 is beyond 100 standard deviations.",
        "UltraEdit's first batch holds a single token: RunningMeanStd.update takes the variance of one row.",
    ),
    Rule(
        "normaliser-nan",
        "input",
        "trigger",
        _statistics,
        "Load the editor's checkpoint with strict=True and check that its buffers came with it (u_mean, u_std, v_mean,"
        " v_std in MEND). If they turn NaN later, freeze them while edits are made (evaluation mode), and compute a std"
        " from one row as 0, not as NaN (unbiased=False).",
        "The buffers of a hypernetwork's normaliser begin as NaN, and stay so when a checkpoint lacks them. A running"
        " std that is updated with a single row divides by n - 1 = 0, and is NaN for good.",
        "NaN in the normaliser's mean or std, first of all readings; the sentence says whether from the start on.",
        "A MEND checkpoint saved from parameters() instead of state_dict(), which leaves buffers out.",
    ),
    Rule(
        "normaliser-zero-std",
        "input",
        "trigger",
        _zero_std,
        "Floor the normaliser's std (for example at 1% of its median) or clamp the normalised inputs, and collect its"
        " statistics over more rows, so that no unit is constant in them. A NaN may still come later if edits are never"
        " rolled back: restore the weights between edits, or edit in batches (MALMEN).",
        "A unit that was constant while the statistics were collected, such as a dead ReLU, has a std of 0. MEND"
        " divides by std + 1e-7, so the first time that the unit fires, its input is ten million times its own size.",
        "An input to the hypernetwork beyond 100 standard deviations, at a unit whose std is at most 1e-6, or 0 on the"
        " side of the gradients; other units have a spread.",
        "MEND on BLIP2-OPT: unit 117 has std 0 and fires with 0.032 at edit 6. Its normalised value is 3.2e5, and in"
        " float16 the weights overflow in that very edit.",
    ),
    Rule(
        "statistics-restarted",
        "input",
        "trigger",
        _restarted,
        'Freeze the statistics while edits are made, and save their "initialised" flag or count with them, so that a'
        " resumed run doesn't collect them anew.",
        "A hypernetwork is trained for inputs of one scale. If the statistics behind that scale restart or go on"
        " running, it sees inputs that it was never trained on.",
        "The count of its rows falls; or, where it counts none, the smallest std of every one of its sites changes by a"
        " quarter or more in a single edit. Before anything else leaves its usual range.",
        "A checkpoint without the flag that says that the statistics were collected: the first edit resets them.",
    ),
)
