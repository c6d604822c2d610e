"""The report page: its charts, its data whatever the texts hold, and its filters in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_examples import PROBLEMS, run
from test_cli import ampo

from trainer.reports.charts import BARS, BOTTOM, LEFT, RIGHT, TOP, line_chart, stacked_chart

HOSTILE = '</script><script>document.title = "broken"</script><img src=x onerror=alert(1)> \u2028 & "quoted"'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rewrite(file: Path, **columns: Any) -> None:
    """Replaces a Parquet file's columns: name -> function of a row."""
    table = pq.read_table(file)
    rows = [row | {name: change(row) for name, change in columns.items()} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


@pytest.fixture(scope="module")
def runs(world: Path, model_dir: Path) -> list[Path]:
    """A run with a hostile text in the store's queries of its first step, and a GRPO run that is never
    evaluated and has no query."""
    evaluation = {"problems__eval": str(world / "train.jsonl"), "eval__every": 2, "eval__k": [1]}
    ampo_run = run(world, model_dir, run__name="ampo", **evaluation).run
    grpo = run(world, model_dir, run__name="grpo", guidance__trigger="never", train__max_steps=2).run
    rewrite(
        ampo_run / "rollouts" / "step-000001.parquet",
        text=lambda row: HOSTILE if row["sample_index"] == 0 and not row["trace_id"] else row["text"],
    )
    return [ampo_run, grpo]


def page_of(runs: list[Path], out: Path, *options: str) -> tuple[str, str]:
    """The page, and what the command printed."""
    done = ampo("report", *map(str, runs), "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    return out.read_text(encoding="utf-8"), done.stdout


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.split('id="data">')[1].split("</script>")[0])
    return found


def test_curves_reach_from_edge_to_edge() -> None:
    chart = line_chart("reward", [([1, 3], [0.0, 0.5]), ([], [])], top=1.0)
    first, second = chart["lines"]
    assert first["points"] == [(LEFT, BOTTOM), (RIGHT, (BOTTOM + TOP) / 2)]
    assert second["points"] == []
    assert [label for _, label in chart["x"]] == ["1", "2", "3"]
    assert [label for _, label in chart["y"]] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_a_long_curve_has_its_running_mean_over_all_values() -> None:
    (line,) = line_chart("x", [(list(range(100)), [0.0, 1.0] * 50)])["lines"]
    assert len(line["points"]) == len(line["faint"]) == 100
    middle = (BOTTOM + TOP) / 2
    assert all(abs(y - middle) < 10 for _, y in line["points"][10:-10])


@pytest.mark.parametrize("value", [0.0, -2.0, 3e-9, 7e6])
def test_a_constant_curve_has_an_axis(value: float) -> None:
    chart = line_chart("x", [([5], [value])])
    assert chart["lines"][0]["points"]
    assert len(chart["y"]) >= 2


def test_bars_are_shares_and_long_runs_have_few() -> None:
    colours = {"ada": "0", "bob": "1", "no trace": "none"}
    chart = stacked_chart("used", {1: {"ada": 3, "bob": 1, "no trace": 0}}, colours)
    ada, bob = chart["bars"]
    assert ada["height"] == pytest.approx(3 * bob["height"], abs=0.2)
    assert ada["label"] == "step 1: ada 75% (3)"
    long = stacked_chart(
        "used", {step: {"ada": 1, "bob": 0, "no trace": 0} for step in range(1, 511)}, colours
    )
    assert len(long["bars"]) <= BARS
    assert long["bars"][-1]["label"].startswith("steps 508 to 510: ada 100%")


def test_the_page_has_the_groups_their_samples_and_candidates(runs: list[Path], tmp_path: Path) -> None:
    page, said = page_of(runs, tmp_path / "report.html")
    data = data_of(page)
    # 4 problems in each of 4 and 2 steps.
    assert (len(data["groups"]), data["runs"]) == (24, ["ampo", "grpo"])
    assert "left out" not in said
    group = next(group for group in data["groups"] if group["traces"])
    assert group["question"] in {problem.question for problem in PROBLEMS}
    assert len(group["samples"]) == 4
    assert {row["teacher"] for row in group["candidates"]} == {"ada", "bob"}
    assert all("\\boxed" in row["text"] for row in group["candidates"])
    assert data["groups"][0]["samples"][0]["text"] == HOSTILE
    assert page.count("</script>") == 2
    assert "http" not in page


def test_few_groups_are_spread_and_the_rest_is_counted(runs: list[Path], tmp_path: Path) -> None:
    page, said = page_of(runs, tmp_path / "report.html", "--groups", "8")
    groups = data_of(page)["groups"]
    line = "8 of 24 groups, spread over the steps; 16 left out; --groups 0 shows all"
    assert line in said
    assert line in page
    assert {group["step"] for group in groups if group["run"] == "ampo"} >= {1, 3}
    assert sum(bool(group["traces"]) for group in groups if group["run"] == "ampo") == 2


def test_what_cannot_be_read_is_said(runs: list[Path], tmp_path: Path) -> None:
    lonely = shutil.copytree(runs[0], tmp_path / "lonely")
    config = (lonely / "config.toml").read_text(encoding="utf-8")
    (lonely / "config.toml").write_text(re.sub(r'(path|train) = "[^"]*"', r'\1 = "nowhere"', config))
    rewrite(lonely / "queries" / "step-000001.parquet", trace_id=lambda row: row["trace_id"] and "0" * 16)
    rewrite(lonely / "rollouts" / "step-000002.parquet", text=lambda row: "x" * 7000)
    page, said = page_of([lonely], tmp_path / "report.html")
    assert "unused candidates have no text: the run's store lacks them or cannot be read" in said
    assert "texts of more than 6,000 characters lack their middle" in said
    middle = {row["text"][4000:-2000] for row in data_of(page)["groups"][4]["samples"]}
    assert middle == {"\n[… 1,000 characters …]\n"}


def test_a_run_that_has_just_begun_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    shutil.copy(runs[0] / "config.toml", tmp_path / "young" / "config.toml")
    page, _ = page_of([tmp_path / "young"], tmp_path / "report.html")
    assert page.count("not measured") == 7
    assert "No run queried the store." in page
    assert "No groups yet." in page


def test_a_page_is_html(runs: list[Path], tmp_path: Path) -> None:
    done = ampo("report", str(runs[0]), "--out", str(tmp_path / "report.pdf"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a page ends in .html" in done.stderr


DRIVER = """<script>
function seen(filters) {
  const form = document.getElementById("filters");
  form.reset();
  for (const [name, value] of Object.entries(filters)) form.elements[name].value = value;
  form.dispatchEvent(new Event("input", { bubbles: true }));
  return [...document.querySelectorAll("#groups details")].map(details => {
    details.open = true; details.dispatchEvent(new Event("toggle"));
    return details.textContent;
  });
}
const found = FILTERS.map(seen);
document.body.replaceChildren();
const result = document.createElement("pre");
result.id = "result"; result.textContent = JSON.stringify([document.title, found]);
document.body.append(result);
</script></body>"""


def browsed(page: Path, filters: list[dict[str, str]]) -> tuple[str, list[list[str]]]:
    """The title, and for each set of filters the texts of the groups shown, opened, in a headless browser."""
    driven = page.with_name("driven.html")
    script = DRIVER.replace("FILTERS", json.dumps(filters))
    driven.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title, found = json.loads(html.unescape(done.stdout.split('<pre id="result">')[1].split("</pre>")[0]))
    return title, found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_filters_work_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    page, _ = page_of(runs, tmp_path / "report.html")
    groups = data_of(page)["groups"]
    filters = [
        {},
        {"run": "grpo"},
        {"step": "2"},
        {"teacher": "ada"},
        {"outcome": "guided"},
        {"outcome": "unanswered"},
        {"outcome": "guided", "step": "1", "run": "ampo"},
        {"text": "onerror=alert"},
    ]
    title, found = browsed(tmp_path / "report.html", filters)
    assert title == "ampo, grpo"
    guided = [group for group in groups if group["traces"]]
    assert [len(texts) for texts in found] == [
        24,
        8,
        8,
        sum(any(row["teacher"] == "ada" for row in group["candidates"]) for group in groups),
        len(guided),
        sum(group["queried"] and not group["candidates"] for group in groups),
        sum(group["step"] == 1 for group in guided),
        4,
    ]
    assert 0 < len(found[4]) < 24
    assert found[5]
    shown = found[4][0]
    trace = guided[0]["traces"][0]
    assert f"replaced sample {trace['sample_index']}" in shown
    assert f"replaced by {trace['teacher']}" in shown
    assert HOSTILE in found[7][0]
