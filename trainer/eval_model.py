"""`ampo eval`: one model, one problem file, any engine; stopped at any moment, the same call goes on.

model --engine--> samples --judge--> parts of DIR --all there--> results
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from precompute.config import TeacherConfig
from precompute.engines import Engine
from precompute.engines.registry import load_engine, prepare_engine, resolve_engine
from precompute.engines.transformers_engine import TransformersEngine
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, EngineError
from store.records import content_hash
from trainer.config import Config
from trainer.eval_files import EvalFiles
from trainer.evaluation import (
    COVERAGE,
    Evaluation,
    draw_samples,
    eval_sampling,
    evaluation_of,
    samples_of,
)
from trainer.method.rewards import Judge
from trainer.method.rollouts import Prompt, demanded_form
from trainer.run.saved_model import ADAPTERS, as_saved, check_model, fingerprint
from trainer.run.setup import fitting_prompts, usable_problems, warn_of_prompts
from trainer.student.load import load_policy, load_tokenizer
from trainer.telemetry.console import TrainReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """How `ampo eval` ended."""

    out: Path
    evaluation: Evaluation
    results: dict[str, Any]
    """The body of results.json."""


NAME = "eval"
"""That engines know the model by."""

Started = Callable[[Path, int, int], None]
"""Told where the samples go, how many are there, and how many there will be."""


def evaluate_model(
    config: Config,
    reporter: TrainReporter,
    *,
    out: Path | None = None,
    on_start: Started = lambda out, there, wanted: None,
) -> EvalReport:
    """Samples `eval.samples` responses of each problem of `problems.eval` from `student.model` into `out`.

    None: a directory below `run.dir`/evals named by what is evaluated, so that a change of it gets another.
    Problems that cannot be judged, or whose prompts are too long, are reported and left out. Raises
    UserErrors; whatever ends it, what was judged by then is kept.
    """
    if not config.problems.eval:
        raise ConfigError("no problems to evaluate on: give --problems FILE or set problems.eval")
    check_model(config.student, named="MODEL")
    engine_name = _engine_name(config)
    with Verifier.configured(config.verify) as verifier:
        problems = usable_problems(config, "eval", verifier, reporter)
        with _of_the_model():
            tokenizer = load_tokenizer(config.student)
        prompts = fitting_prompts(config, problems, tokenizer, reporter)
        warn_of_prompts(config, tokenizer, prompts, reporter)
        judge = Judge(
            verifier,
            answer_form=demanded_form(config.student, problems),
            format_weight=config.train.format_weight,
        )
        recipe = recipe_of(config, engine_name, prompts, judge)
        files = EvalFiles((out or default_out(config, recipe)).absolute())
        with files.opened(recipe):
            _draw(config, engine_name, tokenizer, judge, prompts, files, reporter, on_start)
            evaluation = evaluation_of(files.samples(), prompts, samples=config.eval.samples, k=config.eval.k)
            results = results_of(config, evaluation)
            files.write_results(results)
    return EvalReport(out=files.root, evaluation=evaluation, results=results)


def default_out(config: Config, recipe: Mapping[str, Any]) -> Path:
    """`run.dir`/evals/MODEL-PROBLEMS-HASH, with a hash of all that a second run must have in common."""
    names = [Path(name).absolute().name for name in (config.student.model, Path(config.problems.eval).stem)]
    return Path(config.run.dir) / "evals" / "-".join([*names, content_hash(recipe)[:8]])


def recipe_of(config: Config, engine_name: str, prompts: Sequence[Prompt], judge: Judge) -> dict[str, Any]:
    """What must be the same for samples to belong together. How many of each problem is free: more are drawn
    beside those that are there."""
    sampling = asdict(eval_sampling(config.eval, config.rollout))
    model = config.student.model
    return {
        "model": str(Path(model).absolute()) if Path(model).is_dir() else model,
        "revision": config.student.revision,
        "weights": fingerprint(model),
        "problems": str(Path(config.problems.eval).absolute()),
        "prompts": f"{len(prompts)}, {content_hash([prompt.ids for prompt in prompts])}",
        "golds": content_hash([prompt.problem.answer for prompt in prompts]),
        **{key: sampling[key] for key in ("temperature", "top_p", "top_k", "max_tokens")},
        "seed": config.train.seed,
        "engine": engine_name,
        "dtype": config.eval.engine_args.get("dtype", config.student.dtype),
        "quantization": config.eval.engine_args.get("quantization"),
        "answer_form": judge.answer_form,
        "verifier": f"{judge.verifier.name} {judge.verifier.version}",
    }


def results_of(config: Config, evaluation: Evaluation) -> dict[str, Any]:
    """The body of results.json and of `--json`."""
    return {
        "model": config.student.model,
        "problems": config.problems.eval,
        "interval": f"{COVERAGE:.0%}, bootstrap over problems",
        **evaluation.metrics,
        "overall": asdict(evaluation.overall),
        "sources": {source: asdict(score) for source, score in evaluation.sources.items()},
        "mean_of_sources": evaluation.mean_of_sources,
    }


def _draw(
    config: Config,
    engine_name: str,
    tokenizer: Any,
    judge: Judge,
    prompts: Sequence[Prompt],
    files: EvalFiles,
    reporter: TrainReporter,
    on_start: Started,
) -> None:
    """Brings the samples that are not there; loads nothing when all are."""
    there = {(row.problem_id, row.sample_index) for row in files.samples()}
    wanted = {
        (prompt.problem.problem_id, s)
        for prompt in prompts
        for s in range(samples_of(prompt.problem, config.eval.samples))
    }
    on_start(files.root, len(wanted & there), len(wanted))
    if wanted <= there:
        return
    with _loaded(config, engine_name, tokenizer, prompts, reporter) as engine:
        drawn = draw_samples(
            engine,
            judge,
            prompts,
            eval_sampling(config.eval, config.rollout),
            samples=config.eval.samples,
            seed=config.train.seed,
            there=there,
            on_sample=lambda done, total: reporter.sampling("evaluation", done, total),
        )
        for _ in files.keep(drawn):
            pass


def _engine_name(config: Config) -> str:
    """Checked before anything is loaded."""
    name = resolve_engine(config.eval.engine)
    if name == "transformers" and config.eval.engine_args:
        key = next(iter(config.eval.engine_args))
        raise ConfigError(
            f"eval.engine_args.{key}: the engine transformers reads student.dtype, student.device and "
            "rollout.batch_size instead"
        )
    if name != "transformers":
        if (Path(config.student.model) / ADAPTERS).is_file():
            raise EngineError(
                f"{config.student.model} holds adapters alone, which {name} cannot take for a model: "
                f"ampo model merge {config.student.model} OUT, or --engine transformers"
            )
        with _of_the_model():
            prepare_engine(_as_teacher(config, name), name)
    return name


@contextmanager
def _loaded(
    config: Config, engine_name: str, tokenizer: Any, prompts: Sequence[Prompt], reporter: TrainReporter
) -> Iterator[Engine]:
    """The model in the engine. transformers has it as training does, so that both draw the same samples."""
    if engine_name == "transformers":
        student, weights = as_saved(config.student)
        with _of_the_model():
            policy = load_policy(student, temperature=1.0, weights=weights)
        with policy.computing():
            yield TransformersEngine(policy.model, tokenizer, batch_size=config.rollout.batch_size)
        return
    longest = max(len(prompt.ids) for prompt in prompts)
    teacher = _as_teacher(config, engine_name)
    with _of_the_model():
        engine = load_engine(teacher, engine_name, tokenizer, longest_prompt=longest, report=reporter.warned)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _of_the_model() -> Iterator[None]:
    """What is said of a teacher or the student is said of the model here."""
    try:
        yield
    except EngineError as error:
        of_model = str(error).removeprefix(f"teacher {NAME!r}: ").replace("student.model = ", "MODEL = ")
        raise EngineError(of_model) from error


def _as_teacher(config: Config, engine_name: str) -> TeacherConfig:
    """The model as the engines take one."""
    own = {"dtype": config.student.dtype, "batch_size": config.rollout.batch_size}
    return TeacherConfig.model_validate(
        {
            "name": NAME,
            "model": config.student.model,
            "revision": config.student.revision,
            "engine": engine_name,
            "max_tokens": config.rollout.max_completion_length,
            **own,
            **config.eval.engine_args,
        }
    )
