"""Why: one file for each family of causes, what they look at, and the order in which they are asked."""

from stabilitylab.analysis.causes.evidence import EditorInput, Evidence, FatalRow, Growth, Learning, Place, Step
from stabilitylab.analysis.causes.precedence import RULES, chain, claims, find_cause
from stabilitylab.analysis.causes.rule import Cause, Claim, Rule

__all__ = [
    "RULES",
    "Cause",
    "Claim",
    "EditorInput",
    "Evidence",
    "FatalRow",
    "Growth",
    "Learning",
    "Place",
    "Rule",
    "Step",
    "chain",
    "claims",
    "find_cause",
]
