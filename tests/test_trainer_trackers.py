"""`run.report_to`: the numbers read back from each program are those of metrics.jsonl."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from run_examples import config_of, make_world, settings

from store.errors import EngineError
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import MEASURED
from trainer.telemetry.trackers import start_trackers
from trainer.train import train

ROOT = Path(__file__).parent.parent
NAMES = ("tensorboard", "trackio", "wandb")
Curve = dict[int, dict[str, float]]
"""step -> metric -> value"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("tracked"))


DIES_AFTER_STEP_3 = """
import os, signal, sys, time
from precompute.config_file import load_config
from trainer.telemetry.console import TrainReporter
from trainer.config import Config
from trainer.train import train

class Killed(TrainReporter):
    def stepped(self, row, groups, steps):
        if row["step"] == 3:
            time.sleep(1.5)  # trackio stores with some delay
            os.kill(os.getpid(), signal.SIGKILL)

train(load_config(Config, None, sys.argv[1:]), reporter=Killed())
"""


@pytest.fixture(scope="module")
def tracked(world: Path, model_dir: Path) -> Path:
    """A run of four steps with all trackers, offline: killed (-9) after step 3, then resumed by the command
    from the checkpoint of step 2."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(world / "trackio"),
    }
    overrides = settings(world, model_dir, run__report_to=NAMES, run__log_completions_every=0)
    flags = [part for override in overrides for part in ("--set", override)]
    for arguments, status in (
        (["-c", DIES_AFTER_STEP_3, *overrides], -signal.SIGKILL),
        (["-m", "cli", "train", *flags], 0),
    ):
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=world, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == status, done.stderr
    assert "resuming after step 2" in done.stdout
    return world / "runs" / "run"


def written(run: Path) -> Curve:
    """The numbers of metrics.jsonl, without missing values."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {key: value for key, value in row.items() if key != "step" and value is not None}
        for row in rows
    }


def of_tensorboard(run: Path) -> Curve:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    curve: Curve = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in curve.setdefault(event.step, {}), "a step is stored twice"
            curve[event.step][name] = event.value
    return curve


def of_trackio(run: Path) -> Curve:
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; (name,) = S.get_runs('ampo');"
        "print(json.dumps(S.get_logs('ampo', name)))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(run.parent.parent / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    return {row["step"]: {k: v for k, v in row.items() if k not in {"step", "timestamp"}} for row in rows}


def of_wandb(run: Path) -> Curve:
    """Read from the last of two offline directories."""
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "a resumed run is the same run"
    curve: Curve = {}
    for record in wandb_records(files[-1].read_bytes()):
        if record.HasField("history"):
            items = record.history.item
            found = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            step = found["_step"]
            assert step not in curve, "a step is stored twice"
            curve[step] = {key: value for key, value in found.items() if not key.startswith("_")}
    return curve


def wandb_records(body: bytes) -> Iterator[object]:
    """Records of a .wandb file: 7 bytes of its own, then LevelDB's log of 32 KiB blocks, whose pieces have a
    checksum (4 bytes), a length (2) and a type: 1 whole, 2 first, 3 middle, 4 last."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, held = 7, b""
    while at + 7 <= len(body):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(body[at + 4 : at + 6], "little"), body[at + 6]
        held += body[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(held)
            held = b""
            yield record


@pytest.mark.parametrize(
    ("read", "steps"), [(of_tensorboard, [1, 2, 3, 4]), (of_trackio, [1, 2, 3, 4]), (of_wandb, [3, 4])]
)
def test_a_tracker_has_the_steps_numbers_over_a_kill_and_a_resume(
    tracked: Path, read: Callable[[Path], Curve], steps: list[int]
) -> None:
    expected, found = written(tracked), read(tracked)
    assert sorted(found) == steps
    for step in steps:
        assert found[step].keys() == expected[step].keys()
        for key, value in expected[step].items():
            # TensorBoard keeps float32.
            if not key.startswith(MEASURED):
                assert found[step][key] == pytest.approx(value, rel=1e-6), (step, key)


def test_a_missing_package_is_an_error_with_its_extra_before_anything_is_loaded(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # how Python itself marks what cannot be imported
    config = config_of(world, world / "no-model", run__name="never", run__report_to=("trackio",))
    with pytest.raises(EngineError, match=r'trackio.*pip install -e "\.\[trackio\]"'):
        train(config, resume="auto", reporter=TrainReporter())
    assert not (world / "runs" / "never" / "config.toml").exists()


def test_a_resume_hides_what_tensorboard_has_past_the_checkpoint(tmp_path: Path) -> None:
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with ExitStack() as stack:
            (board,) = start_trackers(["tensorboard"], tmp_path, {}, done=done, stack=stack)
            for step in steps:
                board.log({"loss": step + done / 10}, step=step)
    losses = {step: numbers["loss"] for step, numbers in of_tensorboard(tmp_path).items()}
    assert losses == pytest.approx({1: 1.0, 2: 2.0, 3: 3.2, 4: 4.2})
