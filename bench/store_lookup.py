"""Fetching the verified traces of 64 random problems: this store against DuckDB, Lance and pandas.

    python -m bench.store_lookup [--traces 100000] [--big 2000000] [--dir DIR]

One data set, one run, each contender in a process of its own: latency of a query, resident memory after all
of them, disk, build time. Lance and pandas get the row numbers; this store and DuckDB find the problems
themselves, and this store returns records, not columns. Then this store again
with `--big` traces of a tenth of the length. Needs `pip install -e ".[bench]"`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

QUERIES = 60
PROBLEMS_A_QUERY = 64
TEACHERS = ("ada", "bob", "cyd", "dee")
APPENDED = 512
"""Traces of a part as `ampo precompute teachers` writes it."""

BIG = "ampo, written sorted"
"""What a compaction of the big store leaves, without the minutes that it takes."""

CONTENDERS = ("ampo", "ampo, not compacted", "duckdb over parquet", "lance", "pandas in memory")


def main() -> None:
    """Runs all of it, prints a table and one line of JSON."""
    arguments = _arguments()
    if arguments.one:
        print(json.dumps(_one(arguments.one, Path(arguments.dir), arguments.traces)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        found = {name: _child(name, folder, arguments.traces) for name in CONTENDERS}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        if arguments.big:
            found[f"ampo, {arguments.big:,} short traces"] = _child(BIG, folder, arguments.big, length=600)
    _print(found)
    print(json.dumps(_summary(found)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=100_000)
    parser.add_argument("--big", type=int, default=2_000_000, help="0: leave it out")
    parser.add_argument("--dir", default=None, help="where the data goes for the time being")
    parser.add_argument("--length", type=int, default=6000, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(name: str, folder: str, traces: int, *, length: int = 6000) -> dict[str, Any]:
    source = Path(folder) / "traces.parquet"
    if not source.exists():
        write_source(source, traces, length)
    print(f"{name}: {traces:,} traces", file=sys.stderr)
    # Building and asking apart, so that the memory of the one is not taken for that of the other.
    command = [sys.executable, "-m", "bench.store_lookup", "--dir", folder, "--traces", str(traces), "--one"]
    found: dict[str, Any] = {}
    for part in ("build", "ask"):
        done = subprocess.run([*command, f"{part} {name}"], check=True, stdout=subprocess.PIPE)
        found |= json.loads(done.stdout)
    return found


def _one(task: str, folder: Path, traces: int) -> dict[str, Any]:
    part, _, name = task.partition(" ")
    target = folder / name.replace(" ", "-").replace(",", "")
    if part == "build":
        began = time.perf_counter()
        _BUILD[name](folder / "traces.parquet", target)
        return {"build_s": time.perf_counter() - began, "disk_mb": _disk(target) / 1e6}
    began = time.perf_counter()
    ask = _ASK[name](folder / "traces.parquet", target)
    opened = time.perf_counter() - began
    latencies = []
    for problems in _questions(traces):
        began = time.perf_counter()
        count = ask(problems)
        latencies.append(1e3 * (time.perf_counter() - began))
        assert count == len(TEACHERS) * len(problems), f"{name} gave {count} traces"
    return {
        "open_ms": 1e3 * opened,
        "median_ms": statistics.median(latencies),
        "p95_ms": statistics.quantiles(latencies, n=20)[-1],
        "rss_mb": _resident() / 1e6,
    }


def _questions(traces: int) -> Iterator[list[int]]:
    generator = np.random.default_rng(1)
    for _ in range(QUERIES):
        yield generator.choice(traces // len(TEACHERS), PROBLEMS_A_QUERY, replace=False).tolist()


def _problem_id(number: int) -> str:
    return f"{(number * 0x9E3779B97F4A7C15 + 1) % 2**64:016x}"


def write_source(path: Path, traces: int, length: int) -> None:
    """Traces of about `length` characters, four teachers to a problem, in the store's own columns; in order
    of teacher, then of problem as a file of problems has them."""
    from store.format.schema import TRACE_SCHEMA

    generator = np.random.default_rng(0)
    paragraphs = _paragraphs(generator)
    with pq.ParquetWriter(path, TRACE_SCHEMA, compression="zstd") as writer:
        for teacher in TEACHERS:
            for start in range(0, traces // len(TEACHERS), 8192):
                numbers = range(start, min(start + 8192, traces // len(TEACHERS)))
                writer.write_table(_rows(numbers, teacher, paragraphs, length, generator))


def _paragraphs(generator: np.random.Generator) -> list[str]:
    """Returns paragraphs of about 300 characters: phrases by Zipf's law and small sums."""
    syllables = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "on")]
    words = ["".join(generator.choice(syllables, generator.integers(1, 5))) for _ in range(6000)]
    phrases = [" ".join(generator.choice(words, generator.integers(2, 7))) for _ in range(4000)]
    found = []
    for _ in range(20_000):
        said = [phrases[pick] for pick in np.minimum(generator.zipf(1.2, 10) - 1, len(phrases) - 1)]
        for place in generator.integers(0, 10, 4):
            left, right = generator.integers(1, 999, 2)
            said[place] += f" ${left} \\cdot x_{{{right % 9}}} = {left * right}$"
        found.append(" ".join(said))
    return found


def _rows(
    numbers: Sequence[int], teacher: str, paragraphs: list[str], length: int, generator: np.random.Generator
) -> pa.Table:
    from store.format.schema import TRACE_SCHEMA
    from store.records import content_hash

    counts = generator.gamma(8, length / 300 / 8, len(numbers)).astype(int) + 1
    own = np.split(generator.integers(0, len(paragraphs), counts.sum()), np.cumsum(counts)[:-1])
    # Every teacher restates the problem: that much its solutions have in common.
    texts = [
        " ".join([paragraphs[number % len(paragraphs)], *(paragraphs[pick] for pick in picks[1:])])
        + " \\boxed{7}"
        for number, picks in zip(numbers, own, strict=True)
    ]
    many = len(numbers)
    columns: dict[str, list[Any]] = {
        "trace_id": [content_hash(number, teacher) for number in numbers],
        "problem_id": [_problem_id(number) for number in numbers],
        "teacher": [teacher] * many,
        "sample_index": [0] * many,
        "text": texts,
        "answer": ["7"] * many,
        "answer_start": [len(text) - 2 for text in texts],
        "n_tokens": [len(text) // 4 for text in texts],
        "token_ids": [[]] * many,
        "logprobs": [[]] * many,
        "finish_reason": ["stop"] * many,
        "verdict": ["match"] * many,
        "is_correct": [True] * many,
        "seed": generator.integers(0, 2**31, many).tolist(),
        "generation_fingerprint": ["00112233aabbccdd"] * many,
        "created_at": [1_790_000_000_000_000 + number for number in numbers],
        "verified_by": ["bench 1"] * many,
        "verdict_detail": [""] * many,
        "parsed_answer": ["7"] * many,
        "parsed_gold": ["7"] * many,
        "filtered": [None] * many,
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in TRACE_SCHEMA], TRACE_SCHEMA)


def _build_parts(source: Path, target: Path) -> None:
    """As the offline stage leaves it."""
    from store.format.index import reindex
    from store.format.manifest import change_parts, create_manifest
    from store.format.parts import write_part

    target.mkdir()
    create_manifest(target, verifiers={"bench": "1"})
    entries = {}
    for batch in pq.ParquetFile(source).iter_batches(APPENDED):
        table = pa.Table.from_batches([batch])
        for teacher in TEACHERS:
            own = table.filter(pc.equal(table["teacher"], teacher))
            if own.num_rows:
                part, entry = write_part(target, own)
                entries[part] = entry
    change_parts(target, add=entries)
    reindex(target)


def _build_store(source: Path, target: Path) -> None:
    from store.upkeep.compaction import compact

    _build_parts(source, target)
    compact(target)


def _build_sorted(source: Path, target: Path) -> None:
    from store.format.index import reindex
    from store.format.manifest import change_parts, create_manifest
    from store.format.parts import write_part
    from store.upkeep.compaction import PART_TRACES

    target.mkdir()
    create_manifest(target, verifiers={"bench": "1"})
    table = pq.read_table(source).sort_by("problem_id")
    slices = (table.slice(start, PART_TRACES) for start in range(0, table.num_rows, PART_TRACES))
    change_parts(target, add=dict(write_part(target, each) for each in slices))
    reindex(target)


def _build_parquet(source: Path, target: Path) -> None:
    """Sorted by problem, in DuckDB's own row groups: what one would hand to DuckDB."""
    target.mkdir()
    table = pq.read_table(source).sort_by("problem_id")
    pq.write_table(table, target / "traces.parquet", compression="zstd", row_group_size=2048)


def _build_lance(source: Path, target: Path) -> None:
    import lance

    lance.write_dataset(pq.ParquetFile(source).iter_batches(8192), target, schema=pq.read_schema(source))


def _build_nothing(source: Path, target: Path) -> None:
    target.mkdir()
    shutil.copy(source, target)


Ask = Callable[[Sequence[int]], int]


def _ask_store(source: Path, target: Path) -> Ask:
    from store.reader import TraceStore

    store = TraceStore(target)
    return lambda numbers: sum(map(len, store.candidates([_problem_id(n) for n in numbers]).values()))


def _ask_duckdb(source: Path, target: Path) -> Ask:
    import duckdb

    connection = duckdb.connect()
    file = str(target / "traces.parquet")

    def ask(numbers: Sequence[int]) -> int:
        ids = ", ".join(f"'{_problem_id(number)}'" for number in numbers)
        sql = f"SELECT * EXCLUDE (created_at) FROM '{file}' WHERE problem_id IN ({ids}) AND is_correct"
        return len(connection.execute(sql).fetchall())

    return ask


def _ask_lance(source: Path, target: Path) -> Ask:
    import lance

    dataset = lance.dataset(target)
    rows = _row_numbers(source)
    return lambda numbers: int(dataset.take([row for n in numbers for row in rows[n]]).num_rows)


def _ask_pandas(source: Path, target: Path) -> Ask:
    frame = pq.read_table(source).to_pandas()
    rows = _row_numbers(source)
    return lambda numbers: len(frame.iloc[[row for n in numbers for row in rows[n]]].to_dict("records"))


def _row_numbers(source: Path) -> dict[int, list[int]]:
    """problem -> its rows in the source: every teacher has the problems in one order."""
    problems = pq.read_metadata(source).num_rows // len(TEACHERS)
    return {
        number: [number + problems * place for place in range(len(TEACHERS))] for number in range(problems)
    }


_BUILD = dict(
    zip(CONTENDERS, (_build_store, _build_parts, _build_parquet, _build_lance, _build_nothing), strict=True)
)
_BUILD[BIG] = _build_sorted
_ASK = dict(zip(CONTENDERS, (_ask_store, _ask_store, _ask_duckdb, _ask_lance, _ask_pandas), strict=True))
_ASK[BIG] = _ask_store


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _print(found: dict[str, dict[str, Any]]) -> None:
    names = ("median_ms", "p95_ms", "open_ms", "rss_mb", "disk_mb", "build_s")
    print(f"{'':28}" + "".join(f"{name:>12}" for name in names))
    for contender, figures in found.items():
        print(f"{contender:28}" + "".join(f"{figures[name]:12.1f}" for name in names))


def _summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ours, lance = found["ampo"], found["lance"]
    big = next((figures for name, figures in found.items() if name.endswith("short traces")), None)
    return {
        "latency_over_lance": ours["median_ms"] / lance["median_ms"],
        "disk_over_lance": ours["disk_mb"] / lance["disk_mb"],
        "latency_over_duckdb": ours["median_ms"] / found["duckdb over parquet"]["median_ms"],
        "rss_mb": ours["rss_mb"],
        "latency_big_over_small": big["median_ms"] / ours["median_ms"] if big else None,
        "contenders": found,
    }


if __name__ == "__main__":
    main()
