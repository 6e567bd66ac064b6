"""The model's logits inside the edit, and the canary's after it."""

from __future__ import annotations

import math

from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.logits_pass import CanaryPass, LaterLogits, LogitsPass, LogitsStatistics, LossPass, TextPass
from stabilitylab.record.readings import Metric, Phase


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
            "Shannon (1948)",
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
            "Share of the canary's tokens, of those that the unedited model can predict, at which its most likely next"
            " token is still the same. A non-finite one never agrees.",
            "mean [argmax z_t = argmax z_0]",
            "locality: MEND (arXiv 2110.11309)",
        ),
        Metric(
            "canary.kl",
            "nats",
            "log",
            "after",
            "How far the canary's predictions are from the unedited model's, over the tokens that it can predict.",
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


class Loss(Probe[LossPass]):
    """The model's own loss, as the edit finds it and as it leaves it, and what the loop's objective makes of it."""

    tier = "light"
    needs = LossPass
    metrics = (
        Metric(
            "logits.loss",
            "nats",
            "log",
            "during",
            "The loss that the model's first forward with labels gave, before this edit took effect. Growth from edit "
            "to edit: what was asked gets ever further from what the edited model says.",
            "−mean log p(label)",
            "Shannon (1948), cross-entropy",
        ),
        Metric(
            "logits.loss_last",
            "nats",
            "log",
            "during",
            "The same in the edit's last forward with labels: beside the first, how far the edit has come. Absent "
            "where there was one only.",
            "−mean log p(label), last",
            "efficacy: ROME (arXiv 2202.05262), §3.4",
        ),
        Metric(
            "logits.loss_weight",
            "1",
            "linear",
            "during",
            "What the loop multiplies the model's own loss with before it differentiates, a loss scale and a share of "
            "a batch included; the least, where there are several. Below 0: the step goes up the loss, as unlearning "
            "by gradient ascent does. NaN or infinite: it was multiplied with, or divided by, what is not sound.",
            "∂ objective / ∂ loss",
            "gradient ascent: Yao et al., Large Language Model Unlearning (arXiv 2310.10683)",
        ),
    )

    def compute(self, seen: LossPass) -> Readings:
        """From the model's own output; absent where the loop forms the loss by itself."""
        readings = {"logits.loss": seen.loss}
        if seen.last is not None:
            readings["logits.loss_last"] = seen.last
        if seen.weight is not None:
            readings["logits.loss_weight"] = seen.weight
        return readings


class LogitsPasses(Probe[LaterLogits]):
    """The later forwards of an edit that runs the model several times."""

    tier = "light"
    needs = LaterLogits
    metrics = (
        Metric(
            "logits.passes",
            "passes",
            "count",
            "during",
            "Forwards of the whole model inside the edit. All logits readings without a suffix are of the first.",
            "#",
            "—",
        ),
        Metric(
            "logits.nonfinite_passes",
            "passes",
            "count",
            "during",
            "How many of them gave a NaN or an infinity.",
            "#{passes: z ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
        Metric(
            "logits.max_abs_last",
            "logit",
            "log",
            "during",
            "The largest logit in the last forward.",
            "max |z|, last",
            "—",
        ),
        Metric(
            "logits.max_abs_worst",
            "logit",
            "log",
            "during",
            "The largest logit in any forward; of the first that is not finite, if there is one.",
            "max |z| over all forwards",
            "—",
        ),
    )

    def compute(self, seen: LaterLogits) -> Readings:
        """The last and the worst are left out where there was one forward only."""
        readings = {"logits.passes": seen.passes, "logits.nonfinite_passes": seen.nonfinite_passes}
        if seen.max_abs_last is not None and seen.max_abs_worst is not None:
            readings |= {"logits.max_abs_last": seen.max_abs_last, "logits.max_abs_worst": seen.max_abs_worst}
        return readings


_MOST_NATS = 38 * math.log(10)


class Perplexity(Probe[TextPass]):
    """How well the edited model still predicts a fixed text: the canary's own tokens."""

    tier = "light"
    needs = TextPass
    metrics = (
        Metric(
            "canary.perplexity",
            "1",
            "log",
            "after",
            "Perplexity of the canary's own text. Tens are usual for a language model; above 1,000 it is lost.",
            "exp(−mean log p(token | tokens before it))",
            "The Butterfly Effect of Model Editing (arXiv 2402.09656)",
        ),
        Metric(
            "canary.perplexity_ratio",
            "1",
            "log",
            "after",
            "The same against the unedited model's, which was stored at edit 0.",
            "perplexity_t / perplexity_0",
            "The Butterfly Effect of Model Editing (arXiv 2402.09656)",
        ),
    )

    def compute(self, seen: TextPass) -> Readings:
        """Infinite above 10³⁸, which is past any meaning and what float32 can hold."""
        return {
            "canary.perplexity": _exp(seen.nll),
            "canary.perplexity_ratio": _exp(seen.nll - seen.original_nll),
        }


def _exp(nats: float) -> float:
    return math.inf if nats > _MOST_NATS else math.exp(nats)
