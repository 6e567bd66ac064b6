"""The model's logits inside the edit, and the canary's after it."""

from __future__ import annotations

from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.logits_pass import CanaryPass, LogitsPass, LogitsStatistics

from stabilitylab.readings import Metric, Phase


def _range_metrics(family: str, phase: Phase, whose: str) -> tuple[Metric, ...]:
    """The metrics that the edit's own logits and the canary's have in common."""
    return (
        Metric(
            f"{family}.min", "logit", "linear", phase, f"The smallest of {whose} logits, over all tokens.", "min z", "—"
        ),
        Metric(
            f"{family}.max", "logit", "linear", phase, f"The largest of {whose} logits, over all tokens.", "max z", "—"
        ),
        Metric(
            f"{family}.logsumexp",
            "nats",
            "linear",
            phase,
            f"The log of the softmax's normaliser over {whose} last real token. Large either way: fp16 nears its end.",
            "mean log Σ exp z",
            "z-loss: PaLM (arXiv 2204.02311); small-scale proxies (arXiv 2309.14322)",
        ),
        Metric(
            f"{family}.entropy",
            "nats",
            "linear",
            phase,
            f"How undecided the model is at {whose} last real token: 0 is certain, the log of the vocabulary blank.",
            "mean −Σ p log p",
            "Rebuilding ROME (arXiv 2403.07175)",
        ),
        Metric(
            f"{family}.margin",
            "logit",
            "linear",
            phase,
            f"How far the most likely token is ahead at {whose} last real token.",
            "mean z_(1) − z_(2)",
            "—",
        ),
        Metric(
            f"{family}.top_share",
            "share",
            "linear",
            phase,
            f"The probability of the most likely token at {whose} last real token. Stuck at 1: it only ever says "
            "one thing; near 0: it says anything.",
            "mean max p",
            "Guo et al., calibration (arXiv 1706.04599)",
        ),
        Metric(
            f"{family}.nonfinite",
            "entries",
            "count",
            phase,
            f"NaN or infinite entries among {whose} logits.",
            "#{z ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
        Metric(
            f"{family}.dead",
            "flag",
            "flag",
            phase,
            f"1 when all of {whose} logits are equal, such as all zero: finite, and dead.",
            "max z = min z",
            "—",
        ),
    )


def _range_readings(family: str, seen: LogitsStatistics) -> dict[str, float]:
    return {
        f"{family}.min": seen.low,
        f"{family}.max": seen.high,
        f"{family}.logsumexp": seen.logsumexp,
        f"{family}.entropy": seen.entropy,
        f"{family}.margin": seen.margin,
        f"{family}.top_share": seen.top_share,
        f"{family}.nonfinite": seen.nonfinite,
        f"{family}.dead": float(seen.low == seen.high),
    }


class Logits(Probe[LogitsPass]):
    """The logits of the edit's own forward pass: the model as it was before this edit took effect."""

    tier = "light"
    needs = LogitsPass
    metrics = _range_metrics("logits", "during", "the edit's")

    def compute(self, seen: LogitsPass) -> Readings:
        """From the first forward pass inside the edit."""
        return _range_readings("logits", seen)


class Canary(Probe[CanaryPass]):
    """The logits of a small fixed batch after each edit, against those of the unedited model."""

    tier = "light"
    needs = CanaryPass
    metrics = (
        *_range_metrics("canary", "after", "the canary's"),
        Metric(
            "canary.agreement",
            "share",
            "linear",
            "after",
            "Share of the canary whose most likely token is still the unedited model's. A non-finite row never agrees.",
            "mean [argmax z_t = argmax z_0]",
            "locality: MEND (arXiv 2110.11309)",
        ),
        Metric(
            "canary.kl",
            "nats",
            "log",
            "after",
            "How far the canary's predictions have moved from the unedited model's.",
            "mean KL(p_0 ‖ p_t)",
            "Kullback and Leibler (1951)",
        ),
    )

    def compute(self, seen: CanaryPass) -> Readings:
        """From the canary's pass after the edit."""
        readings = _range_readings("canary", seen)
        if seen.agreement is not None and seen.kl is not None:
            readings |= {"canary.agreement": seen.agreement, "canary.kl": seen.kl}
        return readings
