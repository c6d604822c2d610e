"""Any sequence of what may happen to a store, against a plain dict."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from store_examples import JUDGE, make_store, problem, teacher
from store_faults import KILL, Contents, append_lacking, contents, keyed, keys_in, run

from store.reader import TraceStore
from store.records import VERDICTS, Trace
from store.upkeep.checking import check
from store.upkeep.compaction import compact, forget
from store.writer import StoreWriter

IDS = [problem(number).problem_id for number in range(4)]
NAMES = ("ada", "bob")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.builds(
    lambda text, times: text * times,
    st.text("aé\u0000\U0001f600", max_size=4),
    st.sampled_from([0, 1, 20_000]),
)


@st.composite
def batches(draw: st.DrawFn) -> list[Trace]:
    """Up to twenty traces of one teacher, of any content."""
    name = draw(st.sampled_from(NAMES))
    keys = st.tuples(st.sampled_from(IDS), st.integers(0, 40))
    return [
        a_trace(draw, name, problem_id, sample)
        for problem_id, sample in draw(st.lists(keys, min_size=1, max_size=20, unique=True))
    ]


def a_trace(draw: st.DrawFn, name: str, problem_id: str, sample_index: int) -> Trace:
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), max_size=4))
    logprobs = st.floats(max_value=0, width=32, allow_nan=False)
    return Trace(
        problem_id=problem_id,
        teacher=name,
        sample_index=sample_index,
        text=draw(TEXTS),
        answer=draw(st.none() | TEXTS),
        answer_start=draw(st.none() | st.integers(0, 2**31 - 1)),
        n_tokens=len(tokens),
        token_ids=tuple(tokens),
        logprobs=tuple(draw(st.lists(logprobs, min_size=len(tokens), max_size=len(tokens)))),
        finish_reason="stop",
        verdict=draw(st.sampled_from(VERDICTS)),
        is_correct=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
        generation_fingerprint=teacher(name).generation_fingerprint,
        created_at=draw(st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))),
        filtered=draw(st.none() | st.just("short: 3 tokens")),
    )


def cut(part: Path, place: int) -> None:
    os.truncate(part, place)


def turn(part: Path, place: int) -> None:
    content = bytearray(part.read_bytes())
    content[place] ^= 0x10
    part.write_bytes(content)


def remove(part: Path, _: int) -> None:
    part.unlink()


class AnyHistory(RuleBasedStateMachine):
    """`there`: what a reader must see; `ever`: every trace that was ever appended."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.root = self.place / "traces"
        self.there: Contents = {}
        self.ever: Contents = {}
        self.broken: set[Path] = set()
        self.removed: set[Path] = set()

    @initialize()
    def begin(self) -> None:
        make_store(self.root)

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    def append_lacking(self, batch: list[Trace]) -> Contents:
        with StoreWriter.open(self.root, **JUDGE) as writer:
            return append_lacking(writer, batch)

    @rule(batch=batches())
    def append(self, batch: list[Trace]) -> None:
        expected = {key: each for key, each in keyed(batch).items() if key not in self.there}
        assert self.append_lacking(batch) == expected
        self.there |= expected
        self.ever |= expected

    @rule(batch=batches(), at=st.integers(1, 60), fault=st.sampled_from([KILL, errno.ENOSPC, errno.EIO]))
    def append_and_fail(self, batch: list[Trace], at: int, fault: int) -> None:
        lacking = {key: each for key, each in keyed(batch).items() if key not in self.there}

        def work(root: Path, ack: Callable[[object], None]) -> None:
            self.append_lacking(batch)
            ack("appended")

        outcome = run(work, self.root, at=at, fault=fault)
        assert outcome.killed or outcome.refused or outcome.finished, outcome
        now = contents(self.root)
        assert now in (self.there, self.there | lacking), "half of an append"
        assert not outcome.acknowledged or now == self.there | lacking
        self.ever |= lacking if now != self.there else {}
        self.there = now

    @rule(size=st.integers(1, 30))
    def merge(self, size: int) -> None:
        compact(self.root, part_traces=size)

    @rule(name=st.sampled_from(NAMES))
    def leave_out(self, name: str) -> None:
        if (self.root / "teachers" / f"{name}.json").exists():
            forget(self.root, name)
            self.there = {key: each for key, each in self.there.items() if key[1] != name}
            self.ever = {key: each for key, each in self.ever.items() if key[1] != name}

    def whole(self) -> list[Path]:
        return sorted(set((self.root / "parts").rglob("part-*.parquet")) - self.broken)

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), harm=st.sampled_from([cut, turn, remove]))
    def damage(self, data: st.DataObject, harm: Callable[[Path, int], None]) -> None:
        part = data.draw(st.sampled_from(self.whole()))
        held = keys_in(part)
        harm(part, data.draw(st.integers(0, part.stat().st_size - 1)))
        self.broken.add(part)
        self.removed |= set() if part.exists() else {part}
        elsewhere = {key for other in self.whole() for key in keys_in(other)}
        for key in held - elsewhere:
            self.there.pop(key, None)

    @rule()
    def put_something_foreign(self) -> None:
        (self.root / "parts" / "ada").mkdir(parents=True, exist_ok=True)
        foreign = self.root / "parts" / "ada" / "part-000099-00000000deadbeef.parquet"
        foreign.write_bytes(b"PAR1 not really PAR1")
        self.broken.add(foreign)

    @rule()
    def repair(self) -> None:
        found = {self.root / "parts" / finding.part for finding in check(self.root, repair=True).findings}
        assert found == self.broken
        self.broken, self.removed = set(), set()
        assert check(self.root).findings == ()

    @rule()
    def make_again_what_is_lost(self) -> None:
        for name in NAMES:
            lost = [each for key, each in self.ever.items() if key not in self.there and key[1] == name]
            if lost:
                assert self.append_lacking(lost) == keyed(lost)
        self.there = dict(self.ever)

    @invariant()
    def a_reader_sees_exactly_what_is_there(self) -> None:
        if not self.root.exists():
            return
        assert contents(self.root) == self.there
        # The same traces written again may get the same name again.
        back = {part for part in self.removed if part.exists()}
        self.broken, self.removed = self.broken - back, self.removed - back
        usable = {key for key, each in self.there.items() if each.is_correct and each.filtered is None}
        with TraceStore(self.root) as store:
            asked = store.candidates(IDS, tokens=True)
        assert keyed(each for ones in asked.values() for each in ones).keys() == usable


def histories(*, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        AnyHistory,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # to shrink a history takes minutes, to read it one
            report_multiple_bugs=False,
        ),
    )


def test_any_history_leaves_what_a_dict_would_hold() -> None:
    histories(examples=4, steps=8)


@pytest.mark.slow
def test_many_long_histories_leave_what_a_dict_would_hold() -> None:
    histories(examples=40, steps=25)
