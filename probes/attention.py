"""What attention is about to do inside the edit: its logits, how sharp it is, and rows with nothing to attend to."""

from __future__ import annotations

from stabilitylab.probes.attention_pass import AttentionPass
from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.mask_pass import MaskPass
from stabilitylab.record.readings import Metric


class MaskedRows(Probe[MaskPass]):
    """Query rows of the attention mask that see no key, where a softmax over nothing is NaN."""

    needs = MaskPass
    tier = "light"
    metrics = (
        Metric(
            "attention.masked_rows",
            "rows",
            "count",
            "during",
            "Query rows that can see no real token under a causal mask, from the attention mask of the edit's first "
            "forward. With left padding these are the padding rows: normal, and harmless where the attention "
            "implementation handles them (transformers' does); one that does not makes NaN of them.",
            "#{t : no real token at ≤ t}",
            "IEEE 754-2019, §7.2: softmax over nothing is 0/0",
        ),
        Metric(
            "attention.masked_sequences",
            "sequences",
            "count",
            "during",
            "Rows of the batch that are padding altogether, from the same mask: an error in the input.",
            "#{rows without a real token}",
            "IEEE 754-2019, §7.2: softmax over nothing is 0/0",
        ),
    )

    def compute(self, seen: MaskPass) -> Readings:
        """Both counts, over the batch."""
        return {"attention.masked_rows": seen.masked_rows, "attention.masked_sequences": seen.masked_sequences}


class AttentionLogits(Probe[AttentionPass]):
    """The size of the attention logits, recomputed on a sample of queries."""

    needs = AttentionPass
    tier = "deep"
    metrics = (
        Metric(
            "attention.max_logit",
            "1",
            "log",
            "during",
            "The largest attention logit, scaled and with the mask added, over the keys that the mask allows: on a "
            "sample of up to 32 heads and 32 queries each, of the first call at this place in the edit.",
            "max |q·k · scale + mask|",
            "Small-scale proxies (arXiv 2309.14322), §3.1.1",
        ),
        Metric(
            "attention.nonfinite",
            "entries",
            "count",
            "during",
            "NaN or infinite attention logits among the same sample.",
            "#{q·k · scale + mask ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
    )

    def compute(self, seen: AttentionPass) -> Readings:
        """The largest is left out where no sampled query sees a key."""
        readings = {"attention.nonfinite": seen.nonfinite}
        if seen.visible_rows > 0:
            readings["attention.max_logit"] = seen.max_logit
        return readings


class AttentionEntropy(Probe[AttentionPass]):
    """How spread out attention is."""

    needs = AttentionPass
    tier = "deep"
    metrics = (
        Metric(
            "attention.entropy",
            "nats",
            "linear",
            "during",
            "The entropy of the attention weights over the keys that the mask allows, mean over a sample of queries: "
            "near 0 each query attends to one key, and the gradient through the softmax dies.",
            "−Σ a log a",
            "Attention entropy collapse (arXiv 2303.06296), §3",
        ),
    )

    def compute(self, seen: AttentionPass) -> Readings:
        """Left out where no sampled query sees a key."""
        return {"attention.entropy": seen.entropy} if seen.visible_rows > 0 else {}
