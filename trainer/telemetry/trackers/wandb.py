"""Weights & Biases: `wandb login` once, or WANDB_MODE=offline and `wandb sync` later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from store.errors import EngineError
from trainer.telemetry.trackers import PROJECT


class WandbTracker:
    """A resumed run goes on as the same one; steps that it takes again are those that are there. Offline it
    begins anew with all steps, for `wandb sync` puts the last directory of a run in the others' place."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, identity: str) -> None:
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=f"{folder.name}-{identity}",
                resume="allow",
                dir=folder,
                config=dict(config),
                # Our own lines stand in log.txt.
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())[:200]
            raise EngineError(
                f"run.report_to: wandb cannot start: {reason}; `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self.known = self._run.starting_step - 1

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
