"""Which problems a step trains on: a pure function of (seed, step), so a resume needs no position."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from store.errors import ProblemsError
from trainer.method.rollouts import seed_of

T = TypeVar("T")


def problems_of_step(items: Sequence[T], *, step: int, per_step: int, seed: int) -> list[T]:
    """The `per_step` items of 1-based step `step`.

    Each epoch is a new permutation; what is left of it below a whole step is dropped, so that no step holds
    a problem twice.

    Raises ProblemsError when there are fewer items than a step needs.
    """
    if len(items) < per_step:
        raise ProblemsError(
            f"train.problems_per_step = {per_step}, but only {len(items)} problems can be trained on"
        )
    return [items[index] for index in places_of_step(len(items), step=step, per_step=per_step, seed=seed)]


def refills_of_step(items: Sequence[T], *, step: int, per_step: int, seed: int) -> list[T]:
    """All other items than the step's own, in the order in which they stand in for groups that carry no
    gradient (dynamic sampling)."""
    own = set(places_of_step(len(items), step=step, per_step=per_step, seed=seed))
    others = [index for index in range(len(items)) if index not in own]
    Random(seed_of(seed, "refill", step)).shuffle(others)
    return [items[index] for index in others]


def places_of_step(count: int, *, step: int, per_step: int, seed: int) -> list[int]:
    """The `per_step` of `count` places that 1-based step `step` takes; `per_step` is at most `count`."""
    epoch, place = divmod(step - 1, count // per_step)
    order = Random(seed_of(seed, "epoch", epoch)).sample(range(count), count)
    return order[place * per_step : (place + 1) * per_step]
