"""`ampo precompute teachers`, `ampo verify`, `ampo store import` and `ampo store refilter`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from store.errors import ConfigError, UserError
from store.terminal.console import (
    ConfigOption,
    DryRun,
    JsonFlag,
    SetOption,
    console_of,
    emit_json,
    on_interrupt,
    print_config,
)
from store.terminal.progress import Meter

app = typer.Typer(no_args_is_help=True, help="The offline stage: teachers fill the store.")


TeacherOption = Annotated[
    list[str] | None, typer.Option("--teacher", help="Only this teacher. May be repeated; default: all.")
]
StoreArgument = Annotated[
    str | None, typer.Argument(help="The store's directory; default: the config's store.path.")
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="auto, vllm, transformers, openai, or module:function (your own); default: each teacher's. "
        "ray: the teachers' own engines on the workers of a Ray cluster, the one at RAY_ADDRESS or the "
        "one that `ray start` started on this machine; see [ray] in the config."
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        help="i/n, e.g. 3/16: only the i-th of n shards of the problems, beside processes that take the "
        "others into the same store. All must name the same n."
    ),
]
ProbeOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Let each teacher take one sample of N problems, keep nothing, and show the cost of a run: "
        "tokens, hours, disk. Implies --dry-run.",
    ),
]


@app.command("teachers")
def precompute_teachers(
    config: ConfigOption = None,
    set_: SetOption = None,
    teacher: TeacherOption = None,
    engine: EngineOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems.")] = None,
    shard: ShardOption = None,
    dry_run: DryRun = False,
    probe: ProbeOption = 0,
) -> None:
    """Let teachers solve the training problems; verify every solution into the store.

    Stopped at any moment, the same command goes on where it was.

    Example: `ampo precompute teachers --config configs/lab.toml --limit 64`

    On many machines with a common directory: `ampo precompute teachers --config F --shard 3/16`
    """
    from precompute.config_file import toml_of
    from precompute.problems.prompts import demanded_form
    from precompute.run import pipeline
    from precompute.run.progress import ConsoleReporter
    from precompute.run.shard import Shard
    from precompute.run.tables import plan_tables, report_tables
    from trainer.config import read_config

    settings, console = read_config(config, set_), console_of()
    chosen: dict[str, Any] = {"teachers": teacher, "engine": engine, "limit": limit}
    chosen["shard"] = None if shard is None else Shard.parse(shard)
    if dry_run or probe:
        with on_interrupt("nothing was kept"), ConsoleReporter(console) as reporter:
            plan = pipeline.plan(settings, **chosen, probe=probe, reporter=reporter)
        print_config(console, toml_of(settings))
        student_form = demanded_form(settings.student, plan.first_problem)
        console.print(plan_tables(plan, student_form=student_form))
        return
    kept = "what the workers wrote" if engine == "ray" else "every verified trace"
    with (
        on_interrupt(f"{kept} is kept. Go on with the same command"),
        ConsoleReporter(console) as reporter,
    ):
        report = pipeline.run(settings, **chosen, reporter=reporter)
    console.print(report_tables(report))


def verify(
    file: Annotated[Path, typer.Argument(help="A .parquet or .jsonl file, one response a row.")],
    response_column: Annotated[
        str | None, typer.Option(help="Default: response, completion, text, output, ..., solution.")
    ] = None,
    gold_column: Annotated[
        str | None,
        typer.Option(help="Default: gold, answer, ground_truth, reward_model.ground_truth, gold_answer."),
    ] = None,
    form: Annotated[
        Literal["any", "boxed", "answer_tags"],
        typer.Option(help="Mark of the final answer: `\\boxed{}`, `<answer>` tags, or either."),
    ] = "any",
    failed: Annotated[int, typer.Option(min=0, help="Show the first N rows that do not match.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Write every row's verdict to this .parquet or .jsonl file.")
    ] = None,
    json_: JsonFlag = False,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Verify the final answers of responses against their gold answers, as the trainer does.

    Counts by verdict, and the rows that failed. `--set verify.workers=8` takes more processes,
    `--set verify.timeout=20` gives each answer more seconds.

    Example: `ampo verify samples.jsonl --gold-column answer --failed 50 --out verdicts.parquet`
    """
    from precompute.verify.verifier import Verifier
    from precompute.verify.verify_file import PairFile, verify_file, verify_tables
    from trainer.config import read_config

    settings = read_config(config, set_)
    with on_interrupt(f"{out or 'nothing'} was {'not ' if out else ''}written", stderr=True):
        pairs = PairFile(file, response_column, gold_column)
        with Meter("verifying") as progress, Verifier(settings.verify) as verifier:
            report = verify_file(
                pairs,
                verifier,
                form=None if form == "any" else form,
                failed=failed,
                out=out,
                progress=progress,
            )
    if json_:
        emit_json(asdict(report))
    else:
        console_of().print(verify_tables(report))


def store_refilter(
    store: StoreArgument = None,
    teacher: TeacherOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Apply the config's [filters] to the stored traces; nothing is sampled or verified again.

    A filtered trace stays in the store with the reason, and never reaches the student. Without `--config` the
    filters must be named: `--set filters.max_tokens=4096`, or `=none` to lift all of them.

    Example: `ampo store refilter --config configs/lab.toml --set filters.max_tokens=4096`
    """
    from precompute.run.refilter import refilter
    from precompute.run.tables import refilter_table
    from trainer.config import read_config

    if config is None and not any(each.strip().startswith("filters.") for each in set_ or ()):
        raise ConfigError(
            "no [filters] given, which would lift all that the store has: give --config FILE, or name them "
            "by --set, e.g. --set filters.max_tokens=4096 (--set filters.max_tokens=none lifts all)"
        )
    settings, console = read_config(config, set_), console_of()
    with (
        on_interrupt("nothing is lost. Go on with the same command"),
        Meter("filtering traces") as meter,
    ):
        path = store or settings.store.path
        reports = refilter(path, settings.filters, teachers=teacher, progress=meter)
    console.print(refilter_table(reports))


def store_reverify(
    store: StoreArgument = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Verify the stored traces again, by the config's verifiers; nothing is sampled.

    With `problems.train` in the config, traces go to the problem of the same question where its gold answer
    was corrected.

    Example: `ampo store reverify --config my.toml`
    """
    from precompute.problems.problem_files import configured_problems
    from precompute.run.reverify import reverify
    from precompute.run.tables import reverify_table
    from precompute.verify.verifier import Verifier
    from trainer.config import read_config

    settings, console = read_config(config, set_), console_of()
    found, train = settings.problems, settings.problems.train
    problems = configured_problems(found, train, key="problems.train").problems if train.files else ()
    with (
        on_interrupt("the verdicts are as before. Start again with the same command"),
        Verifier(settings.verify) as verifier,
        Meter("verifying traces") as meter,
    ):
        reports = reverify(store or settings.store.path, verifier, problems, progress=meter)
    console.print(reverify_table(reports))


RenameOption = Annotated[
    list[str] | None,
    typer.Option("--rename", help="OLD=NEW: the file's teacher OLD is NEW in the store. May be repeated."),
]
QuestionColumn = Annotated[
    str | None, typer.Option(help="Default: question, problem or prompt (a text, or messages).")
]
AnswerColumn = Annotated[str | None, typer.Option(help="Default: answer, gold or reward_model.ground_truth.")]
TextColumn = Annotated[
    str | None,
    typer.Option(
        help="Default: target_lst, target, text, response, completion or output: a text, or a list of "
        "{content, source}."
    ),
]
TeacherColumn = Annotated[str | None, typer.Option(help="Default: teacher or extra_info.teacher.")]
CountTokenizer = Annotated[
    str | None,
    typer.Option(help="A model whose tokenizer gives token ids and counts; default: none, they stay 0."),
]


def store_import(
    file: Annotated[
        Path, typer.Argument(help="Parquet or JSON lines; or a directory of such files, read as one.")
    ],
    store: StoreArgument = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher of traces that name none.")] = None,
    rename: RenameOption = None,
    question_column: QuestionColumn = None,
    answer_column: AnswerColumn = None,
    text_column: TextColumn = None,
    teacher_column: TeacherColumn = None,
    tokenizer: CountTokenizer = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Import traces from elsewhere into a store; each is verified again and filtered, and all are kept.

    Reads AMPO's form (a row a problem, `target_lst` of {content, source}), LUFFY's (`target`), and plain rows
    of question, answer, teacher and text. Stopped at any moment, the same command goes on.

    Example: `ampo store import openr1_math_4longcots.parquet traces --rename deepseek-ai/DeepSeek-R1=r1`
    """
    from precompute.imports.foreign_rows import ImportColumns, ImportForm, TeacherNames
    from precompute.imports.import_traces import import_table, import_traces
    from precompute.problems.data_files import files_at
    from precompute.verify.verifier import Verifier
    from trainer.config import read_config

    settings = read_config(config, [*(set_ or []), *([f"store.path={json.dumps(store)}"] if store else [])])
    names = TeacherNames(default=teacher, renames=_renames(rename or []))
    columns = ImportColumns(
        question=question_column, answer=answer_column, text=text_column, teacher=teacher_column
    )
    form = ImportForm(files_at(file), columns, names)
    with (
        on_interrupt("what was verified is kept. Go on with the same command", stderr=True),
        Verifier(settings.verify) as verifier,
        Meter("importing") as meter,
    ):
        report = import_traces(
            form,
            store=settings.store,
            verifier=verifier,
            filters=settings.filters,
            tokenizer=tokenizer,
            progress=meter,
        )
    if json_:
        emit_json(asdict(report))
    else:
        console_of().print(import_table(report))


def _renames(pairs: list[str]) -> dict[str, str]:
    from precompute.imports.foreign_rows import file_name

    renames = {}
    for pair in pairs:
        old, equals, new = pair.rpartition("=")
        if not equals or not old or new != file_name(new):
            raise UserError(f"--rename {pair}: write OLD=NEW, NEW of letters, digits, '.', '_' and '-'")
        renames[old] = new
    return renames
