"""Which layers and tensors are watched: names, patterns, orientation. Registers no hook.

A pattern is a shell pattern in which ``*`` crosses dots: ``"language_model.*.fc[12]"``. It is matched against module
names and parameter names. A module that owns a weight is a site under the module's name, and so is its parameter
``….weight``; any other parameter is a site under its own name. Of a pruned or parametrised layer it is the parameter
that the weight is computed of. A quantised layer whose weight is no parameter is one too, so that it can be named as
skipped. A layer that PEFT has put adapters on is a site with the weight that it computes with, also under the name that
it has in the model without PEFT.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stabilitylab.errors import SiteError, did_you_mean, nearest
from stabilitylab.probes.weight_pieces import InPieces
from stabilitylab.watching import adapted
from stabilitylab.watching.offloaded import values_of
from stabilitylab.watching.spread import is_managed, is_spread, parameters_at_rest

Patterns = str | Sequence[str]
Orientation = Literal["out_in", "in_out", "none"]

_MEASURED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)  # what quantised values are kept in; int64 is an index
_MATRIX = 2  # dimensions

_PARAMETRISED = re.compile(r"(?:^|\.)parametrizations\.[^.]+$")
"""Where ``torch.nn.utils.parametrize`` keeps what a layer's weight is computed of."""

_ONE = (str, nn.Module, Tensor)  # what may be iterable, and is one thing

_WRAPPED_LIMIT = 4  # an adapter that wraps a wrapped layer is found; a search of whole models is not wanted


@dataclass(frozen=True)
class Site:
    """A layer or tensor by name. It holds no tensor, so it outlives the model it was found in.

    parameter: the name of the watched tensor. shape, dtype: as found. orientation: ``out_in`` (Linear: the weight is
    [out, in]), ``in_out`` (GPT-2's Conv1D: [in, out]) or ``none`` (no matrix product with the input: weight and output
    are measured, gradient factors are not).
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    orientation: Orientation

    @functools.cached_property
    def module(self) -> str:
        """The name of the module that owns the tensor; of a parametrised layer the layer's."""
        owner = self.parameter.rpartition(".")[0]
        return owner[: place.start()] if (place := _PARAMETRISED.search(owner)) else owner

    @functools.cached_property
    def within(self) -> tuple[str, str]:
        """(where inside that module the tensor is held, its own name)."""
        inner, _, leaf = self.parameter[len(self.module) + bool(self.module) :].rpartition(".")
        return inner, leaf

    @property
    def is_layer(self) -> bool:
        """Whether the site is a whole layer rather than a single tensor such as a bias."""
        return self.name == self.module


def orientation_of(module: nn.Module) -> Orientation:
    """How a module's weight meets its input."""
    if isinstance(module, nn.Linear):
        return "out_in"
    # transformers.pytorch_utils.Conv1D, by name: no import of transformers. A parametrization makes a subclass.
    if any(each.__name__ == "Conv1D" for each in type(module).__mro__[:2]):
        return "in_out"
    return "none"


def _site_of_parameter(module: nn.Module, name: str, tensor: Tensor) -> Site:
    owner, _, leaf = name.rpartition(".")
    if leaf == "weight" and owner:
        return Site(owner, name, tuple(tensor.shape), tensor.dtype, orientation_of(module))
    # The weight itself is computed anew from this one, which is what an edit and an optimiser can move. What reaches it
    # of a gradient is not the product of the layer's input and δ.
    if leaf == "weight_orig" and owner and "weight_mask" in module._buffers:
        return Site(owner, name, tuple(tensor.shape), tensor.dtype, "none")
    if leaf == "original" and owner.endswith(".parametrizations.weight"):
        return Site(owner.removesuffix(".parametrizations.weight"), name, tuple(tensor.shape), tensor.dtype, "none")
    return Site(name, name, tuple(tensor.shape), tensor.dtype, "none")


def _packed_weight(module: nn.Module) -> tuple[str, Tensor] | None:
    """(name, values) of a quantised layer's weight where it is not a parameter ``weight``; None for other modules.

    GPTQ, AWQ and HQQ keep integers under names of their own, ``torch.ao`` has a method that unpacks the weight.
    """
    if isinstance(module, torch.jit.ScriptModule) or module._parameters.get("weight") is not None:
        return None
    if ".quantized." in type(module).__module__ and callable(getattr(type(module), "weight", None)):
        return "weight", module.weight()  # type: ignore[operator]
    if next(module.children(), None) is None:  # with children, it is a mask or a table of positions
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.dtype in _PACKED and tensor.dim() >= _MATRIX:
                return name, tensor
    return None


def all_sites(model: nn.Module) -> dict[str, Site]:
    """Every site that the model offers, by name, in the order in which the model registers its parameters."""
    offered: dict[str, Site] = {}
    made: set[str] = set()
    at_rest = parameters_at_rest(model)
    for owner, module in model.named_modules(remove_duplicate=False):
        if owner and adapted.is_adapted(module):
            made.add(owner)
            held = adapted.shape_of(module), adapted.dtype_of(module), orientation_of(adapted.base_of(module))
            offered[owner] = Site(owner, f"{owner}.weight", *held)
        if (copy := adapted.running(module)) is not module:
            for name, tensor in copy.named_parameters(owner, recurse=False):
                site = _site_of_parameter(copy, name, tensor)
                offered[site.name] = site
        for name, tensor in module.named_parameters(owner, recurse=False, remove_duplicate=False):
            leaf = name.rpartition(".")[2]
            site = _site_of_parameter(module, name, at_rest.get((id(module), leaf), tensor))
            if site.name in made:  # whose weight is made of this one and others
                site = Site(name, name, site.shape, site.dtype, "none")
            offered[site.name] = site
        packed = _packed_weight(module) if owner else None
        if packed is not None:
            leaf, values = packed
            offered[owner] = Site(owner, f"{owner}.{leaf}", tuple(values.shape), values.dtype, "none")
    return offered


def why_unmeasurable(tensor: Tensor) -> str | None:
    """The reason why the tensor's values can't be read, or None when they can."""
    if tensor.dtype not in _MEASURED:
        return f"its dtype is {_plain(tensor.dtype)}, not one of {', '.join(map(_plain, _MEASURED))} (quantised?)"
    if is_traceable_wrapper_subclass(tensor):
        return f"it is a {type(tensor).__name__}, whose values are not held in one plain tensor (quantised? sharded?)"
    if tensor.is_meta:
        return "its values are on the meta device (offloaded?): what an edit writes there is lost; load it to a device"
    if tensor.numel() == 0:
        return "it is empty"
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _matches(pattern: str, sites: Mapping[str, Site], parts: Mapping[str, str], prefix: str) -> list[Site]:
    """parts: where those that have adapters keep them. prefix: of all names of the model that a wrapper holds."""

    def matches(name: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removeprefix(prefix), pattern)

    found = [site for site in sites.values() if matches(site.name) or matches(site.parameter)]
    # The parts of a layer with adapters are meant only where it is not itself.
    whole = tuple(parts[site.name] for site in found if site.name in parts)
    return [site for site in found if not site.name.startswith(whole)]


def _such_as(sites: Mapping[str, Site]) -> str:
    first = next(iter(sites), None)
    return "" if first is None else f", such as '{first}'"


def _near_patterns(pattern: str, sites: Mapping[str, Site]) -> str:
    """``; did you mean '*.fc1' (12 layers)?``: patterns like the wrong one that lead somewhere."""
    layers = [site.name for site in sites.values() if site.is_layer]
    known = {part for name in layers for part in name.split(".")}
    stem, _, leaf = pattern.rpartition(".")
    leaves = {name.rpartition(".")[2] for name in layers}
    told = []
    for near in [leaf] if leaf in leaves or _has_wildcard(leaf) else sorted(nearest(leaf, leaves)):
        mended = ".".join(_known_part(part, known) for part in stem.split("."))
        for tried in (f"{stem}.{near}", f"{mended}.{near}", f"*.{near}", near):
            count = len(fnmatch.filter(layers, tried))
            if count:
                told.append(f"'{tried}' ({count} layer{'s' if count > 1 else ''})")
                break
    return f"; did you mean {', '.join(told)}?" if told else ""


def _known_part(part: str, known: Collection[str]) -> str:
    """A part of a pattern, or where no name has it, the most similar one that some name has."""
    if part in known or _has_wildcard(part):
        return part
    return next(iter(nearest(part, known, n=1)), part)


def _has_wildcard(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def _as_patterns(model: nn.Module, patterns: object) -> list[str]:
    """The patterns as a list. Raises SiteError for what is no text, with its name where it is a part of the model."""
    given = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, _ONE) else [patterns]
    for each in given:
        if isinstance(each, str):
            continue
        named = (*model.named_modules(), *model.named_parameters())
        own = next((name for name, part in named if part is each and name), None)
        such = f"'{own}', which is its name" if own else f"'{next(iter(all_sites(model)), '*')}'"
        raise SiteError(f"sites={_kind(each)} is no name; expected names of layers or patterns of them, such as {such}")
    return [each for each in given if isinstance(each, str)]


def _kind(thing: object) -> str:
    return f"<{type(thing).__name__}>"


def _no_match(pattern: str, model: nn.Module, sites: Mapping[str, Site]) -> SiteError:
    containers = [name for name, _ in model.named_modules() if name and fnmatch.fnmatchcase(name, pattern)]
    if containers:
        inside = next((name for name in sites if name.startswith(f"{containers[0]}.")), None)
        if inside:
            return SiteError(
                f"site pattern '{pattern}' matches '{containers[0]}', which has no weight of its own; "
                f"expected a layer, such as '{inside}'"
            )
        kind = type(model.get_submodule(containers[0])).__name__
        return SiteError(
            f"site pattern '{pattern}' matches '{containers[0]}', a {kind} that has no parameter (quantised?); "
            f"expected a layer with a weight{_such_as(sites)}"
        )
    hint = ("" if _has_wildcard(pattern) else did_you_mean(pattern, sites)) or _near_patterns(pattern, sites)
    some = next(iter(sites), None)
    fallback = f"; its first layer is '{some}'" if some else "; the model has no parameters"
    return SiteError(
        f"site pattern '{pattern}' matches no layer or parameter of {type(model).__name__}{hint or fallback}"
    )


def find_sites(model: nn.Module, patterns: Patterns) -> tuple[Site, ...]:
    """The sites that the patterns select, each once, in the order in which the model registers them.

    Raises SiteError for a pattern that matches nothing, naming the nearest layers.
    """
    offered = all_sites(model)
    chosen: set[str] = set()
    wanted = _as_patterns(model, patterns)
    if not wanted:
        raise SiteError(
            "no site pattern given; expected at least one, or sites=None to watch what the first edit moves"
        )
    parts = adapted.parts_of_layers(model)
    prefix = adapted.WRAPPER if adapted.is_wrapper(model) else ""
    for pattern in wanted:
        found = _matches(pattern, offered, parts, prefix)
        if not found:
            raise _no_match(pattern, model, offered)
        chosen.update(site.name for site in found)
    return tuple(site for site in offered.values() if site.name in chosen)


def _registered(module: nn.Module, leaf: str) -> object:
    found = module._parameters.get(leaf)
    return found if found is not None else module._buffers.get(leaf)


def _attribute(module: nn.Module, leaf: str) -> object:
    found = getattr(module, leaf, None)
    packed = _packed_weight(module) if callable(found) else None
    return found if packed is None else packed[1]


def _unwrapped(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor] | None:
    """The owner of a tensor `leaf` of this shape, and it: `module`, or the layer in an adapter that took its place.

    A layer that registers the tensor comes first: an adapter may show its layer's weight as a property of its own.
    """
    for read in (_registered, _attribute):
        queue: list[nn.Module] = [module]
        for _ in range(_WRAPPED_LIMIT):
            for candidate in queue:
                tensor = read(candidate, leaf)
                if isinstance(tensor, Tensor) and tuple(tensor.shape) == shape:
                    return candidate, tensor
            queue = [child for candidate in queue for child in candidate.children()]
    return None


def _registered_at(model: nn.Module, name: str) -> nn.Module | None:
    """The module at `name` if each step to it is a registered child: a fifth of the time that `get_submodule` takes."""
    found = model
    for step in name.split("."):
        children = found._modules  # a ScriptModule's have no `get`
        child = children[step] if step in children else None  # noqa: SIM401
        if child is None:
            return None
        found = child
    return found


def _by_name(model: nn.Module, name: str) -> nn.Module | None:
    """The module called `name`, or the one whose name ends in it: an editor may have wrapped the whole model."""
    try:
        # Direct: walking all modules of a model takes milliseconds.
        found = _registered_at(model, name)
        return model.get_submodule(name) if found is None else found
    except AttributeError:
        name = name.removeprefix(adapted.WRAPPER)  # its adapters may be merged, and gone
        named = model.named_modules(remove_duplicate=False)
        inner = [module for full, module in named if full == name or full.endswith(f".{name}")]
        return inner[0] if inner and all(module is inner[0] for module in inner) else None


def locate(model: nn.Module, site: Site) -> tuple[nn.Module, Tensor] | None:
    """The module and tensor that a site names in `model` as it is now, or None when they are gone.

    Found by name anew each time: an edit may swap a layer for an adapter, deep-copy it, or wrap the model. Of a weight
    that is offloaded these are the values that the next forward takes; of one that FSDP has gathered, as after a
    forward without a backward, it is what it is spread as.
    """
    found = _located(model, site)
    if found is None or is_spread(found[1]) or not is_managed(found[0]):
        return found
    return found[0], parameters_at_rest(model).get((id(found[0]), site.within[1]), found[1])


def _located(model: nn.Module, site: Site) -> tuple[nn.Module, Tensor] | None:
    """The same, as the module holds it now."""
    owner = _by_name(model, site.module) if site.module else model
    owner = None if owner is None else adapted.running(owner)
    inner, leaf = site.within
    if owner is not None and not inner and leaf == "weight" and adapted.is_adapted(owner):
        weight = adapted.base_weight(owner)
        return None if weight is None else (owner, weight)
    if owner is None or not inner:
        found = None if owner is None else _unwrapped(owner, leaf, site.shape)
        kept = None if found is None or not found[1].is_meta else values_of(found[0], leaf)
        return found if found is None or kept is None else (found[0], kept)
    holder = _by_name(owner, inner)
    tensor = None if holder is None else _registered(holder, leaf)
    return (owner, tensor) if isinstance(tensor, Tensor) and tuple(tensor.shape) == site.shape else None


def locate_readable(model: nn.Module, site: Site) -> tuple[nn.Module, Tensor] | None:
    """The same; None too when the values can't be read any more: quantised or offloaded since."""
    found = locate(model, site)
    return None if found is None or why_unmeasurable(found[1]) is not None else found


def weight_at(model: nn.Module, site: Site) -> Tensor | str:
    """The weight that counts at a site, with the adapters where it has some; else the reason why it can't be read."""
    return weight_in(model, locate(model, site))


def weight_in(model: nn.Module, found: tuple[nn.Module, Tensor] | None) -> Tensor | str:
    """The same of what `locate` found there."""
    if found is None:
        return f"no longer found in {type(model).__name__}"
    module, weight = found
    if adapted.is_made(module, weight) and not weight.is_meta:
        try:
            weight = adapted.effective_weight(module)
        except Exception as error:  # of PEFT, or of a kind of adapter that can't be merged
            return f"its adapters can't be merged ({type(error).__name__}: {error})"
    return why_unmeasurable(weight) or weight


def weight_to_pass(model: nn.Module, found: tuple[nn.Module, Tensor] | None) -> Tensor | InPieces | str:
    """The same, in pieces where it need not be made as a whole."""
    pieces = adapted.in_pieces(found[0]) if found is not None and adapted.is_adapted(found[0]) else None
    return weight_in(model, found) if pieces is None else pieces


def describe(sites: Iterable[Site]) -> dict[str, dict[str, object]]:
    """Shape, dtype and orientation of each site as plain JSON values, for the manifest."""
    return {
        site.name: {
            "shape": list(site.shape),
            "dtype": _plain(site.dtype),
            "kind": {"out_in": "linear", "in_out": "conv1d", "none": "tensor"}[site.orientation],
        }
        for site in sites
    }
