"""What an edit is compared with: our tiers, the floor of any exact method, and other tools on the same edit."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import stabilitylab as sl
from benchmarks.workloads import Subject
from stabilitylab.acting.schedule import VARIABLE, Trace
from stabilitylab.probes.base import DEEP_EVERY, Tier
from stabilitylab.probes.native_scan import sweep
from stabilitylab.watching.budget import CADENCES, CHEAP, DEFAULT_SHARE, FIRST
from stabilitylab.watching.monitor import Monitor

Action = Callable[[], object]
"""One edit, watched in some way."""

_CHUNK = 262_144  # entries: 1 MiB of float32


@dataclass(frozen=True)
class Variant:
    """make: from a subject of its own and a new folder, the watched edit; what it opens is closed by the stack.

    rounds: it takes part in the first so many, and needs no more: where the ratio is 2, nobody asks for 1%.
    cycle: edits that make one pair. label: its name in tables. ours: a failure is the workload's, not a peer's.
    """

    name: str
    make: Callable[[Subject, Path, ExitStack], Action]
    rounds: int = 1_000_000
    cycle: int = 1
    label: str = ""
    ours: bool = True


def _plain(subject: Subject, folder: Path, stack: ExitStack) -> Action:
    return subject.round


def _watched(
    tier: Tier | None,
    with_canary: bool,
    subject: Subject,
    folder: Path,
    stack: ExitStack,
    *,
    trace: Trace = False,
    ranges: bool = False,
    budget: float | None = None,
) -> Action:
    """tier: None for a monitor that measures nothing. trace: as for `attach`, whose own "auto" may keep the tracer on,
    which is a line of its own. ranges: the tracer as the environment asks for it, in full.
    budget: as for `attach`; with one, the edits are made first that show what probes cost, and set the cadence.
    """
    probes: Tier | tuple[()] = () if tier is None else tier
    canary = subject.canary if with_canary else None
    options = {"probes": probes, "canary": canary, "trace": trace, "budget": budget}
    with _environment(VARIABLE, "all") if ranges else contextlib.nullcontext():
        _, edit = stack.enter_context(watching(subject, folder, **options))
    for _ in range(0 if budget is None else FIRST + CHEAP):
        edit()
    return edit


@contextlib.contextmanager
def watching(subject: Subject, folder: Path, **options: Any) -> Iterator[tuple[Monitor, Action]]:
    """The monitor of a subject, and its round watched. options: as for `attach`."""
    if subject.host is not None:
        with subject.host(run=folder, sites=subject.sites, **options) as monitor:
            yield monitor, subject.round
        return
    with sl.attach(subject.model, subject.sites, folder, editor=subject.editor, **options) as monitor:

        def edit() -> None:
            with monitor.edit():
                subject.edit()
            subject.evaluate()

        yield monitor, edit


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _floor(subject: Subject, folder: Path, stack: ExitStack) -> Action:
    """‖W‖, ‖W − W₀‖, ‖W − W₋‖, extremes and a new W₋ of each edited weight, in one sweep: the memory traffic that no
    exact method can avoid. In plain torch, ‖W − W₋‖ and W₋ alone, where there is no native code.
    """
    weights = [weight.detach() for weight in subject.weights.values()]
    references = [(weight.clone(), weight.clone()) for weight in weights]

    def edit() -> None:
        subject.round()
        for weight, pair in zip(weights, references, strict=True):
            if sweep(weight, pair, _CHUNK) is None:
                torch.linalg.vector_norm(weight - pair[1])
                pair[1].copy_(weight)

    return edit


def _set_detect_anomaly(subject: Subject, folder: Path, stack: ExitStack) -> Action:
    def edit() -> None:
        with torch.autograd.set_detect_anomaly(True):
            subject.round()

    return edit


def _debug_underflow_overflow(subject: Subject, folder: Path, stack: ExitStack) -> Action:
    """transformers' debugger, silenced. Its hooks never come off: the subject is of no other use afterwards."""
    from transformers.debug_utils import DebugUnderflowOverflow

    with contextlib.redirect_stdout(io.StringIO()):
        DebugUnderflowOverflow(subject.model)  # type: ignore[no-untyped-call]

    def edit() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            subject.round()

    return edit


def _tensorboard_histograms(subject: Subject, folder: Path, stack: ExitStack) -> Action:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    stack.callback(writer.close)

    def edit() -> None:
        gradients = subject.round()
        for (name, weight), gradient in zip(subject.weights.items(), gradients, strict=True):
            writer.add_histogram(f"{name}.weight", weight)
            writer.add_histogram(f"{name}.gradient", gradient)
        writer.flush()  # its thread would write while the next, plain edit is timed

    return edit


def _svdvals_loop(subject: Subject, folder: Path, stack: ExitStack) -> Action:
    """What people write by hand: a clone before, `.item()` of ‖ΔW‖ and the singular values of each gradient after."""
    weights = [weight.detach() for weight in subject.weights.values()]

    def edit() -> None:
        before = [weight.clone() for weight in weights]
        gradients = subject.round()
        for weight, last, gradient in zip(weights, before, gradients, strict=True):
            (weight - last).norm().item()
            torch.linalg.svdvals(gradient).max().item()

    return edit


def _wandb_watch(subject: Subject, folder: Path, stack: ExitStack) -> Action:
    """Weights & Biases, offline, on the edited layers. Its writer is another process, whose time is not counted."""
    import wandb  # type: ignore[import-not-found,unused-ignore]

    folder.mkdir()
    run = wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(console="off", silent=True))
    stack.callback(run.finish)
    layers = [subject.model.get_submodule(site) for site in subject.sites]
    run.watch(layers, log="all", log_freq=1)

    def edit() -> None:
        subject.round()
        run.log({"edited": 1})

    return edit


def _weightwatcher(subject: Subject, folder: Path, stack: ExitStack) -> Action:
    """WeightWatcher's analysis of the edited layers alone, after each edit; its chatter is silenced."""
    with contextlib.redirect_stdout(io.StringIO()):
        import weightwatcher  # type: ignore[import-untyped,import-not-found,unused-ignore]

        watcher = weightwatcher.WeightWatcher(model=subject.model)
        found = watcher.describe()
        layers = [int(row.layer_id) for row in found.itertuples() if row.longname in subject.sites]
    if len(layers) != len(subject.sites):
        raise LookupError(f"it found {len(layers)} of the {len(subject.sites)} edited layers")

    def edit() -> None:
        subject.round()
        with contextlib.redirect_stdout(io.StringIO()):
            watcher.analyze(layers=layers)

    return edit


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("a_a", _plain, label="a_a (plain to plain)"),
        Variant("light", partial(_watched, "light", False)),
        # Of up to 20 edits one is measured in full.
        Variant(
            "default",
            partial(_watched, "default", False, budget=DEFAULT_SHARE),
            rounds=6 * CADENCES[-1],
            cycle=CADENCES[-1],
            label=f"default ({CADENCES[-1]} edits a pair)",
        ),
        Variant("whole", partial(_watched, "default", False), label="default, budget=None"),
        # Its own probes run at each tenth edit: only a whole cycle holds their cost, a median of single edits never.
        Variant(
            "deep",
            partial(_watched, "deep", False),
            rounds=3 * DEEP_EVERY,
            cycle=DEEP_EVERY,
            label=f"deep ({DEEP_EVERY} edits a pair)",
        ),
        # The tracer, beside the same monitor without it: one that measures nothing, and one of the default tier.
        Variant("bare", partial(_watched, None, False), label="bare (a monitor without probes)"),
        Variant("bare_armed", partial(_watched, None, False, trace="armed"), label="bare, tracer armed"),
        Variant("bare_traced", partial(_watched, None, False, trace=True), label="bare, traced"),
        Variant("bare_ranges", partial(_watched, None, False, ranges=True), rounds=12, label="bare, traced in full"),
        Variant("traced", partial(_watched, "default", False, trace=True), label="… budget=None, traced"),
        Variant("canary", partial(_watched, "default", True), rounds=12, label="… budget=None, + canary"),
        # As `attach` has it: on where it is seen to cost little, else from the first unusual edit on.
        Variant(
            "tracer",
            partial(_watched, "default", False, trace="auto"),
            rounds=12,
            label="… budget=None, + tracer",
        ),
        Variant("floor", _floor, rounds=12, label="floor (one sweep)"),
        Variant("set_detect_anomaly", _set_detect_anomaly, rounds=12, ours=False),
        # Six pairs are the fewest whose extremes are a 95% interval of the median.
        Variant(
            "debug_underflow_overflow", _debug_underflow_overflow, rounds=6, label="DebugUnderflowOverflow", ours=False
        ),
        Variant("tensorboard_histograms", _tensorboard_histograms, rounds=6, ours=False),
        Variant("svdvals_loop", _svdvals_loop, rounds=6, ours=False),
        Variant("wandb_watch", _wandb_watch, rounds=6, ours=False),
        Variant("weightwatcher", _weightwatcher, rounds=6, ours=False),
    )
}
