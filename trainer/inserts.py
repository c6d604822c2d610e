"""Part of a trace in the prompt: the student completes it in a second sampling round (`guidance.insert`).

    prefix     prompt, first tokens of the trace | the student's tokens       trains under the plain prompt
    hint       prompt with the first part of the trace | the student's tokens     trains under that prompt
    context    its own samples, and their log-probabilities with all of the trace in the prompt (SDFT)

A prompt that is over `rollout.max_prompt_length` with its insert is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from precompute.engines import Completion, Engine, Requests, Sampling
from precompute.engines.decoding import response_decoder
from precompute.problems.prompts import render_prompt
from trainer.config import Config, GuidanceConfig
from trainer.method.groups import Group, Prompt, Rewarder, Sample
from trainer.method.guidance import guidance_size, placed
from trainer.method.rollouts import rewarded_samples, sampling_of
from trainer.method.teacher_traces import Candidate
from trainer.student.batches import fill, pad
from trainer.student.policy import Policy


@dataclass(slots=True, eq=False)
class Inserter:
    """Inserts parts of traces, and samples or scores with them."""

    config: Config
    policy: Policy
    engine: Engine
    rewarder: Rewarder

    def __call__(
        self, groups: Sequence[Group], ranked: Mapping[str, Sequence[Candidate]], step: int
    ) -> dict[str, Group]:
        """Returns problem_id -> group, where something could be inserted with its new members.

        `ranked`: problem_id -> candidates, best first.
        """
        found = {group.problem_id: group for group in groups}
        waiting = [group for group in groups if ranked[group.problem_id]]
        if self.config.guidance.insert == "context":
            own = self._distilled(waiting, ranked)
            return found | {g.problem_id: placed(g, own[g.problem_id], self.config, step) for g in waiting}
        for level, share in enumerate(shares_at(step, self.config.train.max_steps, self.config.guidance)):
            key = f"step {step} insert {level}"
            samples = self._sampled(waiting, ranked, share, key=key)
            for group in waiting:
                members = samples[group.problem_id]
                if self.config.guidance.place == "failed":
                    members = [sample for sample in members if sample.is_correct]
                if members:
                    found[group.problem_id] = placed(group, members, self.config, step)
            waiting = [g for g in waiting if not any(sample.is_correct for sample in samples[g.problem_id])]
        return found

    def _sampled(
        self, groups: Sequence[Group], ranked: Mapping[str, Sequence[Candidate]], share: float, *, key: str
    ) -> dict[str, list[Sample]]:
        """Returns problem_id -> new rewarded samples: a sample for each trace, or G of them `instead`."""
        rollout, is_prefix = self.config.rollout, self.config.guidance.insert == "prefix"
        parts: list[tuple[Group, Candidate, Prompt]] = []
        indices = []
        for group in groups:
            for j, candidate in enumerate(self._chosen(group, ranked[group.problem_id])):
                prompt = self.inserted(group.prompt, candidate, share)
                if len(prompt.ids) <= rollout.max_prompt_length:
                    indices.append((len(parts), j))
                    parts.append((group, candidate, prompt))
        starts = [prompt.ids[len(group.prompt.ids) :] if is_prefix else () for group, _, prompt in parts]
        engine = Completing(self.engine, {f"{p}/{j}": starts[p] for p, j in indices}, self.policy)
        prompts = [prompt for *_, prompt in parts]
        found: dict[str, list[Sample]] = {group.problem_id: [] for group in groups}
        with self.policy.computing():
            samples = dict(
                rewarded_samples(
                    engine,
                    self.rewarder,
                    prompts,
                    sampling_of(rollout),
                    indices,
                    seed=self.config.train.seed,
                    key=key,
                )
            )
        for p, j in indices:
            group, candidate, prompt = parts[p]
            sample = replace(
                samples[p, j],
                trace_id=candidate.trace.trace_id,
                teacher=candidate.trace.teacher,
                n_guided=len(starts[p]),
                prompt_ids=None if is_prefix else prompt.ids,
            )
            found[group.problem_id].append(sample)
        return found

    def _chosen(self, group: Group, best_first: Sequence[Candidate]) -> list[Candidate]:
        """Returns the trace of each new sample: the k best, in turn."""
        size = guidance_size(group, len(best_first), self.config.guidance)
        is_instead = self.config.guidance.place == "instead"
        return [best_first[j % size] for j in range(len(group.samples) if is_instead else size)]

    def inserted(self, prompt: Prompt, candidate: Candidate, share: float) -> Prompt:
        """Returns the prompt with the first share of the trace: of its tokens behind the prompt (never the
        EOS), or of its text in the user turn."""
        if self.config.guidance.insert == "prefix":
            end = min(max(round(share * len(candidate.token_ids)), 1), len(candidate.token_ids) - 1)
            return replace(prompt, ids=prompt.ids + candidate.token_ids[:end])
        text = candidate.sample.text
        hint = self.config.guidance.hint_text + text[: round(share * len(text))]
        problem, student, turns = prompt.problem, self.config.student, prompt.problem.turns
        if turns:
            turns = (*turns[:-1], (turns[-1][0], turns[-1][1] + hint))
        rendered = render_prompt(
            self.policy.tokenizer,
            replace(problem, question=problem.question + hint, turns=turns),
            system_prompt=student.system_prompt,
            chat_template_kwargs=student.chat_template_kwargs,
            user_template=student.user_template,
        )
        return replace(prompt, ids=rendered.ids, text=rendered.text)

    def _distilled(
        self, groups: Sequence[Group], ranked: Mapping[str, Sequence[Candidate]]
    ) -> dict[str, list[Sample]]:
        """Returns problem_id -> the student's samples, with log-probabilities under its prompt with the best
        trace; [] where that prompt is too long."""
        found: dict[str, list[Sample]] = {group.problem_id: [] for group in groups}
        rows: list[tuple[Group, Candidate, Sample, tuple[int, ...]]] = []
        for group in groups:
            candidate = ranked[group.problem_id][0]
            prompt = self.inserted(group.prompt, candidate, 1.0)
            if len(prompt.ids) <= self.config.rollout.max_prompt_length:
                rows += [(group, candidate, sample, prompt.ids) for sample in group.samples]
        lengths = [len(ids) + len(sample.token_ids) for *_, sample, ids in rows]
        cuts = fill(lengths, self.config.train.max_tokens_per_microbatch)
        values = self.policy.response_logprobs(
            pad(
                [(*rows[i][3], *rows[i][2].token_ids) for i in cut],
                [len(rows[i][2].token_ids) for i in cut],
                pad_id=self.policy.pad_id,
                device=self.policy.device,
            )
            for cut in cuts
        )
        logprobs = {i: tuple(islice(values, len(rows[i][2].token_ids))) for cut in cuts for i in cut}
        for i, (group, candidate, sample, _) in enumerate(rows):
            trace = candidate.trace
            own = replace(sample, trace_id=trace.trace_id, teacher=trace.teacher, logprobs=logprobs[i])
            found[group.problem_id].append(own)
        return found


def shares_at(step: int, steps: int, guidance: GuidanceConfig) -> tuple[float, ...]:
    """Returns the shares that a 1-based step of `steps` tries, in order."""
    if guidance.share_end is None:
        return guidance.share
    fall = 0.5 * (1 + math.cos(math.pi * (step - 1) / max(steps - 1, 1)))
    return (guidance.share_end + (guidance.share[0] - guidance.share_end) * fall,)


@dataclass(frozen=True, slots=True)
class Completing:
    """An engine whose completions begin with the last tokens of their prompt."""

    engine: Engine
    starts: Mapping[str, tuple[int, ...]]
    """request_id -> these tokens."""
    policy: Policy

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request; its first tokens have a log-probability of 0."""
        decode = response_decoder(self.policy.tokenizer)
        for completion in self.engine.generate(requests, sampling):
            start, logprobs = self.starts[completion.request_id], completion.logprobs
            ids = start + completion.token_ids
            if logprobs:
                logprobs = (0.0,) * len(start) + logprobs
            yield replace(completion, token_ids=ids, text=decode(ids), logprobs=logprobs)

    def close(self) -> None:
        """Does nothing: the engine is in use elsewhere."""
