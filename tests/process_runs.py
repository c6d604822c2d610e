"""Whole training runs by any number of processes, one after the other; run by torchrun.

    torchrun --standalone --nproc-per-node 2 tests/process_runs.py RUNS

RUNS is a JSON file: a list of {"settings": [...], "copy": [from, to] or null}; a run may begin as a copy of
what an earlier one left.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from precompute.config_file import load_config
from trainer.config import Config
from trainer.parallel.world import World, torchrun_world
from trainer.telemetry.console import TrainReporter
from trainer.train import train


def one_run(described: dict[str, Any], world: World) -> None:
    if described["copy"] and world.is_main:
        cut_back(*map(Path, described["copy"]))
    world.gather(None)  # nobody starts before the copy is there
    train(load_config(Config, None, described["settings"]), reporter=TrainReporter(), world=world)


def cut_back(whole: Path, copy: Path) -> None:
    """The run as it was after its first checkpoint, with what it logged since still there."""
    shutil.copytree(whole, copy)
    for later in sorted((copy / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)


def main(runs: str) -> None:
    with torchrun_world(torch.device("cpu")) as world:
        for described in json.loads(Path(runs).read_text()):
            one_run(described, world)


if __name__ == "__main__":
    main(*sys.argv[1:])
