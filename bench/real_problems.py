"""Problems of `make real`: reasoning-gym's with a fixed seed, in lab/real.

    python -m bench.real_problems [--traces STORE]

train.jsonl has 160 problems of two kinds, heldout.jsonl 128 others of the same kinds; no sum and no equation
is in both, under whatever variable and words. siblings.jsonl has 64 problems of each of two kinds that are
not trained. A row names its kind.

With a store that `ampo precompute teachers` made of them, its usable traces become traces.jsonl, which
`ampo store import` reads, and the teachers' records teachers.json. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from precompute.problems.problem_files import load_problems
from store.reader import TraceStore

FOLDER = Path("lab/real")
SEED = 7
SUM = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}
EQUATION = {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 30}
TRAINED: dict[str, dict[str, Any]] = {
    "chain_sum": SUM,
    "simple_equations": EQUATION | {"operators": ["+", "-"], "operators_weights": [0.5, 0.5]},
}
SIBLINGS: dict[str, dict[str, Any]] = {
    "decimal_chain_sum": SUM | {"max_terms": 3, "min_decimal_places": 1, "max_decimal_places": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, default=None)
    store = parser.parse_args().traces
    files = {"traces": list(traces_of(store))} if store else problem_files()
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(json.dumps({"bench": "real_problems", **{name: len(rows) for name, rows in files.items()}}))


def problem_files() -> dict[str, list[dict[str, Any]]]:
    kinds = {kind: problems(kind, settings, 144) for kind, settings in TRAINED.items()}
    return {
        "train": [row for kind in kinds.values() for row in kind[:80]],
        "heldout": [row for kind in kinds.values() for row in kind[80:]],
        "siblings": [row for kind, settings in SIBLINGS.items() for row in problems(kind, settings, 64)],
    }


def traces_of(path: Path) -> Iterator[dict[str, Any]]:
    """A row for each usable trace; writes the teachers' records."""
    problems = load_problems(str(FOLDER / "train.jsonl")).problems
    records = {
        file.stem: json.loads(file.read_text("utf-8")) for file in sorted(path.glob("teachers/*.json"))
    }
    (FOLDER / "teachers.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", "utf-8")
    with TraceStore(path) as store:
        found = store.candidates([problem.problem_id for problem in problems])
    for problem in problems:
        own = {"question": problem.question, "answer": problem.answer, "data_source": problem.source}
        for trace in found[problem.problem_id]:
            yield {**own, "teacher": trace.teacher, "text": trace.text}


def problems(kind: str, settings: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The first `count` problems of a data set that differ in more than words and the variable's name."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows_of(kind, settings):
        found.setdefault(re.sub(r"[a-z]", "x", row["question"].rpartition(": ")[2]), row)
        if len(found) == count:
            break
    return list(found.values())


def rows_of(kind: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import reasoning_gym  # type: ignore[import-untyped]

    for entry in reasoning_gym.create_dataset(kind, size=4000, seed=SEED, **settings):
        yield {
            "question": entry["question"].strip(),
            "answer": str(entry["answer"]),
            "data_source": kind,
        }


if __name__ == "__main__":
    main()
