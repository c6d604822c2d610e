"""The processes that train together, one a device, as `torchrun` starts them.

    torchrun --nproc-per-node 4 --no-python ampo train --config my.toml

Every process samples, asks and scores its share of a step's problems; then all know all groups, and each
takes its share of every mini-batch's sequences. Alone, nothing is ever sent and no process group exists.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.student.load import pick_device

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""A process may wait for another as long as the slowest sampling takes; who dies is noticed at once."""

FIRST_SPEAKS = 3.0
"""Seconds that the others leave to the first process to say what went wrong: mostly all of them know."""

WATCH_EVERY = 0.2
"""Seconds between two looks at whether another process has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """How many processes there are, and which one this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which one of its machine's."""
    scratch: list[Path] = field(default_factory=list, compare=False)
    """Folders that go when the processes leave, by whichever of them is left to remove them."""

    @property
    def is_main(self) -> bool:
        """The process that writes files and speaks to people."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """The process that does what one has to do on every machine."""
        return self.local_rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item, from this process's own place on."""
        return list(items[self.rank :: self.size])

    def gather(self, mine: T) -> list[T]:
        """[size], every process's value, in every process."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def merged(self, mine: Sequence[T]) -> list[T]:
        """The items of every process in the order that `share` dealt them out from."""
        shares = self.gather(list(mine))
        total = sum(len(share) for share in shares)
        return [shares[place % self.size][place // self.size] for place in range(total)]

    def barrier(self) -> None:
        """Returns when every process is here."""
        self.gather(None)

    def from_local_main(self, mine: T) -> T:
        """The value of the first process on this one's machine."""
        return self.gather(mine)[self.rank - self.local_rank]

    def from_main(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process; the others do not call `make`."""
        if self.size == 1:
            return make()
        found: list[Any] = [make() if self.is_main else None]
        dist.broadcast_object_list(found, src=0)
        value: T = found[0]
        return value


ALONE = World()


@contextmanager
def torchrun_world(device: str) -> Iterator[World]:
    """The world that `torchrun` made for the block; ALONE where it did not start this process.

    Where a process fails, all end: one says why, the others leave with exit code 1 and without a word.

    Args:
        device: `student.device`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_torchelastic_launched() or size == 1:
        yield ALONE
        return
    place = pick_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = World(rank=int(os.environ["RANK"]), size=size, local_rank=int(os.environ["LOCAL_RANK"]))
    with _process_group(place), _failing_together(world):
        yield world


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    on_cuda, ended_well = device.type == "cuda", False
    # Objects travel over gloo, which takes nothing of the device's memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield
        ended_well = True
    finally:
        # NCCL would wait for the others to end what was begun.
        if ended_well or not on_cuda:
            dist.destroy_process_group()


@contextmanager
def _failing_together(world: World) -> Iterator[None]:
    """Ends the others when the block fails here, and this process when it failed there.

    A process that waits for a dead one would wait for hours, or be told to stop by torchrun and take that for
    a person's wish to save and go.
    """
    board, failed = _board(), f"ampo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    threading.Thread(target=_leave_when_another_fails, args=(failed, world), daemon=True).start()
    try:
        yield
    except BaseException:
        # torchrun sends it as soon as another leaves: this one is leaving, and may have to say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not world.is_main:
            time.sleep(FIRST_SPEAKS)  # and most often never returns from it
        if board.compare_set(failed, "", str(world.rank)) != str(world.rank).encode():
            raise SystemExit(1) from None
        raise
    finally:
        _remove(world.scratch)


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _board() -> Any:
    """A connection of its own to torchrun's store: a shared one would wait for whoever uses it."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )


def _leave_when_another_fails(failed: str, world: World) -> None:
    try:
        board = _board()
        while not board.check([failed]):
            time.sleep(WATCH_EVERY)
        if board.get(failed) != str(world.rank).encode():
            _remove(world.scratch)
            # The main thread may be in a collective that never ends, so no exception would reach it.
            os._exit(1)
    except dist.DistError:
        return  # torchrun has gone, and its store with it
