"""The small files of a store: problems and teachers."""

from __future__ import annotations

import json
from pathlib import Path

from store.errors import StoreDamagedError
from store.format.manifest import PROBLEMS, TEACHERS
from store.format.parts import damage_named, one_line, open_part
from store.records import Problem, TeacherRecord

MAKE_AGAIN = "remove it and run `ampo precompute teachers` (or `ampo store import`) again"


def read_problems(root: Path) -> list[Problem]:
    """Returns every problem, in order of arrival. Raises StoreDamagedError."""
    path = root / PROBLEMS
    if not path.exists():
        return []
    with damage_named(path, MAKE_AGAIN), open_part(path) as file:
        rows = file.read(use_threads=False).to_pylist()
        ids = [row.pop("problem_id") for row in rows]
        problems = [Problem(**row) for row in rows]
        if ids != [problem.problem_id for problem in problems]:
            raise ValueError("the problem_id of a row does not fit its content")
    return problems


def read_teachers(root: Path) -> dict[str, TeacherRecord]:
    """Returns every registered teacher, in order of the name. Raises StoreDamagedError."""
    records = {}
    for path in sorted((root / TEACHERS).glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
            content.pop("generation_fingerprint", None)
            record = TeacherRecord(**content)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise StoreDamagedError(f"{path} cannot be read: {one_line(error)}; {MAKE_AGAIN}") from error
        records[record.name] = record
    return records
