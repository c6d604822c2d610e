"""Who draws the student's samples, and how the student's new weights reach it.

sync -> generate (samples of a step) -> sleep -> guide, update -> sync -> generate (evaluation) -> ...
"""

from __future__ import annotations

from typing import Protocol

from precompute.engines import Engine
from precompute.engines.transformers_engine import TransformersEngine
from trainer.config import Config
from trainer.policy import Policy


class Sampler(Engine, Protocol):
    """An engine that draws from the student as it is now."""

    def sync(self, step: int) -> None:
        """Makes the student's weights those that are drawn from, and wakes what slept.

        `step`: the sampling steps that these weights have behind them.
        """
        ...

    def sleep(self) -> None:
        """Gives memory to the update; until the next `sync` nothing can be drawn."""
        ...


class SharedSampler(TransformersEngine):
    """Draws from the very model that is trained: its weights are always the new ones."""

    def sync(self, step: int) -> None:
        """Nothing is to be brought."""

    def sleep(self) -> None:
        """Nothing is held but what the update needs too."""


def make_sampler(config: Config, policy: Policy) -> Sampler:
    """The sampler that `rollout.engine` names."""
    return SharedSampler(policy.model, policy.tokenizer, batch_size=config.rollout.batch_size)
