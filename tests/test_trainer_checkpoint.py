"""Checkpoints under kill -9 at every call that changes the disk, at any moment, and on a full disk."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from store.errors import RunError
from trainer.run import checkpoint
from trainer.run.checkpoint import TrainState, check_complete, checkpoints
from trainer.run.run_dir import Position
from trainer.student.policy import Policy

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
"""Audit events of calls that change a disk; `open` where it is for writing."""


class Saver:
    """Saves checkpoints of a tiny student."""

    def __init__(self) -> None:
        self.policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.policy.model.parameters())
        for weight in self.policy.model.parameters():
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()

    def save(self, folder: Path, step: int) -> Path:
        state = TrainState(done=Position(step=step), config={}, problems_fingerprint="f", store={})
        return checkpoint.save(folder, self.policy, self.optimizer, state, keep_last=2)


@pytest.fixture(scope="module")
def saver() -> Saver:
    return Saver()


def in_child(
    work: Callable[[int], None], until: Callable[[int], None] = lambda pid: None
) -> tuple[int, bytes]:
    """(wait status, what `work` wrote into the pipe that it was given) of a forked child."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(out)
            work(into)
        finally:
            os._exit(0)
    os.close(into)
    until(child)
    with os.fdopen(out, "rb") as pipe:
        told = pipe.read()
    return os.waitpid(child, 0)[1], told


def killed_at(call: int, folder: Path) -> None:
    """This process dies before its `call`-th call that changes `folder`."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        seen += 1
        if seen == call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def assert_law(folder: Path, saved: int) -> None:
    """Every checkpoint that is there is whole, and the last that was reported, or a later one, is there."""
    there = checkpoints(folder)
    for path in there:
        check_complete(path)
    assert Position.of(there[-1]).step >= saved


def test_a_kill_at_any_call_leaves_the_last_checkpoint_whole(saver: Saver, tmp_path: Path) -> None:
    call = 0
    while True:
        call += 1
        folder = tmp_path / f"killed-{call}"
        saver.save(folder, 1)
        saver.save(folder, 2)

        def work(_: int, folder: Path = folder, call: int = call) -> None:
            killed_at(call, folder)
            saver.save(folder, 3)  # and prunes the first

        status, _ = in_child(work)
        assert_law(folder, 2)
        if not os.WIFSIGNALED(status):
            break
        # Who comes next clears what was left, and goes on.
        saver.save(folder, 4)
        assert [path.name for path in folder.iterdir() if path.name.startswith(".tmp")] == []
        assert_law(folder, 4)
    assert call > 10  # made, written, renamed, pruned: there were calls to be killed at


def test_a_kill_at_any_moment_leaves_the_last_checkpoint_whole(saver: Saver, tmp_path: Path) -> None:
    draw, last = Random(0), 1

    def work(into: int) -> None:
        # As a run does: on from the last one that is there.
        for step in count(Position.of(checkpoints(tmp_path)[-1]).step + 1):
            saver.save(tmp_path, step)
            os.write(into, f"{step}\n".encode())

    saver.save(tmp_path, 1)
    for _ in range(10):

        def kill(child: int) -> None:
            time.sleep(draw.uniform(0.02, 0.3))
            os.kill(child, signal.SIGKILL)

        status, told = in_child(work, kill)
        assert os.WIFSIGNALED(status)
        last = int(told.split()[-1]) if told else last
        assert_law(tmp_path, last)


@pytest.mark.parametrize("fits", ["nothing", "the weights"])
def test_a_disk_that_takes_no_more_says_so_and_keeps_the_old_one(
    fits: str, saver: Saver, tmp_path: Path
) -> None:
    weights = saver.save(tmp_path, 1) / "model.safetensors"
    limit = 50_000 if fits == "nothing" else weights.stat().st_size + 1000

    def work(into: int) -> None:
        # A real limit of the kernel; the optimizer's state is twice the weights.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            saver.save(tmp_path, 2)
        except RunError as error:
            os.write(into, str(error).encode())

    _, told = in_child(work)
    assert b"cannot save" in told
    assert b"File too large" in told
    assert b"step-000002" in told
    assert b"older checkpoints are complete" in told
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    check_complete(tmp_path / "step-000001")


def test_only_the_last_are_kept_and_those_of_the_warm_up_come_first(saver: Saver, tmp_path: Path) -> None:
    for done in (Position(sft_step=200), Position(step=1, sft_step=200), Position(step=2, sft_step=200)):
        state = TrainState(done=done, config={}, problems_fingerprint="f", store={})
        checkpoint.save(tmp_path, saver.policy, saver.optimizer, state, keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001", "step-000002"]
    assert checkpoint.read_state(tmp_path / "step-000002").done == Position(step=2, sft_step=200)
