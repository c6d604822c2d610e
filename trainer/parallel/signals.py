"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the way to go on printed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from trainer.parallel.world import World


class StopRequest:
    """Set by the first signal; the second one interrupts at once."""

    def __init__(self, *, prints: bool = True) -> None:
        self.signal: str | None = None
        self._prints = prints

    def agreed(self, world: World) -> str | None:
        """The signal that any rank has received, the same in all ranks; every rank has to call it."""
        return next((signal for signal in world.gather(self.signal) if signal is not None), None)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if self._prints:
            # A step may take minutes. os.write, since a handler may run in the middle of another print.
            os.write(2, b"\nfinishing this step, then saving; press again to stop at once\n")


@contextmanager
def stop_on_signals(*, prints: bool = True) -> Iterator[StopRequest]:
    """Routes SIGINT and SIGTERM to a StopRequest for the block; outside the main thread it never fires."""
    request = StopRequest(prints=prints)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {
        number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
