"""What the benchmarks share: a process for each way, and the memory that it takes."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from store.terminal.tables import plain_table

A = TypeVar("A")
T = TypeVar("T")

RETURNED_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": "4096",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
"""glibc gives freed tensors back at once, so that resident memory is what lives; it takes time."""


def alone(way: Callable[[A], T], argument: A, **environment: str) -> T:
    """`way(argument)` in a fresh process, so that its memory and caches are its own.

    Raises what `way` raises, and BrokenProcessPool for a process that dies, its own error on stderr.
    """
    before = dict(os.environ)
    os.environ |= environment
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(way, argument).result()
    finally:
        os.environ.clear()
        os.environ |= before


def ways_table(
    title: str, case: str, found: Mapping[str, Mapping[str, T]], figures: Mapping[str, Callable[[T], str]]
) -> Table:
    """A row for each way of each case. `case`: the head of their names; `figures`: the other heads."""
    drawn = plain_table(title)
    for name in (case, "way"):
        drawn.add_column(name, no_wrap=True)
    for name in figures:
        drawn.add_column(name, justify="right", no_wrap=True)
    for name, ways in found.items():
        for way, measured in ways.items():
            drawn.add_row(name, way, *(figure(measured) for figure in figures.values()))
    return drawn


class Peak:
    """The most memory beyond what was there when it began, in MiB."""

    mib: float = 0.0


@contextmanager
def peak_growth() -> Iterator[Peak]:
    """Of the accelerator where there is one, otherwise resident (Linux)."""
    import torch  # here, for a benchmark that measures what does without

    peak = Peak()
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
    before = _status("VmRSS")
    yield peak
    peak.mib = (_status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    """In KiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found.group(1))


def synchronize() -> None:
    """Waits for what a GPU still computes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of the values and the ends of its 95 % interval."""
    from trainer.evaluation import mean_with_interval

    found = mean_with_interval(values)
    if found.low is None or found.high is None:  # all are equal
        return found.value, found.value, found.value
    return found.value, found.low, found.high
