"""Whether the student's new weights have reached its sampler: both say what they think of a few prompts.

Two ways to fail: the log-probabilities are too far apart, or the student's have moved and the sampler's are
to the last bit what they were. The second shows a step that was missed and is smaller than the tolerance,
as steps of 1e-6 in bfloat16 are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from store.errors import EngineError
from trainer.batch import pad
from trainer.policy import Policy

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
        self._policy = Policy(policy.model, policy.tokenizer, dtype=policy.dtype, temperature=1.0)
        self._before: tuple[Tensor, Tensor] | None = None

    def compare(self, theirs: Sequence[Sequence[float]]) -> None:
        """Raises EngineError, with both values, when the sampler does not compute with the student's weights.

        `theirs`: [N][P - 1], the sampler's log-probabilities of all but the first token of each row.
        """
        ours = self._logprobs()
        sampler = torch.tensor([value for row in theirs for value in row])
        difference = float((ours - sampler).abs().mean())
        values = (
            f"the probe's log-probability is {float(sampler.mean()):.5f} a token in vllm and "
            f"{float(ours.mean()):.5f} in the trainer"
        )
        if not difference <= self.tolerance:
            raise EngineError(
                f"the student's weights did not reach vllm: {values}, tokens differ by {difference:.2g} "
                f"on average, rollout.sync_tolerance = {self.tolerance:g}"
            )
        if self._before is not None:
            moved = float((ours - self._before[0]).abs().mean())
            if moved > MOVED * self.tolerance and sampler.equal(self._before[1]):
                raise EngineError(
                    f"the student's weights did not reach vllm: {values}; the trainer's moved by {moved:.2g} "
                    f"a token and vllm's not at all, rollout.sync_tolerance = {self.tolerance:g}"
                )
        self._before = ours, sampler

    @torch.no_grad()
    def _logprobs(self) -> Tensor:
        """[sum of P - 1]"""
        policy = self._policy
        asked = [len(row) - 1 for row in self.rows]
        batch = pad(self.rows, asked, pad_id=policy.pad_id, device=policy.device)
        return policy.statistics(batch).logprobs[batch.asked].cpu()
