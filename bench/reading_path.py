"""Functions of trainer/ that one training step enters: the way that a reader of the method goes.

    python -m bench.reading_path [--list]

Runs a lab training of two steps in this process and counts, under a profiler hook, the distinct functions of
trainer/ entered during step 2, from `train_step` to its return. Needs no store of its own: the lab's teachers
first solve some problems. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from precompute.config_file import load_config
from trainer.config import Config
from trainer.run.run_dir import Position, RunFiles
from trainer.run.setup import Run
from trainer.telemetry.console import TrainReporter
from trainer.train import train_step

TRAINER = str(Path(__file__).parent.parent / "trainer") + "/"
PROBLEMS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="also print the functions")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        make_store(f"{folder}/traces")
        entered = step_functions(folder)
    if options.list:
        for file, function in sorted(entered):
            print(f"{file.removeprefix(TRAINER)}  {function}")
    files = {file for file, _ in entered}
    print(json.dumps({"bench": "reading_path", "functions": len(entered), "files": len(files)}))


def make_store(path: str) -> None:
    """Lets the lab's teachers solve a part of its problems."""
    from typer.testing import CliRunner

    from cli import app

    command = ["precompute", "teachers", "--config", "configs/lab.toml", "--engine", "transformers"]
    result = CliRunner().invoke(app, [*command, "--limit", str(PROBLEMS), "--set", f"store.path={path}"])
    assert result.exit_code == 0, result.output


def step_functions(folder: str) -> set[tuple[str, str]]:
    """Returns (file, function) of all functions of trainer/ that step 2 enters."""
    changes = [f"store.path={folder}/traces", f"run.dir={folder}", "eval.every=0", "train.max_steps=2"]
    config = load_config(Config, "configs/lab.toml", changes)
    entered: set[tuple[str, str]] = set()

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(TRAINER) and not code.co_name.startswith("<"):
            entered.add((code.co_filename, code.co_qualname))

    with ExitStack() as stack:
        files = RunFiles(Path(folder) / "run")
        run = Run(config, files, None, TrainReporter(), stack)
        files.start(config, after=Position())
        train_step(run, 1)
        sys.setprofile(hook)
        try:
            train_step(run, 2)
        finally:
            sys.setprofile(None)
    return entered


if __name__ == "__main__":
    main()
