"""How much memory is free, and whether something fits in there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch

_GROUPS: Final = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""The limit of a control group and what of it is in use, as its two versions call them."""
_GB: Final = 1e9
_LEAST: Final = 0.01


def shortage(needed: Mapping[torch.device, int]) -> str | None:
    """Why there is no room for so many bytes more on each device; None where there is, or where nobody can tell."""
    for device, size in needed.items():
        free = free_memory(device)
        if free is not None and size > free:
            return f"it takes about {in_gb(size)} of memory ({device.type}), and {in_gb(free)} are free"
    return None


def in_gb(size: float) -> str:
    """``3.21 GB``."""
    return f"{size / _GB:.2f} GB" if size >= _LEAST * _GB else f"less than {_LEAST} GB"


def free_memory(device: torch.device) -> int | None:
    """The bytes that are free on a device; None where that can't be known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free: int = torch.cuda.mem_get_info(device)[0] + unused
        return free
    return min(_on_the_host(), default=None) if device.type == "cpu" else None


def _on_the_host() -> Iterator[int]:
    """What the kernel has left, and what each control group that this process is in leaves it."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
    root = Path("/sys/fs/cgroup")
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds not in {"", "memory"}:
            continue
        for top in {root / kinds / path.lstrip("/"), root / kinds}:  # in a container the path may be the host's
            for limit, used in _GROUPS:
                allowed, taken = _read(top / limit).strip(), _read(top / used).strip()
                if allowed.isdigit() and taken.isdigit():
                    yield max(0, int(allowed) - int(taken) + _reclaimed(top))


def _reclaimed(group: Path) -> int:
    """Of what a group uses: files that were read, which give way."""
    words = (line.split() for line in _read(group / "memory.stat").splitlines())
    return max((int(word[1]) for word in words if word[0] in {"inactive_file", "total_inactive_file"}), default=0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
