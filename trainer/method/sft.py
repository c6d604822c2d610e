"""SFT: supervised steps on the store's verified traces, before RL or (`max_steps = 0`) alone.

    chosen traces --order--> a step's traces --store, student's tokens--> sequences --token mean-->
    optimizer step

    L = -(1 / T) * sum of log pi_theta of every trace token     T: the tokens of the whole optimizer step

Micro-batches, chunks of logits and the kind of optimizer are those of RL. The optimizer's state is SFT's
own: RL begins with a fresh one, since moments of another loss, at another learning rate, do not fit its
gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from store.errors import StoreError
from trainer.config import Config, SftConfig
from trainer.method.groups import Prompt
from trainer.method.loss import LossInputs, StepCounts, Sums, token_sums
from trainer.method.rollouts import problems_of_step
from trainer.method.teacher_traces import Candidate, TraceReader
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
        chosen: Sequence[ChosenTrace] = (),
        world: World = ALONE,
    ) -> None:
        """
        Args:
            traces: None where there are no supervised steps.
            chosen: traces to train on, see `choose_traces`.
        """
        self.config = config.sft
        self.seed = config.train.seed
        self.policy = policy
        self.traces = traces
        self.chosen = chosen
        self.optimizer = make_optimizer(policy.model, config.train)
        self.updater = Updater(
            policy,
            self.optimizer,
            config.train,
            token_mean,
            max_completion_length=config.rollout.max_completion_length,
            world=world,
        )

    def step(self, number: int) -> dict[str, Any]:
        """Takes the 1-based step `number`; returns its line of metrics.jsonl."""
        started = time.perf_counter()
        sequences = self.sequences_of(number)
        set_learning_rate(self.optimizer, self.config.learning_rate)
        # Of the text as written, whatever temperature the student samples at.
        with self.policy.at_temperature(1.0):
            metrics = self.updater.optimizer_step(sequences)
        return {
            "step": 0,
            "sft/step": number,
            "sft/loss": metrics["loss"],
            "sft/grad_norm": metrics["grad_norm"],
            "sft/entropy": metrics["entropy"],
            "sft/traces": len(sequences),
            "sft/tokens": metrics["train_tokens"],
            "sft/learning_rate": self.config.learning_rate,
            "seconds/sft": round(time.perf_counter() - started, 4),
        }

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
            candidate = self.traces.candidate(traces[trace_id], opens_think=prompt.opens_think)
            sequences.append(
                TrainSequence(
                    prompt_ids=prompt.ids,
                    response_ids=candidate.token_ids,
                    advantage=1.0,
                    # Trained as if the student had written it: all tokens count as student tokens.
                    is_teacher=False,
                )
            )
        return sequences

    def forget(self) -> None:
        """Frees the optimizer's state, once the last step is taken and saved."""
        own = {id(value) for state in self.optimizer.state.values() for value in state.values()}
        # bitsandbytes keeps every page that it ever allocated.
        if (pages := getattr(self.optimizer, "page_mng", None)) is not None:
            pages.paged_tensors[:] = [page for page in pages.paged_tensors if id(page) not in own]
        self.optimizer.state.clear()


CHOICES: dict[str, Callable[[Sequence[Candidate]], Sequence[Candidate]]] = {
    "all": lambda candidates: candidates,
    "shortest": lambda candidates: sorted(candidates, key=lambda c: (len(c.token_ids), c.trace.trace_id))[:1],
}
"""`sft.traces`: candidates of a problem -> those that are trained on."""


def choose_traces(
    config: SftConfig,
    traces: TraceReader,
    prompts: Sequence[Prompt],
    on_problem: Callable[[int, int], None] = lambda done, total: None,
) -> list[ChosenTrace]:
    """Returns every trace that `sft.traces` chooses, in the order of problems, teachers and samples.

    `on_problem` is called with (problems done, problems in all).

    Raises:
        StoreError: there are fewer than a step needs.
    """
    chosen: list[ChosenTrace] = []
    for done, (prompt, candidates) in enumerate(traces.all_candidates(prompts), start=1):
        chosen += [(prompt, c.trace.trace_id) for c in CHOICES[config.traces](candidates)]
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
    loss = -inputs.logprobs[inputs.response_mask].sum() / counts.tokens
    return loss, token_sums({"entropy": inputs.entropy}, inputs.response_mask)
