"""The house rules that a reader can rely on: who imports whom, and that every config key is read."""

from __future__ import annotations

import ast
import typing
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from pydantic import BaseModel

from trainer.config import Config

ROOT = Path(__file__).parent.parent
OURS = ("store", "precompute", "trainer", "lab", "cli")
PACKAGES = ("store", "precompute", "trainer", "lab")

LAYERS = {
    "store": [
        "errors registry",
        "records",
        "format",
        "reader writer",
        "terminal",
        "reports upkeep export",
    ],
    "precompute": [
        "config config_file",
        "problems verify",
        "engines",
        "imports run",
    ],
    "trainer": [
        "config",
        "parallel",
        "student",
        "method sampling",
        "variants buffer inserts",
        "evaluation",
        "telemetry",
        "run",
        "train",
    ],
}
"""Modules and folders of each package from the ground up; each imports from its own layer and from those
before it. Modules that are not listed (planning, reports, merge) are above them all."""

BELOW = {"store": set(), "precompute": {"store"}, "trainer": {"store", "precompute"}, "lab": {"store"}}
"""The packages that a package may import from; the command-line files (`cli.py`) are above them all."""

HEAVY = {
    "accelerate": 1,
    "vllm": 1,
    "bitsandbytes": 1,
    "math_verify": 1,
    "openai": 1,
    "peft": 1,
    "ray": 1,
    "wandb": 1,
}


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def our_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, in dotted form."""
    return {name for name in imports_of(path) if name.split(".")[0] in OURS}


@pytest.mark.parametrize("package", sorted(BELOW))
def test_a_package_imports_only_from_those_below_it(package: str) -> None:
    for path in modules_of(package):
        if path.name != "cli.py":
            others = {name.split(".")[0] for name in our_imports(path)} - {package}
            assert others <= BELOW[package], f"{path.relative_to(ROOT)} imports {sorted(others)}"


def layer_of(module: str) -> int:
    """The index of a dotted module's layer in its package."""
    package, _, rest = module.partition(".")
    layers = LAYERS[package]
    found = [i for i, names in enumerate(layers) if rest.split(".")[0] in names.split()]
    return found[0] if found else len(layers)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_no_import_goes_up_a_layer(package: str) -> None:
    upwards = [
        f"{dotted(path)} imports {name}"
        for path in modules_of(package)
        if path.name != "cli.py" and dotted(path) != package
        for name in our_imports(path)
        if name.startswith(f"{package}.") and layer_of(name) > layer_of(dotted(path))
    ]
    assert not upwards


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    modules = {dotted(path): path for path in modules_of(package) if dotted(path) != package}
    graph = {
        module: {name for name in imports_of(path) if name in modules and name != module}
        for module, path in modules.items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_each_heavy_library_is_imported_in_one_file(library: str) -> None:
    files = [
        path.relative_to(ROOT)
        for package in ("store", "precompute", "trainer")
        for path in modules_of(package)
        if any(name.split(".")[0] == library for name in imports_of(path))
    ]
    assert len(files) == HEAVY[library], files


def keys(model: type[BaseModel], path: str = "") -> list[tuple[str, str]]:
    """(dotted name, key) of every leaf of the config."""
    found = []
    for name, field in model.model_fields.items():
        below = [
            candidate
            for candidate in (field.annotation, *typing.get_args(field.annotation))
            if isinstance(candidate, type) and issubclass(candidate, BaseModel)
        ]
        found += keys(below[0], f"{path}{name}.") if below else [(f"{path}{name}", name)]
    return found


def test_every_config_key_is_read_by_the_code() -> None:
    read = {
        node.attr
        for package in ("precompute", "trainer")
        for path in modules_of(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = {dotted for dotted, key in keys(Config) if key not in read}
    assert unread <= {"problems.train", "problems.eval"}


@pytest.mark.parametrize("package", ["store", "precompute", "trainer", "lab"])
def test_functions_stay_short(package: str) -> None:
    for path in modules_of(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_nothing_but_the_lab_knows_of_the_lab() -> None:
    for package in ("store", "precompute", "trainer"):
        for path in modules_of(package):
            names = {name.split(".")[0] for name in imports_of(path)}
            assert "lab" not in names, path
