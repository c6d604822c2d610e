"""`ampo inspect store`: what a store holds, and what was asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.shared import CsvFlag, JsonFlag, StorePath, console_of, emit_json, emit_rows
from store.errors import UserError

if TYPE_CHECKING:
    from trainer.config import Config

SQL_VIEWS = """\
Views: **traces** (trace_id, problem_id, teacher, sample_index, text, answer, answer_start, n_tokens,
token_ids, logprobs, finish_reason, verdict, is_correct, seed, generation_fingerprint, created_at,
verdict_detail, parsed_answer, parsed_gold, filtered, is_usable); **problems** (problem_id, question, answer,
source, system_prompt); **teachers** (name, model, revision, engine, engine_version, chat_template,
system_prompt, chat_template_kwargs, sampling, tokenizer_fingerprint, generation_fingerprint); **parts**
(part, size, mtime_ns, rows, error)."""
"""store.views.VIEWS in words: a help text must not load what reads Parquet."""

app = typer.Typer(no_args_is_help=True, help="Look into a store, and what was asked of it.")


@app.command("queries")
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
    if emit_rows(rows, json_, csv_):
        return
    questions, console = questions_of(rows), console_of()
    shown = questions[-limit:] if limit else questions
    console.print(queries_table(shown, _problem_texts(run_config(files))))
    if len(shown) < len(questions):
        console.print(f"the last {len(shown)} of {len(questions)} questions; --limit 0 shows all")
    filtered = (step, problem, teacher) != (None, None, None)
    line = summary_line(summary_of(questions), filtered=filtered)
    console.print(f"{files.root.name}: {line}", highlight=False)


def _problem_texts(config: Config) -> dict[str, str]:
    """Question texts for the table, where the store is still there to tell them."""
    from store.trace_store import TraceStore

    try:
        with TraceStore(config.store.path) as store:
            return {problem.problem_id: problem.question for problem in store.problems()}
    except UserError:
        return {}


@app.command("summary")
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
        emit_json(asdict(report))
    else:
        console_of().print(summary_tables(report))


@app.command("traces")
def inspect_traces(
    store: StorePath = "traces",
    problem: Annotated[
        str | None, typer.Option(help="Only this problem_id, or its beginning; shows whole texts.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Only this teacher.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only this verdict, e.g. mismatch.")] = None,
    usable: Annotated[
        bool, typer.Option("--usable", help="Only traces that may guide a student: verified, not filtered.")
    ] = False,
    filtered: Annotated[
        bool, typer.Option("--filtered", help="Only traces that a filter holds back, with the reason.")
    ] = False,
    why: Annotated[
        bool,
        typer.Option("--why", help="Show gold and answer as they stand and as the verifier read them."),
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most N traces; 0: all.")] = 20,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Read traces side by side; with `--why`, what the verifier read in gold and answer.

    Example: `ampo inspect store traces traces --problem 5f0c1d2e3a4b5c6d`

    Why answers failed: `ampo inspect store traces traces --verdict mismatch --why`
    """
    from store.records import VERDICTS
    from store.report import problem_id_of, trace_rows
    from store.tables import traces_table
    from store.trace_store import TraceStore
    from store.why_table import why_table, with_golds

    if verdict is not None and verdict not in VERDICTS:
        raise UserError(f"--verdict {verdict}: one of {', '.join(VERDICTS)}")
    if usable and filtered:
        raise UserError("--usable and --filtered exclude each other: give one of them")
    with TraceStore(store) as opened:
        rows = trace_rows(
            opened,
            problem_id=None if problem is None else problem_id_of(opened, problem),
            teacher=teacher,
            verdict=verdict,
            usable=usable,
            filtered=filtered,
            limit=limit or None,
        )
        if why:
            rows = with_golds(opened, rows)
    if not emit_rows(rows, json_, csv_):
        console_of().print(why_table(rows) if why else traces_table(rows, full=problem is not None))


@app.command("problems")
def inspect_problems(
    store: StorePath = "traces",
    uncovered: Annotated[
        bool, typer.Option("--uncovered", help="Only those without a usable trace of any teacher.")
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
    if not emit_rows(rows, json_, csv_):
        console_of().print(problems_table(rows))


@app.command("agreement")
def inspect_agreement(store: StorePath = "traces", json_: JsonFlag = False, csv_: CsvFlag = False) -> None:
    """Show which teachers solve the same problems, pair by pair, and whether they err alike.

    Example: `ampo inspect store agreement traces`
    """
    from store.agreement import agreement_rows, agreement_tables, agreements
    from store.trace_store import TraceStore

    with TraceStore(store) as opened:
        pairs = agreements(opened)
    if not emit_rows(agreement_rows(pairs), json_, csv_):
        console_of().print(agreement_tables(pairs))


@app.command("lengths")
def inspect_lengths(
    store: StorePath = "traces",
    unit: Annotated[str, typer.Option(help="tokens (each teacher's own) or chars.")] = "tokens",
    png: Annotated[Path | None, typer.Option(help="Draw a histogram a teacher into this PNG.")] = None,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Show how long the traces are, verified ones and others apart: quantiles, and histograms as a PNG.

    Example: `ampo inspect store lengths traces --png lengths.png`
    """
    from store.lengths import length_rows, lengths, lengths_table, plot_lengths
    from store.trace_store import TraceStore

    with TraceStore(store) as opened:
        found = lengths(opened, unit)
    if png is not None:
        plot_lengths(found, unit, png)
    rows = length_rows(found)
    if emit_rows(rows, json_, csv_):
        return
    console_of().print(lengths_table(rows, unit))
    if png is not None:
        console_of().print(f"drew {png}", highlight=False, soft_wrap=True)


@app.command("sql", epilog=SQL_VIEWS)
def inspect_sql(
    query: Annotated[str, typer.Argument(help="One SELECT, in DuckDB's SQL.")],
    store: StorePath = "traces",
    limit: Annotated[int, typer.Option(min=0, help="The table shows the first N rows; 0: all.")] = 100,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Ask the store in SQL. Nothing can be written, and no other file read; a writer is not disturbed.

    `--json` and `--csv` give every row, whole cells.

    Example: `ampo inspect store sql "SELECT teacher, avg(n_tokens) FROM traces GROUP BY teacher" traces`
    """
    from store.tables import answer_table
    from store.trace_store import TraceStore
    from store.views import Views

    everything = json_ or csv_ or limit == 0
    with TraceStore(store) as opened, Views(opened) as views:
        try:
            answer = views.query(query, limit=None if everything else limit)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        damaged = len(opened.damaged)
    if damaged:
        typer.echo(f"{damaged} damaged parts are left out; see `ampo store check`", err=True)
    if emit_rows(answer.dicts(), json_, csv_):
        return
    console_of().print(answer_table(answer.columns, answer.rows))
    if answer.more:
        console_of().print(f"the first {limit:,} rows; --limit 0 shows all")
