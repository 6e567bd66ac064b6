"""What others would have said of the same runs: an alarm's edit for each, scored as ours is.

**isfinite**: a watched weight or a logit of the canary is not finite, looked at after each edit.

**EMA z-score**, as ZClip has it (arXiv 2504.02507): (x − mean) / std of the logs of the update's norm and of the edit's
loss, upwards; both moments start from the first ``WARM_UP`` readings and then follow with a factor of 0.97.
**Page–Hinkley** on the same series: the sum of the amounts by which x, in standard deviations of the first ``WARM_UP``
readings, is above its running mean and half a deviation, less the least value of that sum. A reading that is not finite
is beyond every threshold; one of zero has no log, and is left out. Both thresholds are the lowest at which no more
than 2 % of the healthy tuning runs alarm.

**Debugger** (transformers' ``DebugUnderflowOverflow``) and **anomaly** (``torch.autograd.set_detect_anomaly``) are
live: the loop is gone through again, without our monitor, and each edit is carried out under them, with a forward of
the canary after it, as our monitor has one; the first edit in which they raise is their alarm. The debugger's
printed extremes are left out: they are slow, and it breaks at masks of booleans, which have no absolute values.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.debug_utils import DebugUnderflowOverflow, detect_overflow

from benchmarks.detection.judge import Seen
from benchmarks.detection.judged import Judged
from benchmarks.zoo import by_name
from benchmarks.zoo.runs import Case
from benchmarks.zoo.scenario import CarryOut, Loop, Step, watched

D = TypeVar("D", bound="Debugger")
WARM_UP: Final = 8
"""Readings, as many as our own baseline takes."""
FOLLOWS: Final = 0.97
LEAST_STD: Final = 0.05
"""Of a log: a series that stood still in the warm-up may move by some percent."""
MARGIN: Final = 0.5
FALSE_ALARMS: Final = 0.02

Score = Callable[[Sequence[float]], Iterator[float]]
"""From the readings of one series, logs or infinity, to one score each."""


def ema_z(readings: Sequence[float]) -> Iterator[float]:
    """Standard deviations above the moving mean; 0 in the warm-up."""
    mean, variance = _start(readings)
    for number, x in enumerate(readings):
        if not math.isfinite(x):
            yield math.inf
        elif number < WARM_UP:
            yield 0.0
        else:
            yield (x - mean) / max(math.sqrt(variance), LEAST_STD)
            variance = FOLLOWS * variance + (1.0 - FOLLOWS) * (x - mean) ** 2
            mean = FOLLOWS * mean + (1.0 - FOLLOWS) * x


def page_hinkley(readings: Sequence[float]) -> Iterator[float]:
    """How far the sum is above its least value; 0 in the warm-up."""
    mean, variance = _start(readings)
    unit = max(math.sqrt(variance), LEAST_STD)
    summed = least = 0.0
    for number, x in enumerate(readings):
        if not math.isfinite(x):
            yield math.inf
        elif number < WARM_UP:
            yield 0.0
        else:
            mean += (x - mean) / (number + 1)
            summed += (x - mean) / unit - MARGIN
            least = min(least, summed)
            yield summed - least


def _start(readings: Sequence[float]) -> tuple[float, float]:
    first = [x for x in readings[:WARM_UP] if math.isfinite(x)]
    return (float(np.mean(first)), float(np.var(first))) if first else (0.0, 0.0)


OFFLINE: Final[dict[str, Score]] = {"ema_z_score": ema_z, "page_hinkley": page_hinkley}


def scores(seen: Seen, score: Score) -> list[float]:
    """The higher one of both series' scores, for each edit."""
    found = [-math.inf] * len(seen.norms)
    for series in (seen.norms, seen.losses):
        taken = [(place, _log(value)) for place, value in enumerate(series) if value is not None and value != 0]
        for (place, _), one in zip(taken, score([x for _, x in taken]), strict=True):
            found[place] = max(found[place], one)
    return found


def _log(value: float) -> float:
    return math.log(value) if 0 < value < math.inf else math.inf


def threshold(healthy: Sequence[Seen], score: Score) -> float:
    """The lowest at which no more than 2 % of these alarm; none is healthy: infinite."""
    peaks = sorted((max(scores(seen, score), default=-math.inf) for seen in healthy), reverse=True)
    return peaks[int(FALSE_ALARMS * len(peaks))] if peaks else math.inf


def alarmed(seen: Seen, score: Score, above: float) -> Judged:
    """The run with the alarm that this score raises, which is above the threshold or infinite."""
    found = enumerate(scores(seen, score), start=1)
    return replace(seen.judged, alarm=next((edit for edit, one in found if one > above or one == math.inf), None))


def isfinite(seen: Seen) -> Judged:
    """The run with the alarm that a look at every value raises."""
    return replace(seen.judged, alarm=seen.judged.nonfinite)


class _Raised(Exception):
    """A peer spoke: the loop need not go on."""

    def __init__(self, peer: str, edit: int) -> None:
        super().__init__(peer, edit)
        self.peer, self.edit = peer, edit


def live(case: Case) -> tuple[Case, dict[str, int | None]]:
    """The alarm of each live peer in one loop: the edit in which it raised.

    They watch together until one of them raises, which ends the loop; the other then watches another one, alone.
    """
    alarms: dict[str, int | None] = dict.fromkeys(LIVE)
    watching = set(LIVE)
    while watching:
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                watched(by_name(case[0]), case[1], partial(_under, peers=watching))
            break
        except _Raised as raised:
            alarms[raised.peer] = raised.edit
            watching.remove(raised.peer)
    return case, alarms


@contextmanager
def _under(loop: Loop, peers: Collection[str]) -> Iterator[CarryOut]:
    def carry_out(model: nn.Module, step: Step) -> nn.Module:
        try:
            with _watched_by(peers, model):
                model = step.apply(model)
            with _watched_by(peers, model), torch.no_grad():
                model(**loop.canary)
        except (RuntimeError, ValueError) as error:
            for peer in peers:
                if LIVE[peer][1] in str(error):
                    raise _Raised(peer, loop.witness.edit) from error
            raise
        return model

    yield carry_out


@contextmanager
def _watched_by(peers: Collection[str], model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for peer in peers:
            stack.enter_context(LIVE[peer][0](model))
        yield


class Debugger(DebugUnderflowOverflow):
    """What it detects, without the extremes that it prints: these take most of its time."""

    def analyse_variable(self, var: Any, ctx: str) -> None:
        if torch.is_tensor(var) and detect_overflow(var, ctx):  # type: ignore[no-untyped-call]
            self.detected_overflow = True


@contextmanager
def debugging(model: nn.Module, debugger: Callable[[nn.Module], D]) -> Iterator[D]:
    """Watched by what this makes, whose hooks come off afterwards."""
    ours = debugger(model)
    try:
        yield ours
    finally:  # it throws the handles away
        for module in model.modules():
            hooks = [key for key, hook in module._forward_hooks.items() if getattr(hook, "__self__", None) is ours]
            for key in hooks:
                del module._forward_hooks[key]


def _anomaly(model: nn.Module) -> AbstractContextManager[None]:
    return torch.autograd.set_detect_anomaly(True)


LIVE: Final[dict[str, tuple[Callable[[nn.Module], AbstractContextManager[object]], str]]] = {
    "transformers_debugger": (lambda model: debugging(model, Debugger), "DebugUnderflowOverflow: inf/nan"),
    "detect_anomaly": (_anomaly, "returned nan values"),
}
"""What is entered around an edit, and the words by which its own exceptions are known."""
