"""`ampo store import`: other people's traces into a store, each verified again by our verifier.

A verdict in the file is ignored. A trace is identified by (problem, teacher, sample_index), the index
counting the pair's different texts in order of appearance: the same file again changes nothing, and an import
that was stopped goes on. A teacher's record has the engine `import`, the file's name for it as the model and
the files' content hash as the revision, so that another file under the same name is another recipe and is
refused.

Seeds (-1) and log-probs (none) are unknown, and the texts count as complete (`stop`). Without a tokenizer a
trace has no token ids and `n_tokens` is 0. The trainer reads neither: it tokenises the text with the
student's tokenizer, except under `guidance.ratio = "teacher"`, which refuses imported traces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import tee
from pathlib import Path
from typing import Any

from precompute.config import FiltersConfig, StoreConfig, TeacherConfig
from precompute.imports.foreign_rows import ForeignTrace, ImportForm
from precompute.imports.import_report import ImportCounts, ImportReport, TeacherImport
from precompute.problems.prompts import demanded_form
from precompute.run.filters import why_filtered
from precompute.run.refilter import check_filters, filter_settings
from precompute.verify.verifier import Verdict, Verifier
from store.errors import ConfigError, EngineError, RecipeChangedError
from store.records import Problem, TeacherRecord, Trace
from store.writer import StoreWriter

HELD_TRACES = 4096
"""Largest number of verified traces, of all teachers, that wait to be written."""
UNKNOWN_SEED = -1

Progress = Callable[[ImportCounts], None]
"""Called after each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    """Contents of the files without the texts."""

    problems: Mapping[str, Problem]
    sources: Mapping[str, str]
    """The store's name of a teacher -> the files' name."""
    traces: int


def import_traces(
    form: ImportForm,
    *,
    store: StoreConfig,
    verifier: Verifier,
    filters: FiltersConfig = FiltersConfig(),  # noqa: B008  It is frozen.
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Verifies the traces of the form's files into the store at `store.path`, which is created if missing.

    The files are read twice, a few rows at a time; problems stay in memory, texts do not. `tokenizer`: a
    directory or hub name, for token ids and counts, without which `min_tokens` and `max_tokens` filter
    nothing. Raises UserErrors before anything is written, except for a row that cannot be read, and
    KeyboardInterrupt after writing what was verified: the same call goes on.
    """
    began = time.monotonic()
    survey = _survey(form)
    tokens = _Tokens(tokenizer)
    records = _records(form, survey, tokens.fingerprint, filters)
    with StoreWriter.open(store.path, verifier=verifier.name, verifier_version=verifier.version) as writer:
        _register(writer, survey, records)
        work = _Import(records, survey, writer, verifier, filters, tokens, store, progress)
        work.run(form)
        return ImportReport(
            store=str(writer.path),
            files=tuple(map(str, form.files)),
            problems=len(survey.problems),
            teachers=tuple(work.counts[name] for name in sorted(work.counts)),
            seconds=time.monotonic() - began,
        )


def _survey(form: ImportForm) -> _Survey:
    problems: dict[str, Problem] = {}
    sources: dict[str, str] = {}
    traces = 0
    for problem, row in form.rows():
        problems.setdefault(problem.problem_id, problem)
        for trace in row:
            known = sources.setdefault(trace.teacher, trace.source)
            if known != trace.source:
                raise ConfigError(
                    f"{known!r} and {trace.source!r} would both be {trace.teacher!r} in the store; "
                    f"distinguish them with --rename {trace.source}=NAME"
                )
            traces += 1
    if not traces:
        raise ConfigError(f"{form.files[0]} holds no trace: its column {form.text!r} is empty in every row")
    return _Survey(problems=problems, sources=sources, traces=traces)


def _records(
    form: ImportForm, survey: _Survey, tokenizer_fingerprint: str, filters: FiltersConfig
) -> dict[str, TeacherRecord]:
    """Returns the teachers' records by the store's names."""
    content = content_of(form.files)
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
            tokenizer_fingerprint=tokenizer_fingerprint,
            filters=filter_settings(filters),
        )
        for name, source in survey.sources.items()
    }


def content_of(files: Sequence[Path]) -> str:
    """Returns 16 hex digits of blake2b over the files' bytes, one after the other."""
    digest = blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _register(writer: StoreWriter, survey: _Survey, records: Mapping[str, TeacherRecord]) -> None:
    """Checks every recipe before anything is written."""
    for record in records.values():
        check_filters(writer, record)
        try:
            writer.check_recipe(record)
        except RecipeChangedError as error:
            raise RecipeChangedError(
                f"{error}; or import with --rename {record.model}=NAME or --teacher-prefix PREFIX"
            ) from None
    writer.write_problems(list(survey.problems.values()))
    for record in records.values():
        writer.register_teacher(record)


class _Tokens:
    """Token ids by a tokenizer, or none without one."""

    def __init__(self, model: str | None) -> None:
        self._tokenizer: Any = None
        self.fingerprint = ""
        if model is not None:
            from precompute.engines.registry import load_tokenizer
            from precompute.problems.prompts import tokenizer_fingerprint

            try:
                self._tokenizer = load_tokenizer(TeacherConfig(name="import", model=model))
            except EngineError as error:  # the config has no teacher "import"
                reason = str(error).removeprefix("teacher 'import': model ")
                raise EngineError(f"--tokenizer {reason}") from error
            self.fingerprint = tokenizer_fingerprint(self._tokenizer)

    def ids(self, text: str) -> tuple[int, ...]:
        """Returns the text's ids and the EOS id, as if the teacher had generated it."""
        if self._tokenizer is None:
            return ()
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        eos = self._tokenizer.eos_token_id
        return (*ids, eos) if eos is not None else tuple(ids)


@dataclass(frozen=True, slots=True)
class _Indexed:
    """A trace that the store lacks."""

    trace: ForeignTrace
    sample_index: int


class _Import:
    """The second reading: sample indices, verdicts, parts."""

    def __init__(
        self,
        records: Mapping[str, TeacherRecord],
        survey: _Survey,
        writer: StoreWriter,
        verifier: Verifier,
        filters: FiltersConfig,
        tokens: _Tokens,
        config: StoreConfig,
        progress: Progress | None,
    ) -> None:
        self.counts = {name: TeacherImport(name, source) for name, source in survey.sources.items()}
        self._records = records
        self._done = {name: writer.done(name) for name in records}
        self._seen: dict[tuple[str, str], list[bytes]] = {}
        self._writer = writer
        self._verifier = verifier
        self._filters = filters
        self._tokens = tokens
        self._config = config
        self._progress = progress or (lambda counts: None)
        self._all = ImportCounts(survey.traces)
        self._ready: dict[str, list[Trace]] = {}
        self._written = time.monotonic()

    def run(self, form: ImportForm) -> None:
        """Reads, verifies, writes; also what was verified when the user interrupts."""
        lacking, again = tee(self._lacking(form))
        verdicts = self._verifier.stream(
            (each.trace.text, each.trace.problem.answer, each.trace.problem.question) for each in lacking
        )
        try:
            for verdict, indexed in zip(verdicts, again, strict=False):
                self._keep(self._trace(indexed, verdict))
        except KeyboardInterrupt:
            self._write_all()
            raise
        self._write_all()

    def _lacking(self, form: ImportForm) -> Iterator[_Indexed]:
        for _, row in form.rows():
            for trace in row:
                indexed = self._index(trace)
                self._all.done += 1
                if indexed is not None:
                    yield indexed
            self._progress(self._all)

    def _index(self, trace: ForeignTrace) -> _Indexed | None:
        """Returns the trace with its index; None where there is nothing to verify."""
        counts = self.counts[trace.teacher]
        counts.found += 1
        if not trace.text.strip():
            counts.empty += 1
            return None
        problem_id = trace.problem.problem_id
        texts = self._seen.setdefault((problem_id, trace.teacher), [])
        text = blake2b(trace.text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if text in texts:
            counts.repeated += 1
            return None
        texts.append(text)
        if len(texts) - 1 in self._done[trace.teacher].get(problem_id, {}):
            counts.existing += 1
            return None
        return _Indexed(trace, len(texts) - 1)

    def _keep(self, trace: Trace) -> None:
        counts = self.counts[trace.teacher]
        counts.new += 1
        counts.verdicts[trace.verdict] = counts.verdicts.get(trace.verdict, 0) + 1
        counts.filtered += trace.is_correct and not trace.is_usable
        self._all.new += 1
        self._all.verified += trace.is_correct
        ready = self._ready.setdefault(trace.teacher, [])
        ready.append(trace)
        if len(ready) >= self._config.part_traces:
            self._writer.append(self._ready.pop(trace.teacher))
        late = time.monotonic() - self._written >= self._config.part_seconds
        if late or sum(map(len, self._ready.values())) >= HELD_TRACES:
            self._write_all()

    def _trace(self, indexed: _Indexed, verdict: Verdict) -> Trace:
        trace = indexed.trace
        token_ids = self._tokens.ids(trace.text)
        record = self._records[trace.teacher]
        return Trace(
            problem_id=trace.problem.problem_id,
            teacher=trace.teacher,
            sample_index=indexed.sample_index,
            text=trace.text,
            answer=verdict.answer,
            answer_start=verdict.answer_start,
            n_tokens=len(token_ids),
            token_ids=token_ids,
            logprobs=(),
            finish_reason="stop",
            verdict=verdict.reason,
            is_correct=verdict.is_correct,
            seed=UNKNOWN_SEED,
            generation_fingerprint=record.generation_fingerprint,
            created_at=datetime.now(UTC),
            verdict_detail=verdict.detail,
            parsed_answer=verdict.parsed_answer,
            parsed_gold=verdict.parsed_gold,
            filtered=why_filtered(
                self._filters,
                text=trace.text,
                n_tokens=len(token_ids),
                form=demanded_form(record, trace.problem),
                opens_think=False,
            ),
        )

    def _write_all(self) -> None:
        for teacher in list(self._ready):
            self._writer.append(self._ready.pop(teacher))
        self._written = time.monotonic()
