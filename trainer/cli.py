"""`ampo train`, `ampo eval`, `ampo inspect run`, `ampo inspect store queries` and `ampo model`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from store.errors import UserError
from store.terminal.console import (
    ConfigOption,
    CsvFlag,
    DryRun,
    JsonFlag,
    SetOption,
    ShownRows,
    console_of,
    emit_json,
    emit_rows,
    escaped,
    print_config,
    print_error,
    print_left_out,
    print_line,
    row_limit,
)

if TYPE_CHECKING:
    from trainer.config import Config, EvalConfig
    from trainer.run.resume import TrainReport

model_app = typer.Typer(no_args_is_help=True, help="Export checkpoints as models.")


def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: resume from the run's last checkpoint; never: refuse an existing run; or a path."
        ),
    ] = "auto",
    changed_store: Annotated[
        bool,
        typer.Option("--resume-with-changed-store", help="Resume although the traces in the store changed."),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N training problems.")] = None,
    dry_run: DryRun = False,
    gpu: Annotated[str, typer.Option(help="With --dry-run: the card to plan for, e.g. A100-40GB.")] = "",
    processes: Annotated[
        int, typer.Option(min=1, help="With --dry-run: number of GPUs that share the run.")
    ] = 1,
) -> None:
    """Train the student; query the store only for problems whose samples all failed.

    Ctrl-C finishes the step, saves, and prints how to resume.

    `--dry-run` prints the plan even where problems, store or student are missing; each is then reported as
    an error, and the exit code is 2.

    Example: `ampo train --config configs/lab.toml --set run.name=first --set train.max_steps=20`

    On several devices: `torchrun --standalone --nproc-per-node 4 --no-python ampo train --config my.toml`
    """
    from trainer.config import read_config

    given = [f"problems.limit={limit}"] if limit else []
    settings = read_config(config, [*(set_ or []), *given])
    if dry_run:
        _show_dry_run(settings, gpu=gpu, processes=processes, resume=resume, changed_store=changed_store)
        return
    if gpu or processes > 1:
        raise UserError("--gpu and --processes plan a run: they need --dry-run")
    _train(settings, resume=resume, changed_store=changed_store)


def _train(settings: Config, *, resume: str, changed_store: bool) -> None:
    from trainer.parallel.world import leave, torchrun_world
    from trainer.student.load import pick_device
    from trainer.telemetry.console import TrainReporter
    from trainer.train import train as run_training

    console = console_of()
    try:
        with (
            torchrun_world(pick_device(settings.student.device)) as world,
            TrainReporter(console if world.is_main else None, settings.run) as reporter,
        ):
            outcome = run_training(
                settings, resume=resume, changed_store=changed_store, reporter=reporter, world=world
            )
    except KeyboardInterrupt:
        console.print("stopped at once; everything saved before is complete. Resume with the same command.")
        raise typer.Exit(130) from None
    if world.is_main:
        _print_end(outcome)
    code = 130 if outcome.interrupted_by else 0
    if world.size > 1:
        leave(code)
    raise typer.Exit(code)


def _print_end(outcome: TrainReport) -> None:
    if outcome.interrupted_by:
        saved = f"saved {outcome.checkpoint}" if outcome.checkpoint else "nothing to save yet"
        print_line(
            f"stopped by {outcome.interrupted_by} after {outcome.done}; {saved}. "
            f"Resume with the same command (--resume auto is the default)."
        )
        return
    run = os.path.relpath(outcome.run)
    print_line(f"done: {outcome.done}. Next:\n  ampo inspect run {run}\n  ampo inspect store queries {run}")


def _show_dry_run(settings: Config, **options: Any) -> None:
    from precompute.config_file import toml_of
    from trainer.planning import dry_run

    report, missing = dry_run(settings, **options)
    console = console_of()
    print_config(console, toml_of(settings))
    console.print(report)
    for error in missing:
        print_error(error)
    if missing:
        raise typer.Exit(2)


def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory, e.g. a checkpoint, or a hub name.")],
    problems: Annotated[
        str,
        typer.Option(
            help="A file, or a name in the config's eval.sets; default: the config's problems.eval."
        ),
    ] = "",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Samples per problem; default: eval.samples, or the largest k."),
    ] = None,
    k: Annotated[str, typer.Option(help="The k of pass@k, e.g. 1,8,32; default: the config's eval.k.")] = "",
    engine: Annotated[
        str, typer.Option(help="auto, transformers, vllm or openai; default: the config's eval.engine.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Trace store of the samples; default: one in runs/evals for this evaluation."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Measure avg@n and the unbiased pass@k of a model on a problem file, with confidence intervals.

    Every sample is kept in a trace store; after an interruption the same command continues.

    Example: `ampo eval lab/models/student --config configs/lab.toml --k 1,8,32`

    With servers: `ampo eval MODEL --engine openai --set eval.engine_args.base_urls='["http://gpu1:8000/v1"]'`
    """
    from precompute.run.progress import ConsoleReporter
    from trainer.config import read_config
    from trainer.eval_model import evaluate_model
    from trainer.reports.tables import evaluation_table

    overrides = _eval_overrides(read_config(config, set_).eval, model, problems, samples, k, engine)
    settings = read_config(config, [*(set_ or []), *overrides])
    console = console_of(stderr=True)
    try:
        with ConsoleReporter(console) as reporter:
            evaluation, results = evaluate_model(settings, reporter, out=out)
    except KeyboardInterrupt:
        console.print("\ninterrupted; verified samples are kept. Continue with the same command.")
        raise typer.Exit(130) from None
    if json_:
        emit_json(results)
    else:
        console_of().print(evaluation_table(model, evaluation))


def _eval_overrides(
    eval_config: EvalConfig, model: str, problems: str, samples: int | None, k: str, engine: str
) -> list[str]:
    """Returns the options as overrides of the config; n and k each follow the other where one is missing."""
    ks = [int(each) if each.strip().isdecimal() else 0 for each in k.split(",")] if k else []
    if k and min(ks) < 1:
        raise UserError(f"--k {k}: write whole numbers of 1 or more with commas between, e.g. 1,8,32")
    samples = samples or max(eval_config.samples, *ks, 1)
    ks = ks or [each for each in eval_config.k if each <= samples] or [1]
    given = {"student.model": model, "eval.samples": samples, "eval.k": ks}
    optional = {"problems.eval": problems, "eval.engine": engine}
    given |= {key: value for key, value in optional.items() if value}
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def inspect_queries(
    run: Annotated[
        str | None, typer.Argument(help="A run's directory; default: the last below runs/.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Only this step.")] = None,
    problem: Annotated[str | None, typer.Option(help="Only this problem_id, or its beginning.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Only queries for which this teacher had a trace.")
    ] = None,
    limit: ShownRows = None,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Show the trainer's queries to the store: candidates, scores, and the traces used.

    A table has the last 20 queries; `--json` and `--csv` give all that pass the filters, a row a candidate.

    Example: `ampo inspect store queries runs/lab-ampo --step 3`
    """
    from trainer.reports.inspection import open_run, problems_of, query_rows
    from trainer.reports.tables import by_query, queries_table, summary_line

    root = open_run(run)
    queries = by_query(query_rows(root, step=step, problem=problem, teacher=teacher))
    shown = queries[-(row_limit(limit, table=20, programs=json_ or csv_) or 0) :]
    if not emit_rows([row for query in shown for row in query], json_, csv_):
        problems = problems_of(root, {query[0]["problem_id"] for query in shown})
        questions = {problem_id: problem.question for problem_id, problem in problems.items()}
        console_of().print(queries_table(shown, questions))
        console_of().print(f"{root.name}: {summary_line(queries)}", highlight=False)
    print_left_out(len(shown), len(queries), "queries", programs=json_ or csv_)


def inspect_run(
    runs: Annotated[list[str] | None, typer.Argument(help="Run directories; default: the last one.")] = None,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Show a run's curves as text, or several runs side by side; `ampo report` draws them.

    Example: `ampo inspect run runs/lab-ampo runs/lab-grpo`
    """
    from trainer.reports.inspection import open_run
    from trainer.reports.tables import curves_table, evaluations_table
    from trainer.telemetry.metrics import read_metrics

    roots = [open_run(path) for path in runs] if runs else [open_run()]
    found = {os.path.relpath(root): read_metrics(root) for root in roots}
    if emit_rows([{"run": name, **row} for name, rows in found.items() for row in rows], json_, csv_):
        return
    console = console_of()
    console.print(curves_table(found))
    if any("eval/pass@1" in row for rows in found.values() for row in rows):
        console.print(evaluations_table(found))


def report(
    runs: Annotated[list[str], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option(help="The page; an existing one is replaced.")] = Path("report.html"),
    groups: Annotated[int, typer.Option(min=0, help="At most N groups in the page; 0: all.")] = 200,
) -> None:
    """Write runs as one HTML page: curves, shares of the teachers, and groups with their candidates.

    The page needs neither a server nor a network.

    Example: `ampo report runs/lab-ampo runs/lab-grpo --out report.html`
    """
    from trainer.reports.inspection import open_run
    from trainer.reports.report import write_report

    roots = [open_run(path) for path in runs]
    common = os.path.commonpath([root.parent for root in roots])
    notes = write_report({os.path.relpath(root, common): root for root in roots}, out, most=groups)
    print_line(f"wrote {escaped(str(out))}: {len(roots)} runs, {out.stat().st_size / 2**20:.1f} MiB")
    for note in notes:
        print_line(note)


@model_app.command("merge")
def model_merge(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or any directory of a model or of LoRA adapters.")
    ],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type of the stored weights; auto: that of the model before training."),
    ] = "auto",
    json_: JsonFlag = False,
) -> None:
    """Write a checkpoint as an ordinary transformers directory, with its adapters merged.

    Adapters of a 4-bit student are added to its dequantized 4-bit weights, as in training.

    Example: `ampo model merge runs/ampo/checkpoints/step-000510 my-model`, then `vllm serve my-model`
    """
    from trainer.merge import merge

    console_of(stderr=True).print(f"reading {checkpoint}", highlight=False, soft_wrap=True, markup=False)
    report = merge(checkpoint.absolute(), out.absolute(), dtype=dtype)
    if json_:
        emit_json(report)
        return
    kind = ", adapters merged" if report["adapters"] else ""
    four = " into the dequantized 4-bit weights" if report["four_bits"] else ""
    print_line(f"{escaped(report['out'])}: {report['parameters']:,} weights in {report['dtype']}{kind}{four}")
