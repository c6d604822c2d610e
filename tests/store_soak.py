"""Kills writing processes at random moments, and looks each time whether the store has kept its word.

    make soak          180 kills of a process that appends and compacts, 20 of `ampo precompute teachers`

What a process has been told is durable, it writes down outside the store; after each `kill -9` every such
trace must be there in full, none twice, none of another content, and the store in order. Ends with exit code
1 at the first store that is not as it should be, and leaves that store where it is.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
from store_examples import JUDGE, problem, teacher, trace, wrong

from store.reader import TraceStore
from store.records import Trace
from store.upkeep.checking import check
from store.upkeep.compaction import compact
from store.writer import StoreWriter

ROUNDS_OF_A_STORE = 10
"""Then a new one is begun: every store ages, and none grows without end."""


@dataclass
class Tally:
    """What the soak has seen."""

    kills: int = 0
    in_append: int = 0
    """Kills in the middle of an append."""
    in_compaction: int = 0
    late: int = 0
    """Rounds whose command had ended by itself."""
    traces: int = 0
    lost: int = 0
    doubled: int = 0


class NotKeptError(Exception):
    """A law that was broken."""


@cache
def soaked(name: str, number: int) -> Trace:
    """The trace that stands under a number: any length from nothing to some kilobytes, some wrong."""
    if number % 7 == 3:
        return wrong(number, name)
    draw = random.Random(number)
    n_tokens = draw.randrange(200)
    return trace(
        number,
        name,
        text=f"{number} é " * draw.randrange(400),
        n_tokens=n_tokens,
        token_ids=tuple(draw.randrange(50_000) for _ in range(n_tokens)),
        logprobs=tuple(-draw.randrange(64) / 8 for _ in range(n_tokens)),
    )


def write_for_ever(root: Path, journal: Path, seed: int) -> None:
    """The process to be killed: appends parts of 1 to 20 traces, compacts, and so on."""
    draw = random.Random(seed)
    with journal.open("ab", buffering=0) as told:
        while True:
            with StoreWriter.open(root, **JUDGE) as writer:
                for name in ("ada", "bob"):
                    writer.register_teacher(teacher(name))
                    start = sum(map(len, writer.done(name).values()))
                    for _ in range(draw.randrange(1, 6)):
                        stop = start + draw.randrange(1, 21)
                        told.write(f"begin {name} {start} {stop}\n".encode())
                        writer.append([soaked(name, number) for number in range(start, stop)])
                        told.write(f"done {name} {start} {stop}\n".encode())
                        start = stop
            told.write(b"compact begin 0 0\n")
            compact(root, part_traces=draw.choice([20, 50, 8192]))
            told.write(b"compact done 0 0\n")


def kill_a_writer(root: Path, journal: Path, seed: int, tally: Tally) -> None:
    """One round: a writer, a random while, SIGKILL, and the laws."""
    child = os.fork()
    if child == 0:
        try:
            write_for_ever(root, journal, seed)
        finally:
            os._exit(1)
    time.sleep(random.Random(seed).uniform(0.02, 1.5))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise NotKeptError("the writer failed by itself; see above")
    tally.kills += 1
    look(root, journal, tally)


def look(root: Path, journal: Path, tally: Tally) -> None:
    """The laws, by the journal: first as a reader that comes right after the kill, then as a writer."""
    told = [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []
    promised, begun = (
        {(n, i) for word, n, a, b in told if word == kind for i in range(int(a), int(b))}
        for kind in ("done", "begin")
    )
    tally.in_append += promised != begun
    tally.in_compaction += bool(told) and told[-1] == ["compact", "begin", "0", "0"]
    if not (root / "manifest.json").exists():
        if promised:
            raise NotKeptError("the store is gone")
        return
    compare(root, promised, begun, tally)
    with StoreWriter.open(root, **JUDGE):
        pass
    if check(root).findings or list(root.rglob(".tmp-*")):
        raise NotKeptError(f"a check finds {check(root).findings}")
    compare(root, promised, begun, tally)
    with journal.open("w") as file:  # what stands there now is what is promised from now on
        for name in ("ada", "bob"):
            with TraceStore(root) as store:
                count = len(store.traces(teacher=name))
            file.write(f"begin {name} 0 {count}\ndone {name} 0 {count}\n")


def compare(root: Path, promised: set[tuple[str, int]], begun: set[tuple[str, int]], tally: Tally) -> None:
    with TraceStore(root) as store:
        if store.damaged:
            raise NotKeptError(f"damaged: {store.damaged}")
        found = store.traces(tokens=True)
    numbers = {problem(number).problem_id: number for _, number in begun}
    there = [(each.teacher, numbers[each.problem_id]) for each in found if each.problem_id in numbers]
    tally.doubled += len(found) - len(set(there))
    tally.lost += len(promised - set(there))
    tally.traces = max(tally.traces, len(found))
    if tally.doubled or tally.lost or not set(there) <= begun:
        raise NotKeptError(f"{tally.lost} lost, {tally.doubled} doubled or never written")
    for each in found:
        if each != soaked(each.teacher, numbers[each.problem_id]):
            raise NotKeptError(f"another content: {each.teacher} {numbers[each.problem_id]}")


def kill_precompute(root: Path, seed: int, tally: Tally, before: dict[str, Trace]) -> dict[str, Trace]:
    """One round with the real command on the lab; returns what the store holds now."""
    child = subprocess.Popen(precompute(root), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = len(list(root.rglob("part-*.parquet"))) + 1
    end = time.monotonic() + 120
    # The start takes seconds and writes nothing: most kills shall come while there is something to lose.
    while seed % 4 and len(list(root.rglob("part-*.parquet"))) < until and time.monotonic() < end:
        if child.poll() is not None:
            break
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 1.5))
    child.kill()
    _, said = child.communicate()
    if child.returncode not in (0, -signal.SIGKILL):
        raise NotKeptError(f"`ampo precompute teachers` ended with {child.returncode}: {said}")
    tally.kills += child.returncode != 0
    tally.late += child.returncode == 0
    return kept(root, before, tally)


def precompute(root: Path) -> list[str]:
    ampo = Path(sys.executable).with_name("ampo")
    small = ["--limit", "192", "--teacher", "totals", "--teacher", "signs"]
    parts = ["--set", "store.part_traces=16", "--set", "store.part_seconds=0.2"]
    options = ["--config", "configs/lab.toml", "--set", f"store.path={root}", *parts, *small]
    return [str(ampo), "precompute", "teachers", *options]


def kept(root: Path, before: dict[str, Trace], tally: Tally) -> dict[str, Trace]:
    """The laws, by what a reader saw before."""
    if not (root / "manifest.json").exists():
        return before
    with TraceStore(root) as store:
        found = store.traces(tokens=True)
        if store.damaged:
            raise NotKeptError(f"damaged: {store.damaged}")
    now = {each.trace_id: each for each in found}
    samples = {(each.problem_id, each.teacher, each.sample_index) for each in found}
    tally.doubled += len(found) - len(samples)
    tally.lost += sum(now.get(key) != each for key, each in before.items())
    tally.traces = max(tally.traces, len(found))
    rows = sum(pq.read_metadata(part).num_rows for part in root.rglob("part-*.parquet"))
    if tally.lost or tally.doubled or rows != len(found) or check(root).findings:
        found_by_check = check(root).findings
        raise NotKeptError(f"{tally.lost} lost, {rows - len(found)} doubled; a check finds {found_by_check}")
    return now


def soak(place: Path, *, writers: int, commands: int, seed: int) -> Tally:
    """All rounds. Raises NotKeptError."""
    tally, began = Tally(), time.monotonic()

    def report(what: str, number: int, rounds: int) -> None:
        seconds = time.monotonic() - began
        line = f"{what} {number}/{rounds}  {tally.kills} kills, up to {tally.traces} traces, "
        line += f"{tally.lost} lost, {tally.doubled} doubled  {seconds:.0f} s"
        print(f"\r{line}", end="\n" if number == rounds or not sys.stdout.isatty() else "", flush=True)

    for number in range(writers):
        root = place / f"store-{number // ROUNDS_OF_A_STORE}"
        kill_a_writer(root, root.with_suffix(".journal"), seed + number, tally)
        if (number + 1) % 10 == 0 or number + 1 == writers:
            report("appending and compacting", number + 1, writers)
    seen: dict[str, Trace] = {}
    number = 0
    while tally.kills < writers + commands:
        late = tally.late
        seen = kill_precompute(place / f"lab-{late}", seed + number, tally, seen)
        if tally.late > late:  # it ended by itself: the store is full, and another is begun
            seen = {}
        number += 1
        report("precomputing", tally.kills - writers, commands)
    if commands:
        finish(place / f"lab-{tally.late}", tally)
    return tally


def finish(root: Path, tally: Tally) -> None:
    """The killed store, run to its end, holds what a run that nobody killed holds."""
    before = kept(root, {}, tally)
    subprocess.run(precompute(root), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = kept(root, before, tally)
    # 192 problems and two teachers.
    pairs = {(each.problem_id, each.teacher) for each in after.values()}
    if len(pairs) != 2 * 192:
        raise NotKeptError(f"{len(pairs)} of 384 pairs of problem and teacher are there at the end")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--writers", type=int, default=180, help="kills of a writer")
    parser.add_argument("--commands", type=int, default=20, help="kills of `ampo precompute teachers`")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    place, began = Path(tempfile.mkdtemp(prefix="ampo-soak-")), time.monotonic()
    try:
        tally = soak(place, writers=asked.writers, commands=asked.commands, seed=asked.seed)
    except NotKeptError as broken:
        print(f"\nbroken: {broken}; the stores are in {place}")
        return 1
    shutil.rmtree(place)
    print(
        f"{tally.kills} kills: {tally.in_append} in an append, {tally.in_compaction} in a compaction; "
        f"{tally.late} rounds ended by themselves; stores of up to {tally.traces} traces\n"
        f"{tally.lost} lost, {tally.doubled} doubled, {time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
