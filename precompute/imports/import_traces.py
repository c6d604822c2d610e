"""`ampo store import`: other people's traces into a store, each verified again by our verifier.

A verdict in the file is ignored. A trace is identified by (problem, teacher, sample_index), the index
counting the pair's different texts in order of appearance: the same file again changes nothing, and an import
that was stopped goes on. A teacher's record has the engine `import`, the file's name for it as the model and
the files' content hash as the revision, so that another file under the same name is another recipe and is
refused.

Seeds (-1) and log-probs (none) are unknown, and the texts count as complete (`stop`). Without a tokenizer a
trace has no token ids and `n_tokens` is 0. The trainer reads neither: it tokenises the text with the
student's tokenizer, except under `guidance.loss = "shaped_ratio"`, which refuses imported traces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import tee
from typing import Any

from rich.console import Group
from rich.text import Text

from precompute.config import FiltersConfig, StoreConfig, TeacherConfig
from precompute.engines import Completion
from precompute.engines.openai_answers import whole_text
from precompute.engines.registry import load_tokenizer
from precompute.imports.foreign_rows import ForeignTrace, ImportForm
from precompute.problems.problem_files import LeftOut
from precompute.problems.prompts import tokenizer_fingerprint
from precompute.run.refilter import check_filters, filter_settings
from precompute.run.reverify import check_verdicts
from precompute.run.traces import NO_FILTERS, PartBuffer, trace_of
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, EngineError, RecipeChangedError, prefixed
from store.format.parts import file_digest
from store.records import VERDICTS, Problem, TeacherRecord, Trace, content_hash
from store.terminal.tables import plain_table
from store.writer import StoreWriter

Progress = Callable[[int, int, str], None]
"""(traces done, traces in the files, a note)."""


@dataclass(slots=True)
class TeacherImport:
    """Counts of one teacher's traces."""

    teacher: str
    source: str
    """The files' name for it."""
    found: int = 0
    """Traces in the files."""
    empty: int = 0
    """Without a text; left out."""
    repeated: int = 0
    """The pair's text once more; left out."""
    mended: int = 0
    """With halves of surrogate pairs, which no file holds: U+FFFD replaces each."""
    existing: int = 0
    """In the store before."""
    new: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    """Number of new traces by verdict; a verdict that does not occur is missing."""
    filtered: int = 0
    """Number of new verified traces that a filter keeps from the student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """Result of an import."""

    store: str
    files: tuple[str, ...]
    problems: int
    """Number of different problems in the files."""
    teachers: tuple[TeacherImport, ...]
    seconds: float
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    """Rows that hold no problem or no trace."""


def import_traces(
    form: ImportForm,
    *,
    store: StoreConfig,
    verifier: Verifier,
    filters: FiltersConfig = NO_FILTERS,
    tokenizer: str | None = None,
    progress: Progress = lambda done, total, note: None,
) -> ImportReport:
    """Verifies the traces of the form's files into the store at `store.path`, which is created if missing.

    The files are read twice, a few rows at a time; problems stay in memory, texts do not. `tokenizer`: a
    directory or hub name, for token ids and counts, without which `min_tokens` and `max_tokens` filter
    nothing. Rows that cannot be read are left out. Raises UserErrors before anything is written. Whatever
    ends it, all that was verified is written, and the same call goes on.
    """
    began, left_out = time.monotonic(), LeftOut()
    problems, sources, total = _survey(form, left_out)
    with prefixed("--tokenizer", EngineError):
        loaded = load_tokenizer(TeacherConfig(name="import", model=tokenizer)) if tokenizer else None
    records = _records(form, sources, loaded, filters)
    counts = {name: TeacherImport(name, source) for name, source in sorted(sources.items())}

    def report() -> None:
        done = sum(each.empty + each.repeated + each.existing + each.new for each in counts.values())
        progress(done, total, _verified_share(list(counts.values())))

    with StoreWriter.open(store.path, verifiers=verifier.versions(problems.values())) as writer:
        _register(writer, list(problems.values()), records, verifier)
        stored = {name: writer.done(name) for name in records}
        parts = {
            name: PartBuffer(writer.append, part_traces=store.part_traces, part_seconds=store.part_seconds)
            for name in records
        }
        lacking, again = tee(_lacking(form, stored, counts, report))
        verdicts = verifier.stream((t.text, t.problem) for t, _ in lacking)
        try:
            for verdict, (foreign, index) in zip(verdicts, again, strict=False):
                trace = trace_of(
                    _completion(foreign.text, loaded),
                    verdict,
                    foreign.problem,
                    records[foreign.teacher],
                    sample_index=index,
                    filters=filters,
                )
                _count(counts[foreign.teacher], trace)
                parts[foreign.teacher].add(trace)
                report()
        finally:
            for part in parts.values():
                part.write()
    return ImportReport(
        store=str(writer.path),
        files=tuple(map(str, form.files)),
        problems=len(problems),
        teachers=tuple(counts.values()),
        seconds=time.monotonic() - began,
        left_out=left_out,
    )


def _survey(form: ImportForm, left_out: LeftOut) -> tuple[dict[str, Problem], dict[str, str], int]:
    """Returns the problems by id, the store's name of each teacher -> the files' name, and the number of
    traces."""
    problems: dict[str, Problem] = {}
    sources: dict[str, str] = {}
    traces = filled = 0
    for problem, row in form.rows(left_out):
        problems.setdefault(problem.problem_id, problem)
        for trace in row:
            known = sources.setdefault(trace.teacher, trace.source)
            if known != trace.source:
                raise ConfigError(
                    f"{known!r} and {trace.source!r} would both be {trace.teacher!r} in the store; "
                    f"distinguish them with --rename {trace.source}=NAME"
                )
            traces += 1
            filled += bool(trace.text.strip())
    if not filled and left_out.counts:
        raise ConfigError(f"{form.files[0]} holds no trace: {left_out.lines[0]}")
    if not filled:
        raise ConfigError(
            f"{form.files[0]} holds no trace: its column {form.text!r} has no response in any row; "
            "--text-column names the right one"
        )
    return problems, sources, traces


def _records(
    form: ImportForm, sources: Mapping[str, str], tokenizer: Any, filters: FiltersConfig
) -> dict[str, TeacherRecord]:
    """Returns the teachers' records by the store's names."""
    content = content_hash(*map(file_digest, form.files))
    named = form.files[0].name if len(form.files) == 1 else f"{len(form.files)} files"
    return {
        name: TeacherRecord(
            name=name,
            model=source,
            revision=content,
            engine="import",
            engine_version=named,
            chat_template="",
            system_prompt=None,
            chat_template_kwargs={},
            sampling={"text_column": form.text},
            tokenizer_fingerprint="" if tokenizer is None else tokenizer_fingerprint(tokenizer),
            filters=filter_settings(filters),
        )
        for name, source in sources.items()
    }


def _register(
    writer: StoreWriter, problems: Sequence[Problem], records: Mapping[str, TeacherRecord], verifier: Verifier
) -> None:
    """Checks verdicts and every recipe before anything is written."""
    check_verdicts(writer.path, problems, verifier)
    for record in records.values():
        check_filters(writer, record)
        try:
            writer.check_recipe(record)
        except RecipeChangedError as error:
            raise RecipeChangedError(f"{error}; or import with --rename {record.model}=NAME") from None
    writer.write_problems(problems)
    for record in records.values():
        writer.register_teacher(record)


def _lacking(
    form: ImportForm,
    stored: Mapping[str, Mapping[str, Mapping[int, bool]]],
    counts: Mapping[str, TeacherImport],
    report: Callable[[], None],
) -> Iterator[tuple[ForeignTrace, int]]:
    """Yields the traces that the store lacks, each with its sample index. Counts all others."""
    seen: dict[tuple[str, str], list[bytes]] = {}
    for _, row in form.rows(LeftOut()):
        for trace in row:
            count, problem_id = counts[trace.teacher], trace.problem.problem_id
            count.found += 1
            texts = seen.setdefault((problem_id, trace.teacher), [])
            whole = whole_text(trace.text)
            count.mended += whole != trace.text
            trace = replace(trace, text=whole)
            text = blake2b(whole.encode(), digest_size=8).digest()
            if not trace.text.strip():
                count.empty += 1
            elif text in texts:
                count.repeated += 1
            else:
                texts.append(text)
                if len(texts) - 1 not in stored[trace.teacher].get(problem_id, {}):
                    yield trace, len(texts) - 1
                    continue
                count.existing += 1
            report()


def _completion(text: str, tokenizer: Any) -> Completion:
    """Returns a text as if its teacher had sampled it just now, with the EOS token behind it."""
    token_ids: tuple[int, ...] = ()
    if tokenizer is not None:
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        token_ids = (*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *eos)
    return Completion(token_ids=token_ids, text=text)


def _count(counts: TeacherImport, trace: Trace) -> None:
    counts.new += 1
    counts.verdicts[trace.verdict] = counts.verdicts.get(trace.verdict, 0) + 1
    counts.filtered += trace.is_correct and not trace.is_usable


def _verified_share(teachers: Sequence[TeacherImport]) -> str:
    new = sum(teacher.new for teacher in teachers)
    verified = sum(teacher.verdicts.get("match", 0) for teacher in teachers)
    return f"verified {verified / new:.1%}" if new else ""


def import_table(report: ImportReport) -> Group:
    """Returns a row per teacher with the verdicts on the new traces, and a line of totals."""
    counted = {
        name: [getattr(teacher, name) for teacher in report.teachers]
        for name in ("found", "empty", "repeated", "existing", "new", "filtered")
    } | {verdict: [teacher.verdicts.get(verdict, 0) for teacher in report.teachers] for verdict in VERDICTS}
    shown = {
        name: each for name, each in counted.items() if any(each) or name in ("found", "new", "existing")
    }
    names = [teacher.teacher for teacher in report.teachers]
    rows = zip(names, *shown.values(), strict=True)
    table = plain_table(f"imported into {report.store}", text=["teacher"], numbers=tuple(shown), rows=rows)
    files = report.files[0] if len(report.files) == 1 else f"{len(report.files)} files"
    share = _verified_share(report.teachers)
    totals = f"{sum(counted['new']):,} new traces{f', {share}' if share else ''}; {report.seconds:.1f} s"
    lines = [Text(f"{files}: {report.problems:,} problems; {totals}")]
    if mended := sum(teacher.mended for teacher in report.teachers):
        lines.append(Text(f"{mended:,} texts had lone surrogates: U+FFFD replaces each"))
    return Group(table, *lines, *map(Text, report.left_out.lines))
