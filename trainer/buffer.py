"""The buffer of traces (ReLIFT, arXiv 2506.07527): they wait until there are enough, and then train by an
update of their own, with SFT's loss and optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.config import Config
from trainer.method.groups import Group
from trainer.method.sft import Sft, supervised
from trainer.parallel.fsdp import load_optimizer_state, optimizer_state


class TraceBuffer:
    """The traces that wait; equal in all ranks."""

    def __init__(self, config: Config, sft: Sft) -> None:
        given = config.guidance.buffer_learning_rate
        self.learning_rate = config.train.learning_rate if given is None else given
        self.size = config.guidance.buffer
        self.sft = sft
        self.waiting: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        """(prompt ids, trace ids), newest first."""

    def collect(self, groups: Sequence[Group]) -> list[Group]:
        """Takes the groups' traces into the buffer; returns the groups without them."""
        new = [(group.prompt.ids, trace.token_ids) for group in groups for trace in group.extra]
        self.waiting = new + self.waiting
        return [replace(group, extra=()) for group in groups]

    def train(self) -> dict[str, float]:
        """Takes one optimizer step on the newest traces if enough wait; returns the metrics. All ranks call
        it."""
        metrics = {}
        if len(self.waiting) >= self.size:
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
            found = self.sft.update([supervised(*each) for each in batch], self.learning_rate)
            metrics = {f"buffer/{name}": found[name] for name in ("loss", "grad_norm")}
        return {**metrics, "buffer/waiting": len(self.waiting)}

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps. All ranks call it."""
        optimizer = self.sft.optimizer
        moments = optimizer_state(self.sft.policy, optimizer) if optimizer.state else None
        return {"waiting": self.waiting, "optimizer": moments}

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.waiting = saved["waiting"]
        if saved["optimizer"] is not None:
            load_optimizer_state(self.sft.policy, self.sft.optimizer, saved["optimizer"])
