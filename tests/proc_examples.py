"""Processes, memory and open files as Linux's /proc shows them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def children_of(parent: int) -> dict[int, tuple[str, bytes]]:
    """Process id -> (state, command line) of the processes that `parent` started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            state, above = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(above) == parent:
            found[int(entry.name)] = (state, command)
    return found


def workers_of(parent: int) -> set[int]:
    """Process ids of the workers that `parent` started."""
    return {pid for pid, (_, command) in children_of(parent).items() if b"spawn_main" in command}


def zombies_of(parent: int) -> int:
    """Number of children of `parent` that ended and were not reaped."""
    return sum(state == "Z" for state, _ in children_of(parent).values())


def is_running(pid: int) -> bool:
    """Returns whether the process computes; an orphan that ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def memory_kb(process: int, field: str) -> int:
    """`VmRSS` (now) or `VmPeak` (address space, at most) of a process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Returns whether `holds` became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.02)
    return False
