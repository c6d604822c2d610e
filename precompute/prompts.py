"""Turns a problem into the prompt that a model sees, exactly: messages, text, token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from precompute.config import AnswerForm, TeacherConfig
from store.errors import ConfigError
from store.records import Problem, TeacherRecord, content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as sent."""

    text: str
    """With every special token written out."""
    ids: tuple[int, ...]
    """[P], the text's token ids; nothing is added to them."""
    opens_think: bool
    """The prompt ends inside a `<think>` block: the response begins as thought."""


def system_turn(problem: Problem, system_prompt: str | None) -> str:
    """What the system turn says: `system_prompt`, or for None the problem's own; empty: no such turn."""
    return (problem.system_prompt or "") if system_prompt is None else system_prompt


def build_messages(problem: Problem, system_prompt: str | None) -> list[dict[str, str]]:
    """The chat of one problem: a system turn, unless it is empty, and the question as the user's."""
    system = system_turn(problem, system_prompt)
    question = {"role": "user", "content": problem.question}
    return [{"role": "system", "content": system}, question] if system else [question]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    *,
    system_prompt: str | None,
    chat_template_kwargs: Mapping[str, Any],
) -> Prompt:
    """The prompt through the tokenizer's chat template, or `plain_text` where it has none.

    Raises ConfigError when the template refuses the messages (some know no system turn).
    """
    messages = build_messages(problem, system_prompt)
    if tokenizer.chat_template is None:
        text = plain_text(messages, bos_token=tokenizer.bos_token)
    else:
        text = _through_template(tokenizer, messages, chat_template_kwargs)
    # The text has its special tokens already: adding them again would double the BOS.
    # Whoever uses the ids checks their number against the model; a warning would only repeat it.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Prompt(text=text, ids=tuple(ids), opens_think=text.rstrip().endswith("<think>"))


def plain_text(messages: list[dict[str, str]], *, bos_token: str | None) -> str:
    """The prompt for a model without a chat template: BOS, if it has one, `{system}\\n\\n{question}\\n`."""
    return (bos_token or "") + "\n\n".join(message["content"] for message in messages) + "\n"


def answer_form_of(system_prompt: str | None) -> AnswerForm:
    """The form that a system turn demands: `<answer>` tags where it names them, `\\boxed{}` otherwise."""
    return "answer_tags" if system_prompt is not None and "<answer>" in system_prompt else "boxed"


def demanded_form(teacher: TeacherConfig | TeacherRecord, problem: Problem) -> AnswerForm:
    """The form in which the teacher's answer to the problem is looked for."""
    return teacher.answer_form or answer_form_of(system_turn(problem, teacher.system_prompt))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what turns text into ids: vocabulary, added tokens, merges, normaliser, pre-tokeniser.

    Chat template and the roles of special tokens (which is EOS, which is padding) are left out: two models
    of one family keep one fingerprint, and log-probs of the same ids may be compared.
    """
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    return content_hash(sorted(tokenizer.get_vocab().items()), added, _rules(tokenizer))


def _rules(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__]
    parts = json.loads(backend.to_str())
    return [parts["model"].get("merges"), parts["normalizer"], parts["pre_tokenizer"]]


def _through_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], kwargs: Mapping[str, Any]
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    except TemplateError as error:
        turns = " and ".join(message["role"] for message in messages)
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses the turns {turns}: "
            f'{error}; for a template without a system turn set system_prompt = ""'
        ) from None
    assert isinstance(text, str)
    return text
