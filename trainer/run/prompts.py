"""Problems as the student sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from precompute.problems.prompts import prompt_warning, render_prompt
from store.errors import ProblemsError
from store.records import Problem
from trainer.config import Config
from trainer.method.groups import Prompt
from trainer.student.load import TEMPLATE_KEY
from trainer.telemetry.console import TrainReporter


def fitting_prompts(
    config: Config, problems: Sequence[Problem], tokenizer: Any, reporter: TrainReporter
) -> list[Prompt]:
    """Returns the prompts of all problems that fit; those that are too long are left out, with a warning.

    Raises:
        ProblemsError: none fits.
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
                )
            )
    if not fitting:
        raise ProblemsError(f"no problem has a prompt of at most rollout.max_prompt_length = {limit}")
    if too_long := len(problems) - len(fitting):
        reporter.warned(
            f"{too_long} problems have prompts over rollout.max_prompt_length = {limit}; left out"
        )
    return fitting


def warn_of_prompts(
    config: Config, tokenizer: Any, prompts: Sequence[Prompt], reporter: TrainReporter
) -> None:
    """Warns of prompts that a chat template or its absence makes in an unexpected way."""
    warning = prompt_warning(
        tokenizer, prompts[0].text, key=TEMPLATE_KEY, template=config.student.chat_template
    )
    if warning:
        reporter.warned(warning)
