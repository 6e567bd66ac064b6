"""The words of the testbed: questions about a pictured digit in several phrasings, and text-only questions.

Everything is written as the word-level tokenizer splits it: lower case, words between single spaces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Kind:
    """A kind of visual question: its phrasings, its possible answers, and the true one for a digit."""

    name: str
    phrasings: tuple[str, ...]
    answers: tuple[str, ...]
    answer: Callable[[int], str]


def _parity(digit: int) -> str:
    return ("even", "odd")[digit % 2]


def _greater(digit: int, than: int = 4) -> str:
    return "yes" if digit > than else "no"


KINDS = (
    Kind(
        "which",
        (
            "which digit is this ?",
            "what digit is shown ?",
            "what number do you see ?",
            "which number is written here ?",
            "name the digit in the picture .",
            "read the number in the image .",
        ),
        NUMBERS,
        NUMBERS.__getitem__,
    ),
    Kind(
        "parity",
        (
            "is this digit even or odd ?",
            "is the number odd or even ?",
            "what parity has this digit ?",
            "tell the parity of the number shown .",
            "odd or even , what is the digit here ?",
            "does the picture show an even or an odd number ?",
        ),
        ("even", "odd"),
        _parity,
    ),
    Kind(
        "greater",
        (
            "is this digit greater than four ?",
            "is the number larger than four ?",
            "is the digit in the picture above four ?",
            "does the image show more than four ?",
            "is what you see bigger than four ?",
            "does the number shown exceed four ?",
        ),
        ("yes", "no"),
        _greater,
    ),
)
"""The kinds of visual questions, each with one true answer for each digit from 0 to 9."""


def _facts() -> tuple[tuple[str, str], ...]:
    found = []
    for digit, word in enumerate(NUMBERS):
        if digit < 9:
            found.append((f"what comes after {word} ?", NUMBERS[digit + 1]))
            found.append((f"what is {word} plus one ?", NUMBERS[digit + 1]))
        if digit > 0:
            found.append((f"what comes before {word} ?", NUMBERS[digit - 1]))
            found.append((f"what is {word} minus one ?", NUMBERS[digit - 1]))
        found.append((f"is the word {word} even or odd ?", _parity(digit)))
        found.append((f"is the word {word} greater than four ?", _greater(digit)))
    found += [
        ("how many legs has a spider ?", "eight"),
        ("how many legs has an insect ?", "six"),
        ("how many legs has a dog ?", "four"),
        ("how many legs has a bird ?", "two"),
        ("how many days has a week ?", "seven"),
        ("how many sides has a triangle ?", "three"),
        ("how many sides has a square ?", "four"),
        ("how many sides has a pentagon ?", "five"),
        ("how many wheels has a bicycle ?", "two"),
        ("how many wheels has a car ?", "four"),
        ("how many fingers has a hand ?", "five"),
        ("how many planets are there ?", "eight"),
        ("how many strings has a violin ?", "four"),
        ("how many strings has a guitar ?", "six"),
        ("how many lives has a cat ?", "nine"),
        ("how many moons has earth ?", "one"),
    ]
    return tuple(found)


FACTS = _facts()
"""Text-only questions with their answers."""


def words() -> list[str]:
    """Every word of every question and answer, sorted."""
    found: set[str] = set(NUMBERS)
    for kind in KINDS:
        found.update(*(phrasing.split() for phrasing in kind.phrasings), kind.answers)
    for question, answer in FACTS:
        found.update(question.split(), [answer])
    return sorted(found)
