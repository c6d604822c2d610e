"""The warm-up: supervised steps on the store's verified traces, before RL or (`max_steps = 0`) alone.

    lessons --order--> a step's lessons --store, student's tokens--> sequences --token mean--> optimizer step

    L = -(1 / T) * sum of log pi_theta of every trace token     T: the tokens of the whole optimizer step

The weights that train, the micro-batches, the chunks of logits and the kinds of optimizer are those of RL.
The optimizer's state is the warm-up's own: RL begins with a fresh one, since moments of another loss, at
another learning rate, say nothing of its gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from store.errors import StoreError
from trainer.config import Config, GuidanceConfig, TrainConfig
from trainer.method.loss import LossInputs, Partial
from trainer.method.objective import StepCounts
from trainer.method.rollouts import Prompt
from trainer.method.schedule import places_of_step
from trainer.method.teacher_traces import ASKED_AT_ONCE, CandidateStore, StudentTrace, TraceTokens
from trainer.method.update import Updater, UpdateReport
from trainer.parallel.world import ALONE, World
from trainer.student.batches import TrainSequence
from trainer.student.optimizer import make_optimizer, set_learning_rate
from trainer.student.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A trace to train on; its text stays in the store until its step comes."""

    prompt: Prompt
    trace_id: str


class Warmup:
    """Takes the supervised steps."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        store: CandidateStore | None,
        lessons: Sequence[Lesson],
        tokens: TraceTokens,
        world: World = ALONE,
    ) -> None:
        self.config = config.warmup
        self.seed = config.train.seed
        self.teachers = config.guidance.teachers
        self.policy = policy
        self.store = store
        self.lessons = lessons
        self.tokens = tokens
        self.optimizer = make_optimizer(policy.model, config.train)
        self.updater = Updater(
            policy,
            self.optimizer,
            config.train,
            config.guidance,
            max_completion_length=config.rollout.max_completion_length,
            loss=token_mean,
            world=world,
        )

    def step(self, number: int) -> dict[str, Any]:
        """Takes the 1-based step `number`; returns its line of metrics.jsonl."""
        started = time.perf_counter()
        sequences = self.sequences_of(number)
        set_learning_rate(self.optimizer, self.config.learning_rate)
        # Of what is written, not of what is drawn.
        with self.policy.at_temperature(1.0):
            report = self.updater.optimizer_step(sequences)
        return _metrics(number, report, len(sequences), self.config.learning_rate, started)

    def sequences_of(self, number: int) -> list[TrainSequence]:
        """What the step trains on: a pure function of (lessons, seed, number)."""
        places = places_of_step(
            len(self.lessons), step=number, per_step=self.config.traces_per_step, seed=self.seed
        )
        chosen = [self.lessons[place] for place in places]
        assert self.store is not None, "there are lessons only where there is a store"
        found = self.store.candidates(
            list(dict.fromkeys(lesson.prompt.problem.problem_id for lesson in chosen)),
            teachers=self.teachers or None,
        )
        traces = {trace.trace_id: trace for each in found.values() for trace in each}
        for lesson in chosen:
            if lesson.trace_id not in traces:
                raise StoreError(
                    f"trace {lesson.trace_id} was taken out of the store while the warm-up learnt from it"
                )
        return [
            _sequence(
                lesson.prompt,
                self.tokens.of(traces[lesson.trace_id], opens_think=lesson.prompt.opens_think),
            )
            for lesson in chosen
        ]

    def forget(self) -> None:
        """Frees the optimizer's state, once the last step is taken and saved."""
        own = {id(value) for state in self.optimizer.state.values() for value in state.values()}
        # bitsandbytes keeps every page it ever gave out.
        if (pages := getattr(self.optimizer, "page_mng", None)) is not None:
            pages.paged_tensors[:] = [page for page in pages.paged_tensors if id(page) not in own]
        self.optimizer.state.clear()


def make_warmup(
    config: Config,
    policy: Policy,
    store: CandidateStore | None,
    tokens: TraceTokens,
    prompts: Sequence[Prompt],
    on_problem: Callable[[int, int], None] = lambda done, total: None,
    world: World = ALONE,
) -> Warmup:
    """The warm-up with all its lessons found; without `sft_steps` it has none. Raises as `find_lessons`."""
    lessons: list[Lesson] = []
    if config.warmup.sft_steps and store is not None:
        lessons = find_lessons(config, store, tokens, prompts, on_problem)
    return Warmup(config, policy, store, lessons, tokens, world)


def find_lessons(
    config: Config,
    store: CandidateStore,
    tokens: TraceTokens,
    prompts: Sequence[Prompt],
    on_problem: Callable[[int, int], None] = lambda done, total: None,
) -> list[Lesson]:
    """Every trace that may be trained on, in the order of the problems, teachers and samples.

    A trace longer than `rollout.max_completion_length` is left out and never cut, as in guidance.
    `on_problem` is called with (problems gone through, problems in all). Raises StoreError when there are
    fewer than a step needs.
    """
    lessons = []
    for start in range(0, len(prompts), ASKED_AT_ONCE):
        part = prompts[start : start + ASKED_AT_ONCE]
        found = store.candidates(
            [prompt.problem.problem_id for prompt in part], teachers=config.guidance.teachers or None
        )
        for prompt in part:
            traces = [tokens.of(t, opens_think=prompt.opens_think) for t in found[prompt.problem.problem_id]]
            fitting = [t for t in traces if len(t.token_ids) <= config.rollout.max_completion_length]
            lessons += [
                Lesson(prompt=prompt, trace_id=trace.trace.trace_id)
                for trace in LESSONS[config.warmup.sft_traces](fitting)
            ]
        on_problem(start + len(part), len(prompts))
    if len(lessons) < config.warmup.traces_per_step:
        raise StoreError(
            f"warmup.traces_per_step = {config.warmup.traces_per_step}, but the store has {len(lessons)} "
            f"traces (sft_traces = {config.warmup.sft_traces!r}) of the training problems that fit "
            f"rollout.max_completion_length = {config.rollout.max_completion_length}"
        )
    return lessons


def _shortest(traces: Sequence[StudentTrace]) -> list[StudentTrace]:
    """In student tokens; ties go to the smaller trace_id."""
    return sorted(traces, key=lambda t: (len(t.token_ids), t.trace.trace_id))[:1]


LESSONS: dict[str, Callable[[Sequence[StudentTrace]], Sequence[StudentTrace]]] = {
    "all": lambda traces: traces,
    "shortest": _shortest,
}
"""`warmup.sft_traces`: a problem's traces that fit -> those that are trained on."""


def token_mean(
    inputs: LossInputs, train: TrainConfig, guidance: GuidanceConfig, counts: StepCounts
) -> tuple[Tensor, Partial]:
    """A micro-batch's share of -(1/T) * sum of log-probabilities, and what is reported of it."""
    loss = -inputs.logprobs[inputs.response_mask].sum() / counts.tokens
    return loss, Partial(
        loss=float(loss.detach()),
        entropy=float(inputs.entropy.detach()[inputs.response_mask].sum()),
        kl=0.0,
        clip_low=0.0,
        clip_high=0.0,
        sampler_difference=None,
        sampler_capped=None,
    )


def _sequence(prompt: Prompt, trace: StudentTrace) -> TrainSequence:
    return TrainSequence(
        prompt_ids=prompt.ids,
        response_ids=trace.token_ids,
        advantage=1.0,
        # Learnt as if the student had written it: the counts of student tokens are those of all tokens.
        is_teacher=False,
    )


def _metrics(
    number: int, report: UpdateReport, traces: int, learning_rate: float, started: float
) -> dict[str, Any]:
    return {
        "step": 0,
        "sft/step": number,
        "sft/loss": report.loss,
        "sft/grad_norm": report.grad_norm,
        "sft/entropy": report.entropy,
        "sft/traces": traces,
        "sft/tokens": report.tokens,
        "sft/learning_rate": learning_rate,
        "seconds/warmup": round(time.perf_counter() - started, 4),
    }
