"""Reads problems from files and recognises repeated ones by content (DESIGN 3).

Rows that cannot be used are counted by reason and left out; only when all are is it an error. The forms of a
row are in forms.py, the kinds of files in data_files.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from precompute.config import ProblemColumns, ProblemFiles, ProblemsConfig
from precompute.config_file import short
from precompute.problems.data_files import Row, data_rows, files_at, hub_rows
from precompute.problems.data_rows import cell_of, find_column
from precompute.problems.forms import PROBLEM_FORMS, TEMPLATE, Columns
from precompute.problems.prompts import filled_template
from precompute.verify.verifier import Verifier
from store.errors import ProblemsError, prefixed
from store.reader import TraceStore
from store.records import Problem
from store.registry import lookup

QUESTION_COLUMNS = (
    *("question", "problem", "prompt", "Problem", "Question"),
    *("conversations", "messages", "0.value"),
)
ANSWER_COLUMNS = (
    *("answer", "gold", "reward_model.ground_truth", "Answer", "final_answer", "expected_answer"),
    *("ground_truth", "answerKey", "solution", "Solution", "conversations", "1.ground_truth.value"),
)
SOURCE_COLUMNS = ("data_source", "source")
METADATA_COLUMNS = ("metadata", "extra_info")
NO_ANSWERS = ("proof", "notfound", "not found", "unknown", "none", "nan", "n/a")
"""Gold answers of published data sets that are none, to verifiers of mathematics."""
MOST_REASONS = 8
"""Reasons with a line of their own, where every row is wrong in its own way."""
CHECKED_AT_ONCE = 500
"""Gold answers between two reports of progress."""


class LeftOut:
    """Counts what is left out, by reason, with the first example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        """Counts one more for a reason."""
        self.counts[reason] += 1
        self._examples.setdefault(reason, example)

    def add_row(self, source: str | Path, number: int, reason: str) -> None:
        """Counts a row of a file; the example says where it is and what stands behind the reason's colon."""
        kind = re.split("[:;]", reason)[0]
        self.add(kind, f"{source}, row {number}{reason.removeprefix(kind)}")

    @property
    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first, and one for all beyond MOST_REASONS."""
        reasons = self.counts.most_common()
        lines = [
            f"{count:,} left out: {reason}, e.g. {self._examples[reason]}"
            for reason, count in reasons[:MOST_REASONS]
        ]
        rest = sum(count for _, count in reasons[MOST_REASONS:])
        return [*lines, f"{rest:,} left out for other reasons"] if rest else lines


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSet:
    """The problems of a set of files."""

    problems: tuple[Problem, ...]
    """Unique by content, in the files' order; of equal ones the first."""
    rows: int
    """Rows of the files."""
    duplicates: int
    """Rows that repeat an earlier one."""
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    """Rows that hold no problem."""


def load_problems(files: ProblemFiles | str | Path) -> ProblemSet:
    """Reads files, with their columns, or one file. Raises ProblemsError where they hold no problem."""
    given = files if isinstance(files, ProblemFiles) else ProblemFiles(files=(str(files),))
    unique: dict[str, Problem] = {}
    repeats: Counter[str] = Counter()
    left_out = LeftOut()
    for problem in _problems_of(given, left_out):
        unique.setdefault(problem.problem_id, problem)
        repeats[problem.problem_id] += 1
    if not unique:
        first = f": {left_out.lines[0]}" if left_out.counts else ""
        raise ProblemsError(f"{given.name} holds no problem{first}")
    problems = tuple(replace(problem, repeats=repeats[each]) for each, problem in unique.items())
    rows, used = repeats.total() + left_out.counts.total(), repeats.total()
    return ProblemSet(problems=problems, rows=rows, duplicates=used - len(unique), left_out=left_out)


def _problems_of(files: ProblemFiles, left_out: LeftOut) -> Iterator[Problem]:
    """Yields the problem of each row, and counts the rows without one."""
    for name in files.files:
        sources = [name] if name.startswith("hf:") else files_at(name, kind="problem file")
        for source in sources:
            reader = ProblemReader(files)

            bad = partial(left_out.add_row, source)
            rows = (
                hub_rows(source)
                if isinstance(source, str)
                else data_rows(source, kind="problem file", on_bad=bad)
            )
            for number, row in rows:
                try:
                    problem = reader.read(source, row)
                except ValueError as error:
                    bad(number, str(error))
                else:
                    yield problem


def configured_problems(config: ProblemsConfig, files: ProblemFiles, *, key: str) -> ProblemSet:
    """Reads the problems of `problems.train`, `problems.eval` or of one of `eval.sets`, whose `key` errors
    name."""
    with prefixed(key, ProblemsError):
        return load_problems(config.with_columns(files))


class ProblemReader:
    """Reads the problems of one file's rows; the first row that has them settles the columns."""

    def __init__(
        self,
        given: ProblemColumns,
        *,
        options: tuple[str, str] = ("problems.question_column", "problems.answer_column"),
    ) -> None:
        """`options` choose the columns, for errors. Raises ConfigError for an unknown form."""
        self._given, form = given, given.form
        self._forms = (
            PROBLEM_FORMS.values() if form is None else [lookup(PROBLEM_FORMS, form, key="problems.form")]
        )
        built_in = form is None or form in PROBLEM_FORMS
        names = (QUESTION_COLUMNS, ANSWER_COLUMNS) if built_in else ((), ())
        wanted = (TEMPLATE if given.template else given.question_column, given.answer_column)
        self._wanted = tuple(zip(wanted, names, options, strict=True))
        self._columns: Columns | None = None

    def read(self, file: Path | str, row: Row) -> Problem:
        """Returns the problem that a row states. ValueError that names what is wrong with the row."""
        given = self._given
        if given.template:
            row = {**row, TEMPLATE: filled_template(given.template, {"row": row, **row})}
        try:
            if self._columns is None:
                self._columns = Columns(
                    *(find_column(file, row, *each) if each[0] or each[1] else "" for each in self._wanted)
                )
            problem = self._formed(row, self._columns)
        except KeyError as error:
            raise ValueError(f"the column {error} is missing") from None
        except ProblemsError as error:
            raise ValueError(str(error).removeprefix(f"{file} has ")) from None
        verifier = row.get("verifier")
        problem = replace(
            problem,
            source=source_of(row, given.source_column) or problem.source,
            verifier=verifier if isinstance(verifier, str) and verifier else problem.verifier,
            metadata={**metadata_of(row, given.metadata_column), **problem.metadata},
        )
        _check_text(problem)
        return problem

    def _formed(self, row: Row, columns: Columns) -> Problem:
        for form in self._forms:
            if (problem := form(row, columns)) is not None:
                return problem
        raise ValueError(f"problems.form does not fit this row: {short(row)}")


def source_of(row: Row, column: str | None) -> str:
    """Returns the row's origin or subject: the named column's, or that of SOURCE_COLUMNS."""
    if column is not None:
        return str(cell_of(row, column) or "")
    return next((cell for cell in map(row.get, SOURCE_COLUMNS) if isinstance(cell, str)), "")


def metadata_of(row: Row, column: str | None = None) -> dict[str, Any]:
    """Returns the facts for the row's verifier, in JSON's types: of the named column, or of `metadata` or
    verl's `extra_info`, an object or JSON text. ValueError where the named one holds neither."""
    for name in METADATA_COLUMNS if column is None else (column,):
        cell = row.get(name) if column is None else cell_of(row, name)
        if isinstance(cell, str) and cell.strip().startswith("{"):
            cell = json.loads(cell)
        if isinstance(cell, Mapping):
            facts = json.loads(json.dumps(cell, default=str))
            # Parquet gives every row the keys of all.
            return {key: value for key, value in facts.items() if value is not None}
        if column is not None and cell is not None:
            raise ValueError(f"{column} is no object: {short(cell)}")
    return {}


def _check_text(problem: Problem) -> None:
    """Raises ValueError for lone surrogates, which no file in UTF-8 can hold."""
    texts = problem.question, problem.answer, problem.source, problem.system_prompt or "", problem.verifier
    try:
        json.dumps([*texts, problem.turns, problem.metadata], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"a text with lone surrogates: {short(problem.question)}") from None


def usable_problems(
    config: ProblemsConfig,
    files: ProblemFiles,
    verifier: Verifier,
    *,
    key: str,
    warn: Callable[[str], None],
    limit: int | None = None,
    shard: Callable[[Sequence[Problem]], Sequence[Problem]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[tuple[Problem, ...], ProblemSet]:
    """Returns the problems of `configured_problems` that can be used, and all that were read.

    Of `problems.train` only those in the range of pass rates, and of them the first `limit`. `warn` gets a
    line for each reason to leave some out. Raises ProblemsError where none can be used and no shard chooses.

    Args:
        limit: None: that of the config.
        shard: chooses some of the problems.
    """
    found = configured_problems(config, files, key=key)
    problems: Sequence[Problem] = found.problems
    if files is config.train:
        problems = in_pass_range(problems, config, found.left_out)[: limit or config.limit]
    chosen = problems if shard is None else shard(problems)
    usable = with_usable_golds(chosen, verifier, found.left_out, progress)
    lines = found.left_out.lines
    if not usable and shard is None:
        raise ProblemsError(f"{key}: {files.name}: no problem can be used: {lines[0]}")
    for line in lines:
        warn(f"{files.name}: {line}")
    return usable, found


def with_usable_golds(
    problems: Sequence[Problem],
    verifier: Verifier,
    left_out: LeftOut,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Problem, ...]:
    """Returns the problems whose gold answer their verifier can use, which could never earn a reward
    otherwise, and counts the others."""
    usable: list[Problem] = []
    for start in range(0, len(problems), CHECKED_AT_ONCE):
        some = problems[start : start + CHECKED_AT_ONCE]
        for problem, error in zip(some, verifier.gold_errors(some), strict=True):
            name, gold = verifier.name_for(problem), problem.answer.strip()
            example = f"{short(gold)} of {problem.problem_id}"
            if name in ("math", "numeric") and gold.casefold() in NO_ANSWERS:
                left_out.add("the gold answer is none", example)
            elif error is not None:
                left_out.add(f"a gold answer that the verifier {name} cannot use", f"{example}: {error}")
            else:
                usable.append(problem)
        progress(start + len(some), len(problems))
    return tuple(usable)


def in_pass_range(
    problems: Sequence[Problem], config: ProblemsConfig, left_out: LeftOut
) -> tuple[Problem, ...]:
    """Returns the problems whose pass rate in the store `problems.pass_rates` is in the config's range, and
    counts the others."""
    if config.pass_rates is None or (config.min_pass_rate, config.max_pass_rate) == (0, 1):
        return tuple(problems)
    with TraceStore(config.pass_rates) as store:
        rates = store.pass_rates()
    kept = []
    for problem in problems:
        rate = rates.get(problem.problem_id)
        if rate is None:
            left_out.add(f"without a sample in {config.pass_rates}", problem.problem_id)
        elif not config.min_pass_rate <= rate <= config.max_pass_rate:
            limits = f"{config.min_pass_rate:g} to {config.max_pass_rate:g}"
            left_out.add(f"a pass rate outside {limits}", f"{problem.problem_id}: {rate:.2f}")
        else:
            kept.append(problem)
    return tuple(kept)
