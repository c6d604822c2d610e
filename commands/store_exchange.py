"""`ampo store import` and `ampo store export`: traces from elsewhere, and for others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from commands.progress import Meter
from commands.shared import ConfigOption, JsonFlag, SetOption, StorePath, console_of, emit_json, read_config
from store.errors import UserError


def store_import(
    file: Annotated[
        Path, typer.Argument(help="Parquet or JSON lines; or a directory of such files, read as one.")
    ],
    store: Annotated[
        str | None, typer.Argument(help="The store's directory; default: the config's store.path.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The teacher of the traces that name none themselves.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(help="OLD=NEW: files the teacher that the file calls OLD under NEW. May be repeated."),
    ] = None,
    teacher_prefix: Annotated[str, typer.Option(help="Put before every teacher's name.")] = "",
    question_column: Annotated[
        str | None, typer.Option(help="Default: question, problem or prompt (a text, or messages).")
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option(help="Default: answer, gold or reward_model.ground_truth.")
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Default: target_lst, target, text, response, completion or output: a text, or a list of "
            "{content, source}."
        ),
    ] = None,
    teacher_column: Annotated[
        str | None, typer.Option(help="Default: teacher or extra_info.teacher.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A model whose tokenizer gives token ids and counts; default: none, they stay 0."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Take traces from elsewhere into a store; each is verified anew, wrong ones are kept with their verdict,
    and those that the config's [filters] hold back with the reason.

    Reads AMPO's form (a row a problem, `target_lst` of {content, source}), LUFFY's (`target`), and plain rows
    of question, answer, teacher and text. The same file again changes nothing; stopped at any moment, the
    same command goes on.

    Example: `ampo store import openr1_math_4longcots.parquet traces --rename deepseek-ai/DeepSeek-R1=r1`
    """
    from precompute.import_form import ImportColumns, ImportForm, TeacherNames, file_name, files_at
    from precompute.import_report import import_tables
    from precompute.importing import import_traces
    from precompute.verify import Verifier

    settings = read_config(config, [*(set_ or []), *([f"store.path={json.dumps(store)}"] if store else [])])
    if teacher_prefix and teacher_prefix != file_name(teacher_prefix):
        raise UserError(f"--teacher-prefix {teacher_prefix}: letters, digits, '.', '_' and '-' alone")
    names = TeacherNames(default=teacher, prefix=teacher_prefix, renames=_renames(rename or []))
    columns = ImportColumns(
        question=question_column, answer=answer_column, text=text_column, teacher=teacher_column
    )
    form = ImportForm(files_at(file), columns, names)
    console_of(stderr=True).print(f"reading {file}", highlight=False, soft_wrap=True)
    with Verifier.configured(settings.verify) as verifier, Meter("importing") as meter:
        try:
            report = import_traces(
                form,
                store=settings.store,
                verifier=verifier,
                filters=settings.filters,
                tokenizer=tokenizer,
                progress=lambda counts: meter(counts.done, counts.total, counts.note),
            )
        except KeyboardInterrupt:
            console_of(stderr=True).print(
                "\ninterrupted; what was judged is kept. Go on with the same command."
            )
            raise typer.Exit(130) from None
    if json_:
        emit_json(asdict(report))
    else:
        console_of().print(import_tables(report))


def store_export(
    to: Annotated[
        str,
        typer.Option(
            help="verl: a row a problem with target_lst; luffy: a row a trace with target; chat: messages "
            "for supervised training; hf: a directory for datasets.load_dataset, with a data card."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new .parquet or .jsonl file; for hf a new directory.")],
    store: StorePath = "traces",
    only_verified: Annotated[
        bool,
        typer.Option(
            "--only-verified/--all",
            help="Only traces that may guide a student; or wrong and filtered ones too.",
        ),
    ] = True,
    teacher: Annotated[list[str] | None, typer.Option(help="Only this teacher. May be repeated.")] = None,
    max_per_problem: Annotated[
        int | None, typer.Option(min=1, help="At most N traces of a problem; the teachers take turns.")
    ] = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="Replaces every system turn, '' for none; default: the problem's, in chat the teacher's."
        ),
    ] = None,
    license_: Annotated[
        str, typer.Option("--license", help="For the data card of hf, e.g. apache-2.0.")
    ] = "unknown",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    json_: JsonFlag = False,
) -> None:
    """Write a store's traces in another program's form: verl, LUFFY, chat messages, Hugging Face datasets.

    The output appears whole or not at all.

    Example: `ampo store export traces --to verl --out train.parquet --max-per-problem 4`
    """
    from store.exporting import ExportOptions, check_out, export
    from store.trace_store import TraceStore

    check_out(out.absolute(), to, overwrite=overwrite)
    options = ExportOptions(
        everything=not only_verified,
        teachers=tuple(teacher or ()),
        max_per_problem=max_per_problem,
        system_prompt=system_prompt,
        license=license_,
        overwrite=overwrite,
    )
    with TraceStore(store) as opened, Meter("exporting") as meter:
        try:
            report = export(opened, out, to, options, progress=meter)
        except KeyboardInterrupt:
            console_of(stderr=True).print(f"\ninterrupted; {out} was not written.", highlight=False)
            raise typer.Exit(130) from None
    if json_:
        emit_json(asdict(report))
    else:
        console_of().print(report.line, highlight=False, soft_wrap=True)


def _renames(pairs: list[str]) -> dict[str, str]:
    from precompute.import_form import file_name

    renames = {}
    for pair in pairs:
        old, equals, new = pair.rpartition("=")
        if not equals or not old or new != file_name(new):
            raise UserError(f"--rename {pair}: write OLD=NEW, NEW of letters, digits, '.', '_' and '-'")
        renames[old] = new
    return renames
