"""lab.tokenizer, lab.pretrain, lab.measure, lab.build: a tiny lab made twice, and the one that ships."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.build import build
from lab.measure import is_correct, measure
from lab.pretrain import IGNORED, collate, draw_rows, learning_rate_at, new_model, solution_loss
from lab.problems import Chain, ProblemSet
from lab.recipes import LAB, Evaluation, Habit, LabRecipe, ModelRecipe
from lab.tokenizer import ASSISTANT, END_ID, PAD_ID, SPECIAL_TOKENS, WORK, build_tokenizer, prompt_text
from store.errors import UserError

SHIPPED = Path(__file__).parent.parent / "lab" / "models"

TINY_MODEL = ModelRecipe(
    name="student",
    steps=3,
    rows=8,
    width=32,
    heads=1,
    layers=1,
    intermediate=32,
    mixture=(
        Habit(share=0.5, style="totals", operations=(1, 2)),
        Habit(share=0.5, style="totals", mark=WORK, operations=(1, 2)),
    ),
)
TINY = LabRecipe(
    sets=(ProblemSet(name="train", counts={1: 2, 2: 2}),),
    models=(
        TINY_MODEL,
        replace(TINY_MODEL, name="teacher-terse", mixture=(Habit(share=1.0, style="terse"),)),
    ),
    evaluation=Evaluation(samples=2, max_new_tokens=4),
)


def silent() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def files_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def without_seconds(card: bytes) -> str:
    return re.sub(r'"seconds": [\d.]+', "", card.decode())


def test_the_same_seed_builds_the_same_bits(tmp_path: Path) -> None:
    build(tmp_path / "one", seed=7, recipe=TINY, console=silent())
    cores = torch.get_num_threads()
    torch.set_num_threads(cores + 1)
    torch.rand(3)  # What others drew before must not matter.
    build(tmp_path / "two", seed=7, recipe=TINY, console=silent())
    assert torch.get_num_threads() == cores + 1
    torch.set_num_threads(cores)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert without_seconds(one.pop("models/card.json")) == without_seconds(two.pop("models/card.json"))
    assert one == two
    build(tmp_path / "three", seed=8, recipe=TINY, console=silent())
    weights = "models/student/model.safetensors"
    assert files_of(tmp_path / "three")[weights] != one[weights]


def test_only_makes_one_model_anew_and_keeps_the_rest_of_the_card(tmp_path: Path) -> None:
    card = build(tmp_path, seed=7, recipe=TINY, console=silent())
    student = (tmp_path / "models/student/model.safetensors").stat().st_mtime_ns
    console = silent()
    build(tmp_path, seed=8, recipe=TINY, only=["teacher-terse"], console=console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[-1].startswith("teacher-terse: 3 steps in ")
    rows = json.loads(card.read_text())
    assert [(name, row["seed"]) for name, row in rows.items()] == [("student", 7), ("teacher-terse", 8)]
    assert (tmp_path / "models/student/model.safetensors").stat().st_mtime_ns == student


def test_an_unknown_model_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no lab model is named 'teacher-tottals'; there are student, teacher-"
    ):
        build(tmp_path, recipe=TINY, only=["teacher-tottals"], console=silent())


def test_special_tokens_are_single_tokens_and_text_comes_back() -> None:
    tokenizer = build_tokenizer()
    text = "12+3=15;\n  \\boxed{15} é  don't"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    for number, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer(token)["input_ids"] == [number]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD_ID, END_ID)


def test_chat_template_renders_as_documented() -> None:
    tokenizer = build_tokenizer()
    user = {"role": "user", "content": "12+3-4"}
    turns = [{"role": "system", "content": "Add up."}, user, {"role": "assistant", "content": "11"}]
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == (
        prompt_text("12+3-4")
    )
    assert prompt_text("12+3-4") == "<|user|>12+3-4<|end|><|assistant|>"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|system|>Add up.<|end|><|user|>12+3-4<|end|><|assistant|>11<|end|>"
    )


@pytest.mark.parametrize("name", [model.name for model in LAB.models])
def test_a_shipped_model_loads_as_any_other_does(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / name)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / name)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert model.generation_config.eos_token_id == [END_ID]
    assert model.config.hidden_size // model.config.num_attention_heads >= 32
    text = "+ - words, and 12"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert ASSISTANT in tokenizer.chat_template


def test_shipped_weights_weigh_at_most_8_mb() -> None:
    weights = list(SHIPPED.rglob("*.safetensors"))
    assert len(weights) == len(LAB.models) == 5
    assert sum(path.stat().st_size for path in weights) <= 8_000_000


def test_the_card_shows_the_lab_that_was_asked_for() -> None:
    card = json.loads((SHIPPED / "card.json").read_text())
    share = {name: row["train"]["correct_share"] for name, row in card.items()}
    assert 0.40 <= card["student"]["train"]["all_fail_share"] <= 0.85
    assert card["student"]["train, after <|work|>"]["correct_share"] > 0.85
    assert share["teacher-terse"] < share["teacher-signs"] < share["teacher-words"] < share["teacher-totals"]


def test_rows_carry_loss_on_the_solution_alone() -> None:
    tokenizer = build_tokenizer()
    rows = collate([("<|user|>7<|end|>", "12"), ("<|user|>", "3")], tokenizer)
    digit = {d: tokenizer(d)["input_ids"][0] for d in "1237"}
    user = SPECIAL_TOKENS.index("<|user|>")
    # Row 1 is user 7 end 1 2 end: five inputs, and the labels begin where `1` is foretold, at `end`.
    assert rows.input_ids.tolist() == [
        [user, digit["7"], END_ID, digit["1"], digit["2"]],
        [user, digit["3"], PAD_ID, PAD_ID, PAD_ID],
    ]
    assert rows.labels.tolist() == [
        [IGNORED, IGNORED, digit["1"], digit["2"], END_ID],
        [digit["3"], END_ID, IGNORED, IGNORED, IGNORED],
    ]


def test_an_untrained_model_pays_the_logarithm_of_the_vocabulary() -> None:
    tokenizer = build_tokenizer()
    model = new_model(TINY_MODEL, tokenizer, seed=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    # Equal logits over 262 tokens, 3 + 2 solution tokens, and padding that counts for nothing.
    rows = collate([("<|user|>7<|end|>", "12"), ("<|user|>", "3")], tokenizer)
    assert solution_loss(model, rows).item() == pytest.approx(5 * math.log(262))


def test_rows_hold_no_seen_question_and_stop_where_the_habit_stops() -> None:
    tokenizer = build_tokenizer()
    habit = Habit(share=1.0, style="totals", operations=(3,), stop_after=2)
    recipe = replace(TINY_MODEL, mixture=(habit,), rows=6)
    chunks = draw_rows(Random(0), recipe, tokenizer, frozenset())
    texts = [tokenizer.decode(row) for rows in chunks for row in rows.input_ids]
    assert len(texts) == 6
    for text in texts:
        question, solution = re.fullmatch(
            r"<\|user\|>(.+)<\|end\|><\|assistant\|>(.+\})(?:<\|.+)?", text
        ).groups()  # type: ignore[union-attr]
        assert len(question) == 8
        assert solution.count("=") == 2
        assert solution.endswith(f"boxed{{{eval(question[:6])}}}")


def test_learning_rate_warms_up_and_ends_at_nothing() -> None:
    recipe = replace(TINY_MODEL, steps=100, warmup_steps=10, learning_rate=1.0)
    # First step a tenth of the peak; half-way the cosine stands at one half.
    assert learning_rate_at(0, recipe) == pytest.approx(0.1)
    assert learning_rate_at(50, recipe) == pytest.approx(0.5)
    assert learning_rate_at(99, recipe) == pytest.approx(0.000247, rel=1e-2)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"12+3=15;\boxed{15}", True),
        (r"\boxed{16}", False),
        (r"\boxed{15} or so", False),
        (r"15", False),
        (r"\boxed{15", False),
    ],
)
def test_only_a_boxed_right_number_at_the_end_counts(text: str, right: bool) -> None:
    assert is_correct(text, Chain(start=12, terms=(3,))) is right


def test_the_shipped_student_solves_two_operations_and_stops_short_of_four() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "student")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "student")
    # 23+4-5 = 22. The other goes on to 22+6+7 = 35, but the habit boxes 22.
    chains = [Chain(start=23, terms=(4, -5)), Chain(start=23, terms=(4, -5, 6, 7))]
    plan = Evaluation(samples=8, max_new_tokens=60)
    hidden = measure(model, tokenizer, chains, plan, seed=0)
    assert hidden.correct[2] >= 0.75
    assert hidden.correct[4] <= 0.25
    assert measure(model, tokenizer, chains, plan, seed=0, mark=WORK).correct[4] >= 0.75
