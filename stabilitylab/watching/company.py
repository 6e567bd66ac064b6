"""Several processes that watch one loop: which of them writes the run, and whether all are there that must be.

They tell each other by the store of ``torch.distributed``, not by collectives: nobody waits for longer than is said
here.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from stabilitylab.errors import RunError, StabilityLabError, UsageError
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import Alarm, EditRow, Note, OutcomeKind

MUST_COME: Final = timedelta(seconds=60)
"""How long the processes that hold parts of one weight wait for each other."""
MAY_COME: Final = timedelta(seconds=10)
"""How long any other process waits for the first one to say what it writes."""

_attached: Counter[str] = Counter()


class Company:
    """The processes that attach at the same place of one program."""

    def __init__(self, store: Any, rank: int, ranks: tuple[int, ...], run: str | None, *, bound: bool) -> None:
        """ranks: of all of them. bound: whether each needs the others, since weights are spread over them."""
        self.rank, self.ranks, self.bound = rank, ranks, bound
        self._store, self._run = store, run
        # Apart: a model that is not spread may be watched by one process alone.
        kind = f"stabilitylab/{'spread' if bound else 'each'}/{'-'.join(map(str, ranks))}"
        _attached[kind] += 1
        _attached[f"{kind}/{run}"] += 1
        self._meeting = f"{kind}/{_attached[kind]}"
        self._record = f"{kind}/{_attached[f'{kind}/{run}']}/{run}"

    def writes(self) -> bool:
        """Whether this process is the one of those with this run that writes it: the first, if it is among them.

        Where they don't need each other, that is who opens it first; the others give the first process some time.
        """
        first = self.rank == self.ranks[0]
        if self.bound:
            return first
        if not first:
            with contextlib.suppress(RuntimeError):
                self._store.wait([self._meeting], MAY_COME)
        claims: int = self._store.add(f"{self._record}/claims", 1)
        if first:  # only now: the others are told that they may
            self._store.set(self._meeting, "")
        return claims == 1

    def says_what_is_whose(self) -> str:
        """Which readings are of all processes, and which of this one."""
        own = (
            f"outputs, logits, losses and what gradients' factors show (spectra, dead units) are of process {self.rank}"
        )
        if not self.bound:
            return f"process {self.rank} of {len(self.ranks)}: norms of gradients are those after an all-reduce; {own}"
        return (
            f"weights are spread over the processes {_listed(self.ranks)}: their norms, extremes, updates and drift, "
            f"and the norms of their gradients, are of the whole; {own}; cosines of gradients, feedback and "
            "what the dtype swallowed are not measured"
        )

    def meet(self, asked: Mapping[str, object]) -> None:
        """Wait for all others. asked: what this process would measure, as plain JSON.

        Raises UsageError where one does not come, or asks for something else.
        """
        mine = json.dumps({**asked, "run": self._run}, sort_keys=True)
        self._store.set(f"{self._meeting}/{self.rank}", mine)
        keys = {rank: f"{self._meeting}/{rank}" for rank in self.ranks}
        try:
            self._store.wait(list(keys.values()), MUST_COME)
        except RuntimeError as error:
            missing = [rank for rank, key in keys.items() if not self._store.check([key])]
            raise UsageError(
                f"weights of the model are spread over the processes {_listed(self.ranks)}, and {_listed(missing)} did "
                f"not attach within {MUST_COME.total_seconds():g} s; expected attach on each of them, at the same place"
            ) from error
        for rank, key in keys.items():
            theirs = json.loads(self._store.get(key))
            for name, value in json.loads(mine).items():
                if theirs[name] != value:
                    raise UsageError(
                        f"process {rank} attached with {name}={theirs[name]!r}, process {self.rank} with {value!r}; "
                        "expected the same on all processes that the weights are spread over"
                    )

    @contextlib.contextmanager
    def opening(self, folder: Path) -> Iterator[None]:
        """The run is opened inside, by the process that writes it: tell the others what became of it."""
        said = {"folder": str(folder), "error": ""}
        try:
            yield
        except StabilityLabError as error:
            said["error"] = str(error)
            raise
        finally:
            self._store.set(self._record, json.dumps(said))

    def opened(self) -> Path:
        """The folder that another process writes for this one too. Raises RunError where it could not be opened."""
        try:
            self._store.wait([self._record], MUST_COME)
        except RuntimeError as error:
            raise RunError(
                f"the process that writes the run {self._run or ''} did not say within {MUST_COME.total_seconds():g} s "
                "that it has opened it; expected attach to go through there"
            ) from error
        said = json.loads(self._store.get(self._record))
        if said["error"]:
            raise RunError(f"the process that writes the run could not open it: {said['error']}")
        return Path(said["folder"])


def company(run: str | Path | None, spread_over: Sequence[int]) -> Company | None:
    """The processes that this one attaches with; None where it is alone.

    spread_over: those that hold parts of watched weights, if any: they need each other. Else it is all of the program,
    each of which may attach or not.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    ranks = tuple(sorted(spread_over)) or tuple(range(dist.get_world_size()))
    if len(ranks) == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    given = None if run is None else str(run)
    return Company(store, dist.get_rank(), ranks, given, bound=bool(spread_over))


def _listed(ranks: Sequence[int]) -> str:
    named = [str(rank) for rank in ranks]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


class Unwritten:
    """The record of a process whose run another one writes: it keeps nothing."""

    def __init__(self, path: Path) -> None:
        """path: the run file that is written."""
        self.path = path

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Nothing here fails."""
        return contextlib.nullcontext()

    def append(self, row: EditRow) -> None:
        """Nothing, as all of these."""

    def append_dry(self, rows: Sequence[EditRow]) -> int:
        """How many would have been written."""
        return len(rows)

    def note(self, note: Note) -> None:
        """Nothing."""

    def operation(self, operation: Operation) -> None:
        """Nothing."""

    def set_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Nothing."""

    def outcome(self, edit: int, outcome: OutcomeKind) -> None:
        """Nothing."""

    def alarm(self, alarm: Alarm) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""
