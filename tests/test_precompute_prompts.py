"""What a model is shown, to the token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from precompute.config import TeacherConfig
from precompute.problems.prompts import (
    build_messages,
    check_form,
    prompt_warning,
    render_prompt,
    tokenizer_fingerprint,
    turn_end,
    use_template,
)
from precompute.verify.final_answer import answer_form_of
from store.errors import ConfigError
from store.records import Problem

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if thinking is defined and thinking %}<think>\n{% endif %}"
)
WORDS = ["<unk>", "<s>", "<end>", "<system>", "<user>", "<assistant>", "<think>", "2", "+", "?", "Solve", "."]
PROBLEM = Problem(question="2 + 2 ?", answer="4")
WITH_SYSTEM = Problem(question="2 + 2 ?", answer="4", system_prompt="Solve .")


def tokenizer(
    words: list[str] = WORDS, template: str | None = TEMPLATE, **special: str
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens([AddedToken(w, special=True) for w in words if w.startswith("<")])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("problem", "system_prompt", "roles"),
    [
        (PROBLEM, None, ["user"]),
        (PROBLEM, "", ["user"]),
        (PROBLEM, "Solve .", ["system", "user"]),
        (WITH_SYSTEM, None, ["system", "user"]),
        (WITH_SYSTEM, "", ["user"]),
    ],
)
def test_none_takes_the_problems_own_system_turn_and_empty_takes_none(
    problem: Problem, system_prompt: str | None, roles: list[str]
) -> None:
    messages = build_messages(problem, system_prompt)
    assert [message["role"] for message in messages] == roles
    assert messages[-1]["content"] == problem.question


def test_a_prompt_is_the_filled_template_and_its_ids() -> None:
    prompt = render_prompt(tokenizer(), WITH_SYSTEM, system_prompt=None, chat_template_kwargs={})
    assert prompt.text == "<system>Solve .<end><user>2 + 2 ?<end><assistant>"
    # <system>=3 Solve=10 .=11 <end>=2 <user>=4 2=7 +=8 2=7 ?=9 <end>=2 <assistant>=5
    assert prompt.ids == (3, 10, 11, 2, 4, 7, 8, 7, 9, 2, 5)
    assert not prompt.opens_think


@pytest.mark.parametrize("thinking", [True, False])
def test_template_options_reach_the_template_and_open_thought_is_noticed(thinking: bool) -> None:
    prompt = render_prompt(
        tokenizer(), PROBLEM, system_prompt="", chat_template_kwargs={"thinking": thinking}
    )
    assert prompt.opens_think is thinking
    assert prompt.text.endswith("<think>\n") is thinking


def test_a_model_without_a_template_gets_plain_text_after_its_bos() -> None:
    bare = tokenizer(template=None)
    prompt = render_prompt(bare, WITH_SYSTEM, system_prompt=None, chat_template_kwargs={})
    assert prompt.text == "Solve .\n\n2 + 2 ?\n"
    prompt = render_prompt(with_own_bos(None), PROBLEM, system_prompt=None, chat_template_kwargs={})
    # <s>=1 once, then 2=7 +=8 2=7 ?=9
    assert (prompt.text, prompt.ids) == ("<s>2 + 2 ?\n", (1, 7, 8, 7, 9))


def test_a_template_that_refuses_a_system_turn_is_one_clear_line() -> None:
    strict = tokenizer(
        template="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(
        ConfigError, match=r"refuses the turns system and user: no system; .*system_prompt = \"\""
    ):
        render_prompt(strict, WITH_SYSTEM, system_prompt=None, chat_template_kwargs={})
    assert render_prompt(strict, WITH_SYSTEM, system_prompt="", chat_template_kwargs={}).text == ""


@pytest.mark.parametrize(
    "expression", ["1 / 0", "[][1] + 1", "'a' + 1", "messages.nothing.of.it", "int('x')"]
)
def test_whatever_a_template_raises_is_one_line(expression: str) -> None:
    broken = tokenizer(template="{{ " + expression + " }}")
    with pytest.raises(ConfigError, match=r"^the chat template of .* (fails with|refuses)") as error:
        render_prompt(broken, PROBLEM, system_prompt="", chat_template_kwargs={})
    assert "\n" not in str(error.value)


def with_own_bos(template: str | None) -> PreTrainedTokenizerFast:
    """As many real ones do, it puts a BOS before plain text by itself."""
    made = tokenizer(template=template, bos_token="<s>")
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.mark.parametrize("end_of_file", ["", "\n"])
def test_a_template_from_a_file_is_the_tokenizers_and_writes_bos_once(
    tmp_path: Path, end_of_file: str
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}" + end_of_file)
    given = with_own_bos(None)
    use_template(given, str(file), key="student.chat_template")
    prompt = render_prompt(given, PROBLEM, system_prompt="", chat_template_kwargs={})
    # <s>=1 once, though the tokenizer would add another; then 2=7 +=8 2=7 ?=9
    assert (prompt.text, prompt.ids) == ("<s>2 + 2 ?", (1, 7, 8, 7, 9))
    assert prompt_warning(given, prompt.text, key="k", template=str(file)) is None


def test_a_template_file_that_cannot_be_read_is_one_line_with_key_and_path(tmp_path: Path) -> None:
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    for path, reason in [("no.jinja", "No such file"), ("latin.jinja", "UTF-8"), (".", "Is a directory")]:
        with pytest.raises(ConfigError, match=rf"teachers.ada.chat_template = .*{reason}") as error:
            use_template(tokenizer(), str(tmp_path / path), key="teachers.ada.chat_template")
        assert str(tmp_path / path) in str(error.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", r"not valid Jinja: line 1"),
        ("<s>{{ bos_token }}", r"begins with '<s>' twice"),
        (
            {"rag": TEMPLATE, "tool": TEMPLATE},
            r"fails with ValueError: .*give the right one as a file",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_one_clear_line(template: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        render_prompt(with_own_bos(template), PROBLEM, system_prompt="", chat_template_kwargs={})
    assert "\n" not in str(error.value)


def test_prompts_that_lack_a_bos_that_the_tokenizer_itself_would_add_are_warned_of() -> None:
    made = with_own_bos(TEMPLATE)
    prompt = render_prompt(made, PROBLEM, system_prompt="", chat_template_kwargs={})
    warning = prompt_warning(made, prompt.text, key="student.chat_template", template=None)
    assert warning is not None
    assert "'<s>'" in warning
    assert "{{ bos_token }}" in warning
    # Its own template and no habit of adding one: as its makers wanted it.
    plain = tokenizer(bos_token="<s>")
    assert prompt_warning(plain, prompt.text, key="k", template=None) is None
    assert prompt_warning(plain, prompt.text, key="k", template="chat.jinja") is not None
    assert prompt_warning(tokenizer(), prompt.text, key="k", template="chat.jinja") is None


def test_plain_text_prompts_are_warned_of_by_the_key_that_changes_them() -> None:
    warning = prompt_warning(
        tokenizer(template=None), "2 + 2 ?\n", key="student.chat_template", template=None
    )
    assert warning is not None
    assert "no chat template" in warning
    assert "student.chat_template" in warning


@pytest.mark.parametrize(
    ("template", "eos", "ends_with"),
    [
        # Its template ends an answer with <end>, whatever the tokenizer calls EOS.
        (TEMPLATE, "<s>", 2),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "<s>", 1),
        # The opening of the next turn ends one, as in GLM's.
        ("{% for m in messages %}{{ '<end>' if m.role == 'user' }}{{ m.content }}{% endfor %}", "<s>", 2),
        (None, "<s>", 1),
        (None, None, 1),
        ("{{ raise_exception('never') }}", "<s>", 1),
    ],
)
def test_a_turn_ends_with_the_eos_that_the_template_writes_behind_an_answer(
    template: str | None, eos: str | None, ends_with: int
) -> None:
    made = tokenizer(template=template, **({"eos_token": eos} if eos else {}))
    assert turn_end(made, (1, 2)) == ends_with  # <s>=1 <end>=2


def test_the_system_turn_says_which_form_an_answer_must_have() -> None:
    assert answer_form_of("put the final answer within the <answer> </answer> tags.") == "answer_tags"
    assert answer_form_of("put your final answer within \\boxed{}.") == "boxed"
    assert answer_form_of("") is None
    assert answer_form_of("End with a line #### and the number.") == "hashes"
    assert answer_form_of("Its last line is Answer: $Answer (without quotes).") == "answer_line"
    assert answer_form_of("Give the letter of the right option in parentheses.") == "letter"
    # A few-shot prompt that ends in "Answer:" wants the answer behind it, not another line.
    assert answer_form_of("Question: 2+2?\nAnswer:") is None
    # The system turn decides before the user turn.
    assert answer_form_of("Use \\boxed{}.", "Write #### x.") == "boxed"


def test_a_form_that_the_prompt_contradicts_is_one_line() -> None:
    problem = Problem(question="2+2? End with a line #### x.", answer="4")
    teacher = TeacherConfig(name="ada", model="m", system_prompt="", answer_form="boxed")
    check_form(teacher.model_copy(update={"answer_form": "hashes"}), problem, key="teachers.ada.answer_form")
    with pytest.raises(ConfigError, match=r"teachers\.ada\.answer_form = 'boxed', but the prompt .* hashes"):
        check_form(teacher, problem, key="teachers.ada.answer_form")


def test_a_fingerprint_tells_vocabularies_apart_and_nothing_else() -> None:
    one = tokenizer_fingerprint(tokenizer())
    assert one == tokenizer_fingerprint(tokenizer(template=None, bos_token="<s>"))
    assert one != tokenizer_fingerprint(tokenizer([*WORDS, "more"]))
    assert one != tokenizer_fingerprint(tokenizer([*WORDS[:-2], ".", "Solve"]))


def test_this_module_needs_no_torch() -> None:
    program = "import precompute.problems.prompts, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
