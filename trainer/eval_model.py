"""`ampo eval`: one model, one problem file, any engine; after an interruption the same call continues.

    DIR/eval.json                      the recipe of the samples; other recipes are refused
    DIR/samples/part-000001.parquet    one row per sample (EvalSample); a part appears whole or not at all
    DIR/results.json                   written when all samples exist

`SELECT source, avg(is_correct::INT) FROM 'DIR/samples/*.parquet' GROUP BY source` works in DuckDB.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from precompute.config import TeacherConfig
from precompute.engines import Engine
from precompute.engines.registry import load_engine, prepare_engine, resolve_engine
from precompute.engines.transformers_engine import TransformersEngine
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, EngineError, RunError
from store.format.files import FileLock, disk_errors_named, make_directory, remove_orphans, whole_file
from store.records import content_hash
from trainer.config import Config
from trainer.evaluation import (
    EvalSample,
    Evaluation,
    eval_samples,
    eval_sampling,
    evaluation_of,
    sample_keys,
)
from trainer.method.groups import Prompt, Rewarder
from trainer.method.rollouts import demanded_form
from trainer.run.prompts import fitting_prompts, usable_problems
from trainer.run.rows import read_rows, write_rows
from trainer.run.saved_model import ADAPTERS, as_saved, check_model, fingerprint
from trainer.student.load import load_policy, load_tokenizer
from trainer.telemetry.console import TrainReporter

NAME = "eval"
"""Name of the model as a teacher of the engines."""
PART_SECONDS = 3.0
"""A part is written after this many seconds: the most that a kill may lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """A finished evaluation and its directory."""

    out: Path
    evaluation: Evaluation


@contextmanager
def _naming_the_model() -> Iterator[None]:
    """Makes errors about a teacher or the student name MODEL, the command's argument."""
    try:
        yield
    except EngineError as error:
        text = str(error).removeprefix(f"teacher {NAME!r}: ").replace("student.model = ", "MODEL = ")
        raise EngineError(text) from error


@_naming_the_model()
def evaluate_model(config: Config, reporter: TrainReporter, *, out: Path | None = None) -> EvalReport:
    """Samples `eval.samples` responses per problem of `problems.eval` from `student.model` into `out`.

    The default directory is run.dir/evals/MODEL-PROBLEMS-HASH, with a hash of the recipe. Problems whose gold
    answers cannot be parsed or whose prompts are too long are reported and left out. Raises UserErrors; all
    samples that were verified by then are kept.
    """
    if not config.problems.eval:
        raise ConfigError("no problems to evaluate on: give --problems FILE or set problems.eval")
    check_model(config.student)
    engine_name = _engine_name(config)
    with Verifier.configured(config.verify) as verifier:
        problems = usable_problems(config, "eval", verifier, reporter)
        tokenizer = load_tokenizer(config.student)
        prompts = fitting_prompts(config, problems, tokenizer, reporter)
        form = demanded_form(config.student, problems)
        rewarder = Rewarder(verifier, answer_form=form, weights=config.rewards)
        recipe = recipe_of(config, engine_name, prompts, rewarder)
        names = [Path(config.student.model).absolute().name, Path(config.problems.eval).stem]
        default = Path(config.run.dir, "evals", "-".join([*names, content_hash(recipe)[:8]]))
        root = (out or default).absolute()
        with opened(root, recipe):
            done = {(row.problem_id, row.sample_index) for row in read_samples(root)}
            wanted = sample_keys(config.eval, prompts)
            missing = sum(key not in done for key in wanted)
            reporter.line(f"{root}: {len(wanted) - missing:,} of {len(wanted):,} samples exist")
            if missing:
                on_sample = partial(reporter.sampling, "evaluation")
                with _loaded(config, engine_name, tokenizer, prompts, reporter) as engine:
                    new = eval_samples(config, engine, rewarder, prompts, existing=done, on_sample=on_sample)
                    write_samples(root, new)
            evaluation = evaluation_of(config.eval, read_samples(root), prompts)
            _write_json(root / "results.json", results_of(config, evaluation))
    return EvalReport(out=root, evaluation=evaluation)


def recipe_of(
    config: Config, engine_name: str, prompts: Sequence[Prompt], rewarder: Rewarder
) -> dict[str, Any]:
    """Returns what all samples of one directory have in common; their number may grow."""
    model = config.student.model
    return {
        "model": str(Path(model).absolute()) if Path(model).is_dir() else model,
        "revision": config.student.revision,
        "weights": fingerprint(model),
        "problems": str(Path(config.problems.eval).absolute()),
        "prompts": f"{len(prompts)}, {content_hash([prompt.ids for prompt in prompts])}",
        "golds": content_hash([prompt.problem.answer for prompt in prompts]),
        **asdict(eval_sampling(config)),
        "seed": config.train.seed,
        "engine": engine_name,
        "dtype": config.eval.engine_args.get("dtype", config.student.dtype),
        "quantization": config.eval.engine_args.get("quantization"),
        "answer_form": rewarder.answer_form,
        "verifier": f"{rewarder.verifier.name} {rewarder.verifier.version}",
    }


def results_of(config: Config, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the body of results.json and of `--json`."""
    return {
        "model": config.student.model,
        "problems": config.problems.eval,
        "interval": "95%, bootstrap over problems",
        **evaluation.metrics,
        "overall": asdict(evaluation.overall),
        "sources": {source: asdict(score) for source, score in evaluation.sources.items()},
        "mean_of_sources": evaluation.mean_of_sources,
    }


@contextmanager
def opened(root: Path, recipe: Mapping[str, Any]) -> Iterator[None]:
    """Locks the directory for this process. RunError when it holds another recipe or something else."""
    path = root / "eval.json"
    if not path.exists() and root.exists() and any(root.iterdir()):
        raise RunError(f"--out {root} holds something other than an evaluation; choose a new directory")
    with disk_errors_named(root):
        make_directory(root)
        lock = FileLock(root / ".write.lock")
        if not lock.acquire(wait=False):
            raise RunError(f"--out {root}: another process (pid {lock.holder()}) is writing there")
    try:
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else recipe
        changed = [
            f"{key} = {old.get(key)!r}, now {recipe[key]!r}" for key in recipe if old.get(key) != recipe[key]
        ]
        if changed:
            raise RunError(
                f"--out {root} holds an evaluation with {'; '.join(changed)}; choose another directory"
            )
        remove_orphans(root)
        _write_json(path, recipe)
        yield
    finally:
        lock.release()


def read_samples(root: Path) -> list[EvalSample]:
    """Returns all samples of the directory."""
    parts = sorted((root / "samples").glob("part-*.parquet"))
    return [row for part in parts for row in read_rows(part, EvalSample)]


def write_samples(root: Path, samples: Iterable[EvalSample]) -> None:
    """Writes samples in parts as they arrive; an exception first writes those that have arrived."""
    buffer: list[EvalSample] = []
    since = time.monotonic()
    try:
        for sample in samples:
            buffer.append(sample)
            if time.monotonic() - since >= PART_SECONDS:
                _write_part(root / "samples", buffer)
                buffer, since = [], time.monotonic()
    finally:
        if buffer:
            _write_part(root / "samples", buffer)


def _write_part(folder: Path, samples: Sequence[EvalSample]) -> None:
    number = len(list(folder.glob("part-*.parquet"))) + 1
    write_rows(folder / f"part-{number:06d}.parquet", EvalSample, samples)


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(body, indent=2) + "\n").encode())


def _engine_name(config: Config) -> str:
    """Returns the engine, checked before anything is loaded."""
    name = resolve_engine(config.eval.engine)
    if name == "transformers":
        if config.eval.engine_args:
            raise ConfigError(
                "eval.engine_args: the engine transformers reads student.dtype, student.device and "
                "rollout.batch_size instead"
            )
        return name
    if (Path(config.student.model) / ADAPTERS).is_file():
        raise EngineError(
            f"{config.student.model} holds only adapters, which {name} cannot load as a model: "
            f"ampo model merge {config.student.model} OUT, or --engine transformers"
        )
    prepare_engine(_as_teacher(config, name), name)
    return name


@contextmanager
def _loaded(
    config: Config, engine_name: str, tokenizer: Any, prompts: Sequence[Prompt], reporter: TrainReporter
) -> Iterator[Engine]:
    """Loads the model; with transformers as training does, so that both generate the same samples."""
    if engine_name == "transformers":
        student, weights = as_saved(config.student)
        policy = load_policy(student, temperature=1.0, weights=weights)
        with policy.computing():
            yield TransformersEngine(policy.model, tokenizer, batch_size=config.rollout.batch_size)
        return
    longest = max(len(prompt.ids) for prompt in prompts)
    teacher = _as_teacher(config, engine_name)
    engine = load_engine(teacher, engine_name, tokenizer, longest_prompt=longest, report=reporter.warned)
    with closing(engine):
        yield engine


def _as_teacher(config: Config, engine_name: str) -> TeacherConfig:
    """Returns the model in the form that the engines load."""
    student = config.student
    given = {
        "name": NAME,
        "model": student.model,
        "revision": student.revision,
        "engine": engine_name,
        "max_tokens": config.rollout.max_completion_length,
        "dtype": student.dtype,
        "batch_size": config.rollout.batch_size,
    }
    return TeacherConfig.model_validate(given | config.eval.engine_args)
