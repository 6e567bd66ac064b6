"""Visual questions about real handwritten digits (scikit-learn's `load_digits`: 1,797 images from the UCI set).

Train, validation and held-out images are disjoint, by one fixed shuffle. An image's name is ``digits/0123``; its
rephrased pictures are ``digits/0123~7``: the same handwriting, a little turned, scaled, moved and dimmed, by number 7.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stabilitylab.errors import UsageError
from stabilitylab.testbed.questions import FACTS, KINDS, Kind
from stabilitylab.testbed.records import EditRecord

Split = Literal["train", "validation", "held_out"]

SIZE = 32
"""Images are [3, SIZE, SIZE]."""
_SHUFFLE_SEED = 20240
_SIZES = {"train": 1197, "validation": 200, "held_out": 400}
_NAME = re.compile(r"digits/(\d{4})(?:~(\d{1,6}))?")


@lru_cache(maxsize=1)
def _load() -> tuple[Tensor, tuple[int, ...]]:
    """Images [1797, 1, 8, 8] in [0, 1] and the digit that each shows."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "the digits need scikit-learn, which is not installed; run: pip install stabilitylab[demo]"
        ) from None
    found = load_digits()
    images = torch.from_numpy(np.asarray(found.images, dtype=np.float32) / 16.0)
    return images.unsqueeze(1), tuple(int(digit) for digit in found.target)


def split(name: Split) -> tuple[int, ...]:
    """The image numbers of ``"train"``, ``"validation"`` or ``"held_out"``; the three are disjoint."""
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(sum(_SIZES.values()))
    start = 0
    for part, size in _SIZES.items():
        if part == name:
            return tuple(int(number) for number in order[start : start + size])
        start += size
    raise UsageError(f"no split {name!r}; expected one of {', '.join(_SIZES)}")


def facts(name: Split) -> tuple[tuple[str, str], ...]:
    """Text-only questions and answers of a split: the model knows all, an editor trains its locality on its own."""
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(FACTS))
    third = len(FACTS) // 4
    parts = {"held_out": order[:third], "validation": order[third : 2 * third], "train": order[2 * third :]}
    return tuple(FACTS[number] for number in parts[name])


def image_name(number: int, variant: int | None = None) -> str:
    """The name of image `number`, or of its rephrased picture `variant`."""
    return f"digits/{number:04d}" if variant is None else f"digits/{number:04d}~{variant}"


def _parse(name: str) -> tuple[int, int | None]:
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) >= sum(_SIZES.values()):
        raise UsageError(f"no image {name!r}; expected a name such as 'digits/0123' or 'digits/0123~7' (0000 to 1796)")
    return int(match[1]), None if match[2] is None else int(match[2])


def digit_of(name: str) -> int:
    """The digit, 0 to 9, that image `name` shows."""
    return _load()[1][_parse(name)[0]]


def image(name: str) -> Tensor:
    """The pixels of image `name`: float32 [3, 32, 32], from -1 (paper) to 1 (ink).

    Raises:
        UsageError: no image of that name, or scikit-learn is not installed.
    """
    number, variant = _parse(name)
    picture = _load()[0][number].unsqueeze(0)
    if variant is None:
        large = functional.interpolate(picture, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return (large[0] * 2 - 1).expand(3, SIZE, SIZE).contiguous()
    rng = np.random.default_rng([_SHUFFLE_SEED, number, variant])
    angle, size = math.radians(rng.uniform(-12, 12)), rng.uniform(0.9, 1.12)
    across, down = rng.uniform(-0.08, 0.08, size=2)
    turned = torch.tensor(
        [
            [
                [math.cos(angle) / size, -math.sin(angle) / size, across],
                [math.sin(angle) / size, math.cos(angle) / size, down],
            ]
        ],
        dtype=torch.float32,
    )
    grid = functional.affine_grid(turned, [1, 1, SIZE, SIZE], align_corners=False)
    moved = functional.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved[0] * rng.uniform(0.8, 1.0) * 2 - 1).expand(3, SIZE, SIZE).contiguous()


def record(rng: np.random.Generator, numbers: Sequence[int], texts: Sequence[tuple[str, str]]) -> EditRecord:
    """A random edit about one of the images `numbers`: a question that gets a wrong answer `alt`.

    `image_rephrase` shows the same handwriting moved; `m_loc` is another image of another digit, with any question.
    """
    labels = _load()[1]
    number = int(rng.choice(np.asarray(numbers)))
    kind = KINDS[int(rng.integers(len(KINDS)))]
    src, rephrase = (str(words) for words in rng.choice(np.asarray(kind.phrasings), size=2, replace=False))
    pred = kind.answer(labels[number])
    alt = str(rng.choice(np.asarray([answer for answer in kind.answers if answer != pred])))
    other = int(rng.choice(np.asarray([n for n in numbers if labels[n] != labels[number]])))
    m_kind = KINDS[int(rng.integers(len(KINDS)))]
    loc, loc_ans = texts[int(rng.integers(len(texts)))]
    return EditRecord(
        src=src,
        pred=pred,
        alt=alt,
        rephrase=rephrase,
        image=image_name(number),
        image_rephrase=image_name(number, int(rng.integers(1_000_000))),
        loc=loc,
        loc_ans=loc_ans,
        m_loc=image_name(other),
        m_loc_q=str(rng.choice(np.asarray(m_kind.phrasings))),
        m_loc_a=m_kind.answer(labels[other]),
    )


def edit_stream(seed: int, n: int, part: Split = "held_out") -> list[EditRecord]:
    """`n` edits about images of a split, no (image, kind of question) twice; the same for the same arguments.

    A longer stream of the same seed starts with the shorter one.

    Raises:
        UsageError: `n` is negative or more than there are images × kinds.
    """
    numbers, texts = split(part), facts(part)
    most = len(numbers) * len(KINDS)
    if not 0 <= n <= most:
        raise UsageError(f"n={n} edits can't be had; expected 0 to {most} ({len(numbers)} images, {len(KINDS)} kinds)")
    rng = np.random.default_rng([_SHUFFLE_SEED, seed])
    found: list[EditRecord] = []
    seen: set[tuple[str, str]] = set()
    while len(found) < n:
        candidate = record(rng, numbers, texts)
        key = (candidate.image, kind_of(candidate.src).name)
        if key not in seen:
            seen.add(key)
            found.append(candidate)
    return found


def kind_of(question: str) -> Kind:
    """The kind of a visual question."""
    for kind in KINDS:
        if question in kind.phrasings:
            return kind
    raise UsageError(f"{question!r} is no visual question of the testbed")
