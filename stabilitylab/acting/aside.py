"""Where the tracer has to step aside, because torch rounds differently while any dispatch mode is entered.

Under a mode torch takes every tensor for one that might be a subclass. Singular values and eigenvalues alone are then
computed together with their vectors, and the backwards of a few functions take another way. Over all samples of torch's
own operator database no others differ (`tests/oracle/test_tracer_inert.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_VALUES_ONLY: Final = frozenset(
    {
        torch.linalg.svdvals,
        torch.linalg.eigvalsh,
        torch.linalg.eigvals,
        torch.linalg.cond,
        torch.linalg.matrix_norm,
        torch.linalg.norm,
        torch.linalg.matrix_rank,
        torch.norm,
        Tensor.norm,
        torch.nuclear_norm,
    }
)
_ANOTHER_WAY_BACK: Final = frozenset(
    {torch.prod, Tensor.prod, torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_, torch.linalg.lstsq}
)


class StepAside(TorchFunctionMode):
    """Calls functions of torch as they are; those that would be rounded differently, without the tracer."""

    def __init__(self, aside: Callable[[], AbstractContextManager[Any]], leave: Callable[[str], None]) -> None:
        """aside: takes the tracer away while it is entered. leave: takes it away for the rest of the edit; told why."""
        super().__init__()
        self._aside = aside
        self._leave = leave

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`func` itself."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler traces this very line, so the graph stays the user's
            return func(*args, **kwargs)
        if func in _VALUES_ONLY:
            with self._aside():
                return func(*args, **kwargs)
        if func in _ANOTHER_WAY_BACK and torch.is_grad_enabled() and _is_differentiated(func, args, kwargs):
            self._leave(f"the backward of {func.__name__} is computed in another way under a tracer")
        return func(*args, **kwargs)


def _is_differentiated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = [*args, *kwargs.values()]
    if "masked_fill" in func.__name__:  # by a number it is the same
        given = given[2:]
    return any(isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(given))
