"""`ampo verify`: anybody's responses against their gold answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from commands.shared import ConfigOption, JsonFlag, SetOption, console_of, emit_json, read_config

if TYPE_CHECKING:
    from precompute.verify_file import FileReport
    from trainer.config import Config


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
        typer.Option(help="Where the final answer stands: `\\boxed{}`, `<answer>` tags, or either."),
    ] = "any",
    failed: Annotated[int, typer.Option(min=0, help="Show the first N rows that are no match.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Write every row's verdict to this .parquet or .jsonl file.")
    ] = None,
    json_: JsonFlag = False,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Judge the final answers of responses against their gold answers, as the trainer would.

    Counts by verdict, and the rows that failed. `--set verify.workers=8` takes more processes,
    `--set verify.timeout=20` gives each answer more seconds.

    Example: `ampo verify samples.jsonl --gold-column answer --failed 50 --out verdicts.parquet`
    """
    settings = read_config(config, set_)
    try:
        report = _judge(settings, file, response_column, gold_column, form, failed, out)
    except KeyboardInterrupt:
        console_of(stderr=True).print(f"\ninterrupted; {f'{out} was not' if out else 'nothing was'} written.")
        raise typer.Exit(130) from None
    if json_:
        _emit(report)
    else:
        from precompute.verify_tables import verify_tables

        console_of().print(verify_tables(report))


def _judge(
    settings: Config,
    file: Path,
    response_column: str | None,
    gold_column: str | None,
    form: Literal["any", "boxed", "answer_tags"],
    failed: int,
    out: Path | None,
) -> FileReport:
    from commands.progress import Meter
    from precompute.verify import Verifier
    from precompute.verify_file import PairFile, verify_file

    pairs = PairFile(file, response_column, gold_column)
    with Meter("verifying") as progress, Verifier.configured(settings.verify) as verifier:
        return verify_file(
            pairs,
            verifier,
            form=None if form == "any" else form,
            failed=failed,
            out=out,
            progress=progress,
        )


def _emit(report: FileReport) -> None:
    from dataclasses import asdict

    emit_json(asdict(report))
