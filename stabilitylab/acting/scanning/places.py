"""Which tensors of a model are going to be edited: by patterns, or by an editor's file of hyperparameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn

from stabilitylab.acting.scanning.opening import Entry, one_line, read_json
from stabilitylab.errors import SiteError, UsageError, did_you_mean, nearest
from stabilitylab.record.plain_files import read_text
from stabilitylab.watching.sites import Patterns, find_sites, locate

_TEMPLATES: Final = ("rewrite_module_tmp", "rewrite_module_tmps")
"""ROME, MEMIT and their kin: the layer's name, with ``{}`` for each of ``layers``."""
_NAMES: Final = ("inner_params",)
"""MEND, MALMEN, GRACE, WISE: the parameters by name."""
_MOST_BYTES: Final = 1 << 20
"""Of hyperparameters; reading YAML is slow."""
_MOST_NAMES: Final = 2_000
_LONGEST_NAME: Final = 500


def layer_of(name: str) -> str:
    """``model.layers.3.mlp.down_proj`` of ``model.layers.3.mlp.down_proj.weight``, and of what that is computed of."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0] or name


def of_live(model: nn.Module, entries: Sequence[Entry], patterns: Patterns) -> frozenset[str]:
    """The names of the tensors that the sites of a live model are, tied ones under the name that they are read by.

    Raises:
        SiteError: a pattern matches nothing.
    """
    read_as = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    found = {site: locate(model, site) for site in find_sites(model, patterns)}
    names = {read_as.get(id(at[1]), site.parameter) for site, at in found.items() if at is not None}
    return frozenset(entry.name for entry in entries if entry.name in names)


def matching(entries: Sequence[Entry], patterns: str | Sequence[str]) -> frozenset[str]:
    """The names of the tensors whose own or whose layer's name matches; of a layer its weight.

    Raises:
        SiteError: a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        chosen = {
            entry.name
            for entry in entries
            if fnmatch.fnmatchcase(entry.name, pattern)
            or (entry.name.endswith(".weight") and fnmatch.fnmatchcase(layer_of(entry.name), pattern))
        }
        if not chosen:
            raise SiteError(f"site pattern '{pattern}' matches no layer or tensor{_hint(entries, pattern)}")
        found |= chosen
    return frozenset(found)


def _hint(entries: Sequence[Entry], pattern: str) -> str:
    layers = [layer_of(entry.name) for entry in entries if entry.name.endswith(".weight")]
    alike = (
        nearest(pattern.rpartition(".")[2], {layer.rpartition(".")[2] for layer in layers}) if "*" in pattern else []
    )
    if alike:
        return f"; layers are named like {', '.join(repr(f'*.{name}') for name in sorted(alike))}"
    near = did_you_mean(pattern.replace("*", ""), layers)
    return near or (f"; the first layer is '{layers[0]}'" if layers else "")


def of_hparams(file: Path) -> tuple[str, ...]:
    """The names of the layers or parameters that a file of hyperparameters (EasyEdit's YAML, MEMIT's JSON) edits.

    Raises:
        UsageError: it can't be read, or names no layer.
    """
    held = read_json(file) if file.suffix == ".json" else _read_yaml(file)
    if not isinstance(held, dict):
        raise UsageError(f"{file} holds no hyperparameters; expected names with values")
    names = [name for key in _NAMES for name in _listed(held, key, file)]
    layers = _listed(held, "layers", file)
    for template in (each for key in _TEMPLATES for each in _listed(held, key, file)):
        names += [template.replace("{}", layer) for layer in layers] if "{}" in template else [template]
    if not names:
        expected = ", or ".join(("'inner_params'", "'layers' with 'rewrite_module_tmp'"))
        raise UsageError(f"{file} names no layer that is edited; expected {expected}")
    return tuple(dict.fromkeys(_plain(name) for name in names))


def _plain(name: str) -> str:
    """``layers.27.mlp`` of ``layers[27].mlp``, as GRACE and WISE write it."""
    return name.replace("[", ".").replace("]", "")


def _listed(held: Mapping[Any, Any], key: str, file: Path) -> list[str]:
    """One name or number, or a list of such, as text. Raises UsageError for anything else."""
    value = held.get(key)
    listed = [] if value is None else value if isinstance(value, list) else [value]
    # What an alias stands for may be within itself, or so often within others that no one could write it out.
    if len(listed) > _MOST_NAMES or not all(isinstance(each, str | int | float) for each in listed):
        raise UsageError(f"{file}: expected a name in {key!r}, or a list of up to {_MOST_NAMES} names")
    return [str(each)[:_LONGEST_NAME] for each in listed]


def _read_yaml(file: Path) -> Mapping[str, Any] | Any:
    import yaml

    try:
        return yaml.safe_load(read_text(file, _MOST_BYTES))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"{file} can't be read as YAML: {one_line(error)}") from None


def named_in(entries: Sequence[Entry], names: Sequence[str], file: Path) -> frozenset[str]:
    """The tensors that names of `file` mean; the model's may have a prefix more, or less.

    Raises:
        UsageError: one means none.
    """
    found = set()
    for name in names:
        meant = [entry.name for entry in entries if _means(name, entry.name)]
        if not meant:
            near = did_you_mean(name, [layer_of(entry.name) for entry in entries])
            raise UsageError(f"{file} edits '{name}', which the model lacks; is it of another model?{near}")
        found.update(meant)
    return frozenset(found)


def _means(name: str, tensor: str) -> bool:
    for own in (tensor, layer_of(tensor) if tensor.endswith(".weight") else tensor):
        if own == name or own.endswith(f".{name}") or name.endswith(f".{own}"):
            return True
    return False
