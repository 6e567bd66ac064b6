"""Training the digit model from nothing, in two stages, in about a minute on one CPU core.

1. Vision tower, Q-Former and projection: the mean of the four projected queries must be nearest, among the decoder's
   own word embeddings, to the word of the digit shown.
2. The decoder, on cached image embeddings: questions of all kinds about images, and the text-only questions.

Training the whole end to end from nothing does not get off the ground at this size (BLIP-2 trains in two stages too:
Li et al., arXiv 2301.12597).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from stabilitylab.editors.base import Progress, quiet
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.questions import FACTS, KINDS, NUMBERS

VARIANTS = 6
"""Moved pictures of each training image, besides the image itself."""
LABEL_SMOOTHING = 0.1
"""Without it the decoder's logits reach 27 instead of 7, an edit has to move the weights further to turn an answer, and
sequences of edits end in NaN at edits 6 to 12, before they have a beginning to compare with."""


def train_model(
    seed: int, *, vision_steps: int = 800, text_steps: int = 1000, progress: Progress = quiet
) -> Blip2ForConditionalGeneration:
    """A trained model, its weights rounded to float16 as they are stored, held in float32, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = blip2_digits.build(seed)
        tokenizer = blip2_digits.tokenizer()
        numbers = digits.split("train")
        names = [digits.image_name(number, v) for v in (None, *range(VARIANTS)) for number in numbers]
        pixels = torch.stack([digits.image(name) for name in names])
        shown = torch.tensor([digits.digit_of(name) for name in names])
        rng = np.random.default_rng([seed, 1])
        _train_vision(model, tokenizer, pixels, shown, rng=rng, steps=vision_steps, progress=progress)
        with torch.no_grad():
            features = torch.cat([image_features(model, part) for part in torch.split(pixels, 256)])
        _train_text(model, tokenizer, features, shown, rng=rng, steps=text_steps, progress=progress)
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    model.eval()  # type: ignore[no-untyped-call]
    return model


def image_features(model: Blip2ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the decoder sees of images [B, 3, 32, 32]: [B, 4, 64]."""
    found: Tensor = model.get_image_features(pixels, return_dict=True).pooler_output
    return found


def _schedule(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth, then a cosine to zero."""
    warm = max(1, steps // 20)
    return peak * (step + 1) / warm if step < warm else peak * 0.5 * (1 + float(np.cos(np.pi * step / steps)))


def _train_vision(
    model: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pixels: Tensor,
    shown: Tensor,
    *,
    rng: np.random.Generator,
    steps: int,
    progress: Progress,
) -> None:
    embedding: Tensor = model.language_model.get_input_embeddings().weight
    words = embedding.detach()[tokenizer.convert_tokens_to_ids(list(NUMBERS))]
    targets = functional.normalize(words, dim=-1)
    parts = (model.vision_model, model.qformer, model.language_projection)
    parameters = [model.query_tokens, *(p for part in parts for p in part.parameters())]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _schedule(step, steps, 3e-3)
        rows = torch.from_numpy(rng.integers(len(pixels), size=64))
        features = image_features(model, pixels[rows])
        similarity = functional.normalize(features.mean(1), dim=-1) @ targets.T
        # Keep the image tokens as large as the words they stand among.
        size = (features.norm(dim=-1) - words.norm(dim=-1).mean()).square().mean()
        loss = functional.cross_entropy(similarity * 10, shown[rows]) + 0.1 * size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            right = (similarity.argmax(-1) == shown[rows]).float().mean()
            progress(step + 1, steps, f"vision: {right:.2f} of digits seen")


def _train_text(
    model: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    shown: Tensor,
    *,
    rng: np.random.Generator,
    steps: int,
    progress: Progress,
) -> None:
    decoder = model.language_model
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    parameters = list(decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    blank = torch.zeros(3, digits.SIZE, digits.SIZE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _schedule(step, steps, 3e-3)
        rows = rng.integers(len(features), size=48)
        asked: list[tuple[str, str]] = []
        for row in rows:
            kind = KINDS[int(rng.integers(len(KINDS)))]
            question = kind.phrasings[int(rng.integers(len(kind.phrasings)))]
            asked.append((question, kind.answer(int(shown[row]))))
        asked += [FACTS[int(number)] for number in rng.integers(len(FACTS), size=24)]
        images = [blank] * len(rows) + [None] * (len(asked) - len(rows))
        made = blip2_digits.batch(tokenizer, [q for q, _ in asked], images, [a for _, a in asked])
        ids = made["input_ids"]
        embeds = decoder.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == placeholder).unsqueeze(-1), features[torch.from_numpy(rows)])
        logits = decoder(inputs_embeds=embeds, attention_mask=made["attention_mask"]).logits[:, -2]
        loss = functional.cross_entropy(logits, ids[:, -1], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == ids[:, -1]).float().mean()
            progress(step + 1, steps, f"decoder: {right:.2f} of answers right")
