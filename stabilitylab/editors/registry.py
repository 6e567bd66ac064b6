"""The editors by name: ``make("mend+ball", model, prompts)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from stabilitylab.editors.base import Editor, Prompts
from stabilitylab.editors.regularized import LIMITS, regularized
from stabilitylab.errors import UsageError, did_you_mean

Maker = Callable[[nn.Module, Prompts], Editor]


@dataclass(frozen=True)
class Kind:
    """An editor that can be asked for by name.

    make: an editor for a model, with its usual settings; one that is `Prepared` knows nothing yet.
    """

    name: str
    summary: str
    make: Maker


def _finetune(model: nn.Module, prompts: Prompts) -> Editor:
    from stabilitylab.editors.finetune import Finetune

    return Finetune.for_model(model, batch_of=prompts.edit_batch)


def _finetune_linf(model: nn.Module, prompts: Prompts) -> Editor:
    from stabilitylab.editors.finetune import Finetune

    return Finetune.for_model(model, batch_of=prompts.edit_batch, constraint="linf")


def _mend(model: nn.Module, prompts: Prompts) -> Editor:
    from stabilitylab.editors.mend import Mend

    return Mend.for_model(model, batch_of=prompts.edit_batch)


def _malmen(model: nn.Module, prompts: Prompts) -> Editor:
    from stabilitylab.editors.malmen import Malmen

    return Malmen.for_model(model, batch_of=prompts.edit_batch)


def _grace(model: nn.Module, prompts: Prompts) -> Editor:
    from stabilitylab.editors.grace import Grace

    return Grace.for_model(model, batch_of=prompts.edit_batch)


def _rome(model: nn.Module, prompts: Prompts) -> Editor:
    from stabilitylab.editors.rome import Rome

    return Rome.for_model(model, locate=prompts.located)


def _memit(model: nn.Module, prompts: Prompts) -> Editor:
    from stabilitylab.editors.memit import Memit

    return Memit.for_model(model, locate=prompts.located)


def _alphaedit(model: nn.Module, prompts: Prompts) -> Editor:
    from stabilitylab.editors.alphaedit import AlphaEdit

    return AlphaEdit.for_model(model, locate=prompts.located)


KINDS = (
    Kind("finetune", "Adam steps on one MLP matrix (FT)", _finetune),
    Kind("finetune-linf", "the same, each weight kept in an L∞ ball around its original (FT-L)", _finetune_linf),
    Kind("mend", "a hypernetwork transforms the gradient's factors, one edit on top of the other", _mend),
    Kind("malmen", "hypernetwork shifts of all edits, aggregated by regularised least squares", _malmen),
    Kind("grace", "an external memory: a codebook of keys and values in front of a layer", _grace),
    Kind("rome", "a rank-one update that writes one value at one key of one MLP", _rome),
    Kind("memit", "the same by least squares, spread over several MLPs", _memit),
    Kind("alphaedit", "MEMIT's update, projected onto the null space of the keys to preserve", _alphaedit),
)
"""Every editor, in the order in which lists show them."""

_BY_NAME = {kind.name: kind for kind in KINDS}


def parse(name: str) -> tuple[Kind, tuple[str, ...]]:
    """The editor and the limits that a name such as ``mend+ball`` means.

    Raises:
        UsageError: no such editor or limit; the message lists those there are.
    """
    base, *limits = name.split("+")
    if base not in _BY_NAME:
        raise UsageError(f"no editor {base!r}; expected one of {', '.join(_BY_NAME)}{did_you_mean(base, _BY_NAME)}")
    for limit in limits:
        if limit not in LIMITS:
            known = ", ".join(f"{base}+{valid}" for valid in LIMITS)
            raise UsageError(f"no limit {limit!r} of {name!r}; expected {known}{did_you_mean(limit, LIMITS)}")
    if len(set(limits)) < len(limits):
        raise UsageError(f"{name!r} names a limit twice")
    return _BY_NAME[base], tuple(limits)


def make(name: str, model: nn.Module, prompts: Prompts) -> Editor:
    """The editor called `name` for `model`, with its usual settings; see `parse`.

    Raises:
        UsageError: no such editor or limit.
        SiteError: the model lacks the layers that it edits.
    """
    kind, limits = parse(name)
    editor = kind.make(model, prompts)
    return regularized(editor, **{limit: LIMITS[limit] for limit in limits}) if limits else editor
