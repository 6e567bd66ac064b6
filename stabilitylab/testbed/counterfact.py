"""Facts to edit into a language model, from files in the layouts that people have.

- CounterFact as EasyEdit and its successors hold it: ``prompt``, ``subject``, ``target_new``, ``rephrase_prompt``,
  ``locality_prompt``;
- CounterFact as it was published (Meng et al., *Locating and Editing Factual Associations in GPT*, arXiv 2202.05262):
  ``requested_rewrite``, ``paraphrase_prompts``, ``neighborhood_prompts``;
- MMEdit and zsRE: ``src``, ``alt``, ``rephrase``, ``loc``, ``loc_ans``; of MMEdit the text alone, without images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from stabilitylab.errors import RecordError, did_you_mean
from stabilitylab.testbed.reading import expect_field, expect_object, expect_string, kind_of, read_list


@dataclass(frozen=True)
class Fact:
    """One requested edit of a language model, and what to ask afterwards. None: not to be asked.

    The answers follow their prompts after one space.
    """

    prompt: str
    """The beginning of a sentence, or a question."""
    target_new: str
    """How the edited model should go on."""
    subject: str | None = None
    """What the prompt is about, as it stands in it."""
    ground_truth: str | None = None
    """How the unedited model may go on."""
    rephrase_prompt: str | None = None
    """The prompt in other words: the edited model should go on with `target_new`."""
    locality_prompt: str | None = None
    """Another subject, about which the model should say what it said before."""
    locality_ground_truth: str | None = None
    """A continuation of `locality_prompt`: its places are looked at, whether the model gives it or not."""


_Reader = Callable[[Mapping[str, Any], str], Fact]


def load_facts(path: str | PathLike[str]) -> list[Fact]:
    """Read a json file in one of the layouts above, told apart by the fields of its first record.

    Raises:
        RecordError: no such file, not JSON, not a list, of no known layout, or with a record in which a field is
            missing, no string or empty, or whose subject is not in its prompt: the message names the first bad
            record's index (from 0) and the field.
    """
    path = Path(path)
    entries = read_list(path)
    if not entries:
        return []
    reader = _reader_of(expect_object(entries[0], f"{path}: record 0", "prompt"), f"{path}: record 0")
    mark = next(field for field, known in _LAYOUTS.items() if known is reader)
    facts = []
    for index, entry in enumerate(entries):
        which = f"{path}: record {index}"
        facts.append(reader(expect_object(entry, which, mark), which))
    return facts


def _reader_of(first: Mapping[str, Any], which: str) -> _Reader:
    for field, reader in _LAYOUTS.items():
        if field in first:
            return reader
    near = "".join(filter(None, (did_you_mean(field, map(str, first), n=1) for field in _LAYOUTS)))
    raise RecordError(
        f"{which} has no field 'prompt' (CounterFact), 'requested_rewrite' (CounterFact as published) "
        f"or 'src' (MMEdit, zsRE){near}"
    )


_FLAT = ("prompt", "subject", "target_new", "rephrase_prompt", "locality_prompt")
_FLAT_OPTIONAL = ("ground_truth", "locality_ground_truth")


def _flat(entry: Mapping[str, Any], which: str) -> Fact:
    needed = {name: _words(entry, name, which, _FLAT) for name in _FLAT}
    further = {name: _words(entry, name, which, _FLAT) for name in _FLAT_OPTIONAL if entry.get(name) is not None}
    return _about_its_subject(Fact(**needed, **further), which)


_PUBLISHED = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")


def _published(entry: Mapping[str, Any], which: str) -> Fact:
    rewrite = expect_field(entry, "requested_rewrite", which, _PUBLISHED)
    inside = f"{which}, field 'requested_rewrite'"
    rewrite = expect_object(rewrite, inside, "prompt")
    known = ("prompt", "subject", "target_new", "target_true")
    template, subject = _words(rewrite, "prompt", inside, known), _words(rewrite, "subject", inside, known)
    if "{}" not in template:
        raise RecordError(f"{inside}, field 'prompt': expected '{{}}' in place of the subject, found {template!r}")
    targets = []
    for name in ("target_new", "target_true"):
        target = expect_object(expect_field(rewrite, name, inside, known), f"{inside}, field {name!r}", "str")
        targets.append(_words(target, "str", f"{inside}, field {name!r}", ("id",)))
    return Fact(
        prompt=template.replace("{}", subject),
        subject=subject,
        target_new=targets[0],
        ground_truth=targets[1],
        rephrase_prompt=_first(entry, "paraphrase_prompts", which),
        locality_prompt=_first(entry, "neighborhood_prompts", which),
        # Its neighbours are subjects of which the same is true.
        locality_ground_truth=targets[1],
    )


def _first(entry: Mapping[str, Any], name: str, which: str) -> str:
    found = expect_field(entry, name, which, _PUBLISHED)
    if not isinstance(found, list) or not found:
        what = "an empty list" if isinstance(found, list) else kind_of(found)
        raise RecordError(f"{which}, field {name!r}: expected a list of strings, found {what}")
    return _words({name: found[0]}, name, which, ())


_QUESTION = ("src", "alt", "rephrase", "loc", "loc_ans")


def _question(entry: Mapping[str, Any], which: str) -> Fact:
    src, alt, rephrase, loc, loc_ans = (_words(entry, name, which, _QUESTION) for name in _QUESTION)
    further = {
        field: _words(entry, name, which, _QUESTION)
        for name, field in (("subject", "subject"), ("pred", "ground_truth"))
        if entry.get(name) is not None
    }
    fact = Fact(src, alt, rephrase_prompt=rephrase, locality_prompt=loc, locality_ground_truth=loc_ans, **further)
    return _about_its_subject(fact, which)


_LAYOUTS: dict[str, _Reader] = {"requested_rewrite": _published, "prompt": _flat, "src": _question}
"""The field that gives a layout away, and what reads a record of it."""


def _words(entry: Mapping[str, Any], name: str, which: str, known: tuple[str, ...]) -> str:
    value = expect_string(entry, name, which, known).strip()
    if not value:
        raise RecordError(f"{which}, field {name!r}: expected some words, found an empty string")
    return value


def _about_its_subject(fact: Fact, which: str) -> Fact:
    if fact.subject is not None and fact.subject not in fact.prompt:
        where = f"{which}, field 'subject'"
        prompt, subject = (repr(text if len(text) <= 200 else f"{text[:199]}…") for text in (fact.prompt, fact.subject))
        raise RecordError(f"{where}: expected it word for word in the prompt {prompt}, found {subject}")
    return fact
