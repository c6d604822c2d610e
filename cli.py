"""The `ampo` command: thin, one function a sub-command; what is heavy is imported inside.

ampo precompute teachers     teachers solve, the verifier judges, the store keeps
ampo train                   the student samples, asks where all failed, learns
ampo inspect store queries   what was asked, what came back, what was used
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from store.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.config import Config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Multi-teacher reinforcement learning without a cluster (AMPO, arXiv 2510.02227).",
)
precompute_app = typer.Typer(no_args_is_help=True, help="The offline stage: teachers fill the store.")
inspect_app = typer.Typer(no_args_is_help=True, help="Look into stores and runs.")
inspect_store_app = typer.Typer(no_args_is_help=True, help="Look into a store, and what was asked of it.")
store_app = typer.Typer(no_args_is_help=True, help="Care for a store.")
lab_app = typer.Typer(no_args_is_help=True, help="The bundled lab of tiny models.")
app.add_typer(precompute_app, name="precompute")
app.add_typer(inspect_app, name="inspect")
inspect_app.add_typer(inspect_store_app, name="store")
app.add_typer(store_app, name="store")
app.add_typer(lab_app, name="lab")

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="A TOML file; without it the defaults alone.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Overrides one key, e.g. `--set train.max_steps=100`. May be repeated."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, show what would happen, touch nothing.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="JSON for programs instead of a table.")]
CsvFlag = Annotated[bool, typer.Option("--csv", help="CSV for programs instead of a table.")]
StorePath = Annotated[str, typer.Argument(help="The store's directory.")]


def main() -> None:
    """Entry point: a user's error is one line and exit code 2."""
    # Before torch loads OpenMP: threads that spin while they wait make a step 10 to 15 times slower as soon
    # as anything else (our own verifier's workers, say) wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        _console(stderr=True).print(f"[red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:
        # `ampo ... | head` closes the pipe; that is the reader's good right.
        sys.stderr.close()
        sys.exit(0)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"ampo {package_version('ampo')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Multi-teacher reinforcement learning without a cluster (AMPO, arXiv 2510.02227)."""


@precompute_app.command("teachers")
def precompute_teachers(
    config: ConfigOption = None,
    set_: SetOption = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="Only this teacher. May be repeated; default: all.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, vllm or transformers; default: what each teacher's table says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Let teachers solve the training problems; verify every solution into the store.

    Stopped at any moment, the same command goes on where it was.

    Example: `ampo precompute teachers --config configs/lab.toml --limit 64`
    """
    from precompute import pipeline
    from precompute.progress import ConsoleReporter
    from precompute.tables import plan_tables, report_tables

    settings, console = _config(config, set_), _console()
    names = list(teacher) if teacher else None
    if dry_run:
        plan = pipeline.plan(settings, teachers=names, engine=engine, limit=limit)
        _print_config(console, settings)
        console.print(plan_tables(plan))
        return
    try:
        with ConsoleReporter(console) as reporter:
            report = pipeline.run(settings, teachers=names, engine=engine, limit=limit, reporter=reporter)
    except KeyboardInterrupt:
        console.print("\ninterrupted; every verified trace is kept. Go on with the same command.")
        raise typer.Exit(130) from None
    console.print(report_tables(report))


@app.command()
def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: go on from the run's last checkpoint; never: refuse an existing run; or a path."
        ),
    ] = "auto",
    dry_run: DryRun = False,
) -> None:
    """Train the student; ask the store only for problems whose samples all failed.

    Ctrl-C finishes the step, saves, and says how to go on.

    Example: `ampo train --config configs/lab.toml --set run.name=first --set train.max_steps=20`
    """
    settings, console = _config(config, set_), _console()
    if dry_run:
        from trainer.dry_run import dry_run_of

        report = dry_run_of(settings)
        _print_config(console, settings)
        console.print(report)
        return
    from trainer.console import ConsoleReporter
    from trainer.loop import train as run_training

    try:
        with ConsoleReporter(console, settings.run) as reporter:
            outcome = run_training(settings, resume=resume, reporter=reporter)
    except KeyboardInterrupt:
        console.print("stopped at once; what was saved before is whole. Go on with the same command.")
        raise typer.Exit(130) from None
    if outcome.interrupted_by:
        saved = f"saved {outcome.checkpoint}" if outcome.checkpoint else "there was nothing to save yet"
        console.print(
            f"stopped by {outcome.interrupted_by} after step {outcome.step}; {saved}. "
            f"Go on with the same command (--resume auto is the default).",
            soft_wrap=True,
        )
        raise typer.Exit(130)
    _say_done(console, outcome.run, outcome.step)


def _say_done(console: Console, run: Path, step: int) -> None:
    shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    console.print(
        f"done: step {step}. Look: ampo inspect run {shown}   ampo inspect store queries {shown}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory (a checkpoint, say) or a hub name.")],
    problems: Annotated[
        str, typer.Option(help="Parquet or JSONL; default: the config's problems.eval.")
    ] = "",
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of each problem.")] = None,
    k: Annotated[str, typer.Option(help="The k of pass@k, e.g. 1,8; default: the config's eval.k.")] = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Measure avg@n and the unbiased pass@k of a model on a problem file.

    Example: `ampo eval lab/models/student --config configs/lab.toml --samples 8 --k 1,8`
    """
    from trainer.console import ConsoleReporter
    from trainer.eval_model import evaluate_model
    from trainer.tables import evaluation_table

    overrides = [*(set_ or []), f"student.model={json.dumps(model)}"]
    if problems:
        overrides.append(f"problems.eval={json.dumps(problems)}")
    if samples is not None:
        overrides.append(f"eval.samples={samples}")
    if k:
        overrides.append(f"eval.k=[{k}]")
    settings = _config(config, overrides)
    with ConsoleReporter(_console(stderr=True), settings.run) as reporter:
        evaluation = evaluate_model(settings, reporter)
    if json_:
        _emit_json({"model": model, **evaluation.metrics})
    else:
        _console().print(evaluation_table(model, evaluation))


@inspect_store_app.command("queries")
def inspect_queries(
    run: Annotated[
        str | None, typer.Argument(help="A run's directory; default: the last below runs/.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Only this step.")] = None,
    problem: Annotated[str | None, typer.Option(help="Only this problem_id, or its beginning.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Only questions to which this teacher had a trace.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Show the last N questions; 0: all.")] = 20,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Show what the trainer asked the store, what came back, and what was used.

    `--json` and `--csv` give every row that the filters leave.

    Example: `ampo inspect store queries runs/lab-ampo --step 3`
    """
    from trainer.inspection import query_rows, questions_of, summary_of
    from trainer.run_files import latest_run, open_run, run_config
    from trainer.tables import queries_table, summary_line

    files = open_run(run if run is not None else latest_run("runs"))
    rows = query_rows(files, step=step, problem=problem, teacher=teacher)
    if _emit_rows(rows, json_, csv_):
        return
    questions, console = questions_of(rows), _console()
    shown = questions[-limit:] if limit else questions
    console.print(queries_table(shown, _problem_texts(run_config(files))))
    if len(shown) < len(questions):
        console.print(f"the last {len(shown)} of {len(questions)} questions; --limit 0 shows all")
    console.print(
        f"{files.root.name}: {summary_line(summary_of(questions))}", highlight=False, soft_wrap=True
    )


def _problem_texts(config: Config) -> dict[str, str]:
    """Question texts for the table, where the store is still there to tell them."""
    from store.trace_store import TraceStore

    try:
        with TraceStore(config.store.path) as store:
            return {problem.problem_id: problem.question for problem in store.problems()}
    except UserError:
        return {}


@inspect_store_app.command("summary")
def inspect_summary(store: StorePath = "traces", json_: JsonFlag = False) -> None:
    """Show teachers, verdicts, coverage and tokens of a store.

    Example: `ampo inspect store summary traces`
    """
    from dataclasses import asdict

    from store.report import store_report
    from store.tables import summary_tables
    from store.trace_store import TraceStore

    with TraceStore(store) as opened:
        report = store_report(opened)
    if json_:
        _emit_json(asdict(report))
    else:
        _console().print(summary_tables(report))


@inspect_store_app.command("traces")
def inspect_traces(
    store: StorePath = "traces",
    problem: Annotated[str | None, typer.Option(help="Only this problem_id; shows whole texts.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Only this teacher.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only this verdict, e.g. mismatch.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most N traces; 0: all.")] = 20,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Read traces side by side.

    Example: `ampo inspect store traces traces --problem 5f0c1d2e3a4b5c6d`
    """
    from store.records import VERDICTS
    from store.report import trace_rows
    from store.tables import traces_table
    from store.trace_store import TraceStore

    if verdict is not None and verdict not in VERDICTS:
        raise UserError(f"--verdict {verdict}: one of {', '.join(VERDICTS)}")
    with TraceStore(store) as opened:
        rows = trace_rows(opened, problem_id=problem, teacher=teacher, verdict=verdict, limit=limit or None)
    if not _emit_rows(rows, json_, csv_):
        _console().print(traces_table(rows, full=problem is not None))


@inspect_store_app.command("problems")
def inspect_problems(
    store: StorePath = "traces",
    uncovered: Annotated[
        bool, typer.Option("--uncovered", help="Only those that no teacher solved.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most N problems; 0: all.")] = 20,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """List problems, hardest first, with the teachers that solved them.

    Example: `ampo inspect store problems traces --uncovered`
    """
    from store.report import problem_rows
    from store.tables import problems_table
    from store.trace_store import TraceStore

    with TraceStore(store) as opened:
        rows = problem_rows(opened, uncovered=uncovered, limit=limit or None)
    if not _emit_rows(rows, json_, csv_):
        _console().print(problems_table(rows))


@inspect_app.command("run")
def inspect_run(
    runs: Annotated[list[str] | None, typer.Argument(help="Run directories; default: the last one.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the curves of all runs into this PNG.")] = None,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Show a run's curves as text, or several runs' as one PNG.

    Example: `ampo inspect run runs/lab-ampo runs/lab-grpo --png curves.png`
    """
    from trainer.plot import plot_runs
    from trainer.run_files import latest_run, open_run
    from trainer.tables import curves_table, evaluations_table

    paths = runs or [str(latest_run("runs"))]
    opened = [open_run(path) for path in paths]
    names = [run.root.name for run in opened]
    # Two runs may have one name in two folders.
    shown = names if len(set(names)) == len(names) else paths
    found = {name: run.metrics() for name, run in zip(shown, opened, strict=True)}
    if png is not None:
        plot_runs(found, png)
    if _emit_rows([{"run": name, **row} for name, rows in found.items() for row in rows], json_, csv_):
        return
    console = _console()
    for name, rows in found.items():
        console.print(curves_table(name, rows))
    console.print(evaluations_table(found))
    if png is not None:
        console.print(f"drew {png}", highlight=False)


@store_app.command("reindex")
def store_reindex(store: StorePath = "traces") -> None:
    """Make the store's index anew from its parts.

    Example: `ampo store reindex traces`
    """
    from store.index import reindex

    report = reindex(store)
    console = _console()
    console.print(
        f"indexed {report.traces:,} traces in {report.parts} parts, {report.seconds:.1f} s", highlight=False
    )
    for part in report.damaged:
        console.print(f"[yellow]left out:[/] {_escaped(str(part))}", highlight=False, soft_wrap=True)


@lab_app.command("build")
def lab_build(
    out: Annotated[Path, typer.Argument(help="Where `models/` and `problems/` go.")] = Path("lab"),
    seed: Annotated[int, typer.Option(help="The same seed gives the same bits.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only this model. May be repeated.")] = None,
) -> None:
    """Make the lab's problems and its five tiny models from scratch: about 20 minutes on two cores.

    Example: `ampo lab build /tmp/lab --only student`
    """
    from lab.build import build

    card = build(out, seed=seed, only=only or (), console=_console())
    typer.echo(f"wrote {card}")


def _config(path: str | None, overrides: Sequence[str] | None) -> Config:
    from precompute.config import load_config
    from trainer.config import Config

    return load_config(Config, path, list(overrides or []))


def _print_config(console: Console, config: Config) -> None:
    from precompute.config import toml_of

    console.print("[bold]resolved config[/]")
    console.print(_escaped(toml_of(config)), highlight=False, soft_wrap=True)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _emit_rows(rows: Sequence[Mapping[str, Any]], as_json: bool, as_csv: bool) -> bool:
    """Writes rows for programs where that was asked; says whether it did."""
    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other: give one of them")
    if as_json:
        _emit_json(list(rows))
    elif as_csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(sys.stdout, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    return as_json or as_csv


def _emit_json(body: Any) -> None:
    json.dump(body, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
