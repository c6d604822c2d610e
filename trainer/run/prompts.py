"""Problems and their prompts as the student sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from precompute.config_file import short
from precompute.problems.problem_files import usable_problems
from precompute.problems.prompts import demanded_form, prompt_warning, render_prompt, replaced_warning
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, ProblemsError
from store.records import Problem
from trainer.config import Config
from trainer.method.groups import Prompt
from trainer.method.rollouts import problems_of_step
from trainer.sampling.samplers import sampler_warning
from trainer.student.load import TEMPLATE_KEY
from trainer.telemetry.console import TrainReporter


def training_problems(config: Config, verifier: Verifier, reporter: TrainReporter) -> tuple[Problem, ...]:
    """Returns the problems of `problems.train` that can be used; a line says what is left out and why."""
    settings = config.problems
    if not settings.train.files:
        raise ConfigError("problems.train is not set: give a file of problems")
    return usable_problems(settings, settings.train, verifier, key="problems.train", warn=reporter.warned)[0]


def held_out_problems(
    config: Config, verifier: Verifier, reporter: TrainReporter
) -> dict[str, tuple[Problem, ...]]:
    """Returns the problems of each held-out set that can be used; none where `eval.every` is 0."""
    sets = config.eval_sets if config.eval.every else {}
    return {
        name: usable_problems(config.problems, files, verifier, key=eval_key(name), warn=reporter.warned)[0]
        for name, files in sets.items()
    }


def eval_key(name: str) -> str:
    """Returns the config key of a held-out set."""
    return f"eval.sets.{name}" if name else "problems.eval"


def warn_of_overlap(
    problems: Sequence[Problem], held_out: Mapping[str, Sequence[Problem]], reporter: TrainReporter
) -> None:
    """Warns of held-out problems whose question is trained on, too."""
    trained = {_texts(problem) for problem in problems}
    for name, others in held_out.items():
        shared = [problem for problem in others if _texts(problem) in trained]
        if shared:
            reporter.warned(
                f"{len(shared):,} of {len(others):,} problems of {eval_key(name)} "
                f"are in problems.train, too, e.g. {short(shared[0].question)}"
            )


def _texts(problem: Problem) -> tuple[str, ...]:
    """Returns the prompt's texts without differences in space."""
    return tuple(" ".join(text.split()) for _, text in problem.user_turns)


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
            user_template=student.user_template,
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
        short_ones = {prompt.problem.problem_id for prompt in fitting}
        first = next(problem for problem in problems if problem.problem_id not in short_ones)
        reporter.warned(
            f"{too_long:,} problems left out: prompts over rollout.max_prompt_length = {limit}, "
            f"e.g. {short(first.question)}"
        )
    for warning in (
        prompt_warning(tokenizer, fitting[0].text, key=TEMPLATE_KEY, template=student.chat_template),
        replaced_warning(problems, student.system_prompt, key="student.system_prompt"),
    ):
        if warning and warning not in reporter.warnings:
            reporter.warned(warning)
    return fitting


def checked_prompts(
    config: Config,
    problems: Sequence[Problem],
    held_out: Mapping[str, Sequence[Problem]],
    tokenizer: Any,
    model_config: Any,
    reporter: TrainReporter,
) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """Returns the prompts of the training problems and of each held-out set; warns of shared questions.

    Raises ConfigError for prompts and responses that are too long, ProblemsError for too few problems.
    """
    warn_of_overlap(problems, held_out, reporter)
    train = fitting_prompts(config, problems, tokenizer, reporter)
    held = {name: fitting_prompts(config, each, tokenizer, reporter) for name, each in held_out.items()}
    rollout, per_step = config.rollout, config.train.problems_per_step
    problems_of_step(train, step=1, per_step=per_step, seed=config.train.seed)
    inserts = config.guidance.insert != "trace"
    longest = longest_prompt(config, [prompt for prompts in (train, *held.values()) for prompt in prompts])
    limit = f"rollout.max_prompt_length = {longest}" if inserts else f"a {longest}-token prompt"
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest + rollout.max_completion_length > positions:
        raise ConfigError(
            f"rollout.max_completion_length = {rollout.max_completion_length} and {limit} "
            f"exceed the student's {positions} positions; set it to {max(positions - longest, 0)} at most"
        )
    if warning := sampler_warning(rollout):
        reporter.warned(warning)
    if inserts and max(len(prompt.ids) for prompt in train) + rollout.max_completion_length > longest:
        reporter.warned(f"a prompt of over {limit} tokens, with its insert, is not tried")
    return train, held


def longest_prompt(config: Config, prompts: Sequence[Prompt]) -> int:
    """Returns the most tokens of a prompt, those with an inserted part of a trace included."""
    if config.guidance.insert != "trace":
        return config.rollout.max_prompt_length
    return max(len(prompt.ids) for prompt in prompts)
