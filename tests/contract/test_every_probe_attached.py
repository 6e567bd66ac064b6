"""What every probe promises once it is attached to a loop, found through the registry.

It changes nothing, says the same of the same loop, holds nothing when the run is closed, and no more after many edits
than after few.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.probes import ALL
from stabilitylab.probes.base import Probe
from stabilitylab.probes.feedback import FeedbackShare
from tests.loops import hooks_on
from tests.probed_loops import LOOPS, Ran, ran, same


def with_followed(probe: type[Probe[Any]]) -> list[Probe[Any]]:
    """It at each edit, and one probe for each metric that it follows."""
    followed = [other for other in ALL if {m.name for m in other.metrics} & set(probe.follows) and other is not probe]
    return [other(every=1) for other in (*followed, probe)]


EDITS = 2


@pytest.fixture(scope="module")
def unwatched() -> dict[str, Ran]:
    return {name: ran(loop, EDITS) for name, loop in LOOPS.items()}


every_probe = pytest.mark.parametrize("probe", ALL, ids=lambda probe: probe.__name__)


def assert_untouched(plain: Ran, watched: Ran) -> None:
    for expected, found in zip(plain.computed, watched.computed, strict=True):
        assert all(same(one, other) for one, other in zip(expected, found, strict=True))
    assert all(map(torch.equal, plain.random, watched.random))
    assert plain.flags == watched.flags
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert same(one.grad, other.grad)
    assert hooks_on(watched.model) == 0
    assert torch._C._len_torch_function_stack() == 0


@every_probe
def test_it_is_inert_and_repeatable_and_reads_something(
    tmp_path: Path, unwatched: dict[str, Ran], probe: type[Probe[Any]]
) -> None:
    """Attached alone: what it needs is met without other probes."""
    read: set[str] = set()
    for name, loop in LOOPS.items():
        folders = tmp_path / name / "first", tmp_path / name / "second"
        for folder in folders:
            assert_untouched(unwatched[name], ran(loop, EDITS, folder, with_followed(probe)))
        first, second = map(sl.load, folders)
        off = [note.says for note in first.notes if note.kind == "probe-off"]
        if probe is FeedbackShare:  # only the loop over text has a loss, to run on the original weights
            off = [says for says in off if not says.startswith("feedback switched off: ValueError: the model's output")]
        assert not off
        for one, other in zip(first.edits, second.edits, strict=True):
            assert list(one.row.readings) == list(other.row.readings)
            for key, values in one.row.readings.items():
                np.testing.assert_array_equal(values, other.row.readings[key])
        read |= {metric.name for metric in probe.metrics if first.sites_of(metric.name)}
    assert read == {metric.name for metric in probe.metrics}


def all_at_once() -> list[Probe[Any]]:
    return [probe(every=1) for probe in ALL]


@pytest.mark.parametrize("name", LOOPS)
def test_nothing_is_held_after_close(tmp_path: Path, name: str) -> None:
    """Though the monitor itself is kept, for its diagnosis; and the last edit, for no reason."""
    loop = LOOPS[name]
    model, editor = loop.make(), loop.editor()
    options: dict[str, Any] = {"editor": editor, "canary": loop.canary, "probes": all_at_once()}
    monitor = sl.attach(model, loop.sites, tmp_path / "run", **options)
    for _ in range(2):
        with monitor.edit() as edit:
            loop.edit(model, editor, edit)
    monitor.close()
    kept = [*model.parameters(), *model.buffers(), *model.modules(), *vars(editor or SimpleNamespace()).values()]
    refs = [weakref.ref(thing) for thing in kept if not isinstance(thing, dict)]
    del model, editor, kept, options
    gc.collect()
    assert not [ref() for ref in refs if ref() is not None]
    assert (monitor.edits, edit.label) == (2, "")
    assert monitor.diagnosis().verdict


def live_bytes() -> int:
    gc.collect()
    # By exact type: torch keeps fake tensors, which have no storage, among its own.
    tensors = (thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", LOOPS)
def test_memory_does_not_grow_with_the_edits(tmp_path: Path, name: str) -> None:
    loop, held = LOOPS[name], {}
    model, editor = loop.make(), loop.editor()
    options: dict[str, Any] = {"editor": editor, "canary": loop.canary, "probes": all_at_once()}
    with sl.attach(model, loop.sites, tmp_path / "run", **options) as monitor:
        for at in range(1, 31):
            with monitor.edit() as edit:
                loop.edit(model, editor, edit)
            if at in (10, 30):
                held[at] = live_bytes()
    assert held[10] == held[30]
