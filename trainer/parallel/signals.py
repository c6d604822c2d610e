"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the way to go on printed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.parallel.world import World


class StopSignal:
    """The first signal that any rank has received."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.received: list[str] = []
        """This rank's, at most one."""

    def __call__(self) -> str | None:
        """Returns the signal's name, equal in all ranks; every rank has to call it."""
        return next((name for names in self._world.gather(self.received) for name in names), None)


@contextmanager
def stop_on_signals(world: World) -> Iterator[StopSignal]:
    """Notes the first SIGINT or SIGTERM of the block; the second one interrupts at once.

    Python allows it in the main thread only.
    """
    stop = StopSignal(world)

    def receive(number: int, frame: FrameType | None) -> None:
        if stop.received:
            raise KeyboardInterrupt
        stop.received.append(signal.Signals(number).name)
        if world.is_main:
            # A step may take minutes. os.write, since a handler may run in the middle of another print.
            os.write(2, b"\nfinishing this step, then saving; press again to stop at once\n")

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
