"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the way to go on printed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.parallel.world import World


class StopRequest:
    """Set by the first signal; the second one interrupts at once."""

    def __init__(self, *, prints: bool = True) -> None:
        self.signal: str | None = None
        self._prints = prints

    def agreed(self, world: World) -> str | None:
        """Returns the signal that any rank has received, equal in all ranks; every rank has to call it."""
        return next((name for name in world.gather(self.signal) if name is not None), None)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if self._prints:
            # A step may take minutes. os.write, since a handler may run in the middle of another print.
            os.write(2, b"\nfinishing this step, then saving; press again to stop at once\n")


@contextmanager
def stop_on_signals(*, prints: bool = True) -> Iterator[StopRequest]:
    """Routes SIGINT and SIGTERM to a StopRequest for the block. Python allows it in the main thread only."""
    request = StopRequest(prints=prints)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
