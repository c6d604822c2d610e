"""`ampo model`: checkpoints as models for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.shared import JsonFlag, console_of, emit_json

app = typer.Typer(no_args_is_help=True, help="Checkpoints as models for others.")


@app.command("merge")
def model_merge(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or any directory of a model or of LoRA adapters.")
    ],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="What weights are stored in; auto: as the model that training began from."),
    ] = "auto",
    json_: JsonFlag = False,
) -> None:
    """Write a checkpoint as an ordinary transformers directory, adapters merged, for anybody to serve.

    Adapters of a 4-bit student are added to the weights that it saw: its 4-bit ones, written out in full.

    Example: `ampo model merge runs/ampo/checkpoints/step-000510 my-model`, then `vllm serve my-model`
    """
    from dataclasses import asdict

    from trainer.merging import merge

    console_of(stderr=True).print(f"reading {checkpoint}", highlight=False, soft_wrap=True, markup=False)
    report = merge(checkpoint.absolute(), out.absolute(), dtype=dtype)
    if json_:
        emit_json(asdict(report))
        return
    kind = "with its adapters merged" if report.adapters else "whole"
    four = ", on the numbers that its 4-bit weights stand for" if report.four_bits else ""
    console_of().print(
        f"{report.out}: {report.parameters:,} weights in {report.dtype}, {kind}{four}; "
        f"{report.bytes / 2**20:,.1f} MiB",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
