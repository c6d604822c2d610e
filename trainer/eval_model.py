"""`ampo eval`: one model, one problem file."""

from __future__ import annotations

from precompute.engines.transformers_engine import TransformersEngine
from precompute.problems import load_problems, split_by_gold
from precompute.verify import Verifier
from store.errors import ConfigError
from trainer.config import Config
from trainer.evaluation import Evaluation, eval_sampling, evaluate
from trainer.policy import load_policy
from trainer.rewards import Judge
from trainer.rollout import demanded_form, student_prompts


def evaluate_model(config: Config) -> Evaluation:
    """Samples `eval.samples` responses of each problem of `problems.eval` from `student.model`."""
    if not config.problems.eval:
        raise ConfigError("no problems to evaluate on: give --problems FILE or set problems.eval")
    loaded = load_problems(
        config.problems.eval,
        question_column=config.problems.question_column,
        answer_column=config.problems.answer_column,
    )
    policy = load_policy(config.student, temperature=1.0)
    with Verifier(
        workers=config.verify.workers, timeout=config.verify.timeout, memory_mb=config.verify.memory_mb
    ) as verifier:
        problems, _ = split_by_gold(loaded.problems, verifier)
        prompts, _ = student_prompts(
            problems, policy.tokenizer, config.student, max_prompt_length=config.rollout.max_prompt_length
        )
        judge = Judge(
            verifier,
            answer_form=demanded_form(config.student, problems),
            format_weight=config.train.format_weight,
        )
        with policy.computing():
            return evaluate(
                TransformersEngine(policy.model, policy.tokenizer, batch_size=config.rollout.batch_size),
                judge,
                prompts,
                eval_sampling(config.eval, config.rollout),
                samples=config.eval.samples,
                k=config.eval.k,
                seed=config.train.seed,
            )
