"""Programs that show a run's metrics beside metrics.jsonl, named by `run.report_to`.

tensorboard   event files in the run's directory, under tensorboard/
wandb         Weights & Biases; with WANDB_MODE=offline everything stays in the run's directory
trackio       a local database (TRACKIO_DIR); `trackio show --project ampo` plots it

Each step is logged once, also over a kill and a resume. Accelerate's trackers do the writing.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from store.errors import EngineError
from store.format.files import whole_file

PROJECT = "ampo"
"""Project of the runs, where WANDB_PROJECT or TRACKIO_PROJECT names no other."""


class Trackers:
    """All programs that `run.report_to` names. A context manager that closes them."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises EngineError for one that is not installed, before anything is loaded."""
        for name in names:
            if find_spec(name) is None:
                raise EngineError(
                    f'run.report_to: {name!r} is not installed; pip install "ampo[{name}]" installs it'
                )
        self._names = tuple(dict.fromkeys(names))
        self._started: list[tuple[Any, int]] = []
        """Each tracker with the last step that it has of the run before a resume; -1 for none."""
        self._sft_steps = 0

    def begin(
        self,
        run: Path,
        config: Mapping[str, Any],
        *,
        after: tuple[int, int],
        sft_steps: int,
        rows: Sequence[Mapping[str, Any]],
    ) -> None:
        """Starts the trackers and logs the steps that they lack.

        Args:
            run: the run's directory.
            config: the resolved config, logged with the run.
            after: (sampling steps, SFT steps) that are done; (0, 0) starts a new run.
            sft_steps: SFT steps in all; programs count sampling steps from there on.
            rows: the lines of metrics.jsonl so far. A tracker that was killed with the run, or is new, lacks
                some of them.
        """
        if not self._names:
            return
        identity, self._sft_steps = _identity(run, is_new=after == (0, 0)), sft_steps
        last = (after[0] + sft_steps if after[0] else after[1]) or -1
        self._started = [_start(name, run, dict(config), identity, last) for name in self._names]
        for row in rows:
            self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs a line of metrics.jsonl without its missing values (None)."""
        numbers = {
            key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"
        }
        step = row.get("sft/step") or row["step"] + self._sft_steps
        # The evaluation between SFT and sampling has the number of the last SFT step.
        is_between = "sft/step" not in row and row["step"] == 0 < step
        for tracker, known in self._started:
            if step > known or (is_between and step == known):
                tracker.log(numbers, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker, _ in self._started:
            tracker.finish()
        self._started = []


def _start(name: str, run: Path, config: dict[str, Any], identity: str, last: int) -> tuple[Any, int]:
    """The started tracker, and the last step that it has."""
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's own log lines need it
    if name == "tensorboard":
        has_events = (run / name).exists()
        # Events past the last checkpoint are hidden.
        board = tracking.TensorBoardTracker(name, logging_dir=run, purge_step=last + 1)
        board.start()
        if not has_events:
            board.log({"config": json.dumps(config)}, step=0)
        return board, last if has_events else -1
    project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
    if name == "trackio":
        options = {"name": f"{run.name}-{identity}", "config": config, "resume": "allow"}
        database = tracking.TrackioTracker(project, **options)
        database.start()
        # It stores a step twice without a warning, and no public name gives its last step.
        return database, database.tracker._next_step - 1
    return _start_wandb(project, run, config, identity)


def _start_wandb(project: str, run: Path, config: dict[str, Any], identity: str) -> tuple[Any, int]:
    """A resumed run continues under its id. Offline it has to log all steps again, since `wandb sync` keeps
    the last directory of a run only."""
    from accelerate.tracking import WandBTracker
    from wandb import Error

    options = {"name": run.name, "id": f"{run.name}-{identity}", "resume": "allow", "dir": run}
    tracker = WandBTracker(project, config=config, settings={"console": "off"}, **options)
    try:
        tracker.start()
    except Error as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(
            f"run.report_to: wandb cannot start: {reason}; `wandb login`, or set WANDB_MODE=offline"
        ) from error
    return tracker, tracker.tracker.starting_step - 1


def _identity(run: Path, *, is_new: bool) -> str:
    """Distinguishes this run from others of its name; a resumed run keeps its own."""
    path = run / "tracker.json"
    if path.exists() and not is_new:
        return str(json.loads(path.read_text(encoding="utf-8"))["identity"])
    identity = secrets.token_hex(4)
    with whole_file(path) as file:
        file.write(json.dumps({"identity": identity}).encode() + b"\n")
    return identity
