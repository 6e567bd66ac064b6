"""A call of the whole model, kept so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class ModelCall:
    """The first call of the whole model inside the edit. Of a dict among the arguments, such as EasyEdit's ``samples``,
    what was in it when the call began.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        """The call, with the versions of its tensors."""
        args, kwargs = tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}
        return cls(args, kwargs, tuple(version_of(tensor) for tensor in tensors_in(args, kwargs)))

    def check(self) -> None:
        """Raises ValueError where doing it again would not be the same, or would change what the user passed in."""
        for value in (*self.args, *self.kwargs.values()):
            if not _may_be_passed_again(value):
                raise ValueError(f"the edit's call holds a {type(value).__name__}, which calling again might change")
        if tuple(version_of(tensor) for tensor in tensors_in(self.args, self.kwargs)) != self.versions:
            raise ValueError("an input of the edit's call was overwritten since")

    def again(self, model: nn.Module) -> Any:
        """Call the model so once more."""
        return model(*map(_copied, self.args), **{name: _copied(value) for name, value in self.kwargs.items()})


def _copied(value: Any) -> Any:
    return dict(value) if type(value) is dict else value


def tensors_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among a call's arguments, and in dicts that are."""
    given = [*args, *kwargs.values()]
    given += [inner for value in given if type(value) is dict for inner in value.values()]
    return [value for value in given if isinstance(value, Tensor)]


def _may_be_passed_again(value: Any) -> bool:
    if type(value) is dict:
        return all(_may_be_passed_again(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(isinstance(inner, bool | int | float | str | None) for inner in value)
    return isinstance(value, Tensor | bool | int | float | str | None)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version
