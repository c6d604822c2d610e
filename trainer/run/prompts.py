"""Problems and their prompts as the student sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from precompute.problems.problem_files import configured_problems, split_by_gold
from precompute.problems.prompts import demanded_form, prompt_warning, render_prompt
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, ProblemsError
from store.records import Problem
from trainer.config import Config
from trainer.method.groups import Prompt
from trainer.method.rollouts import problems_of_step
from trainer.sampling.samplers import sampler_warning
from trainer.student.load import TEMPLATE_KEY
from trainer.telemetry.console import TrainReporter


def usable_problems(
    config: Config, which: Literal["train", "eval"], verifier: Verifier, reporter: TrainReporter
) -> list[Problem]:
    """Returns the problems of `problems.train` or `problems.eval` whose gold answers can be parsed."""
    path = getattr(config.problems, which)
    if not path:
        if which == "eval":
            return []
        raise ConfigError("problems.train is not set: give a Parquet or JSONL file of problems")
    loaded = configured_problems(config.problems, which)
    usable, unparseable = split_by_gold(loaded.problems, verifier)
    for problem in unparseable:
        reporter.warned(
            f"{path}: gold answer {problem.answer!r} of {problem.problem_id} cannot be parsed; left out"
        )
    if not usable:
        raise ProblemsError(f"problems.{which}: {path}: no gold answer of its problems can be parsed")
    return list(usable)


def fitting_prompts(
    config: Config, problems: Sequence[Problem], tokenizer: Any, reporter: TrainReporter
) -> list[Prompt]:
    """Returns the prompts of all problems that fit; warns of those that do not, and of an odd chat template.

    Raises ProblemsError when none fits.
    """
    limit, student, fitting = config.rollout.max_prompt_length, config.student, []
    for problem in problems:
        rendered = render_prompt(
            tokenizer,
            problem,
            system_prompt=student.system_prompt,
            chat_template_kwargs=student.chat_template_kwargs,
        )
        if len(rendered.ids) <= limit:
            fitting.append(
                Prompt(
                    problem=problem,
                    text=rendered.text,
                    ids=rendered.ids,
                    opens_think=rendered.opens_think,
                    answer_form=demanded_form(student, problem),
                )
            )
    if not fitting:
        raise ProblemsError(f"no problem has a prompt of at most rollout.max_prompt_length = {limit}")
    if too_long := len(problems) - len(fitting):
        reporter.warned(
            f"{too_long} problems have prompts over rollout.max_prompt_length = {limit}; left out"
        )
    warning = prompt_warning(tokenizer, fitting[0].text, key=TEMPLATE_KEY, template=student.chat_template)
    if warning and warning not in reporter.warnings:
        reporter.warned(warning)
    return fitting


def checked_prompts(
    config: Config,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    tokenizer: Any,
    model_config: Any,
    reporter: TrainReporter,
) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the prompts of the training and of the held-out problems.

    Raises ConfigError for prompts and responses that are too long, ProblemsError for too few problems.
    """
    train = fitting_prompts(config, problems, tokenizer, reporter)
    held = fitting_prompts(config, held_out, tokenizer, reporter) if held_out else []
    rollout, per_step = config.rollout, config.train.problems_per_step
    problems_of_step(train, step=1, per_step=per_step, seed=config.train.seed)
    longest = max(len(prompt.ids) for prompt in (*train, *held))
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest + rollout.max_completion_length > positions:
        raise ConfigError(
            f"rollout.max_completion_length = {rollout.max_completion_length} and a {longest}-token prompt "
            f"exceed the student's {positions} positions; set it to {max(positions - longest, 0)} at most"
        )
    if warning := sampler_warning(rollout):
        reporter.warned(warning)
    return train, held
