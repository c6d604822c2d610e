"""Where metrics go beside metrics.jsonl: `run.report_to`. One file a program, imported only where asked for.

tensorboard   event files in the run's directory, under tensorboard/
wandb         Weights & Biases; WANDB_MODE=offline keeps all of it in the run's directory
trackio       a local database; `trackio show` draws it
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from store.errors import EngineError
from store.format.files import whole_file
from trainer.run.run_dir import Position

PROJECT = "ampo"
"""What runs are filed under, where the program's own environment variable names nothing else."""


class Tracker(Protocol):
    """One program that is told a run's metrics."""

    known: int
    """The last step that it has of the run from before; -1: none."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All that `run.report_to` names. A context manager: leaving it closes them."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises EngineError for one that is not installed, before anything is loaded."""
        for name in names:
            if find_spec(name) is None:
                raise EngineError(
                    f'run.report_to: {name!r} is not installed; pip install "ampo[{name}]" installs it'
                )
        self._names = tuple(dict.fromkeys(names))
        self._trackers: list[Tracker] = []
        self._warmup_steps = 0

    def begin(
        self, folder: Path, config: Mapping[str, Any], *, after: Position, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Opens them for the run in `folder`, which goes on after `after`. `rows`: the lines of metrics.jsonl
        until then, for a program that lacks some: it was killed with the run, say, or is a new one."""
        if not self._names:
            return
        identity = _identity(folder, anew=after == Position())
        self._warmup_steps = config["warmup"]["sft_steps"]
        last = after.step + self._warmup_steps if after.step else after.sft_step
        for name in self._names:
            self._trackers.append(_open(name, folder, config, identity=identity, after_step=last or -1))
        for row in rows:
            self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; what does not exist in it (None) is left out. Programs know one count of
        steps: sampling steps come after those of the warm-up. A step that a program has is not told again."""
        numbers = {
            key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"
        }
        step = row.get("sft/step") or row["step"] + self._warmup_steps
        # What comes between warm-up and sampling has the count of the last supervised step.
        shared = "sft/step" not in row and row["step"] == 0 < step
        for tracker in self._trackers:
            if step > tracker.known or (shared and step == tracker.known):
                tracker.log(step, numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []


def _open(name: str, folder: Path, config: Mapping[str, Any], *, identity: str, after_step: int) -> Tracker:
    if name == "tensorboard":
        from trainer.telemetry.trackers.tensorboard import TensorBoardTracker

        return TensorBoardTracker(folder, after_step=after_step)
    if name == "wandb":
        from trainer.telemetry.trackers.wandb import WandbTracker

        return WandbTracker(folder, config, identity=identity)
    from trainer.telemetry.trackers.trackio import TrackioTracker

    return TrackioTracker(folder, config, identity=identity)


def _identity(folder: Path, *, anew: bool) -> str:
    """What tells this run from others of its name; a resumed run keeps its own."""
    path = folder / "tracker.json"
    if path.exists() and not anew:
        return str(json.loads(path.read_text(encoding="utf-8"))["identity"])
    identity = secrets.token_hex(4)
    with whole_file(path) as file:
        file.write(json.dumps({"identity": identity}).encode() + b"\n")
    return identity
