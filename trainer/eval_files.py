"""The directory of one `ampo eval`: samples as they come, and what they came to.

    eval.json                      what is evaluated, and how: a second run goes on only with the same
    samples/part-000001.parquet    a row a sample (EVAL_SCHEMA); a part appears whole or not at all
    results.json                   written when all samples are there

`SELECT source, avg(is_correct::INT) FROM 'DIR/samples/*.parquet' GROUP BY source` just works in DuckDB.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import RunError
from store.format.files import FileLock, make_directory, remove_orphans, whole_file
from trainer.evaluation import EvalSample

EVAL_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("source", pa.string()),
        ("sample_index", pa.int32()),
        ("is_correct", pa.bool_()),
        ("has_format", pa.bool_()),
        ("n_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
    ]
)
"""The fields of EvalSample, which says what they are."""

PART_SAMPLES = 512
PART_SECONDS = 10.0
"""A part is written after this many samples or seconds: what a kill may lose."""

LOCK = ".write.lock"


class EvalFiles:
    """Writes and reads the directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def opened(self, recipe: Mapping[str, Any]) -> Iterator[None]:
        """The directory is this process's for the block.

        Raises RunError when it holds an evaluation by another recipe, with the difference, or is none.
        """
        there = self.recipe()
        if there is None and self.root.exists() and any(self.root.iterdir()):
            raise RunError(f"--out {self.root} holds something that is no evaluation; choose a new directory")
        changed = differences(there or recipe, recipe)
        if changed:
            raise RunError(
                f"--out {self.root} holds an evaluation with {'; '.join(changed)}; choose another directory"
            )
        try:
            make_directory(self.root)
        except OSError as error:
            raise RunError(f"--out {self.root}: {error.strerror or error}") from error
        lock = FileLock(self.root / LOCK)
        if not lock.acquire(wait=False):
            raise RunError(f"--out {self.root}: another process (pid {lock.holder()}) is writing there")
        try:
            remove_orphans(self.root)
            self._json("eval.json", recipe)
            yield
        finally:
            lock.release()

    def recipe(self) -> dict[str, Any] | None:
        """What is evaluated there; None: nothing yet."""
        path = self.root / "eval.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def samples(self) -> list[EvalSample]:
        """All that are there."""
        parts = sorted((self.root / "samples").glob("part-*.parquet"))
        return [EvalSample(**row) for part in parts for row in pq.read_table(part).to_pylist()]

    def keep(self, samples: Iterable[EvalSample]) -> Iterator[EvalSample]:
        """Passes them through and writes parts as they come; also what is there when it is left early."""
        ready: list[EvalSample] = []
        since = time.monotonic()
        try:
            for sample in samples:
                ready.append(sample)
                yield sample
                if len(ready) >= PART_SAMPLES or time.monotonic() - since >= PART_SECONDS:
                    self._part(ready)
                    ready, since = [], time.monotonic()
        finally:
            if ready:
                self._part(ready)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """The end: everything is there."""
        self._json("results.json", results)

    def _part(self, samples: list[EvalSample]) -> None:
        numbers = [int(path.stem.removeprefix("part-")) for path in self.root.glob("samples/part-*.parquet")]
        table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=EVAL_SCHEMA)
        name = f"part-{max(numbers, default=0) + 1:06d}.parquet"
        with whole_file(self.root / "samples" / name) as file:
            pq.write_table(table, file, compression="zstd")

    def _json(self, name: str, body: Mapping[str, Any]) -> None:
        with whole_file(self.root / name) as file:
            file.write((json.dumps(body, indent=2) + "\n").encode())


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key = there, now other` for every key that differs."""
    pairs = {key: (there.get(key), now.get(key)) for key in sorted({*there, *now})}
    return [f"{key} = {old!r}, now {new!r}" for key, (old, new) in pairs.items() if old != new]
