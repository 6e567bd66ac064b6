"""Which operation first makes a NaN or an infinity in each benchmark loop, written down before there was any tracer.

The truths are from reading the loops, their mechanism and torch's formulas of derivatives, and from intermediate values
that were worked out by hand in plain torch on one CPU core (torch 2.13, transformers 5.23): never from a tracer's
answer. They hold for the loops of `benchmarks.wild`, and for those of `benchmarks.zoo` that are not held out, run with
`SEED`. Names are those of the cases and scenarios, with "wild/" or "zoo/" in front.

Every loop is in one of `TRUTHS`, `ARRIVED`, `OPTIONAL`, `NO_CLAIM` and `FINITE`. Where an infinity comes to nothing (a
softmax, a mask or a clamp takes it in, or it only answers a question such as `isinf`), the truth is the operation whose
result does reach a weight, a gradient, an answer or a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Direction = Literal["forward", "backward"]

SEED: Final = 100
"""Of the zoo's loops."""


@dataclass(frozen=True)
class Truth:
    """The operation that first turns finite values into NaN or infinity, of which the harm comes.

    operators: accepted names of the aten operator, without namespace and overload: all by which torch may carry out the
    same arithmetic, fused or not. direction: "forward" also for the algebra of optimisers and editors that run no
    backward. node: accepted names of the autograd node; empty for a forward operation. lines: accepted places, each the
    name of a file and a fragment of the line as it stands there. Of an operation within torch itself it is the
    innermost line outside of torch (and of what watches), of a backward operation the line of its forward operation.
    why: the mechanism, in one sentence.
    """

    operators: tuple[str, ...]
    direction: Direction
    node: tuple[str, ...]
    lines: tuple[tuple[str, str], ...]
    why: str


_DIVISION: Final = ("div", "div_", "true_divide", "true_divide_", "_foreach_div", "_foreach_div_")
_MATRIX_PRODUCT: Final = ("linear", "addmm", "mm", "matmul", "bmm", "baddbmm")
_SOFTMAX: Final = ("_softmax", "softmax", "_safe_softmax")
_CAST: Final = ("_to_copy", "to", "copy_", "copy")
_LAYER_NORM: Final = ("native_layer_norm", "layer_norm", "var_mean", "var")
_SQUARE: Final = ("pow", "pow_", "square", "mul", "rms_norm", "_fused_rms_norm")
_ADAM_QUOTIENT: Final = ("addcdiv_", "addcdiv", "_foreach_addcdiv_", "_foreach_addcdiv", *_DIVISION)


def _forward(operators: tuple[str, ...], file: str, line: str, why: str) -> Truth:
    return Truth(operators, "forward", (), ((file, line),), why)


def _backward(operators: tuple[str, ...], node: str, file: str, line: str, why: str) -> Truth:
    return Truth(operators, "backward", (node,), ((file, line),), why)


TRUTHS: Final[Mapping[str, Truth]] = {
    "wild/left-padded-row": _forward(
        _SOFTMAX,
        "decoder.py",
        "mixed: Tensor = self.output((scores.softmax(-1) @ heads(self.value))",
        "The padding token in front of the second row may see no key: its scores are all −∞, and their softmax is 0/0.",
    ),
    "wild/root-of-zero": _backward(
        _DIVISION,
        "SqrtBackward0",
        "algebra.py",
        "return (one - other).square().sum(-1).sqrt()",
        "The distance of a sentence to itself is √0, and the root's gradient g / (2√x) a division by zero (0/0 here, as"
        " the relu behind it is shut).",
    ),
    "wild/certain-answer": _backward(
        _DIVISION,
        "Log1PBackward0",
        "algebra.py",
        "log_odds = liked - disliked - torch.log1p(-liked.exp())",
        "p is 1 in bfloat16: log(1 − p) = −∞ is taken in by logsigmoid (the loss is finite, and the gradient that comes"
        " back is 0), and 0 / (1 − p) in the backward of log1p is 0/0.",
    ),
    "wild/zero-scale": _forward(
        _DIVISION,
        "algebra.py",
        "weight.copy_((pruned / scale).round() * scale)",
        "A row that was pruned to zeros has a quantisation scale of 0, and each of its entries is 0/0.",
    ),
    "wild/residual-overflow": _forward(
        ("add", "add_"),
        "decoder.py",
        "return self._limited(hidden + self.mlp(self.norm2(hidden)))",
        "The float16 residual stream passes 65,504 where the last MLP's output, itself finite, is added; the RMSNorm"
        " behind it makes ∞ · 0 of that.",
    ),
    "wild/unused-rows": _forward(
        _ADAM_QUOTIENT,
        "overflow.py",
        "adam.step()",
        "Adam's ε of 1e-8 is zero in float16: rows of words that the request lacks have 0/0 as their step.",
    ),
    "wild/log-of-softmax": _backward(
        _DIVISION,
        "LogBackward0",
        "overflow.py",
        "return -likely.log()",
        "p = 5e-6 is above zero in float16 and its logarithm finite, but that one's gradient −1/p is beyond 65,504.",
    ),
    "wild/corrected-by-zero": _forward(
        _DIVISION,
        "overflow.py",
        "update = kept.first[site] / first / ((kept.second[site] / second).sqrt() + 1e-6)",
        "β₂ = 0.999 is 1 in bfloat16: the second moment stays 0, its correction 1 − β₂ᵗ is 0, and their quotient 0/0.",
    ),
    "wild/smoothed-over-impossible": _forward(
        ("sum", "cross_entropy_loss"),
        "lost.py",
        'return functional.cross_entropy(said, batch["input_ids"][:, -1], label_smoothing=0.1)',
        "One logit is −∞ by design, and so is its log probability; label smoothing sums the log probabilities of all"
        " words, and the loss is infinite.",
    ),
    "zoo/empty-mask": _forward(
        _DIVISION,
        "inputs.py",
        "found: Tensor = (each * counts).sum() / counts.sum()",
        "No token of the answer is left: the mean over the mask is 0/0.",
    ),
    "zoo/masked-row": _forward(
        _SOFTMAX,
        "inputs.py",
        "return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None",
        "In the first left-padded batch the padding's rows see nothing: a softmax of −∞ alone is 0/0.",
    ),
    "zoo/labels-ignored": _forward(
        ("nll_loss_forward", "nll_loss", "nll_loss_nd", "nll_loss2d_forward", "cross_entropy_loss"),
        "loss_utils.py",
        "loss = nn.functional.cross_entropy(source, target, ignore_index=ignore_index, reduction=reduction)",
        "All labels are −100: the loss is a mean over no token, 0/0, while its gradients are zero.",
    ),
    "zoo/normaliser-zero-std": _forward(
        _CAST,
        "foreign.py",
        "layer.parameter.add_(update.to(layer.parameter.dtype))",
        "A unit with std 0 is divided by 1e-7: the update, finite in float32 at 1e7 to 1e11, is infinite in the"
        " weight's float16.",
    ),
    "zoo/single-row-std": _forward(
        ("new_full", "full", "full_like", "fill_", "fill"),
        "normaliser.py",
        'variance = x.new_full(self.var.shape, float("nan"))',
        "The variance of a single row is written down as NaN and mixed into the running one.",
    ),
    "zoo/fp16-overflow": _forward(
        _CAST,
        "dtypes.py",
        "layer.parameter.copy_(master)",
        "The step was not unscaled: the float32 master is finite, but beyond 65,504, and infinite once it is copied"
        " into the float16 weight.",
    ),
    "zoo/adam-eps-fp16": _forward(
        _ADAM_QUOTIENT,
        "dtypes.py",
        "adam.step()",
        "Adam's ε is zero in float16, and so are many squared gradients: the step is 0/0 or x/0.",
    ),
    "zoo/mend-feedback-fp16": _forward(
        _MATRIX_PRODUCT,
        "modeling_opt.py",
        "hidden_states = self.fc2(hidden_states)",
        "Layer 1's two matrices grew together: what enters fc2 is finite at 7e3 and what leaves it is above 65,504, in"
        " the canary's forward after edit 46 as in the forward of edit 47.",
    ),
    "zoo/mend-feedback-bf16": _forward(
        _LAYER_NORM,
        "modeling_opt.py",
        "hidden_states = self.self_attn_layer_norm(hidden_states)",
        "The residual stream reaches 1e21, which bfloat16 holds, but layer 2's LayerNorm squares it in float32: above"
        " 3.4e38.",
    ),
    "zoo/mend-feedback-fp32": _forward(
        _LAYER_NORM,
        "modeling_opt.py",
        "hidden_states = self.self_attn_layer_norm(hidden_states)",
        "The residual stream reaches 5e24 to 1e26, and layer 2's LayerNorm squares it: above 3.4e38.",
    ),
    "zoo/bit-flip": _forward(
        _MATRIX_PRODUCT,
        "modeling_llama.py",
        "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
        "The flipped weight is finite at 1.6e38; an activation above 2.2 on it overflows float32, first in the canary's"
        " forward after edit 50.",
    ),
}
"""By the loop's name. A tracer should name these."""

ALSO: Final[Mapping[str, Truth]] = {
    "zoo/bit-flip": _backward(
        ("mul", "mul_"),
        "PowBackward0",
        "modeling_llama.py",
        "variance = hidden_states.pow(2).mean(-1, keepdim=True)",
        "No forward of edits 51 to 53 itself overflows but for the RMSNorm's square, which only makes the logits zero;"
        " in the backward of edit 53 the square's slope 2x is infinite at 3e38, times a gradient of 0, and so the"
        " weights become NaN.",
    ),
}
"""Right as well, where only the edits themselves are traced and not the forward of the canary."""

ARRIVED: Final[Mapping[str, str]] = {
    "wild/unwritten-head": "The new head's weight holds NaN from before the first edit, as memory that was never"
    " written would.",
    "zoo/normaliser-never-loaded": "The statistics of one shape's hypernetwork are NaN from before the first edit, as"
    " no checkpoint filled them.",
}
"""Loops into which the non-finite value comes from outside, with why: no operation of the loop made it."""

OPTIONAL: Final[Mapping[str, Truth]] = {
    "wild/clipped-to-zero": _forward(
        ("linalg_vector_norm", "norm", "_foreach_norm", "frobenius_norm"),
        "lost.py",
        "if torch.nn.utils.clip_grad_norm_(weights.values(), 2.0).isinf():",
        "The norm of finite float16 gradients is infinite, and 2/∞ = 0 of each gradient is left: no weight, gradient or"
        " answer is ever non-finite.",
    ),
    "wild/singular-moments": _forward(
        ("_linalg_solve_ex", "linalg_solve_ex", "linalg_solve", "linalg_lu_solve"),
        "lost.py",
        "spread = torch.linalg.solve(50.0 * known + key.T @ key, key.T)",
        "A zero pivot makes NaN within the solve, which raises: nobody ever gets the NaN, and the loop swallows the"
        " error.",
    ),
    "zoo/dead-logits": _forward(
        _SQUARE,
        "modeling_llama.py",
        "variance = hidden_states.pow(2).mean(-1, keepdim=True)",
        "The square of the hidden state overflows inside RMSNorm, x / √∞ is 0, and all logits are zero, but finite.",
    ),
    "zoo/gradients-skipped": _backward(
        _CAST,
        "ToCopyBackward0",
        "loss_utils.py",
        "logits = logits.float()",
        "At a loss scale of 2¹⁷ the gradient of the float32 loss at the logits overflows once it is cast to their"
        " float16; the loop throws the step away, at this and every later edit.",
    ),
}
"""Loops whose harm comes of a non-finite value that reaches no weight, answer or kept gradient.

Naming this operation is right, and to name none is not wrong; to name another is.
"""

NO_CLAIM: Final[tuple[str, ...]] = (
    "wild/scaler-skips",
    "wild/gradient-converges",
    "wild/clamped-residual",
    "wild/adapter-begins-at-zero",
    "wild/gradient-rises",
    "wild/warm-restarts",
    "wild/constant-sink",
    "zoo/healthy-malmen",
    "zoo/healthy-mend-singles",
    "zoo/healthy-mend-ball",
    "zoo/healthy-grace",
    "zoo/healthy-finetune",
    "zoo/healthy-finetune-words",
    "zoo/healthy-rome-singles",
    "zoo/healthy-memit-singles",
    "zoo/healthy-large-drift",
    "zoo/healthy-spikes",
)
"""Healthy loops, in which to name any operation is wrong.

Some do make infinities: "scaler-skips" in gradients whose step is skipped, "clamped-residual" in a sum that is clamped
at once, and the search for a value (ROME, MEMIT) a 0/0 that the backward of the norm of a zero shift masks.
"""

FINITE: Final[tuple[str, ...]] = (
    "wild/two-keys",
    "wild/second-beta-is-one",
    "wild/undone-inside",
    "wild/small-rate-in-bfloat16",
    "wild/gains-stuck-at-one",
    "wild/gentle-edits",
    "wild/closed-form-singles",
    "wild/cache-outlives-edits",
    "wild/inexact-unmerge",
    "wild/merged-again",
    "wild/gradients-kept",
    "zoo/not-restored",
    "zoo/partly-restored",
    "zoo/reference-edited",
    "zoo/statistics-restart",
    "zoo/unstable-denominator",
    "zoo/target-pinned",
    "zoo/leaking-cache",
    "zoo/wrong-null-space",
    "zoo/singular-solve",
    "zoo/bf16-absorption",
    "zoo/learning-rate-too-high",
    "zoo/slow-norm-growth",
    "zoo/sign-flipped",
    "zoo/update-misplaced",
    "zoo/update-transposed",
)
"""Loops with a fault, but with no weight, gradient, answer or loss that is ever non-finite: to name any is wrong."""
