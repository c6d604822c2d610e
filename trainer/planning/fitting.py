"""Settings under which a run fits a device: the cheapest change first, and no more changes than it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import Config
from trainer.planning.estimate import Estimate, ModelShape, estimate
from trainer.planning.hardware import Device

SMALLEST_BATCH = 8
"""Rows: with fewer of them sampling takes for ever."""

Changes = dict[str, Any]
"""Dotted key -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What to change, and what a step needs then."""

    changes: Changes
    processes: int
    estimate: Estimate


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with other values of some keys."""
    tree = config.model_dump()
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        tree[section][key] = value
    return Config.model_validate(tree)


def proposal(
    config: Config, shape: ModelShape, device: Device, *, bytes_per_value: int, processes: int = 1
) -> Proposal | None:
    """The first settings on the ladder that fit; None when none does, or the device's memory is unknown.

    Settings that leave the result as it is come first, then those that change its rounding, adapters, and
    more GPUs at last.
    """
    room = device.memory
    if room is None:
        return None
    counts = [processes, *(n for n in (2, 4, 8) if n > processes and _can_be_dealt_out(config))]
    for count in counts:

        def needs(changes: Changes, n: int = count) -> Estimate:
            made = changed(config, changes)
            return estimate(made, shape, device, bytes_per_value=bytes_per_value, processes=n)

        def fits(changes: Changes, needs: Callable[[Changes], Estimate] = needs) -> bool:
            return needs(changes).peak <= room

        for changes in _ladder(config, alone=count == 1):
            if fits(changes):
                fewest = _fewest(config, changes, fits)
                return Proposal(changes=fewest, processes=count, estimate=needs(fewest))
    return None


def _fewest(config: Config, changes: Changes, fit: Callable[[Changes], bool]) -> Changes:
    """Without those changes that are not needed after all."""
    for dotted in list(changes):
        without = {key: value for key, value in changes.items() if key != dotted}
        if _is_whole(config, without) and fit(without):
            changes = without
    return changes


def _can_be_dealt_out(config: Config) -> bool:
    """Whether many processes can share the run (sharding.py)."""
    return not config.student.load_in_4bit and not config.train.compile


def _ladder(config: Config, *, alone: bool) -> Iterator[Changes]:
    """Ever more changes; `alone`: one process, where everything works."""
    so_far: Changes = {}
    for rung in _rungs(config, alone):
        so_far = so_far | rung
        yield so_far


def _rungs(config: Config, alone: bool) -> Iterator[Changes]:
    rollout, train = config.rollout, config.train
    yield {}
    longest = rollout.max_prompt_length + rollout.max_completion_length
    yield from _halved("train.max_tokens_per_microbatch", train.max_tokens_per_microbatch, longest)
    yield {"student.gradient_checkpointing": True}
    yield from _halved("rollout.batch_size", rollout.batch_size, SMALLEST_BATCH)
    if not alone:
        return
    if train.optim == "adamw":
        yield {"train.optim": "adamw_8bit"}
        yield {"train.optim": "paged_adamw_8bit"}
    yield {"train.optim": train.optim, "student.use_peft": True}
    yield {"student.load_in_4bit": True}


def _halved(key: str, value: int, least: int) -> Iterator[Changes]:
    while value > least:
        value = max(value // 2, least)
        yield {key: value}


def _is_whole(config: Config, changes: Changes) -> bool:
    """Whether the changes go together: 4 bits need adapters."""
    four = changes.get("student.load_in_4bit", config.student.load_in_4bit)
    return not four or bool(changes.get("student.use_peft", config.student.use_peft))
