"""The ranks that train together, one a device, as `torchrun` starts them.

    torchrun --nproc-per-node 4 --no-python ampo train --config my.toml

Every rank samples and guides its share of a step's problems. Then every rank has all groups, and trains on
its share of every mini-batch's sequences. A single process sends nothing and has no process group.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""A rank may wait for another as long as the slowest sampling takes; a dead one is noticed at once."""

RANK_0_FIRST = 10.0
"""Seconds that other ranks wait before they fail: rank 0 mostly fails for the same reason, and prints it."""

TORCHRUN_KILLS = 60.0
"""Seconds after which torchrun has surely killed the ranks of a failed one; it waits 30."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This rank among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Index among the ranks of its machine."""

    @property
    def is_main(self) -> bool:
        """True for rank 0, which writes the files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Returns every `size`-th item, from index `rank` on."""
        return list(items[self.rank :: self.size])

    def gather(self, mine: T) -> list[T]:
        """Returns [size], every rank's value, in every rank."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self.gather(None)

    def from_main(self, make: Callable[[], T]) -> T:
        """Returns rank 0's `make()`, in every rank; the others do not call it."""
        found: list[Any] = self.gather(make() if self.is_main else None)
        value: T = found[0]
        return value


ALONE = World()


def full_tensor(tensor: Any) -> Tensor:
    """Returns the unsharded tensor. All ranks have to call it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


@contextmanager
def torchrun_world(device: torch.device) -> Iterator[World]:
    """Yields the ranks that `torchrun` started; ALONE where it did not start this process.

    Where a rank fails, all end, and the reason is printed once. `device`: the student's.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_torchelastic_launched() or size == 1:
        yield ALONE
        return
    on_cuda, local_rank = device.type == "cuda", int(os.environ["LOCAL_RANK"])
    if on_cuda:
        torch.cuda.set_device(local_rank)
    # Objects travel over gloo, which needs no memory of the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    world = World(rank=int(os.environ["RANK"]), size=size, local_rank=local_rank)
    try:
        yield world
    except BaseException as error:
        _wait_for_rank_0(world, error)
        raise
    # After a failure NCCL would wait for collectives that never end.
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends a rank that has left its group, with an exit code.

    The interpreter's own end would free torch's caches while threads of gloo still run (a device mesh keeps
    them), and now and then abort a run in which everything was saved.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_rank_0(world: World, error: BaseException) -> None:
    """Delays a failing rank, so that the one which knows the reason prints it and exits first.

    torchrun then sends SIGTERM to the others, and kills those that wait in a collective.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
        time.sleep(TORCHRUN_KILLS)  # another rank has died
    elif not world.is_main:
        time.sleep(RANK_0_FIRST)
