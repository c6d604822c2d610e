"""Programs that show a run's metrics beside metrics.jsonl, named by `run.report_to`.

tensorboard   event files in the run's directory, under tensorboard/
wandb         Weights & Biases; with WANDB_MODE=offline everything stays in the run's directory
trackio       a local database (TRACKIO_DIR); `trackio show --project ampo` plots it

A resumed run continues under its id, from the step after its checkpoint. Steps that a killed run logged past
the checkpoint are hidden in TensorBoard; trackio may have them twice. Offline, wandb has a directory for each
start, with the steps since then. metrics.jsonl has each step once.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from store.errors import EngineError

PROJECT = "ampo"
"""Project of the runs, where WANDB_PROJECT or TRACKIO_PROJECT names no other."""


def start_trackers(
    names: Sequence[str], run: Path, config: dict[str, Any], *, done: int, stack: ExitStack
) -> list[Any]:
    """Returns the started trackers, of accelerate; `stack` finishes them.

    Args:
        run: the run's directory.
        config: the resolved config, logged with the run.
        done: steps before a resume, those of SFT included; 0 starts a new run.
    """
    trackers: list[Any] = []
    path = run / "tracker_id"  # distinguishes this run from others of its name
    if names and not (done and path.exists()):
        path.write_text(f"{run.name}-{secrets.token_hex(4)}", encoding="utf-8")
    for name in dict.fromkeys(names):
        trackers.append(_start(name, run, config, path.read_text(encoding="utf-8"), done))
        stack.callback(trackers[-1].finish)
    return trackers


def _start(program: str, run: Path, config: dict[str, Any], run_id: str, done: int) -> Any:
    """Returns the program's tracker, started. Raises EngineError when wandb cannot start."""
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's own log lines need it
    project = os.environ.get(f"{program.upper()}_PROJECT", PROJECT)
    if program == "tensorboard":
        # Events of this and later steps are hidden.
        board = tracking.TensorBoardTracker(program, logging_dir=run, purge_step=done and done + 1)
        board.start()
        if not done:
            board.log({"config": json.dumps(config)}, step=0)
        return board
    if program == "trackio":
        database = tracking.TrackioTracker(project, name=run_id, config=config, resume="allow")
        database.start()
        return database
    from wandb import Error

    options = {"name": run.name, "id": run_id, "resume": "allow", "dir": run, "config": config}
    tracker = tracking.WandBTracker(project, settings={"console": "off"}, **options)
    try:
        tracker.start()
    except Error as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(
            f"run.report_to: wandb cannot start: {reason}; `wandb login`, or set WANDB_MODE=offline"
        ) from error
    return tracker
