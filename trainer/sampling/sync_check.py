"""Whether the student's new weights have reached its sampler: both say what they think of a few prompts.

Two ways to fail: the log-probabilities are too far apart, or the student's have moved and the sampler's are
to the last bit what they were. The second shows a step that was missed and is smaller than the tolerance,
as steps of 1e-6 in bfloat16 are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from store.errors import EngineError
from trainer.parallel.fsdp import gathered_weights
from trainer.student.batches import pad
from trainer.student.policy import Policy

ROWS = 4
LENGTH = 256
"""Prompts of the probe, and their tokens at most."""
MOVED = 1 / 100
"""Of the tolerance: a change of the student's that a sampler with the new weights cannot fail to show."""
TOLERANCES = {torch.float32: 0.005}
"""Nats a token; two programs that compute in float32."""
NARROW_TOLERANCE = 0.1
"""The same in 16 bits, where logits near 20 are 0.125 apart."""


class SyncCheck:
    """Compares log-probabilities, at temperature 1, of the same tokens."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], tolerance: float | None) -> None:
        """`tolerance`: nats a token; None: as the type asks that the student computes in."""
        self.rows = [tuple(ids[:LENGTH]) for ids in prompts[:ROWS]]
        """[N][P], at least two tokens each in a usable probe."""
        self.tolerance = TOLERANCES.get(policy.dtype, NARROW_TOLERANCE) if tolerance is None else tolerance
        self._policy = policy
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def compare(self, ours: Tensor, theirs: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Raises EngineError, with both values, when a copy does not compute with the student's weights.

        Args:
            ours: of `own_logprobs`.
            theirs: name of each copy -> [N][P - 1], its log-probabilities of all but each row's first token.
        """
        for name, rows in theirs.items():
            copy = torch.tensor([value for row in rows for value in row])
            self._compare(name, ours, copy)
            self._before[name] = ours, copy

    def _compare(self, name: str, ours: Tensor, copy: Tensor) -> None:
        values = (
            f"the student's weights did not reach {name}: there the probe's log-probability is "
            f"{float(copy.mean()):.5f} a token, in the trainer {float(ours.mean()):.5f};"
        )
        allowed = f"rollout.sync_tolerance = {self.tolerance:g}"
        difference = float((ours - copy).abs().mean())
        if not difference <= self.tolerance:
            raise EngineError(f"{values} tokens differ by {difference:.2g} on average, {allowed}")
        ours_before, copy_before = self._before.get(name, (ours, copy))
        moved = float((ours - ours_before).abs().mean())
        if moved > MOVED * self.tolerance and copy.equal(copy_before):
            raise EngineError(
                f"{values} the trainer's moved by {moved:.2g} a token and {name}'s not at all, {allowed}"
            )

    @torch.no_grad()
    def own_logprobs(self) -> Tensor:
        """[sum of P - 1], the student's; processes that its weights are dealt out to call this together."""
        policy = self._policy
        asked = [len(row) - 1 for row in self.rows]
        batch = pad(self.rows, asked, pad_id=policy.pad_id, device=policy.device)
        with gathered_weights(policy), policy.at_temperature(1.0):
            return policy.logprobs(batch)[batch.asked].cpu()
