"""bitsandbytes' 8-bit AdamW over weights that are dealt out over processes.

Its state is 8 bits a value and a scale for each block of 256 values, in the order of the whole weight. A
process's rows are a weight of their own to it: where they are whole blocks in every process, states and
results are one process's to the bit. Of the other weights (biases, rows of odd width) every process keeps the
whole state, makes the whole update, and takes its rows of it. A checkpoint is one process's in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.parallel.fsdp import full_tensor, own_rows, rows_each

BLOCK = 256
"""Values that share a scale."""
SMALLEST = 4096
"""Values of a weight whose state is 8 bits; a smaller one's is 32."""
NESTED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes puts a weight's tensors in a `state_dict`."""
VALUES, SCALES = ("state1", "state2"), ("absmax1", "absmax2")


def is_cut_well(weight: Any) -> bool:
    """Whether every process's rows are whole blocks, and treated as the whole weight would be."""
    values, rows = int(weight.numel()), rows_each(weight)
    row = values // int(weight.shape[0])
    last = (int(weight.shape[0]) % rows or rows) * row
    return values < SMALLEST or (rows * row % BLOCK == 0 and last >= SMALLEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """A process's part of a weight's scales, which come together as `gathered_state` wants it."""

    own: Tensor
    each: int
    """Blocks of the process that has the most."""
    total: int
    weight: Any

    def full_tensor(self) -> Tensor:
        """[total]; all processes take part."""
        from torch.distributed.tensor import DTensor, Shard

        padded = self.own.new_zeros(self.each)
        padded[: len(self.own)] = self.own
        whole: Tensor = DTensor.from_local(padded, self.weight.device_mesh, [Shard(0)]).full_tensor()
        return whole[: self.total]


class EightBitShares(torch.optim.Optimizer):
    """Steps an optimizer of bitsandbytes over this process's rows of every weight."""

    deals_out = True
    """Takes its part of a whole state itself."""

    def __init__(self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Any]) -> None:
        """`make`: param groups -> bitsandbytes' optimizer of them."""
        super().__init__(groups, {})
        # Stand-ins: what they hold is put there for each step.
        pieces = [[torch.empty(0, device=w.device) for w in group["params"]] for group in groups]
        self.inner = make(
            [{**group, "params": own} for group, own in zip(self.param_groups, pieces, strict=True)]
        )
        self.page_mng = self.inner.page_mng
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self._pairs = list(zip(weights, (each for own in pieces for each in own), strict=True))
        self._begun: set[int] = set()
        """Places of the weights that have a state, in some process at least."""
        _copy_options(self.inner, self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        assert closure is None, "the gradient stands before the step"
        _copy_options(self, self.inner)
        for place, (weight, piece) in enumerate(self._pairs):
            if weight.grad is not None:
                self._begun.add(place)
                self._update(weight, piece)
        self.state = self.inner.state

    def _update(self, weight: Any, piece: Tensor) -> None:
        own, well = weight.to_local(), is_cut_well(weight)
        if well and not own.numel():
            return
        piece.data = own if well else full_tensor(weight)
        piece.grad = weight.grad.to_local() if well else full_tensor(weight.grad)
        self.inner.step()
        if not well:
            own.copy_(piece[own_rows(weight)])
        piece.data, piece.grad = piece.new_empty(0), None

    def state_dict(self) -> dict[str, Any]:
        """One process's, but for parts of tensors that have still to come together (`gathered_state`)."""
        own: dict[str, Any] = self.inner.state_dict()
        # In one order, whichever of them a process has: parts come together in turn.
        states = {place: self._parts(place, own["state"].get(place)) for place in sorted(self._begun)}
        return {**own, "state": states}

    def _parts(self, place: int, state: Mapping[str, Any] | None) -> dict[str, Any]:
        weight, _ = self._pairs[place]
        own = _nothing(weight) if state is None else state
        if not is_cut_well(weight):
            return dict(own)
        return {**own, NESTED: {name: _part(name, x, weight) for name, x in sorted(own[NESTED].items())}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Of one process's state this process's part."""
        self._begun = set(state_dict["state"])
        own = {place: self._own(place, state) for place, state in state_dict["state"].items()}
        kept = {place: state for place, state in own.items() if state[NESTED]["state1"].numel()}
        self.inner.load_state_dict({**state_dict, "state": kept})
        self.state = self.inner.state
        _copy_options(self.inner, self)

    def _own(self, place: int, state: Mapping[str, Any]) -> dict[str, Any]:
        weight, _ = self._pairs[place]
        if not is_cut_well(weight):
            return dict(state)
        rows = own_rows(weight)
        row = weight.numel() // weight.shape[0]
        blocks = slice(rows.start * row // BLOCK, -(-rows.stop * row // BLOCK))
        cut = {**dict.fromkeys(VALUES, rows), **dict.fromkeys(SCALES, blocks)}
        nested = state[NESTED].items()
        return {**state, NESTED: {name: x[cut[name]].clone() if name in cut else x for name, x in nested}}


def _copy_options(given: Any, taker: Any) -> None:
    """Learning rates and the like, group by group."""
    for ours, theirs in zip(given.param_groups, taker.param_groups, strict=True):
        theirs.update({key: value for key, value in ours.items() if key != "params"})


def _part(name: str, own: Tensor, weight: Any) -> Any:
    """A tensor of a state as a part of the whole one."""
    from torch.distributed.tensor import DTensor

    if name in VALUES:
        place, shape = weight.device_mesh, weight.shape
        return DTensor.from_local(
            own, place, weight.placements, run_check=False, shape=shape, stride=weight.stride()
        )
    if name in SCALES:
        each = rows_each(weight) * (weight.numel() // weight.shape[0]) // BLOCK
        return Scales(own=own, each=each, total=-(-weight.numel() // BLOCK), weight=weight)
    return own


def _nothing(weight: Any) -> dict[str, Any]:
    """The state of a process that has no row of the weight."""
    eight = weight.numel() >= SMALLEST
    values = weight.to_local().new_empty(
        (0, *weight.shape[1:]), dtype=torch.uint8 if eight else torch.float32
    )
    nested = dict.fromkeys(VALUES, values)
    if eight:
        nested |= dict.fromkeys((*SCALES, "qmap1", "qmap2"), values.new_empty(0, dtype=torch.float32))
    return {"step": 0, NESTED: nested}
