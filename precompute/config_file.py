"""Configuration files: TOML into frozen pydantic models, with errors that name the key and the right value.

Precedence: defaults < the file that `extends` names < file < `--set section.key=value`. An unknown key is an
error that names the nearest right one.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from store.errors import ConfigError

NONE = "none"
"""TOML has no null: this word stands for it, where a key can be None."""
SECRET = "secret"
"""Kind of an error whose input may be a key, and is not shown."""
EXTENDS = "extends"
"""At the top of a file: another file, relative to it, whose keys hold where this one does not set them."""
HOW_TO_WRITE = {
    "tuple_type": "write a list in brackets, e.g. [1, 2]",
    "dict_type": "write a table in braces, e.g. {a = 1, b = true}",
}
"""Kind of a pydantic error -> what is right in TOML."""


def secret_error(reason: str) -> PydanticCustomError:
    """Returns an error whose message does not repeat the value."""
    return PydanticCustomError(SECRET, "{reason}", {"reason": reason})


def expanded(path: str) -> str:
    """Returns a path with `~` and $VARIABLES replaced. Raises ValueError for a variable that is not set."""
    path = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", path):
        raise ValueError(f"the variable {unset[0]} is not set")
    return path


PathText = Annotated[str, AfterValidator(expanded)]
"""A path, or a name that may be one."""


class Section(BaseModel):
    """A frozen table of the config; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        can_be_none = {
            key for key, field in cls.model_fields.items() if type(None) in get_args(field.annotation)
        }
        return {key: None if value == NONE and key in can_be_none else value for key, value in table.items()}


C = TypeVar("C", bound=Section)


def load_config(schema: type[C], path: str | Sequence[str] | None, overrides: list[str]) -> C:
    """Reads the file at `path`, or several, later ones over earlier ones (None: defaults alone), applies
    `section.key=value` overrides, validates.

    Raises ConfigError with one line that names the key, the value and what would be right.
    """
    tree: Any = {}
    for each in [path] if isinstance(path, str) else path or ():
        tree = _overlaid(tree, read_tree(_file_of(each)))
    for override in overrides:
        set_key(tree, override)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(schema, error)) from None


def _file_of(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def read_tree(path: Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a file's tables over those of the file that it extends, key by key; a [[list]] is taken whole.

    `above` are the files that extend this one, the first one first.
    """
    if path.resolve() in above:
        names = " extends ".join(each.name for each in (*above, path))
        raise ConfigError(f"{path.absolute()} extends itself in the end: {names}")
    try:
        tree = read_toml(path)
    except ConfigError as error:
        raise ConfigError(f"{error} ({above[-1]} extends it)" if above else str(error)) from None
    base = tree.pop(EXTENDS, None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path.absolute()}: extends = {short(base)}: give the path of one TOML file")
    merged: dict[str, Any] = _overlaid(
        read_tree(path.parent / _file_of(base), above=(*above, path.resolve())),
        tree,
    )
    return merged


def _overlaid(base: Any, tree: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(tree, dict)):
        return tree
    return base | {key: _overlaid(base.get(key), value) for key, value in tree.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the file's tables."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path.absolute()}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path.absolute()}: {error.strerror}; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.absolute()} is not valid TOML: {error}") from None


def set_key(tree: dict[str, Any], override: str) -> None:
    """Applies one `section.key=value`; `teachers.NAME.key=value` reaches into a [[teachers]] table."""
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override!r}: write section.key=value, e.g. --set train.max_steps=100")
    table: Any = tree
    for depth, key in enumerate(keys[:-1]):
        table = _table_below(table, key, keys[:depth])
    if isinstance(table, list):
        raise ConfigError(f"--set {override!r}: write {'.'.join(keys[:-1])}.NAME.key=value")
    table[keys[-1]] = _parse_value(raw.strip())


def _table_below(table: Any, key: str, above: list[str]) -> Any:
    """Returns the table, or the list of tables, that `key` names: in a list by the tables' names."""
    if isinstance(table, list):
        named = {row.get("name"): row for row in table if isinstance(row, dict)}
        if key not in named:
            known = ", ".join(map(str, named))
            raise ConfigError(f"--set: {'.'.join(above)} has no {key!r}; it has: {known}")
        return named[key]
    below = table.setdefault(key, {})
    if not isinstance(below, dict | list):
        raise ConfigError(f"--set: {'.'.join([*above, key])} is a value, not a section")
    return below


def _parse_value(raw: str) -> Any:
    """Parses a TOML value; a bare word is a string, so `--set guidance.select=random` needs no quotes."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def explain(schema: type[Section], error: ValidationError) -> str:
    """Returns one line for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    location, kind = first["loc"], first["type"]
    where = dotted(location)
    reason = HOW_TO_WRITE.get(kind) or str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key {where} = {short(first['input'])}; {_hint(schema, location)}"
    if kind == "missing":
        return f"{where} is missing; it has no default"
    if kind == SECRET:
        return f"{where}: {reason}"
    if _table_at(schema, location) is not None:
        return _explain_table(kind, where, reason, first["input"])
    return f"{where} = {short(first['input'])}: {reason[:1].lower()}{reason[1:]}"


def _hint(schema: type[Section], location: tuple[int | str, ...]) -> str:
    """Returns the right key for an unknown one: of these initials, of this name in another section, or
    spelled nearly so; else all keys of the section."""
    table, key = _table_at(schema, location[:-1]), str(location[-1])
    known = sorted(table.model_fields if table else ())
    near = [name for name in known if key == "".join(word[0] for word in name.split("_"))]
    if not near and len(location) > 1:
        tables = {name: _table_at(schema, (name,)) for name in schema.model_fields}
        near = [f"{name}.{key}" for name, other in tables.items() if other and key in other.model_fields]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known keys: {', '.join(known)}"


def _table_at(schema: type[Section], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Returns the model of the table, or of the list of tables, at a location; None for a key's."""
    model: type[BaseModel] = schema
    for part in location:
        if part in model.model_fields:  # others are keys of a dict, or indices
            annotation = model.model_fields[str(part)].annotation
            choices = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
            models = [each for each in choices if issubclass(each, BaseModel)]
            if not models:
                return None
            model = models[0]
    return model


def _explain_table(kind: str, where: str, reason: str, given: Any) -> str:
    """Explains a table in the wrong form, or keys that contradict each other: the reason names them, the
    table's other keys would hide it."""
    if kind == "tuple_type":
        return f"{where} is a list of tables: write [[{where}]] above each"
    if kind == "model_type":
        listed = f", not [[{where}]]" if isinstance(given, list) else " and its keys below"
        return f"{where} is one table: write [{where}]{listed}"
    if isinstance(given, dict) and "[" in where:
        return f"teacher {given.get('name')!r}: {reason}"
    return f"[{where}] {reason}" if where else reason


def dotted(location: tuple[int | str, ...]) -> str:
    """Returns `teachers[0].model` for the location of a pydantic error."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def short(value: Any) -> str:
    """Returns a value for an error message: its repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def toml_of(config: BaseModel) -> str:
    """Writes the resolved config as TOML that `load_config` reads back to the same config."""
    lines: list[str] = []
    for name, value in config.model_dump(mode="json").items():
        for table in value if isinstance(value, list) else [value]:
            lines += [f"[[{name}]]" if isinstance(value, list) else f"[{name}]", *_assignments(table), ""]
    return "\n".join(lines)


def _assignments(table: dict[str, Any]) -> list[str]:
    """Returns `key = value` for each; a key such as `module:function` in quotes."""
    return [
        f"{key if key.isidentifier() else _toml_value(key)} = {_toml_value(value)}"
        for key, value in table.items()
    ]


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(_assignments(value)) + "}"
    # TOML writes numbers and strings as JSON does, DEL apart.
    return json.dumps(NONE if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")
