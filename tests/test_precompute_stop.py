"""SIGTERM, as schedulers send it, to `ampo precompute teachers`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from precompute_examples import GOOD, PROBLEM_FILE, keys_of
from proc_examples import wait_until

CONFIG = """
[problems]
train = "{problems}"
[store]
path = "{store}"
part_traces = 100000
part_seconds = 100000.0
[verify]
workers = 1
[[teachers]]
name = "totals"
model = "{model}"
engine = "transformers"
system_prompt = ""
max_tokens = 120
batch_size = 4
"""


def test_what_is_verified_is_written(tmp_path: Path) -> None:
    store = tmp_path / "traces"
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(problems=PROBLEM_FILE, store=store, model=GOOD["model"]))
    command = [sys.executable, "-m", "cli", "precompute", "teachers"]
    command += ["--config", str(config), "--limit", "400"]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=Path(__file__).parents[1], env=dict(os.environ)
        )
        # Its lines of progress show verified samples, none of which is in a part yet.
        assert wait_until(lambda: "loading" in log.read_text(), 120)
        assert wait_until(lambda: "verified" in log.read_text() or process.poll() is not None, 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    assert "every verified trace is kept. Go on with the same command" in log.read_text()
    kept = len(keys_of(store))
    assert 0 < kept < 400
