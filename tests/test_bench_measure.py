"""A way in a process of its own: what it gives, what it raises, and a process that cannot start."""

from __future__ import annotations

import sys
import types
from concurrent.futures.process import BrokenProcessPool

import pytest

from bench.measure import alone


def test_a_way_runs_in_another_process_and_its_error_comes_back() -> None:
    assert alone(abs, -7) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        alone(int, "seven")


def test_a_process_that_cannot_import_the_way_ends_with_its_own_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # A module that this process has and no other can find.
    module = types.ModuleType("nowhere_else")
    exec("def way(argument): return argument", module.__dict__)
    monkeypatch.setitem(sys.modules, "nowhere_else", module)
    with pytest.raises(BrokenProcessPool):
        alone(module.way, 1)
    assert "No module named 'nowhere_else'" in capfd.readouterr().err
