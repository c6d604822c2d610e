"""trackio: a local database (TRACKIO_DIR), drawn by `trackio show --project ampo`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trackio

from trainer.telemetry.trackers import PROJECT


class TrackioTracker:
    """A resumed run goes on as the same one; steps that it takes again are those that are there."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, identity: str) -> None:
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{folder.name}-{identity}",
            config=dict(config),
            resume="allow",
        )
        # It takes a step twice without a word, and tells nowhere else which it has, here or on a server.
        self.known = self._run._next_step - 1

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
