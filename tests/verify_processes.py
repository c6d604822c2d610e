"""Processes, memory and open files as Linux's /proc shows them to the verifier's tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def workers_of(parent: int) -> set[int]:
    """Returns the process ids of the workers that `parent` started."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
            above = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"spawn_main" in line and above == parent:
            found.add(int(entry.name))
    return found


def zombies_of(parent: int) -> int:
    """Number of children of `parent` that ended and were not reaped."""
    count = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, above = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        count += state == "Z" and int(above) == parent
    return count


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
