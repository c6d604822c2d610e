"""Turns a problem into the prompt that a model sees, exactly: messages, text, token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import Environment, StrictUndefined, Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from precompute.config_file import short
from precompute.verify.final_answer import answer_form_of
from store.errors import ConfigError
from store.records import AnswerForm, Problem, content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, exactly as the model sees it."""

    text: str
    """With every special token written out."""
    ids: tuple[int, ...]
    """[P], the text's token ids; nothing is added to them."""
    opens_think: bool
    """The prompt ends inside a `<think>` block: the response begins as thought."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The chat, for a server that renders it itself; `ids` are empty then."""


def system_turn(problem: Problem, system_prompt: str | None) -> str:
    """Returns the system turn: `system_prompt`, or for None the problem's own; empty: no such turn."""
    return (problem.system_prompt or "") if system_prompt is None else system_prompt


def build_messages(
    problem: Problem, system_prompt: str | None, user_template: str | None = None
) -> list[dict[str, str]]:
    """Returns the chat of one problem: a system turn, unless it is empty, earlier turns, where there are any,
    and the question as the last user turn.

    `user_template`: Jinja over `question` and the problem's metadata that makes that turn.
    """
    system, turns = system_turn(problem, system_prompt), problem.user_turns
    if user_template is not None:
        facts = {"metadata": problem.metadata, **problem.metadata, "question": problem.question}
        turns = (*turns[:-1], ("user", filled_template(user_template, facts)))
    given = (*([("system", system)] if system else []), *turns)
    return [{"role": role, "content": text} for role, text in given]


def filled_template(template: str, values: Mapping[str, Any]) -> str:
    """Returns the text of a Jinja template. ValueError where it names a value that there is not."""
    try:
        return _compiled(template).render(values)
    except (TemplateError, *TEMPLATE_FAULTS) as error:
        raise ValueError(f"the template {short(template)} does not fit: {error}") from None


@lru_cache
def _compiled(template: str) -> Template:
    return Environment(undefined=StrictUndefined).from_string(template)


def use_template(tokenizer: PreTrainedTokenizerBase, path: str | None, *, key: str) -> None:
    """Gives the tokenizer the chat template of the Jinja file at `path`; None: it keeps its own.

    Raises ConfigError, which names the config's `key`, when the file cannot be read.
    """
    if path is None:
        return
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise ConfigError(
            f"{key} = {path!r}: {Path(path).absolute()} cannot be read ({reason}); give a Jinja file"
        ) from None


def render_prompt(
    tokenizer: PreTrainedTokenizerBase | None,
    problem: Problem,
    *,
    system_prompt: str | None,
    chat_template_kwargs: Mapping[str, Any],
    user_template: str | None = None,
) -> Prompt:
    """Renders the prompt by the tokenizer's chat template, or by `plain_text` where it has none.

    Without a tokenizer the prompt is the messages, and the text is for people to read.

    Raises ConfigError when a template refuses the messages (some know no system turn) or the problem, is not
    valid Jinja, or doubles the BOS token.
    """
    try:
        messages = build_messages(problem, system_prompt, user_template)
    except ValueError as error:
        raise ConfigError(f"user_template: problem {problem.problem_id}: {error}") from None
    if tokenizer is None:
        text = plain_text(messages, bos_token=None)
        return Prompt(text=text, ids=(), opens_think=False, messages=tuple(messages))
    if tokenizer.chat_template is None:
        text = plain_text(messages, bos_token=tokenizer.bos_token)
    else:
        text = _through_template(tokenizer, messages, chat_template_kwargs)
    # The text has its special tokens already: adding them again would double the BOS.
    bos = tokenizer.bos_token
    if bos and text.startswith(2 * bos):
        raise ConfigError(
            f"{_name(tokenizer)}: the prompt begins with {bos!r} twice; let the template write it once"
        )
    # Whoever uses the ids checks their number against the model; a warning would only repeat it.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Prompt(text=text, ids=tuple(ids), opens_think=text.rstrip().endswith("<think>"))


def prompt_warning(
    tokenizer: PreTrainedTokenizerBase | None, text: str, *, key: str, template: str | None
) -> str | None:
    """Returns a warning about how prompts such as `text` are rendered, or None.

    `key` is the config key that gives a template, `template` its value.
    """
    if tokenizer is None:
        return None
    if tokenizer.chat_template is None:
        return (
            f"{_name(tokenizer)} has no chat template: prompts are plain text (--dry-run shows the first); "
            f"{key} = a Jinja file gives it one"
        )
    bos = tokenizer.bos_token
    if bos is None or text.startswith(bos):
        return None
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if template is not None or adds_bos:
        return (
            f"the prompts of {_name(tokenizer)} begin without its BOS token {bos!r}; where the model needs "
            f"it, begin the template ({key}) with {{{{ bos_token }}}}"
        )
    return None


TEMPLATE_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
"""Errors of a template's code beside Jinja's own."""


def turn_end(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> int:
    """Returns the one of `eos_ids` with which the model ends its own turn.

    A chat model may end a turn with another token (`<end_of_turn>`, say) than the one that its tokenizer
    calls EOS: the one that its template writes behind an answer. Else the tokenizer's, else the smallest.
    """
    default = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(eos_ids)
    # Where a template writes nothing behind an answer, the next turn's opening may be what ends it.
    behind = behind_answer(tokenizer) + behind_answer(tokenizer, {"role": "user", "content": "1"})
    return next((token for token in behind if token in eos_ids), default)


def behind_answer(tokenizer: PreTrainedTokenizerBase, *more: dict[str, str]) -> list[int]:
    """Returns the ids that the chat template writes behind an answer, with `more` turns to follow."""
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "ANSWER"}, *more]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, *TEMPLATE_FAULTS):
        return []  # no template, or one that fails: reported where prompts are rendered
    return list(tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"])


def turn_end_warning(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> str | None:
    """Returns a warning about a template that ends an answer with another token than an EOS, or None."""
    behind = [index for index in behind_answer(tokenizer) if index in tokenizer.added_tokens_decoder]
    if not behind or not set(behind).isdisjoint(eos_ids):
        return None
    token, eos = (tokenizer.convert_ids_to_tokens(ids) for ids in (behind[:1], list(eos_ids)))
    return (
        f"the chat template of {_name(tokenizer)} ends an answer with {token[0]!r}, which is no EOS token of "
        f"the model ({', '.join(map(repr, eos))}): responses may run on to their limit; add {behind[0]} to "
        "eos_token_id in its generation_config.json"
    )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "the tokenizer"


def plain_text(messages: list[dict[str, str]], *, bos_token: str | None) -> str:
    """Renders a prompt without a chat template: BOS, if there is one, `{system}\\n\\n{question}\\n`."""
    return (bos_token or "") + "\n\n".join(message["content"] for message in messages) + "\n"


def replaced_warning(problems: Sequence[Problem], system_prompt: str | None, *, key: str) -> str | None:
    """Returns a warning where the config's system turn, of the config's `key`, replaces those of the data."""
    count = sum(bool(problem.system_prompt) for problem in problems)
    if system_prompt is None or not any(p.system_prompt not in (None, system_prompt) for p in problems):
        return None
    return f'{key} replaces the system turns of {count:,} problems; {key} = "none" keeps them'


class Answering(Protocol):
    """A model that answers problems: a teacher's config or record, or the student's config."""

    @property
    def answer_form(self) -> AnswerForm | None: ...

    @property
    def system_prompt(self) -> str | None: ...

    @property
    def user_template(self) -> str | None: ...


def demanded_form(model: Answering, problem: Problem) -> AnswerForm:
    """Returns the form in which the model's answer to the problem is searched; without any demand, boxed."""
    if model.answer_form is not None:
        return model.answer_form
    return _demand(model, problem) or "boxed"


def _demand(model: Answering, problem: Problem) -> AnswerForm | None:
    system = system_turn(problem, model.system_prompt)
    return answer_form_of(system, model.user_template or "", problem.question)


def check_form(model: Answering, problem: Problem, *, key: str) -> None:
    """Raises ConfigError where the prompt demands another form than the config key `key` names."""
    demanded = _demand(model, problem)
    if model.answer_form is not None and demanded not in (None, model.answer_form):
        raise ConfigError(
            f"{key} = {model.answer_form!r}, but the prompt demands the form {demanded}: change one of them "
            "(none: as the prompt demands)"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hashes all that turns text into ids: vocabulary, added tokens, merges, normaliser, pre-tokeniser.

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
    except TemplateSyntaxError as error:
        where = f"line {error.lineno}: {error.message}"
        raise ConfigError(f"the chat template of {_name(tokenizer)} is not valid Jinja: {where}") from None
    except TemplateError as error:
        turns = " and ".join(message["role"] for message in messages)
        raise ConfigError(
            f"the chat template of {_name(tokenizer)} refuses the turns {turns}: "
            f'{error}; for a template without a system turn set system_prompt = "" '
            "and put the instruction in user_template"
        ) from None
    except TEMPLATE_FAULTS as error:  # also for several templates by name, of which none is the default
        raise ConfigError(
            f"the chat template of {_name(tokenizer)} fails with {type(error).__name__}: "
            f"{' '.join(str(error).split())}; give the right one as a file: chat_template"
        ) from None
    assert isinstance(text, str)
    return text
