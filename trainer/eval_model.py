"""`ampo eval`: one model, one problem file."""

from __future__ import annotations

from precompute.engines.transformers_engine import TransformersEngine
from precompute.verify import Verifier
from store.errors import ConfigError
from trainer.assemble import TrainReporter, fitting_prompts, usable_problems, warn_of_prompts
from trainer.config import Config
from trainer.evaluation import Evaluation, eval_sampling, evaluate
from trainer.policy import load_policy
from trainer.rewards import Judge
from trainer.rollout import demanded_form


def evaluate_model(config: Config, reporter: TrainReporter) -> Evaluation:
    """Samples `eval.samples` responses of each problem of `problems.eval` from `student.model`.

    Problems that cannot be judged, or whose prompts are too long, are reported and left out.
    """
    if not config.problems.eval:
        raise ConfigError("no problems to evaluate on: give --problems FILE or set problems.eval")
    policy = load_policy(config.student, temperature=1.0)
    with Verifier.configured(config.verify) as verifier:
        problems = usable_problems(config, "eval", verifier, reporter)
        prompts = fitting_prompts(config, problems, policy, reporter)
        warn_of_prompts(config, policy.tokenizer, prompts, reporter)
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
                on_sample=lambda drawn, total: reporter.sampling("evaluation", drawn, total),
            )
