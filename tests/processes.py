"""Starts real processes with torchrun, gloo between them, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(count: int, *arguments: str) -> list[str]:
    """The command line; `--standalone` finds a free port, so that two of them may run at once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(count), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start_processes(count: int, *arguments: str) -> subprocess.Popen[str]:
    """Starts `torchrun ... arguments`; what it says on stdout and stderr comes as one."""
    return subprocess.Popen(
        torchrun(count, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_processes(
    count: int, *arguments: str, cwd: Path = ROOT, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs `torchrun ... arguments` to its end."""
    command: Sequence[str] = torchrun(count, *arguments)
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
