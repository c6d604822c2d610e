"""`ampo eval`: the offline stage with one model on the held-out problems, then pass@k of what it stored.

    DIR/                a trace store with every sample, right or wrong; `ampo inspect store` reads it
    DIR/results.json    written when all samples exist

The store makes an interrupted evaluation go on, and takes more samples of the same model. The model's name in
it is a hash of all that decides about the samples, so that those of two evaluations never mix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from precompute.config import PrecomputeConfig, ProblemFiles, ProblemsConfig, TeacherConfig
from precompute.engines.registry import resolve_engine
from precompute.problems.problem_files import configured_problems
from precompute.run.pipeline import run
from precompute.run.progress import Reporter
from store.errors import ConfigError, EngineError, UserError
from store.format.files import whole_file
from store.reader import TraceStore
from store.records import Problem, content_hash
from trainer.config import Config
from trainer.evaluation import Evaluation, evaluation_of
from trainer.run.saved_model import check_model, fingerprint
from trainer.student.adapters import as_trained


def evaluate_model(
    config: Config, reporter: Reporter | None = None, *, out: Path | None = None
) -> tuple[Evaluation, dict[str, Any]]:
    """Samples `eval.samples` responses per problem of `problems.eval` into the trace store `out`.

    Returns the evaluation, and the body of results.json. The default directory is
    run.dir/evals/MODEL-PROBLEMS-HASH. Problems that cannot be used are reported and left out.
    Raises UserErrors; all samples that were verified by then are kept.
    """
    files, reporter = chosen_files(config), reporter or Reporter()
    if config.eval.engine_args.get("api") != "chat":  # its server knows the model, and nobody else may
        check_model(config.student, named="MODEL")
    _check_adapters(config)
    teacher = as_teacher(config)
    stem = re.sub(r"[^\w.-]+", "-", Path(config.problems.eval.name).stem).strip("-")
    names = [Path(config.student.model).absolute().name, stem, teacher.name[-8:]]
    root = (out or Path(config.run.dir, "evals", "-".join(names))).absolute()
    problems = configured_problems(config.problems, files, key="problems.eval").problems
    if (repeats := max(problem.repeats for problem in problems)) > config.eval.samples:
        reporter.message(f"the file repeats a problem {repeats} times: --samples {repeats} takes as many")
    stage = PrecomputeConfig(
        problems=ProblemsConfig(train=config.problems.with_columns(files)),
        store=config.store.model_copy(update={"path": str(root)}),
        verify=config.verify,
        teachers=(teacher,),
    )
    with _names_of_this_command(teacher):
        run(stage, reporter=reporter)
    evaluation = stored_evaluation(config, root, teacher.name, problems)
    results = results_of(config, evaluation) | {"out": str(root)}
    with whole_file(root / "results.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    return evaluation, results


def chosen_files(config: Config) -> ProblemFiles:
    """Returns the files of `problems.eval`, or those of the set in `eval.sets` that it names."""
    files, sets = config.problems.eval, config.eval.sets
    named = "".join(files.files)
    if named in sets and not Path(named).exists():
        return sets[named]
    if not named:
        names = f" or one of {', '.join(sets)}, the names in eval.sets," if sets else ""
        raise ConfigError(f"no problems to evaluate on: give --problems FILE{names} or set problems.eval")
    return files


def as_teacher(config: Config) -> TeacherConfig:
    """Returns the student as the teacher that the offline stage samples from, named after its recipe."""
    student, engine_args = config.student, config.eval.engine_args
    recipe = {
        "model": str(Path(student.model).absolute()) if Path(student.model).is_dir() else student.model,
        "revision": student.revision,
        "dtype": engine_args.get("dtype", student.dtype),
        "quantization": engine_args.get("quantization"),
        "system_prompt": student.system_prompt,
        "user_template": student.user_template,
        "chat_template": student.chat_template,
        "chat_template_kwargs": student.chat_template_kwargs,
        "answer_form": student.answer_form,
        "temperature": config.eval.temperature,
        "top_p": config.eval.top_p,
        "max_tokens": config.rollout.max_completion_length,
    }
    hashed = content_hash(recipe, fingerprint(student.model), config.train.seed)
    how = {"engine": config.eval.engine, "batch_size": config.rollout.batch_size, **engine_args}
    given = {"name": f"eval-{hashed[:8]}", "samples": config.eval.samples}
    return TeacherConfig.model_validate(recipe | how | given)


def stored_evaluation(config: Config, root: Path, name: str, problems: tuple[Problem, ...]) -> Evaluation:
    """Computes the evaluation from the first `eval.samples` samples of each problem in the store."""
    sources = {problem.problem_id: problem.source for problem in problems}
    with TraceStore(root) as store:
        found = store.candidates(list(sources), teachers=[name], usable=False)
    wanted = range(config.eval.samples)
    samples = [trace for traces in found.values() for trace in traces if trace.sample_index in wanted]
    return evaluation_of(config.eval, samples, sources)


def results_of(config: Config, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the results as JSON holds them."""
    return {
        "model": config.student.model,
        "problems": ", ".join(config.problems.eval.files),
        "interval": "95%, bootstrap over problems",
        **evaluation.metrics,
        "overall": asdict(evaluation.overall),
        "sources": {source: asdict(score) for source, score in evaluation.sources.items()},
        "mean_of_sources": evaluation.mean_of_sources,
    }


def _check_adapters(config: Config) -> None:
    """Raises EngineError for adapters over 4-bit weights, which transformers would add to the 16-bit ones."""
    trained = as_trained(config.student).get("load_in_4bit")
    if trained and resolve_engine(config.eval.engine) == "transformers":
        model = config.student.model
        raise EngineError(
            f"{model} holds LoRA adapters of 4-bit weights; merge them first: ampo model merge {model} OUT"
        )


@contextmanager
def _names_of_this_command(teacher: TeacherConfig) -> Iterator[None]:
    """Makes errors of the offline stage name the keys and options of `ampo eval`."""
    names = {
        f"teacher {teacher.name!r}: ": "",
        f"teachers.{teacher.name}.": "student.",
        "problems.train": "problems.eval",
        "store.path": "--out",
        "max_tokens": "rollout.max_completion_length",
    }
    try:
        yield
    except UserError as error:
        text = str(error)
        for name, here in names.items():
            text = text.replace(name, here)
        raise type(error)(text) from error
