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
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from store.errors import EngineError
from store.format.files import whole_file

PROJECT = "ampo"
"""Project of the runs, where WANDB_PROJECT or TRACKIO_PROJECT names no other."""


class Trackers(AbstractContextManager["Trackers"]):
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
        path = run / "tracker_id"  # distinguishes this run from others of its name
        if after == (0, 0) or not path.exists():
            with whole_file(path) as file:
                file.write(secrets.token_hex(4).encode())
        name, self._sft_steps = f"{run.name}-{path.read_text()}", sft_steps
        last = (after[0] + sft_steps if after[0] else after[1]) or -1
        self._started = [_start(each, run, dict(config), name, last) for each in self._names]
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

    def __exit__(self, *_: object) -> None:
        for tracker, _known in self._started:
            tracker.finish()
        self._started = []


def _start(program: str, run: Path, config: dict[str, Any], name: str, last: int) -> tuple[Any, int]:
    """Returns the started tracker, and the last step that it has."""
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's own log lines need it
    project = os.environ.get(f"{program.upper()}_PROJECT", PROJECT)
    if program == "tensorboard":
        has_events = (run / program).exists()
        # Events past the last checkpoint are hidden.
        board = tracking.TensorBoardTracker(program, logging_dir=run, purge_step=last + 1)
        board.start()
        if not has_events:
            board.log({"config": json.dumps(config)}, step=0)
        return board, last if has_events else -1
    if program == "trackio":
        database = tracking.TrackioTracker(project, name=name, config=config, resume="allow")
        database.start()
        # It stores a step twice without a warning, and no public name gives its last step.
        return database, database.tracker._next_step - 1
    from wandb import Error

    # A resumed run continues under its id. Offline it has to log all steps again, since `wandb sync` keeps
    # the last directory of a run only.
    options = {"name": run.name, "id": name, "resume": "allow", "dir": run, "config": config}
    tracker = tracking.WandBTracker(project, settings={"console": "off"}, **options)
    try:
        tracker.start()
    except Error as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(
            f"run.report_to: wandb cannot start: {reason}; `wandb login`, or set WANDB_MODE=offline"
        ) from error
    return tracker, tracker.tracker.starting_step - 1
