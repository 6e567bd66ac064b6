"""Where weights and the editor's state came from: what an earlier run left, and what was not put back."""

from __future__ import annotations

from stabilitylab.analysis.causes.evidence import Evidence, Place
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.restoring import SUSTAINED
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import MODEL_SITE


def _not_restored(evidence: Evidence) -> Claim | None:
    forgotten = evidence.forgotten
    if forgotten is not None:
        return Claim(
            f"{forgotten.site} is not put back between edits while another layer is: since edit {forgotten.since} its"
            " edits build on those before.",
            "high",
            Place(forgotten.since, "drift.norm", forgotten.site),
        )
    if evidence.stayed is not None:
        return Claim(
            f"the host was to put each edit back, and after edit {evidence.stayed} the edited weights stayed: every"
            " later edit builds on them.",
            "high",
            link=Place(evidence.stayed, "drift.norm", MODEL_SITE),
        )
    if evidence.carried >= (1 if evidence.is_past("drifting") else SUSTAINED):
        edits = "edit" if evidence.carried == 1 else f"{evidence.carried} edits"
        return Claim(
            f"the configuration says single edits (sequential_edit: false), and none of the {edits}"
            " after the first began at the original weights: each builds on those before.",
            "high",
            link=Place(2, "drift.norm", MODEL_SITE),
        )
    if not evidence.is_past("stable") or evidence.restored_until is None:
        return None
    begins = evidence.begins
    if begins is not None and begins <= evidence.restored_until:  # it began while they were still restored
        return None
    return Claim(
        f"up to edit {evidence.restored_until} each edit began at the original weights, and none did after it: each"
        " builds on those before.",
        "medium",
    )


def _growing_cache(evidence: Evidence) -> Claim | None:
    found = evidence.of("cache-grows")
    if found is None:
        return None
    return Claim(
        f"the cache of edited keys at {found.site} grows with every edit, {number(found.value)} by edit {found.edit},"
        " while the weights are put back after each: single edits are held away from the keys of all edits before.",
        "high",
        Place(found.start, found.metric, found.site),
    )


def _reference(evidence: Evidence) -> Claim | None:
    found = evidence.of("codebook-before", "side-memory-before")
    if found is None:
        return None
    # What was edited before is no reason for values to grow.
    return Claim(
        f"the model was edited before the run began: {found.metric} at {found.site} is {number(found.value)} at edit 0."
        " All that is compared with the original is compared with that.",
        "low" if evidence.is_past("drifting") else "high",
        Place(found.edit, found.metric, found.site),
    )


def _leaked(evidence: Evidence) -> Claim | None:
    found = evidence.of("cache-before")
    if found is None:
        return None
    # A leaked cache holds updates back; it seldom blows anything up.
    return Claim(
        f"the cache of edited keys at {found.site} was not empty before the first edit (energy {number(found.value)}):"
        " an earlier run left it, or this one goes on from it.",
        "low" if evidence.is_past("drifting") else "medium",
        Place(found.edit, found.metric, found.site),
    )


def _broken(evidence: Evidence) -> Claim | None:
    bad = evidence.first_bad
    if bad is None or bad.edit > 0 or bad.metric not in ("weight.nonfinite", "state.nonfinite"):
        return None
    return Claim(
        f"{number(bad.value)} {'weights' if bad.metric == 'weight.nonfinite' else 'entries'} of {bad.site} are NaN or"
        " infinite before the first edit: they came so from the checkpoint, or were never written.",
        "high",
        Place(0, bad.metric, bad.site),
    )


def _spoilt(evidence: Evidence) -> Claim | None:
    bad = evidence.first_bad
    spoilt = [each for each in evidence.findings if each.metric == "state.nonfinite" and each.edit > 0]
    if not spoilt or (bad is not None and bad.edit < spoilt[0].edit):
        return None
    found, given = spoilt[0], _taken_in(evidence, spoilt[0].edit)
    if given is not None:
        name, count = given
        return Claim(
            f"{number(count)} entries of {name} were NaN or infinite before edit {found.edit}, which took them in, and"
            " no watched layer was: the fault is there, not in the layers that are edited.",
            "high",
            Place(found.edit, found.metric, next((each.site for each in spoilt if each.site == name), found.site)),
        )
    # An edit that was not finite itself spoils whatever it updates: what is watched, and the rest.
    fatal = evidence.fatal
    if fatal is not None and fatal.edit == found.edit and (fatal.weight is not None or fatal.bad_inputs):
        return None
    return Claim(
        f"{number(found.value)} entries of {found.site} are NaN or infinite since edit {found.edit}, and no watched"
        " layer was before it: the fault is there, not in the layers that are edited.",
        "high",
        Place(found.edit, found.metric, found.site),
    )


def _taken_in(evidence: Evidence, edit: int) -> tuple[str, int] | None:
    """Of the model's tensors that are not watched: one that was not finite before an edit, which was traced to read
    it; and how many of its entries were not.
    """
    watched = {each.site for each in evidence.findings if each.metric.startswith("weight.")}
    traced = (each for each in evidence.operations if each.edit == edit and each.phase != "canary")
    for operand in (value for each in traced if each.made == "arrived" for value in each.operands):
        name = operand.name.partition("(")[2].removesuffix(")")
        if name and operand.nonfinite and not {name, name.removesuffix(".weight")} & watched:
            return name, operand.nonfinite
    return None


RULES = (
    Rule(
        "broken-before",
        "provenance",
        "trigger",
        _broken,
        "Look at how that layer was loaded: a layer that the checkpoint lacks keeps what was in fresh memory until it"
        " is initialised. Load with the report of missing keys, and initialise what is missing.",
        "A layer that no checkpoint filled and no initialisation wrote holds whatever was in memory, NaN among it.",
        "Weights, or anything else in the model, that are not finite at edit 0; infinities that are there by design, as"
        " in a mask, apart.",
        "A new head on a model that was built on the meta device and materialised with empty memory.",
    ),
    Rule(
        "state-spoilt",
        "provenance",
        "trigger",
        _spoilt,
        "Look at what writes that tensor: a BatchNorm in training mode updates its statistics with every forward of an"
        " edit (model.eval(), or momentum 0, prevents it); else an edit, or a hook, reaches further than it should. Put"
        " the tensor back from the unedited model.",
        "A model holds more than the layers that are edited. One batch with a NaN in it makes a running variance NaN"
        " for good, and every later answer with it.",
        "A parameter or buffer beside the watched weights that is not finite, before or at the first bad reading. Not"
        " where a watched weight, or what the model was called with, is not finite in the same edit: that edit spoilt"
        " whatever it updates, unless it was traced to take that tensor in as it was.",
        "The running variance of a BatchNorm, after an edit on a single row in training mode.",
    ),
    Rule(
        "weights-not-restored",
        "provenance",
        "condition",
        _not_restored,
        "Restore the original weights after each edit, if single edits were meant: in EasyEdit"
        " keep_original_weight=True; in a loop of one's own, copy the weights that the editor returns back.",
        "Single edits are evaluated on the original model only if the weights are put back after each. Where that is"
        " forgotten, every edit is a sequential one, and their damage adds up.",
        "‖W_t − W_0‖ equals ‖W_t − W_{t−1}‖ for some edits, and then exceeds it for three in a row; or it does so at"
        " one layer and not at another, for five edits. A loop that never restored anything can be told from one"
        " that is sequential on purpose only by its configuration, where that says `sequential_edit: false`.",
        "EasyEdit's `edit_dataset` never restores; `edit(sequential_edit=False)` does only with"
        " `keep_original_weight=True`.",
    ),
    Rule(
        "cache-grows",
        "provenance",
        "condition",
        _growing_cache,
        "Set AlphaEdit's cache_c to zeros whenever the weights are put back: what is undone is not to be preserved.",
        "AlphaEdit keeps the keys of all edits, so that later ones leave them alone. Where each edit is single, the"
        " cache goes on collecting what is no longer in the weights, and edits get weaker and weaker.",
        "The energy of the cache rises at five edits in a row, each of which began at the original weights.",
        "AlphaEdit over a data set with sequential_edit=False.",
    ),
    Rule(
        "reference-edited",
        "provenance",
        "condition",
        _reference,
        "Attach to a freshly loaded model, before its first edit, or take the adapter of the earlier edits off it."
        " Nothing is to be done where the run is resumed on purpose.",
        "Drift, the canary and locality compare with the model at attach. If that was edited already, the damage of the"
        " earlier edits counts as original, and everything looks better than it is.",
        "A codebook that holds keys, or a side memory away from its layer's weight, before the first edit. Edits to the"
        " weights themselves leave no such trace.",
        "A notebook cell that edits with GRACE is run twice over the same model object.",
    ),
    Rule(
        "cache-leaked",
        "provenance",
        "condition",
        _leaked,
        "Set AlphaEdit's cache_c to zeros before each run, or start a new process. Nothing is to be done where the"
        " run is resumed on purpose.",
        "AlphaEdit keeps the keys of all edits in a module-level cache. A second run in the same process inherits them,"
        " and its updates are held away from keys that it never edited.",
        "A cache of keys whose energy is above zero before the first edit.",
        "Two AlphaEdit runs over two models in one notebook.",
    ),
)
