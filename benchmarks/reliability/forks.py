"""Processes that may be killed, hang or crash: forked from one that has imported all there is, in milliseconds each.

    with Forks() as forks:
        ended = forks.run("benchmarks.reliability.lost_loops:loop", {"run": "…"}, kill_after=0.2)

The process that is forked from has no threads, unlike the one that asks, which draws a progress bar.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

Say = Callable[[str], None]
Task = Callable[..., None]
"""Takes `say`, by which it tells what it has done, and its arguments by name."""

LONGEST: Final = 600.0
_ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a process ended. said: its lines. by: the signal that ended it, or 0. code: its exit code, or what it
    raised. silent: seconds for which it said nothing when it was ended for that, but for those in which it waited for a
    core. peak_mb: of its resident memory.
    """

    said: tuple[str, ...]
    by: int
    code: int
    error: str
    silent: float
    peak_mb: float


class Forks:
    """A server of such processes, one at a time."""

    def __enter__(self) -> Forks:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reliability.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what the monitors of broken loops say, hundreds of times
            text=True,
            cwd=_ROOT,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def run(
        self,
        task: str,
        arguments: Mapping[str, Any],
        *,
        kill_after: float | None = None,
        most_silent: float = LONGEST,
    ) -> Ended:
        """task: ``module:function``. kill_after: seconds, by SIGKILL. most_silent: seconds without a word that are
        borne.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"task": task, "arguments": dict(arguments), "kill_after": kill_after, "most_silent": most_silent}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError("the process that forks has ended")
        plain = json.loads(answer)
        return Ended(**{**plain, "said": tuple(plain["said"])})


def waited_for_a_core(process: int | str = "self") -> float:
    """Seconds for which a process could have run and others did; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _child(task: str, arguments: Mapping[str, Any], into: int) -> None:
    """Never returns."""
    code = 0
    try:
        module, _, name = task.partition(":")
        function: Task = getattr(importlib.import_module(module), name)
        function(lambda text: os.write(into, f"{text}\n".encode()), **arguments)
    except BaseException:
        code = 70
        os.write(into, f"!{traceback.format_exc()[-2_000:]!r}\n".encode())
    os._exit(code)


def _run(job: Mapping[str, Any]) -> Ended:
    sees, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(sees)
        _child(job["task"], job["arguments"], into)
    os.close(into)
    began = heard = time.monotonic()
    ends = None if job["kill_after"] is None else began + job["kill_after"]
    told, silent, waited = b"", 0.0, waited_for_a_core(pid)
    while True:
        allowed = heard + job["most_silent"] + waited_for_a_core(pid) - waited
        until = allowed if ends is None else min(ends, allowed)
        ready, _, _ = select.select([sees], [], [], max(0.0, until - time.monotonic()))
        if ready:
            piece = os.read(sees, 1 << 16)
            heard, waited = time.monotonic(), waited_for_a_core(pid)
            told += piece
            if not piece:
                break
        late = ends is not None and time.monotonic() >= ends
        quiet = time.monotonic() - heard - (waited_for_a_core(pid) - waited)
        if late or (not ready and quiet >= job["most_silent"]):
            silent = 0.0 if late else quiet
            os.kill(pid, signal.SIGKILL)
            while piece := os.read(sees, 1 << 16):
                told += piece
            break
    os.close(sees)
    _, status, usage = os.wait4(pid, 0)
    lines = told.decode(errors="replace").splitlines()
    errors = [line[1:] for line in lines if line.startswith("!")]
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    said = tuple(line for line in lines if not line.startswith("!"))
    return Ended(said, by, code, errors[0] if errors else "", silent, usage.ru_maxrss / 1024)


def serve() -> None:
    """Jobs in, a line each; answers out."""
    out = os.fdopen(os.dup(1), "w")
    sys.stdout.flush()
    os.dup2(2, 1)  # what a child prints is no answer
    import torch

    import stabilitylab as sl
    from stabilitylab.watching import attaching  # noqa: F401 - before the first fork

    torch.set_num_threads(1)
    assert sl.attach is not None
    for line in sys.stdin:
        out.write(json.dumps(asdict(_run(json.loads(line)))) + "\n")
        out.flush()


if __name__ == "__main__":
    serve()
