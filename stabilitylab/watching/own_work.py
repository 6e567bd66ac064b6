"""Marks work of ours that runs inside a user's edit, so that our own tracer passes it by."""

from __future__ import annotations

import threading

import torch


class OwnWork(threading.local):
    """A context manager: work of ours runs in this thread inside of it. It may be entered again inside itself."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


OWN_WORK = OwnWork()


class OwnMode:
    """What a dispatch mode of ours is, besides being one."""


def is_under_a_mode_of_the_users() -> bool:
    """Whether a dispatch mode that is none of ours would see what is computed here."""
    modes = range(torch._C._len_torch_dispatch_stack())
    return any(not isinstance(torch._C._get_dispatch_stack_at(place), OwnMode) for place in modes)
