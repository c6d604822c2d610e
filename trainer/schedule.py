"""Which problems a step trains on: a pure function of (seed, step), so a resume needs no position."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from store.errors import ProblemsError
from trainer.rollout import seed_of

T = TypeVar("T")


def problems_of_step(items: Sequence[T], *, step: int, per_step: int, seed: int) -> list[T]:
    """The `per_step` items of 1-based step `step`.

    Each epoch is a new permutation; what is left of it below a whole step is dropped, so that no step holds
    a problem twice.

    Raises ProblemsError when there are fewer items than a step needs.
    """
    steps_per_epoch = len(items) // per_step
    if steps_per_epoch == 0:
        raise ProblemsError(
            f"train.problems_per_step = {per_step}, but only {len(items)} problems can be trained on"
        )
    epoch, place = divmod(step - 1, steps_per_epoch)
    order = Random(seed_of(seed, "epoch", epoch)).sample(range(len(items)), len(items))
    return [items[index] for index in order[place * per_step : (place + 1) * per_step]]
