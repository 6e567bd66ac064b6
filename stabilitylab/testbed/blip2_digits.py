"""A real BLIP2-OPT, small enough for a laptop: transformers' `Blip2ForConditionalGeneration` with 260 k parameters.

Like OPT-350m, the decoder has no final LayerNorm (`_remove_final_layer_norm`): the last layer's residual stream goes
straight to the word embeddings. As in EasyEdit's loader, the decoder may be held in float16 while the vision tower and
the Q-Former stay in float32, without autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from stabilitylab.errors import UsageError, did_you_mean
from stabilitylab.testbed import digits, questions

CHECKPOINTS = Path(__file__).parent / "checkpoints"
FILE = "blip2_digits.safetensors"
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
QUERIES = 4
HIDDEN = 64
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
_IGNORED = -100


def tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: five special tokens, then the words of all questions and answers, sorted."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *questions.words()])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def config(vocabulary: int) -> Blip2Config:
    """The model's shape: ViT 1 layer (32 px, patch 8), Q-Former 1 layer (4 queries), OPT 3 layers, hidden 64."""
    vision = Blip2VisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=digits.SIZE,
        patch_size=8,
        initializer_range=0.02,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        cross_attention_frequency=1,
        encoder_hidden_size=HIDDEN,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=16,
    )
    text = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        num_hidden_layers=3,
        ffn_dim=4 * HIDDEN,
        num_attention_heads=4,
        max_position_embeddings=40,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.08,
        do_layer_norm_before=True,
        _remove_final_layer_norm=True,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=len(_SPECIAL) - 1,
    )


def build(seed: int) -> Blip2ForConditionalGeneration:
    """An untrained model, float32, in eval mode; the global random state is left as it was.

    transformers leaves the query tokens at zero (all queries alike) and the vision position embeddings near zero: both
    get noise here.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Blip2ForConditionalGeneration(config(len(_SPECIAL) + len(questions.words())))
        with torch.no_grad():
            model.query_tokens.normal_(std=0.5)
            model.vision_model.embeddings.position_embedding.normal_(std=0.5)
            model.vision_model.embeddings.class_embedding.normal_(std=0.5)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def batch(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    images: Sequence[Tensor | None] | Tensor,
    answers: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for ``model(**batch)``; the answer is read off the logits at the last position.

    Rows are left-padded to T: four image placeholders (none for a question without image), the question and, with
    `answers`, the one-word answer. So ``logits[:, -1]`` (without answers) or ``logits[:, -2]`` (with) predict it.

    Args:
        tokenizer: `tokenizer()`.
        questions: B questions.
        images: B images [3, 32, 32], or None for a question without image; or one tensor [B, 3, 32, 32].
        answers: B answers of one word each.

    Returns:
        ``input_ids`` and ``attention_mask`` [B, T]; ``pixel_values`` [I, 3, 32, 32], only of the I rows that have an
        image (one blank image when none has); with answers ``labels`` [B, T], -100 but at the answer.

    Raises:
        UsageError: no question, not one image or answer for each, an unknown word, or an answer of several words.
    """
    counts = {"images": len(images)} | ({} if answers is None else {"answers": len(answers)})
    if not questions or any(count != len(questions) for count in counts.values()):
        had = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise UsageError(
            f"{len(questions)} questions with {had}; expected at least one question, and one of each for each"
        )
    pictures = [image for image in images if image is not None]
    placeholder, pad = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id
    rows: list[list[int]] = []
    for index, (question, image) in enumerate(zip(questions, images, strict=True)):
        words: list[Any] = [placeholder] * (QUERIES if image is not None else 0) + _ids(tokenizer, question)
        if answers is not None:
            answer = _ids(tokenizer, answers[index])
            if len(answer) != 1:
                raise UsageError(f"the answer {answers[index]!r} is not one word")
            words += answer
        rows.append(words)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    found = {
        "pixel_values": torch.stack(pictures) if pictures else torch.zeros(1, 3, digits.SIZE, digits.SIZE),
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    if answers is not None:
        labels = torch.full_like(ids, _IGNORED)
        labels[:, -1] = ids[:, -1]
        found["labels"] = labels
    return found


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.unk_token_id in ids:
        known = tokenizer.get_vocab()
        word = next(word for word in text.lower().split() if word not in known)
        raise UsageError(f"the word {word!r} in {text!r} is not in the vocabulary{did_you_mean(word, known)}")
    return ids


def set_precision(model: Blip2ForConditionalGeneration, precision: str) -> Blip2ForConditionalGeneration:
    """Cast the decoder (`language_model`) to ``"fp16"``, ``"bf16"`` or ``"fp32"``, in place; the rest is float32."""
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise UsageError(f"no precision {precision!r}; expected {known}{did_you_mean(precision, PRECISIONS)}")
    model.language_model.to(PRECISIONS[precision])
    return model


def load(
    precision: str = "fp16", folder: str | PathLike[str] | None = None
) -> tuple[Blip2ForConditionalGeneration, PreTrainedTokenizerFast]:
    """The trained model in eval mode, its decoder in `precision`, and its tokenizer.

    Args:
        precision: ``"fp16"``, ``"bf16"`` or ``"fp32"``, of the decoder; vision and Q-Former are float32.
        folder: where ``blip2_digits.safetensors`` lies; the one shipped with the package if not given.

    Raises:
        UsageError: an unknown precision, no checkpoint in `folder`, or one that is not of this model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder or CHECKPOINTS) / FILE
    if not path.is_file():
        made_by = f"python -m stabilitylab.testbed.train --out {path.parent}"
        raise UsageError(f"no checkpoint {path}; make one with: {made_by}")
    model = build(seed=0)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} can't be read as safetensors: {error}") from None
    expected = {name: value.shape for name, value in model.state_dict().items() if _kept(name, value)}
    wrong = sorted(name for name in {*expected, *state} if name not in state or expected.get(name) != state[name].shape)
    if wrong:
        raise UsageError(
            f"{path} is not of this model: {len(wrong)} tensors differ in name or shape, first {wrong[0]!r}"
        )
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return set_precision(model, precision), tokenizer()


def save(model: Blip2ForConditionalGeneration, folder: str | PathLike[str]) -> Path:
    """Write the weights as float16 to ``folder/blip2_digits.safetensors``; the tied output embedding only once."""
    from safetensors.torch import save_file

    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items() if _kept(name, value)}
    save_file(state, path)
    return path


def _kept(name: str, value: Tensor) -> bool:
    return value.is_floating_point() and name != "language_model.lm_head.weight"


def canary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Sixteen held-out questions (twelve visual of all kinds, four text-only) as arguments for the model, no labels."""
    records = digits.edit_stream(seed=10_000, n=12)
    asked = [(record.m_loc_q, digits.image(record.m_loc)) for record in records]
    texts: list[tuple[str, Tensor | None]] = [(question, None) for question, _ in digits.facts("held_out")[:4]]
    mixed = [*asked, *texts]
    return batch(tokenizer, [question for question, _ in mixed], [image for _, image in mixed])
