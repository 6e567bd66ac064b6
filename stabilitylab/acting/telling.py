"""From a call of an operator to what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from stabilitylab.acting.call import OPERANDS, Call
from stabilitylab.acting.lines import place_of
from stabilitylab.acting.origins import Origins, Trail
from stabilitylab.acting.tensors import is_finite, memory_of, readable, tensors_of
from stabilitylab.record.operations import Made, Operation, Phase, Step, Values
from stabilitylab.record.readings import MODEL_SITE


def bare(edit: int, phase: Phase, call: Call, made: Made) -> Operation:
    """The operation of a call, without its values."""
    return Operation(
        edit=edit,
        phase=phase,
        operator=call.operator.full,
        direction=call.direction,
        module="",
        place=place_of(call.spot),
        made=made,
        reach="values",
        node=call.node,
        number=call.number,
    )


def in_full(operation: Operation, call: Call, read: Callable[[Call, str, Tensor], Values]) -> Operation:
    """With its operands and settings. read: reads one operand."""
    operands = tuple(read(call, name, tensor) for name, tensor in call.operands[:OPERANDS])
    return replace(operation, operands=operands, settings=call.settings)


@dataclass(frozen=True, eq=False)
class Names:
    """What things are called, at the end of an edit. layers: by the module's `id`. weights, gradients: by memory.
    buffers: the memories of those weights that
    are buffers. bad: of those that are not finite; None where that can't be told without waiting.
    """

    layers: Mapping[int, str] = field(default_factory=dict)
    weights: Mapping[int, str] = field(default_factory=dict)
    gradients: Mapping[int, str] = field(default_factory=dict)
    buffers: frozenset[int] = frozenset()
    bad: frozenset[int] | None = None

    @classmethod
    def of(cls, models: Sequence[nn.Module]) -> Names:
        """Of these models; where two have the same thing, the name is the first's."""
        last_first = models[::-1]
        tensors = [(name, tensor) for model in last_first for name, tensor in tensors_of(model)]
        leaves = [(name, tensor) for name, tensor in tensors if tensor.is_leaf and tensor.grad is not None]
        waits = any(tensor.is_cuda for _, tensor in tensors)
        return cls(
            layers={id(module): name or MODEL_SITE for model in last_first for name, module in model.named_modules()},
            weights={memory_of(tensor): name for name, tensor in tensors},
            gradients={memory_of(found): name for name, leaf in leaves for found in readable(leaf.grad)},
            buffers=frozenset(
                memory_of(found) for model in models for buffer in model.buffers() for found in readable(buffer)
            ),
            bad=None if waits else frozenset(memory_of(tensor) for _, tensor in tensors if not is_finite(tensor)),
        )

    def see_what_was_reached(self, origins: Origins) -> None:
        """Tell each trail how far it came."""
        for memory, name in self.weights.items():
            trail = origins.trail(memory)
            if trail is None or (trail.made == "designed" and memory in self.buffers):
                continue  # a mask that the model keeps
            if self.bad is None or memory in self.bad:
                trail.reaches("weight", name)
        for memory, name in self.gradients.items():
            trail = origins.trail(memory)
            if trail is not None:
                trail.reaches("gradient", name)

    def layer(self, call: Call) -> str:
        """The layer that a call was made in; empty outside of any."""
        module = call.spot.module
        return "" if module is None else self.layers.get(id(module), type(module).__name__)

    def operand(self, values: Values, call: Call) -> Values:
        """An operand under the name of the weight that it is, if it is one."""
        weights = (self.weights.get(memory) for name, memory in call.memories if name == values.name)
        weight = next(weights, None)
        return values if weight is None else replace(values, name=f"{values.name} ({weight})")


def told(trail: Trail, call: Call, names: Names) -> Operation:
    """A trail's operation with all that the edit's end shows. call: its own."""
    return replace(
        trail.operation,
        module=names.layer(call),
        operands=tuple(names.operand(values, call) for values in trail.operation.operands),
        reach=trail.reach,
        reached=trail.reached,
        went_back=trail.went_back or call.backward,
        chain=tuple(
            Step(each.operator.full, names.layer(each), each.direction, place_of(each.spot)) for each in trail.chain
        ),
    )
