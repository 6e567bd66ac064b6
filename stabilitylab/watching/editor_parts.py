"""Where an editor keeps its state: found by the attributes that published editors have. Reads no value, hooks nothing.

| editor | where | attributes |
|---|---|---|
| MEND | a module of the editor | ``u_mean``, ``u_std``, ``v_mean``, ``v_std``, ``k``; ``edit_lrs`` |
| MALMEN | the same | ``n``, ``mean``, ``var``, ``std``, in one with ``key_size``; ``lr`` beside ``lamda`` |
| UltraEdit | the same | ``n``, ``mean``, ``var``, ``std`` |
| AlphaEdit | the editor, or the Python module that holds them | ``P``, ``cache_c`` |
| MEMIT, AlphaEdit | the same | ``COV_CACHE`` |
| GRACE | a module of the *model* | ``keys``, ``values``, ``epsilons`` |
| WISE | a module of the *model* | ``new_weight``, ``original_layer``, ``memory_weight`` |
| a loop in mixed precision | the editor | any ``torch.amp.GradScaler`` |
| any of these | a dict, as a loop keeps it in variables | the same names as keys |
| any | the editor | ``reports``, see `stabilitylab.watching.editor_report` |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabilitylab.errors import UsageError
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.walking import NamedModules, holding, named_modules_of

MEND_GUARD = 1e-7
"""What MEND adds to the std before it divides."""

_RUNNING = ("n", "mean", "var", "std")
_COUNTS = ("k", "rows")
"""What MEND's statistics are counted with: by the authors, and in this package."""
_MATRIX = 2  # dimensions
_SHOWN = 40


@dataclass(frozen=True)
class Statistics:
    """What one kind of input is normalised with: mean and std, [units].

    kind: ``u`` (a layer's inputs), ``v`` (gradients at its output), or empty for both in one. place: which tensor of
    the call it is. first: the unit of that tensor at which it begins. guard: what is added to the std. rows: the
    normaliser's own count of the rows that it has seen, one number; None where it keeps none. learns: whether the rows
    that enter become part of the statistics.
    """

    kind: str
    mean: Tensor
    std: Tensor
    place: int
    first: int
    guard: float
    rows: Tensor | None
    learns: bool
    paired: bool = False
    """Whether a row counts only where both tensors of the call have something: MEND leaves the others out."""

    def entered(self, calls: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, Tensor | None]]:
        """Its part, [..., units], of what the module was called with, and beside it what must have something in a row
        too, for that to count.
        """
        found = []
        for call in calls:
            if len(call) > self.place:
                whole, units = call[self.place], self.std.numel()
                is_whole = not self.first and whole.shape[-1] == units
                paired = self.paired and len(call) > 1 and call[0].shape[:-1] == call[1].shape[:-1]
                part = whole if is_whole else whole[..., self.first : self.first + units]
                found.append((part, call[1 - self.place] if paired else None))
        return found


@dataclass(frozen=True)
class Normaliser:
    """A module that normalises what enters a hypernetwork, and the statistics it uses."""

    module: nn.Module
    statistics: tuple[Statistics, ...]


@dataclass(frozen=True)
class Codebook:
    """GRACE's adapter around one layer: keys [n, inputs], values [n, outputs], radii ε [n]."""

    module: nn.Module
    keys: Tensor
    values: Tensor
    radii: Tensor

    @property
    def token(self) -> Tensor | int:
        """The position whose input is looked up; negative for the last."""
        token: Tensor | int = getattr(self.module, "key_id", -1)
        return token


@dataclass(frozen=True)
class SideMemory:
    """WISE's adapter around one layer.

    original: the layer's weight before any edit. sides: the weights that may answer in its place, of the same shape:
    the one in training, the one that was stored last, and the one that stored ones were merged into. stored: how many
    are stored.
    """

    original: Tensor
    sides: tuple[Tensor, ...]
    stored: int


class Named:
    """The state of an editor that a loop keeps in variables of its own, by name: what is put into the dict later, or
    bound anew, is seen too.
    """

    def __init__(self, state: dict[str, object]) -> None:
        self.__dict__ = state


def as_editor(given: object) -> object | None:
    """An editor as the rest of the package takes it: the object, the Python module, or a dict of its state.

    Raises:
        UsageError: it can't keep any state, such as the editor's name.
    """
    if isinstance(given, dict) and all(isinstance(name, str) for name in given):
        return Named(given)
    if isinstance(given, str | bytes | int | float | complex | Tensor | list | tuple | set | dict | type):
        kind = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise UsageError(
            f"editor={str(given)[:_SHOWN]!r} is {kind}; expected the editor itself, the Python module that holds its"
            " state, or a dict of it, such as {'P': P, 'cache_c': cache_c}"
        )
    return given


def find_scaler(editor: object | None) -> torch.amp.GradScaler | None:
    """The loss scaler that the editor holds, where it holds one."""
    held = getattr(editor, "__dict__", {}).values()
    return next((value for value in held if isinstance(value, torch.amp.GradScaler)), None)


def _modules_of(editor: object) -> dict[str, nn.Module]:
    """The modules of an editor: its own, or those in the attributes of an editor that is no module itself."""
    if isinstance(editor, nn.Module):
        return dict(named_modules_of(editor))
    met: set[nn.Module] = set()
    held = {name: value for name, value in getattr(editor, "__dict__", {}).items() if isinstance(value, nn.Module)}
    return {name: m for prefix, top in held.items() for name, m in named_modules_of(top, prefix, met)}


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """A tensor attribute of a module, without the cost of asking for one that it lacks."""
    for held in (module.__dict__, module._buffers, module._parameters):
        value = held.get(name)
        if isinstance(value, Tensor):
            return value
    return None


def _tensors(module: nn.Module, *names: str) -> tuple[Tensor, ...] | None:
    found = []
    for name in names:
        value = _tensor(module, name)
        if value is None:  # at the first one that is missing: this is asked of every module at every edit
            return None
        found.append(value)
    return tuple(found)


def _mend_statistics(module: nn.Module) -> tuple[Statistics, ...]:
    held = _tensors(module, "u_mean", "u_std", "v_mean", "v_std")
    if held is None or getattr(getattr(module, "cfg", None), "norm", True) is False:
        return ()  # without `norm` the buffers are never used, and stay NaN
    u_mean, u_std, v_mean, v_std = held
    rows = _count(next((found for name in _COUNTS if (found := _tensor(module, name)) is not None), None))
    # In training the authors' next forward takes its rows in; in evaluation nothing ever replaces what is there.
    learns = module.training and _tensor(module, "u_s") is not None
    return (
        Statistics("u", u_mean, u_std, 0, 0, MEND_GUARD, rows, learns, paired=True),
        Statistics("v", v_mean, v_std, 1, 0, MEND_GUARD, rows, learns, paired=True),
    )


def _count(held: Tensor | None) -> Tensor | None:
    return held if held is not None and held.numel() == 1 else None


def _running_statistics(module: nn.Module, owner: nn.Module | None) -> tuple[Statistics, ...]:
    held = _tensors(module, *_RUNNING)
    if held is None:
        return ()
    n, mean, _, std = (value.reshape(-1) for value in held)
    rows = _count(n)
    guard = torch.finfo(std.dtype).eps
    keys = getattr(owner, "key_size", None)
    if not isinstance(keys, int):
        return (Statistics("", mean, std, 0, 0, guard, rows, True),)
    return (
        Statistics("u", mean[:keys], std[:keys], 0, 0, guard, rows, True),
        Statistics("v", mean[keys:], std[keys:], 0, keys, guard, rows, True),
    )


def find_normalisers(editor: object) -> dict[str, Normaliser]:
    """The modules of an editor that normalise a hypernetwork's inputs, by name; those without a unit are left out."""
    modules = _modules_of(editor)
    found = {}
    # Asked of every module at every edit: most have neither.
    some = {name for attribute in ("u_mean", "var") for name, _ in holding(modules.items(), attribute)}
    for name in [name for name in modules if name in some]:
        module, owner = modules[name], modules.get(name.rpartition(".")[0])
        statistics = _mend_statistics(module) or _running_statistics(module, owner)
        used = tuple(kind for kind in statistics if kind.std.numel())
        if used:
            found[name] = Normaliser(module, used)
    return found


def find_learning_rates(editor: object) -> dict[str, Tensor]:
    """The learned edit learning rates, [layers] each: MEND's all under the empty name, MALMEN's by module."""
    modules = _modules_of(editor)
    for holder in (editor, *modules.values()):
        rates = getattr(holder, "edit_lrs", None)
        if isinstance(rates, Tensor):
            return {"": rates.detach().reshape(-1)}
        if isinstance(rates, nn.ParameterList | list | tuple) and len(rates):
            return {"": torch.stack([torch.as_tensor(rate).detach().reshape(()) for rate in rates])}
    found = {}
    for name, module in modules.items():
        held = module._modules.get("lr"), module._modules.get("lamda")
        rates = _tensor(held[0], "weight") if held[0] is not None and held[1] is not None else None
        if rates is not None and rates.numel():
            found[name] = rates.detach().reshape(-1)
    return found


def _layers(editor: object, attribute: str) -> Iterator[tuple[str, Tensor]]:
    """The square matrices of an attribute that holds one per layer, or a single one: name and [inputs, inputs]."""
    held = getattr(editor, attribute, None)
    if not isinstance(held, Tensor) or held.dim() < _MATRIX or held.numel() == 0 or held.shape[-1] != held.shape[-2]:
        return
    if held.dim() == _MATRIX:
        yield attribute, held
    else:
        yield from ((f"{attribute}.{layer}", matrix) for layer, matrix in enumerate(held.flatten(end_dim=-3)))


def find_projections(editor: object) -> dict[str, Tensor]:
    """AlphaEdit's projections onto the null space of the keys to preserve, ``P``: [inputs, inputs] by name."""
    return dict(_layers(editor, "P"))


def find_key_caches(editor: object) -> dict[str, Tensor]:
    """AlphaEdit's sums of k kᵀ over all keys edited so far, ``cache_c``: [inputs, inputs] by name."""
    return dict(_layers(editor, "cache_c"))


def find_covariances(editor: object) -> dict[str, Tensor]:
    """The covariances of keys that MEMIT caches, ``COV_CACHE``: [inputs, inputs] by layer."""
    cache = getattr(editor, "COV_CACHE", None)
    if not isinstance(cache, Mapping):
        return {}
    named = ((str(key[-1] if isinstance(key, tuple) and key else key), value) for key, value in cache.items())
    return {name: value for name, value in named if isinstance(value, Tensor) and value.numel()}


def find_reports(editor: object) -> dict[str, EditorReport]:
    """What the editor itself reports, by layer."""
    held = getattr(editor, "reports", None)
    if not isinstance(held, Mapping):
        return {}
    return {str(name): report for name, report in held.items() if isinstance(report, EditorReport)}


def codebook_of(module: nn.Module) -> Codebook | None:
    """The codebook of a module as it is now; None where it is no adapter of GRACE, or has not been given a key yet."""
    held = _tensors(module, "keys", "values", "epsilons")
    return None if held is None else Codebook(module, held[0], held[1], held[2].reshape(-1))


def find_codebooks(named: NamedModules) -> dict[str, Codebook]:
    """GRACE's adapters among a model's modules, by name; none before the first key was added."""
    return {name: book for name, module in holding(named, "keys") if (book := codebook_of(module)) is not None}


def find_side_memories(named: NamedModules) -> dict[str, SideMemory]:
    """WISE's adapters among a model's modules, by name."""
    found = {}
    for name, module in holding(named, "new_weight"):
        new, layer = _tensor(module, "new_weight"), module._modules.get("original_layer")
        original = _tensor(layer, "weight") if new is not None and layer is not None else None
        stored = module.__dict__.get("memory_weight")
        if new is None or original is None or original.numel() == 0 or not isinstance(stored, list):
            continue
        inner = module._modules.get("layer")
        merged = _tensor(inner, "weight") if inner is not None else None
        sides = [new, *stored[-1:], *([merged] if merged is not None else [])]
        fitting = tuple(side for side in sides if isinstance(side, Tensor) and side.shape == original.shape)
        found[name] = SideMemory(original, fitting, len(stored))
    return found
