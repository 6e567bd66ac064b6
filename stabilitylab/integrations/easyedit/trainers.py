"""EasyEdit's trainers of hypernetworks: ``EditTrainer`` and ``MultimodalTrainer``, for MEND, MALMEN and SERAC.

One step of training is one edit, of the hypernetwork. Its weights are watched where the optimizer holds them, and so
are the layers of the model that it learns to edit: MALMEN moves those and takes the same off again in every step.
Before a hypernetwork is saved, what its statistics would do is said.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn

from stabilitylab.integrations.easyedit.layers import edited_layers
from stabilitylab.integrations.easyedit.patching import replaced
from stabilitylab.watching.attaching import attach
from stabilitylab.watching.monitor import Monitor
from stabilitylab.watching.sites import Patterns, all_sites

_SAVES: Final = "save_state"
_LEAST: Final = 2
"""Rows and columns of a matrix that is a weight: what has one is a learning rate, a bias or a scale by another name."""


def is_trainer(host: object) -> bool:
    """Whether it is one of EasyEdit's trainers."""
    return inspect.ismethod(getattr(host, "train_step", None)) and isinstance(getattr(host, "model", None), nn.Module)


@contextlib.contextmanager
def watch_trainer(
    trainer: Any, sites: Patterns | None, run: str | Path | None, options: Mapping[str, Any]
) -> Iterator[Monitor]:
    """See `stabilitylab.integrations.easyedit.watch`. options: the further arguments of `attach`."""
    learner = trainer.model
    if sites is None:
        sites = _trained(trainer)
    with contextlib.ExitStack() as stack:
        monitor = stack.enter_context(attach(learner, sites, run, editor=learner, **options))

        def label(*_: Any, **__: Any) -> str:
            return f"step {getattr(trainer, 'global_iter', monitor.edits + 1)}"

        step = monitor.wrap(trainer.train_step, label=label)
        stack.enter_context(replaced(trainer, "train_step", step))
        if _trains_itself(learner):
            stack.enter_context(replaced(learner, "train", _watched_train(learner.train, monitor, label)))
        if inspect.ismethod(getattr(trainer, _SAVES, None)):
            stack.enter_context(replaced(trainer, _SAVES, _watched_saving(getattr(trainer, _SAVES), monitor)))
        yield monitor


def _trained(trainer: Any) -> list[str] | None:
    """The matrices that the optimizers hold, and the layers that the hypernetwork learns to edit, as the learner names
    them; None where none is found.
    """
    learner = trainer.model
    optimizers = [getattr(holder, name, None) for holder in (trainer, learner) for name in ("opt", "lr_opt")]
    held = {
        id(parameter)
        for optimizer in optimizers
        for group in getattr(optimizer, "param_groups", ())
        for parameter in group["params"]
    }
    offered = all_sites(learner)
    names = {id(parameter): name for name, parameter in learner.named_parameters() if _is_matrix(parameter)}
    by_parameter = {site.parameter: site.name for site in offered.values()}
    found = [by_parameter[name] for key, name in names.items() if key in held and name in by_parameter]
    base = getattr(learner, "model", None)
    if isinstance(base, nn.Module):
        found += [f"model.{name}" for name in edited_layers(getattr(learner, "config", None), base) or []]
    return [name for name in dict.fromkeys(found) if name in offered] or None


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() >= _LEAST and min(parameter.shape) >= _LEAST


def _trains_itself(learner: nn.Module) -> bool:
    """MALMEN's ``train`` takes a list of batches and makes a step; every other module's sets a mode."""
    return type(learner).train is not nn.Module.train


def _watched_train(original: Callable[..., Any], monitor: Monitor, label: Callable[..., str]) -> Callable[..., Any]:
    stepping = monitor.wrap(original, label=label)

    @functools.wraps(original)
    def train(*args: Any, **kwargs: Any) -> Any:
        sets_a_mode = not args or isinstance(args[0], bool)
        return original(*args, **kwargs) if sets_a_mode else stepping(*args, **kwargs)

    return train


def _watched_saving(original: Callable[..., Any], monitor: Monitor) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        monitor.inspect_editor()
        return original(*args, **kwargs)

    return save
