"""TensorBoard: `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker:
    """Writes event files; what a killed run wrote past its last checkpoint is hidden once it goes on."""

    def __init__(self, folder: Path, *, after_step: int) -> None:
        events = folder / "tensorboard"
        self.known = after_step if events.exists() else -1
        self._writer = SummaryWriter(events, purge_step=after_step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
