"""How much memory each process takes while a student is loaded and dealt out; run by torchrun.

torchrun --standalone --nproc-per-node 2 tests/process_memory.py MODEL OUT [whole]

`whole`: each process loads all of it first, which is what this is measured against.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from trainer.config import StudentConfig
from trainer.parallel.fsdp import initial_device, shard
from trainer.parallel.world import torchrun_world
from trainer.student.load import load_policy


def peak() -> int:
    """Bytes that were resident at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Bytes that are resident now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def main(model: str, out: str, how: str = "") -> None:
    with torchrun_world("cpu") as world:
        from torch.distributed.fsdp import fully_shard

        # What the first use of FSDP imports is no part of the model.
        fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh("cpu", (world.size,)))
        before = resident()
        place = None if how else initial_device(world)
        student = StudentConfig(model=model, device="cpu")
        policy = load_policy(student, temperature=1.0, initial_device=place)
        shard(policy, world)
        took = world.gather({"peak": peak() - before, "stays": resident() - before})
        if world.is_main:
            Path(out).write_text(json.dumps(took))


if __name__ == "__main__":
    main(*sys.argv[1:])
