"""`ampo eval`: the offline stage with one model; its store, its results, and whose samples they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model, tiny_tokenizer
from run_examples import PROBLEMS, config_of, write_problems, write_store

from precompute.config_file import load_config
from precompute.run.progress import Reporter
from store.errors import ConfigError, EngineError, ProblemsError, StoreForeignError, UserError
from store.reader import TraceStore
from trainer.config import Config
from trainer.eval_model import as_teacher, evaluate_model
from trainer.evaluation import Evaluation
from trainer.telemetry.console import TrainReporter
from trainer.train import train

HELD_OUT = PROBLEMS[:4]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evals")
    write_problems(path / "train.jsonl", PROBLEMS)
    write_problems(path / "heldout.jsonl", HELD_OUT)
    write_store(path / "traces")
    return path


def eval_config(world: Path, model: Path, **changes: Any) -> Config:
    few: dict[str, Any] = {"eval__samples": 3, "eval__k": [1, 3], "eval__engine": "transformers"}
    return config_of(world, model, **{"problems__eval": str(world / "heldout.jsonl"), **few, **changes})


def evaluated(world: Path, model: Path, out: Path | None = None, **changes: Any) -> tuple[Evaluation, Path]:
    evaluation, results = evaluate_model(eval_config(world, model, **changes), Reporter(), out=out)
    assert json.loads((Path(results["out"]) / "results.json").read_text()) == json.loads(json.dumps(results))
    return evaluation, Path(results["out"])


def texts_of(out: Path) -> dict[tuple[str, str, int], str]:
    with TraceStore(out) as store:
        return {(each.teacher, each.problem_id, each.sample_index): each.text for each in store.traces()}


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_checkpoint_is_evaluated_as_training_evaluated_it(
    world: Path, model_dir: Path, tmp_path: Path, use_peft: bool
) -> None:
    changes: dict[str, Any] = {"eval__temperature": 0.0, "student__use_peft": use_peft}
    steps: dict[str, Any] = {"run__name": f"peft-{use_peft}", "train__max_steps": 1, "eval__every": 1}
    done = train(eval_config(world, model_dir, **changes, **steps), resume="never", reporter=TrainReporter())
    assert done.checkpoint is not None
    evaluation, _ = evaluated(world, done.checkpoint, tmp_path / "out", **changes)
    logged = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()][-1]
    for name, value in evaluation.metrics.items():
        assert logged[name] == value


def test_a_finished_evaluation_is_repeated_from_its_store_and_grows(
    world: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = evaluated(world, model_dir, tmp_path / "whole", eval__samples=5)
    first, out = evaluated(world, model_dir)
    assert out.parent == world / "runs" / "evals"
    assert out.name.startswith(f"{model_dir.name}-heldout-")
    before = texts_of(out)
    assert len(before) == len(HELD_OUT) * 3
    more, grown = evaluated(world, model_dir, eval__samples=5)
    assert (grown, more) == (out, whole)
    assert texts_of(out) == texts_of(tmp_path / "whole")
    assert before.items() <= texts_of(out).items()
    monkeypatch.setattr(
        "precompute.run.backends.load_engine", lambda *_, **__: pytest.fail("a model was loaded")
    )
    assert evaluated(world, model_dir) == (first, out)


def test_evaluations_never_mix_in_one_store(world: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_model(seed=0).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    first, _ = evaluated(world, model, out)
    evaluated(world, model, out, eval__temperature=0.1)
    evaluated(world, model, out, train__seed=5)
    _, default = evaluated(world, model, eval__temperature=0.1)
    assert default != evaluated(world, model)[1]
    assert evaluated(world, model, out)[0] == first
    tiny_model(seed=1).save_pretrained(model)
    evaluated(world, model, out)
    assert len({teacher for teacher, _, _ in texts_of(out)}) == 4


def test_a_problem_whose_gold_answer_cannot_be_parsed_is_left_out(
    world: Path, model_dir: Path, tmp_path: Path
) -> None:
    rows = [
        {"question": "1+1", "answer": "2", "source": "sums"},
        {"question": "2+2", "answer": "4", "source": "others"},
        {"question": "2+2", "answer": "4", "source": "others"},
        {"question": "odd", "answer": "\\frac{"},
    ]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    messages: list[str] = []
    reporter = Reporter()
    reporter.message = messages.append  # type: ignore[method-assign]
    config = eval_config(
        world, model_dir, problems__eval=str(tmp_path / "few.jsonl"), eval__samples=1, eval__k=[1]
    )
    evaluation, _ = evaluate_model(config, reporter, out=tmp_path / "out")
    assert {name: score.problems for name, score in evaluation.sources.items()} == {"sums": 1, "others": 1}
    assert evaluation.overall.problems == 2
    assert "the file repeats a problem 2 times: --samples 2 takes as many" in messages
    few = tmp_path / "few.jsonl"
    (warning,) = (each for each in messages if "left out" in each)
    assert warning.startswith(f"warning: {few}: 1 left out: a gold answer that the verifier math cannot use")


def test_adapters_are_merged_first_where_the_engine_cannot_add_them(
    world: Path, model_dir: Path, tmp_path: Path
) -> None:
    adapters = {"peft_type": "LORA", "base_model_name_or_path": str(model_dir), "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapters))
    four_bits = {"student": {"use_peft": True, "load_in_4bit": True}}
    (tmp_path / "state.json").write_text(json.dumps({"config": four_bits}))
    with pytest.raises(EngineError, match=r"of 4-bit weights; merge them first: ampo model merge"):
        evaluated(world, tmp_path)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (
            {"problems__eval": "nowhere.jsonl"},
            ProblemsError,
            r"^problems\.eval: no problem file at .*nowhere\.jsonl",
        ),
        (
            {"rollout__max_completion_length": 10**6},
            EngineError,
            r"^rollout\.max_completion_length = 1000000 ",
        ),
        ({"eval__engine_args__quantization": "fp8"}, EngineError, r"^quantization = 'fp8' is not for transf"),
        ({"student__model": "/no/where"}, EngineError, r"^MODEL = '/no/where': there is no directory"),
    ],
)
def test_errors_name_the_keys_of_this_command(
    world: Path, model_dir: Path, changes: dict[str, Any], kind: type[UserError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        evaluated(world, model_dir, **changes)


def test_a_directory_of_something_else_is_left_alone(world: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreForeignError, match=r"contains thesis\.tex .*; set --out to a store"):
        evaluated(world, model_dir, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("engine_args", "said"),
    [
        ({"tensor_parallel": 2}, "unknown key tensor_parallel; known keys: dtype, batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"base_urls": ["http://key@host/v1"]}, "a URL carries no key"),
    ],
)
def test_engine_args_are_checked_and_never_shown(engine_args: dict[str, Any], said: str) -> None:
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in engine_args.items())
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(Config, None, [f"eval.engine_args={{{table}}}"])
    assert "key@host" not in str(refused.value)


def test_engine_args_reach_the_engine_and_only_what_is_sampled_names_the_model(
    world: Path, model_dir: Path
) -> None:
    plain, large, half = (
        as_teacher(eval_config(world, model_dir, **{f"eval__engine_args__{k}": v for k, v in args.items()}))
        for args in ({}, {"batch_size": 512}, {"dtype": "float16"})
    )
    assert large == plain.model_copy(update={"batch_size": 512})
    assert half.dtype == "float16"
    assert half.name != plain.name
