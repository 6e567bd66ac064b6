"""What an operator of torch does to memory, read from its schema once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_UNWRITTEN: Final = frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
    | {"resize_", "resize_as_"}
)
_FILLS: Final = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"})
_CONSTANTS: Final = frozenset({"lift_fresh", "lift_fresh_copy", "scalar_tensor"})
_SUMS: Final = frozenset(
    {
        "sum",
        "mean",
        "std",
        "var",
        "var_mean",
        "std_mean",
        "cumsum",
        "dot",
        "mv",
        "mm",
        "bmm",
        "addmv",
        "addmm",
        "baddbmm",
    }
    | {"linear", "convolution", "linalg_vector_norm", "nll_loss_forward", "nll_loss2d_forward", "native_layer_norm"}
)
_ATTENTION: Final = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
_COMMUNICATION: Final = ("c10d", "_c10d")


@dataclass(frozen=True)
class Operator:
    """One operator.

    name: without namespace and overload; full: with both. arguments: their names. written: those that it changes, by
    place and name. skipped: its results are no new values (views), or are still on their way when it returns (what
    ranks send to each other): to read those would be to wait, or to see half of them. unwritten: gives memory that
    holds anything. fills: writes every entry, whatever was there. constant: makes a tensor of a number. adds_up: sums
    entries of what went in. first_only: of several results only the first is values.
    """

    name: str
    full: str
    arguments: tuple[str, ...]
    written: tuple[tuple[int, str], ...]
    skipped: bool = False
    unwritten: bool = False
    fills: bool = False
    constant: bool = False
    adds_up: bool = False
    first_only: bool = False

    def changed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments of a call that it has changed."""
        return [args[place] if place < len(args) else kwargs.get(name) for place, name in self.written]

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The arguments of a call with their names."""
        return [*zip(self.arguments, args, strict=False), *kwargs.items()]


def operator_of(func: Any) -> Operator:
    """What is known of an operator; a higher-order one is skipped."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return Operator(str(func), str(func), (), (), skipped=True)
    namespace, _, name = schema.name.rpartition("::")
    aliases = [result.alias_info for result in schema.returns]
    is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    return Operator(
        name=name,
        full=f"{namespace}.{name}.{schema.overload_name or 'default'}",
        arguments=tuple(argument.name for argument in schema.arguments),
        written=tuple(
            (place, argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
        skipped=(is_view and name not in _CONSTANTS) or namespace.startswith(_COMMUNICATION),
        unwritten=name in _UNWRITTEN,
        fills=name in _FILLS,
        constant=name in _CONSTANTS,
        adds_up=name in _SUMS,
        # The others of fused attention are sums of rows (−∞ for an empty one) and random states.
        first_only=name.startswith(_ATTENTION) and not name.endswith("backward"),
    )
