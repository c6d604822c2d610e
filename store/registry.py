"""Choice of a function by name: from a registry, or from a user's own code as `module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from store.errors import ConfigError

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, *, key: str) -> T:
    """Returns the entry that `name` chooses.

    Args:
        registry: the built-in choices by name.
        name: one of them, `package.module:function`, or `path/to/file.py:function`.
        key: the config key that holds `name`, for the error.

    Raises:
        ConfigError: there is no such entry, module or function.
    """
    if name in registry:
        return registry[name]
    where, colon, function = name.rpartition(":")
    if not colon:
        known = ", ".join(sorted(registry))
        raise ConfigError(f"{key} = {name!r}: give one of {known}, or module:function for your own")
    found: T | None = getattr(_module_at(where, name, key), function, None)
    if found is None:
        raise ConfigError(f"{key} = {name!r}: {where} has no {function!r}")
    return found


def _module_at(where: str, name: str, key: str) -> ModuleType:
    if where.endswith(".py"):
        return _module_of_file(Path(where), name, key)
    try:
        return importlib.import_module(where)
    except ImportError as error:
        raise ConfigError(f"{key} = {name!r}: module {where} cannot be imported: {error}") from error


def _module_of_file(file: Path, name: str, key: str) -> ModuleType:
    """The module of a file, loaded once a process."""
    module_name = f"ampo_user_{file.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{key} = {name!r}: there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
