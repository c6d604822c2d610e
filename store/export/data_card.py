"""The README.md of an exported data set: what made it, what judged it, what its columns are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from store.reader import TraceStore
from store.records import TeacherRecord
from store.reports.report import StoreReport, TeacherReport, store_report

if TYPE_CHECKING:
    from store.export.exporting import ExportOptions, ExportReport

_COLUMNS = """\
| column | what it holds |
| --- | --- |
| `question`, `answer` | the problem and its gold answer |
| `source`, `system_prompt` | where the problem comes from; the system turn that came with it, or null |
| `teacher`, `sample_index` | who wrote the trace; the how-maniest of this teacher and problem, from 0 |
| `text`, `n_tokens` | the trace as the teacher wrote it; its length in the teacher's tokens, 0: unknown |
| `final_answer` | the final answer found in the text |
| `verdict`, `verdict_detail` | what the verifier said, and why |
| `is_correct` | whether the trace counts as right |
| `filtered` | why a filter holds the trace back, or null |
| `finish_reason` | `stop`: it ended by itself; `length`: it was cut |
| `generation_fingerprint` | hash of the teacher's recipe |
| `problem_id`, `trace_id` | content hashes |
"""

_NO_LICENSE = """\
The licence of this data set was not stated when it was made. The traces are the output of the models below
and the problems come from the sources that the column `source` names: look up the terms of both before you
pass the data on, and set `license` in the header of this file.
"""


def data_card(store: TraceStore, options: ExportOptions, exported: ExportReport) -> str:
    """Markdown below the YAML header that the Hugging Face hub and `datasets` read."""
    report, records = store_report(store), store.teachers()
    by_name = {teacher.teacher: teacher for teacher in report.teachers}
    teachers = sorted(exported.traces)
    kept = "every trace, wrong ones too" if options.everything else "verified traces alone"
    return "\n".join(
        [
            _header(options, exported),
            "# Teacher traces\n",
            f"{exported.rows:,} solutions of {exported.problems:,} problems by {len(teachers)} "
            f"{'teacher' if len(teachers) == 1 else 'teachers'}: {kept}. Every solution was judged by "
            f"{store.manifest.verifier} {store.manifest.verifier_version} against the gold answer.\n",
            "## Licence\n",
            _NO_LICENSE if options.license == "unknown" else f"{options.license}\n",
            "## Teachers\n",
            _table(exported, by_name),
            "`verified` is the share of all traces that the teacher wrote, those left out here included.\n",
            "## Recipes\n",
            *(_recipe(name, records.get(name)) for name in teachers),
            "## Columns\n",
            _COLUMNS,
            _totals(report),
        ]
    )


def _header(options: ExportOptions, exported: ExportReport) -> str:
    """JSON scalars and lists are YAML too, so no value needs quoting of its own."""
    fields: dict[str, Any] = {
        "license": options.license,
        "task_categories": ["text-generation"],
        "tags": ["math", "reasoning", "ampo"],
        "size_categories": [_size_category(exported.rows)],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
        ],
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _size_category(rows: int) -> str:
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
    limits = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    return names[sum(rows >= limit for limit in limits)]


def _table(exported: ExportReport, reports: Mapping[str, TeacherReport]) -> str:
    lines = [
        "| teacher | model | traces here | traces written | verified |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, traces in sorted(exported.traces.items()):
        report = reports[name]
        lines.append(
            f"| {name} | {report.model or 'unknown'} | {traces:,} | {report.traces:,} "
            f"| {report.verified_share:.1%} |"
        )
    return "\n".join(lines) + "\n"


def _recipe(name: str, record: TeacherRecord | None) -> str:
    if record is None:
        return f"- **{name}**: its record is lost\n"
    recipe = {key: value for key, value in record.recipe.items() if key != "chat_template"}
    made = f"{record.engine} {record.engine_version}"
    body = json.dumps(
        {**recipe, "engine": made, "generation_fingerprint": record.generation_fingerprint},
        indent=2,
        ensure_ascii=False,
    )
    return f"**{name}**\n\n```json\n{body}\n```\n"


def _totals(report: StoreReport) -> str:
    return (
        f"\nThe store that this was exported from holds {report.traces:,} traces of {report.problems:,} "
        f"problems; {report.verified:,} of them are verified.\n"
    )
