"""SFT: supervised steps on the store's verified traces, before RL or (`max_steps = 0`) alone.

    L = -(1 / T) * sum of log pi_theta of every trace token     T: the tokens of the whole optimizer step

The optimizer's state is SFT's own: RL begins with a fresh one, since moments of another loss, at another
learning rate, do not fit its gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from store.errors import StoreError
from trainer.config import Config, SftConfig
from trainer.method.groups import Prompt
from trainer.method.loss import LossInputs, StepCounts, Sums, token_sums
from trainer.method.rollouts import problems_of_step
from trainer.method.teacher_traces import TraceReader
from trainer.method.update import Updater
from trainer.parallel.world import ALONE, World
from trainer.student.batches import TrainSequence
from trainer.student.optimizer import make_optimizer, set_learning_rate
from trainer.student.policy import Policy

ChosenTrace = tuple[Prompt, str]
"""(prompt, trace_id); the text stays in the store until its step."""


class Sft:
    """Takes the supervised steps."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        traces: TraceReader | None,
        prompts: Sequence[Prompt],
        on_problem: Callable[[int, int], None] = lambda done, total: None,
        world: World = ALONE,
    ) -> None:
        """Chooses the traces if there are supervised steps; `traces` is None where no step reads the store.

        `on_problem` is called with (problems done, problems in all).
        """
        self.config, self.seed, self.policy = config.sft, config.train.seed, policy
        # In the student's own tokens, whatever `guidance.loss` is.
        self.traces = traces and replace(traces, own_ids=False)
        self.chosen: list[ChosenTrace] = []
        if self.traces is not None and config.sft.steps:
            self.chosen = choose_traces(config.sft, self.traces, prompts, on_problem)
        self.optimizer = make_optimizer(policy.model, config.train)
        length = config.rollout.max_completion_length
        self.updater = Updater(
            policy, self.optimizer, config.train, token_mean, max_completion_length=length, world=world
        )

    def step(self, number: int) -> dict[str, Any]:
        """Takes the 1-based step `number`; returns its line of metrics.jsonl."""
        started = time.perf_counter()
        sequences = self.sequences_of(number)
        metrics = self.update(sequences, self.config.learning_rate)
        return {
            "step": 0,
            "sft/step": number,
            **{f"sft/{name}": metrics[name] for name in ("loss", "grad_norm", "entropy")},
            "sft/traces": len(sequences),
            "sft/tokens": metrics["train_tokens"],
            "sft/learning_rate": self.config.learning_rate,
            "seconds/sft": round(time.perf_counter() - started, 4),
        }

    def update(self, sequences: Sequence[TrainSequence], learning_rate: float) -> dict[str, float]:
        """Takes one optimizer step on the sequences; returns its metrics."""
        set_learning_rate(self.optimizer, learning_rate)
        # Of the text as written, whatever temperature the student samples at.
        with self.policy.at_temperature(1.0):
            return self.updater.optimizer_step(sequences)

    def sequences_of(self, number: int) -> list[TrainSequence]:
        """Returns the sequences of a step, a function of (chosen traces, seed, number)."""
        assert self.traces is not None, "there are chosen traces only where there is a store"
        per_step = self.config.traces_per_step
        chosen = problems_of_step(self.chosen, step=number, per_step=per_step, seed=self.seed)
        found = self.traces.query(list({prompt.problem.problem_id: prompt for prompt, _ in chosen}.values()))
        traces = {trace.trace_id: trace for each in found.values() for trace in each}
        sequences = []
        for prompt, trace_id in chosen:
            if trace_id not in traces:
                raise StoreError(f"trace {trace_id} was removed from the store while SFT trained on it")
            ids = self.traces.candidate(traces[trace_id], prompt).token_ids
            sequences.append(supervised(prompt.ids, ids))
        return sequences


def supervised(prompt_ids: tuple[int, ...], trace_ids: tuple[int, ...]) -> TrainSequence:
    """Returns the sequence of a trace in which all tokens count as the student's own."""
    return TrainSequence(prompt_ids=prompt_ids, response_ids=trace_ids, advantage=1.0, is_teacher=False)


def choose_traces(
    config: SftConfig,
    traces: TraceReader,
    prompts: Sequence[Prompt],
    on_problem: Callable[[int, int], None],
) -> list[ChosenTrace]:
    """Returns every trace that `sft.traces` chooses, in the order of problems, teachers and samples.

    Raises StoreError when there are fewer than a step needs.
    """
    chosen: list[ChosenTrace] = []
    for done, (prompt, candidates) in enumerate(traces.all_candidates(prompts), start=1):
        if config.traces == "shortest":
            candidates = sorted(candidates, key=lambda c: (len(c.token_ids), c.trace.trace_id))[:1]
        chosen += [(prompt, candidate.trace.trace_id) for candidate in candidates]
        on_problem(done, len(prompts))
    if len(chosen) < config.traces_per_step:
        raise StoreError(
            f"sft.traces_per_step = {config.traces_per_step}, but the store has {len(chosen)} traces "
            f"(sft.traces = {config.traces!r}) of the training problems that fit "
            f"rollout.max_completion_length = {traces.max_length}"
        )
    return chosen


def token_mean(inputs: LossInputs, counts: StepCounts) -> tuple[Tensor, Sums]:
    """Returns a micro-batch's share of -(1/T) * sum of log-probabilities, and its metrics."""
    loss = -inputs.logprobs.masked_fill(~inputs.response_mask, 0.0).sum() / counts.student_tokens
    return loss, token_sums({"entropy": inputs.entropy}, inputs.response_mask)
