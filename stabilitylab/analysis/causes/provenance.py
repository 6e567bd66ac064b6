"""Where weights and the editor's state came from: what an earlier run left, and what was not put back."""

from __future__ import annotations

from stabilitylab.analysis.causes.evidence import Evidence
from stabilitylab.analysis.causes.rule import Claim, Rule


def _not_restored(evidence: Evidence) -> Claim | None:
    if evidence.restored_until is None or not evidence.is_past("stable"):
        return None
    begins = evidence.begins
    if begins is not None and begins <= evidence.restored_until:  # it began while they were still restored
        return None
    return Claim(
        f"up to edit {evidence.restored_until} each edit began at the original weights, and none did after it: each"
        " builds on those before.",
        "medium",
    )


def _leaked(evidence: Evidence) -> Claim | None:
    found = evidence.of("cache-before", "codebook-before", "side-memory-before")
    if found is None:
        return None
    # A leaked state holds updates back or answers in their place; it seldom blows anything up.
    return Claim(
        f"the editor's state at {found.site} was not empty before the first edit ({found.metric} was"
        f" {found.value:.3g}): an earlier run left it, or this one goes on from it.",
        "low" if evidence.is_past("drifting") else "medium",
    )


RULES = (
    Rule(
        "weights-not-restored",
        "provenance",
        _not_restored,
        "Restore the original weights after each edit, if single edits were meant: in EasyEdit"
        " keep_original_weight=True; in a loop of one's own, copy the weights that the editor returns back.",
        "Single edits are evaluated on the original model only if the weights are put back after each. Where that is"
        " forgotten, every edit is a sequential one, and their damage adds up.",
        "‖W_t − W_0‖ equals ‖W_t − W_{t−1}‖ for some edits, and then exceeds it for three in a row. A loop that never"
        " restored anything can't be told from one that is sequential on purpose.",
        "EasyEdit's `edit_dataset` never restores; `edit(sequential_edit=False)` does only with"
        " `keep_original_weight=True`.",
    ),
    Rule(
        "editor-state-leaked",
        "provenance",
        _leaked,
        "Start the run with a fresh editor: set AlphaEdit's cache_c to zeros, and take GRACE's or WISE's adapter off"
        " the model, or reload the model. Nothing is to be done where the run is resumed on purpose.",
        "AlphaEdit keeps the keys of all edits in a module-level cache, GRACE and WISE keep theirs in the model. A"
        " second run in the same process inherits them, and is held back by, or answers from, edits it never made.",
        "A cache of keys, a codebook or a side memory that is not empty before the first edit.",
        "Two AlphaEdit runs over two models in one notebook: the second one's updates avoid the first one's keys.",
    ),
)
