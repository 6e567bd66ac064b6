"""Loaded by every Python that has this folder in PYTHONPATH: no socket but to this machine itself, and each try told.

Not part of the package around it: nothing but the standard library is imported, and the name is what Python looks for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_LOG = os.environ.get("STABILITYLAB_CONNECTIONS")
_OWN = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")
_EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}
"""Audited events, and where in their arguments the address stands."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _EVENTS:
        return
    address = arguments[_EVENTS[event]]
    host = address[0] if isinstance(address, tuple) and address else address
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    outside = isinstance(host, str) and not host.startswith(_OWN) and (isinstance(address, tuple) or event[7] == "g")
    if not outside or not host or host in _names():
        return
    with open(str(_LOG), "a") as log:
        log.write(f"{event} {host} from {' '.join(sys.argv)[:200]!r}\n")
    raise ConnectionRefusedError(f"{event} to {host}: forbidden here")


def _names() -> set[str]:
    """What this machine calls itself."""
    return {os.uname().nodename} if hasattr(os, "uname") else set()


if _LOG:
    sys.addaudithook(_audit)
