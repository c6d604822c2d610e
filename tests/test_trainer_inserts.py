"""Parts of traces in the prompt: prefixes that the student completes, hints, and its samples in context."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import token_logprobs
from run_examples import PROBLEMS, config_of, make_world, prompt_of, sample_of, updater_of
from test_trainer_loss import COUNTS, INPUTS

from precompute.engines import Completion
from precompute.verify.verifier import Verifier
from store.reader import TraceStore
from trainer.config import GuidanceConfig, TrainConfig
from trainer.inserts import Completing, Inserter, shares_at
from trainer.method.groups import Group, Rewarder
from trainer.method.loss import GUIDED_LOSSES, make_policy_loss
from trainer.method.teacher_traces import TraceReader
from trainer.method.update import count, sequences_of
from trainer.sampling.samplers import SharedSampler
from trainer.student.batches import TrainSequence
from trainer.student.policy import Policy

# Row 0: a token of the trace (p = 0.6), then one of the student's (p = 0.2, p_old = 0.25); row 1 is its own.
BEGUN = replace(INPUTS, guided_mask=torch.tensor([[True, False], [False, False]]))


def test_a_begun_response_trains_its_tokens_apart() -> None:
    # f(0.6) = 0.6/0.7 and min(0.8, 0.8) = 0.8 with A = 1; row 1: -5.8 by test_trainer_loss; all / (2 * 2).
    options = TrainConfig(loss_type="grpo", entropy_coef=0.0)
    found, sums = make_policy_loss(options, GuidanceConfig())(BEGUN, COUNTS)
    assert float(found) == pytest.approx(-(6 / 7 + 0.8 - 5.8) / 4)
    assert int(sums["entropy"][1]) == 3  # student tokens
    # Weight 0 masks the prefix out; -log 0.6 has a denominator of its own, the one guided token.
    masked = make_policy_loss(options, GuidanceConfig())(BEGUN, replace(COUNTS, guided_weight=0.0))[0]
    assert float(masked) == pytest.approx(-(0.8 - 5.8) / 4)
    nll = make_policy_loss(options, GuidanceConfig(loss="nll"))(BEGUN, replace(COUNTS, guided_tokens=1))[0]
    assert float(nll) == pytest.approx(-math.log(0.6) - (0.8 - 5.8) / 4)


def test_what_is_read_of_a_whole_response_is_read_of_the_own_tokens_alone() -> None:
    # s = 0.2 / 0.25 = 0.8 of one token, not sqrt(1.5 * 0.8); H = 2 of the second token, not 1.5.
    alone = replace(BEGUN, response_mask=torch.ones(2, 2, dtype=torch.bool))
    gspo = TrainConfig(loss_type="grpo", entropy_coef=0.0, importance_sampling_level="sequence")
    found = float(make_policy_loss(gspo, GuidanceConfig())(alone, replace(COUNTS, guided_weight=0.0))[0])
    assert found == pytest.approx(-(0.8 - 2 * 2.0) / 4)
    srft = TrainConfig(loss_type="grpo", entropy_coef=0.0, objective="srft")
    found = float(make_policy_loss(srft, GuidanceConfig())(alone, replace(COUNTS, guided_weight=0.0))[0])
    assert found == pytest.approx(-(0.1 * math.exp(2) * math.log(0.2) - math.log(0.5) - math.log(0.4)) / 4)
    # A guided loss sees the first token alone: H = 1, over one guided token; the others as above.
    guided = make_policy_loss(
        TrainConfig(loss_type="grpo", entropy_coef=0.0), GuidanceConfig(loss="nll_entropy")
    )
    found = float(guided(alone, replace(COUNTS, guided_tokens=1))[0])
    assert found == pytest.approx(-0.5 * math.exp(-1) * math.log(0.6) - (0.8 - 5.8) / 4)


def test_prefix_rft_trains_the_fifth_of_a_prefix_that_is_least_certain() -> None:
    # Five guided tokens and one that is not: one of the five is kept, the third, with entropy 5.
    logprobs = torch.log(torch.tensor([[0.5, 0.5, 0.2, 0.5, 0.5, 0.5]]))
    inputs = replace(
        INPUTS,
        logprobs=logprobs,
        old_logprobs=torch.log(torch.tensor([[0.5, 0.5, 0.25, 0.5, 0.5, 0.5]])),
        entropy=torch.tensor([[1.0, 2.0, 5.0, 4.0, 3.0, 9.0]]),
        response_mask=torch.tensor([[True] * 5 + [False]]),
        advantages=torch.tensor([[2.0]]),
    )
    terms, weight, _ = GUIDED_LOSSES["policy_uncertain"](inputs, COUNTS, GuidanceConfig())
    assert terms[0, :5].tolist() == pytest.approx([0, 0, 0.8 * 2.0, 0, 0])
    assert weight is None


def test_self_distillation_weighs_each_token_by_what_the_context_would_change() -> None:
    # p = 0.6 and 0.2, in context 0.3 and 0.8: log(1/2) log 0.6 and log 4 log 0.2, over two tokens.
    inputs = replace(INPUTS, teacher_logprobs=torch.log(torch.tensor([[0.3, 0.8], [1.0, 1.0]])))
    counts = replace(COUNTS, guided_tokens=2)
    terms, weight, metrics = GUIDED_LOSSES["self_kl"](inputs, counts, GuidanceConfig())
    expected = [math.log(0.5) * math.log(0.6), math.log(4) * math.log(0.2)]
    assert terms[0].tolist() == pytest.approx(expected)
    assert weight == 0.5
    assert metrics["guided/kl"][0].tolist() == pytest.approx([math.log(2), -math.log(4)])


def test_shares_stay_or_fall_as_a_cosine_does() -> None:
    assert shares_at(3, 5, GuidanceConfig()) == (0.25, 0.5, 0.75)
    falling = GuidanceConfig(share=(0.95,), share_end=0.05)
    # Half-way between 0.95 and 0.05.
    found = [shares_at(step, 5, falling) for step in (1, 3, 5)]
    assert found == [pytest.approx((share,)) for share in (0.95, 0.5, 0.05)]


@pytest.mark.parametrize(
    "options",
    [
        {"insert": "hint", "place": "buffer"},
        {"insert": "prefix", "loss": "shaped_ratio"},
        {"insert": "context"},
        {"loss": "self_kl"},
        {"insert": "prefix", "share_end": 0.1},
    ],
)
def test_keys_that_conflict_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"insert =|share_end"):
        GuidanceConfig(**options)


class Inserting:
    """An Inserter over the tiny world, with a group of a problem that has traces."""

    def __init__(self, path: Path, policy: Policy, verifier: Verifier, **guidance: Any) -> None:
        options = {f"guidance__{key}": value for key, value in guidance.items()}
        self.config = config_of(make_world(path), path, rollout__max_prompt_length=128, **options)
        rewarder = Rewarder(verifier, weights=self.config.rewards, max_length=24)
        self.insert = Inserter(self.config, policy, SharedSampler(policy, batch_size=8), rewarder)
        prompt = prompt_of(PROBLEMS[4], ids=tuple(policy.tokenizer("<user>4+4<assistant>")["input_ids"]))
        self.group = Group(prompt=prompt, samples=tuple(sample_of() for _ in range(4)))
        reader = TraceReader(store=TraceStore(path / "traces"), student=policy, max_length=99)
        self.traces = reader.candidates(prompt, reader.query([prompt])[prompt.problem.problem_id])[:1]

    def __call__(self) -> Group:
        name = self.group.problem_id
        return self.insert([self.group], {name: self.traces}, 1)[name]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("verifier")
    with Verifier(config_of(path, path).verify) as verifier:
        yield verifier


def test_a_prefix_is_completed_by_the_student(tmp_path: Path, policy: Policy, verifier: Verifier) -> None:
    made = Inserting(tmp_path, policy, verifier, insert="prefix", place="instead", k=1, share=[0.5])
    group, trace = made(), made.traces[0]
    half = round(0.5 * len(trace.token_ids))
    assert not group.own_train
    assert len({sample.token_ids for sample in group.extra}) == 4  # each has a seed of its own
    for sample in group.extra:
        assert (sample.n_guided, sample.is_teacher, sample.trace_id) == (half, False, trace.trace.trace_id)
        assert sample.token_ids[:half] == trace.token_ids[:half]
        assert sample.text.startswith(trace.sample.text[:half])  # one token a character
        assert sample.logprobs is not None
        assert sample.logprobs[:half] == (0.0,) * half
        assert all(sample.logprobs[half:])
    rows = sequences_of([group], [[1.0] * 4])
    assert {row.prompt_ids for row in rows} == {group.prompt.ids}
    counts = count(rows, 24)
    total = sum(len(row.response_ids) for row in rows)
    assert (counts.guided_tokens, counts.student_tokens) == (4 * half, total - 4 * half)


def test_a_prefix_of_all_but_the_eos_solves_and_replaces_a_failed_sample(
    tmp_path: Path, policy: Policy, verifier: Verifier
) -> None:
    made = Inserting(tmp_path, policy, verifier, insert="prefix", place="failed", k=1, share=[0.1, 1.0])
    text = made.traces[0].sample.text

    class Ending:
        """An engine that writes the EOS behind the whole trace, and nonsense behind a shorter prefix."""

        def generate(self, requests: Any, sampling: Any) -> Any:
            for request in requests:
                whole = len(request.prompt_ids) == len(made.group.prompt.ids) + len(text)
                ids = (policy.eos_id,) if whole else (9, policy.eos_id)
                yield Completion(request_id=request.request_id, token_ids=ids, text="")

        def close(self) -> None: ...

    made.insert.engine = Ending()
    group = made()
    (sample,) = group.guidance.values()
    assert sample.is_correct
    assert sample.text == text
    assert sample.n_guided == len(text)
    made.insert.config = config_of(tmp_path, tmp_path, guidance__insert="prefix", guidance__share=[0.1])
    assert made() == made.group  # an unsolved one replaces nothing


def test_a_hint_is_part_of_the_user_turn(tmp_path: Path, policy: Policy, verifier: Verifier) -> None:
    made = Inserting(tmp_path, policy, verifier, insert="hint", place="instead", k=1, share=[0.5])
    group, text = made(), made.traces[0].sample.text
    hint = "\n\nA correct solution, or the first part of one:\n" + text[: round(0.5 * len(text))]
    expected = policy.tokenizer(f"<user>4+4{hint}<assistant>")["input_ids"]
    for sample in group.extra:
        assert (sample.prompt_ids, sample.n_guided) == (tuple(expected), 0)
    rows = sequences_of([group], [[1.0] * 4])
    assert {row.prompt_ids for row in rows} == {tuple(expected)}
    made.insert.config = config_of(tmp_path, tmp_path, guidance__insert="hint", rollout__max_prompt_length=20)
    assert made() == made.group  # over the longest prompt nothing is tried


def test_samples_in_context_keep_their_tokens_and_get_its_log_probs(
    tmp_path: Path, policy: Policy, verifier: Verifier
) -> None:
    made = Inserting(tmp_path, policy, verifier, insert="context", place="instead", k=1, loss="self_kl")
    made.group = replace(made.group, samples=(sample_of(), sample_of(token_ids=(30, 31, 32, 1))))
    group, trace = made(), made.traces[0]
    prompt = made.insert.inserted(made.group.prompt, trace, 1.0).ids
    assert trace.sample.text in policy.tokenizer.decode(prompt)
    for own, sample in zip(made.group.samples, group.extra, strict=True):
        assert sample.token_ids == own.token_ids
        ids = torch.tensor([[*prompt, *own.token_ids]])
        expected = token_logprobs(policy.model(ids).logits, ids)[0, len(prompt) :]
        assert sample.logprobs == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_first_tokens_of_a_response_are_guided_wherever_it_is_cut(policy: Policy) -> None:
    rows = [
        TrainSequence(prompt_ids=(2,), response_ids=(9, 8, 7), advantage=1.0, is_teacher=False, n_guided=2),
        TrainSequence(prompt_ids=(2, 40, 41), response_ids=(9, 1), advantage=1.0, is_teacher=True),
        TrainSequence(prompt_ids=(2, 40), response_ids=(9, 1), advantage=1.0, is_teacher=False),
    ]
    inputs = updater_of(policy, TrainConfig())._inputs(rows)
    assert inputs.guided_mask is not None
    assert inputs.guided_mask.nonzero().tolist() == [[0, 1], [0, 2], [1, 3], [1, 4]]
    assert updater_of(policy, TrainConfig())._inputs(rows[1:]).guided_mask is None


def test_completing_leaves_unknown_log_probs_unknown(policy: Policy) -> None:
    class Silent:
        def generate(self, requests: Any, sampling: Any) -> Any:
            yield Completion(request_id="0/0", token_ids=(9, 1), text="")

        def close(self) -> None: ...

    engine = Completing(Silent(), {"0/0": (30, 31)}, policy)
    (found,) = engine.generate([], None)  # type: ignore[arg-type]
    assert (found.token_ids, found.logprobs) == ((30, 31, 9, 1), ())
