"""Whether all processes are at the same place of the loop, asked before they exchange anything.

An exchange is a collective: a process that skips it leaves the others in it until their group's timeout, or meets them
there with a collective of the loop's own. So each says by the store of ``torch.distributed`` where it is, and goes on
when all others have said the same. That is no collective, and nobody waits for one that has left.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from stabilitylab.watching.one_hook import logger

MUST_COME: Final = timedelta(minutes=5)
"""How long a process is waited for, which may have something to do alone, such as saving the model. At most half of its
group's timeout: the loop's own collectives wait meanwhile, and must not end by that.
"""
AT_THE_END: Final = timedelta(seconds=60)
"""The same where the run ends, and only what became of its last edit is still to be told."""
SAID_AFTER: Final = timedelta(seconds=10)
"""How long one is waited for in silence."""
_LONGEST_SLEEP_SECONDS: Final = 0.02
_EXPECTED: Final = "; expected monitor.edit on each process that the weights are spread over, as often on each"
_FAILED: Final = "failed"
_GO: Final = "go"

_met: Counter[tuple[int, ...]] = Counter()


class Rendezvous:
    """Of the processes that exchange figures; made by each of them, at the same place of one program."""

    def __init__(self, store: Any, rank: int, ranks: Sequence[int], timeout: timedelta) -> None:
        """ranks: of all of them. timeout: of their group."""
        self._store, self._rank, self._ranks = store, rank, tuple(ranks)
        self._longest = timeout / 2
        _met[self._ranks] += 1
        self._name = f"stabilitylab/exchange/{'-'.join(map(str, self._ranks))}/{_met[self._ranks]}"
        self._count = self._read = 0
        self._left = False

    def leaves(self) -> None:
        """This process will come no more. Once."""
        if not self._left:
            self._left = True
            self._store.set(f"{self._name}/left/{self._rank}", "")

    def stays_away(self) -> None:
        """This process does not come this time, since its edit has failed: nobody is waited for."""
        self._say(_FAILED)

    def all_at(self, place: str, figures: int, patience: timedelta) -> bool:
        """Wait for all others. Returns whether all are there; not, where one stays away this time.

        place: as in "the end of edit 5". figures: how many it has to tell; so many must all, since what differs in
        length ends a process, in gloo. patience: how long it waits, or half of the group's timeout. Raises RuntimeError
        where one is elsewhere, or does not come: in each of them then, from now on.
        """
        mine = f"{place} with {figures} figures"
        self._say(mine)
        keys = {rank: self._key(self._count, rank) for rank in self._ranks}
        why = self._wait(keys, place, min(patience, self._longest))
        # Whoever decides first decides for all: nobody may go into the exchange while another one gives up.
        verdict = self._store.compare_set(self._key(self._count, "decided"), "", why or _GO).decode()
        if verdict != _GO:
            self._stop(verdict)
        said = {rank: self._store.get(key).decode() for rank, key in keys.items()}
        self._forget()
        if _FAILED in said.values():
            return False
        for rank, theirs in said.items():
            if theirs != mine:
                self._stop(f"process {self._rank} is at {mine}, process {rank} at {theirs}")
        return True

    def _key(self, count: int, what: object) -> str:
        return f"{self._name}/{count}/{what}"

    def _say(self, place: str) -> None:
        self._count += 1
        self._store.set(self._key(self._count, self._rank), place)

    def _forget(self) -> None:
        """What was said before: whoever is here has read it."""
        for count in range(max(self._read, 1), self._count):
            self._store.delete_key(self._key(count, self._rank))
            if self._rank == self._ranks[0]:
                self._store.delete_key(self._key(count, "decided"))
        self._read = self._count

    def _wait(self, keys: Mapping[int, str], place: str, patience: timedelta) -> str:
        """Until all are there, or there is a reason to wait no longer, which is returned."""
        # By looking, not by the store's own waiting: that holds the store, and warns on stderr each time.
        began, told, sleep = time.monotonic(), False, 1e-4
        while not self._store.check(list(keys.values())):
            time.sleep(sleep)
            sleep = min(2 * sleep, _LONGEST_SLEEP_SECONDS)
            if sleep < _LONGEST_SLEEP_SECONDS:
                continue
            missing = [rank for rank, key in keys.items() if not self._store.check([key])]
            gone = [rank for rank in missing if self._store.check([f"{self._name}/left/{rank}"])]
            waited = timedelta(seconds=time.monotonic() - began)
            if gone:
                return f"{_named(gone)} left the loop before {place}"
            if missing and waited >= patience:
                return f"{_named(missing)} did not come to {place} within {patience.total_seconds():g} s"
            if missing and waited >= SAID_AFTER and not told:
                told = True
                logger.warning("stabilitylab: waiting for %s at %s%s", _named(missing), place, _EXPECTED)
        return ""

    def _stop(self, why: str) -> None:
        self.leaves()
        raise RuntimeError(why + _EXPECTED)


def _named(ranks: Sequence[int]) -> str:
    """As in "processes 1 and 3"."""
    names = [str(rank) for rank in ranks]
    return f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(names[:-1])} and {names[-1]}"
