"""The command as a user meets it: what it prints and how it exits."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from run_examples import PROBLEMS, settings
from typer.main import get_command

import cli

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "150",
    "NO_COLOR": "1",
    "PYTHONPATH": str(ROOT),
}


def ampo(
    *arguments: str, cwd: Path | None = None, columns: str | None = "150"
) -> subprocess.CompletedProcess[str]:
    """The command in this process, which saves importing torch for each."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("NO_COLOR", "1")
        patch.delenv("COLUMNS", raising=False)
        if columns is not None:
            patch.setenv("COLUMNS", columns)
        patch.setattr(sys, "argv", ["ampo", *arguments])
        if cwd is not None:
            patch.chdir(cwd)
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def sets(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@pytest.fixture(scope="module")
def trained(world: Path, model_dir: Path) -> Path:
    """A run of two steps by the command itself."""
    overrides = settings(world, model_dir, train__max_steps=2, run__log_completions_every=1)
    done = ampo("train", *sets(overrides))
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert "sample completions, step 1" in done.stdout
    assert "ampo inspect store queries" in done.stdout
    return world / "runs" / "run"


def commands() -> Iterator[tuple[str, ...]]:
    def walk(command: object, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        children = getattr(command, "commands", None)
        if children is None:
            yield path
        else:
            for name, child in children.items():
                yield from walk(child, (*path, name))

    return walk(get_command(cli.app), ())


@pytest.mark.parametrize("command", sorted(commands()), ids=" ".join)
def test_every_command_has_an_example_in_its_help_and_is_documented(command: tuple[str, ...]) -> None:
    node: object = get_command(cli.app)
    for name in command:
        node = node.commands[name]  # type: ignore[attr-defined]
    help_text = str(node.help)  # type: ignore[attr-defined]
    assert f"Example: `ampo {' '.join(command)}" in " ".join(help_text.split())
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"ampo {' '.join(command)}" in page.read_text(encoding="utf-8") for page in pages)


def test_help_loads_nothing_heavy() -> None:
    # The 0.5 s of `ampo --help` are these imports; machines are noisy, module lists are not.
    code = "import sys, cli, typer.main; typer.main.get_command(cli.app); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "duckdb", "pyarrow", "pydantic", "numpy", "math_verify"}


def test_version_is_the_packages() -> None:
    assert ampo("--version").stdout.split()[0] == "ampo"


def test_in_a_pipe_no_line_is_folded(world: Path) -> None:
    query = "SELECT repeat('x', 70) AS a, * FROM traces"
    done = ampo("inspect", "store", "sql", query, str(world / "traces"), "--limit", "1", columns=None)
    (row,) = (line for line in done.stdout.splitlines() if "x" * 70 in line)
    assert len(row) > 300
    assert "match" in row


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--set", "train.learnin_rate=1"], "train.learnin_rate = 1; did you mean 'learning_rate'"),
        (["train", "--set", "train.loss_type=ppo"], "train.loss_type = 'ppo'"),
        (["train", "--config", "nowhere.toml"], "no config file at "),
        (["train"], "problems.train"),
        (["eval", "lab/models/student"], "problems"),
        (["eval", "lab/models/student", "--k", "abc"], "--k abc: write whole numbers of 1 or more"),
        (["eval", "lab/models/student", "--k", "1,0"], "--k 1,0: write whole numbers of 1 or more"),
        (["precompute", "teachers"], "names no teacher"),
        (["inspect", "store", "summary", "nowhere"], "nowhere"),
        (["inspect", "run", "nowhere"], "no run at "),
        (["store", "reindex", "nowhere"], "nowhere"),
        (["store", "refilter", "traces"], "give --config FILE, or name them by"),
        (["store", "refilter", "traces", "--set", "store.part_traces=9"], "--set filters.max_tokens=none"),
        (["inspect", "store", "traces", "--verdict", "wrong"], "--verdict wrong"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = ampo(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr
    # A training run that is refused has locked its directory by then.
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".train.lock"}


def test_queries_show_candidates_scores_and_what_was_used(trained: Path) -> None:
    done = ampo("inspect", "store", "queries", str(trained))
    assert done.returncode == 0, done.stderr
    assert "hit rate" in done.stdout
    assert "used" in done.stdout
    assert any(problem.question in done.stdout for problem in PROBLEMS)


def test_queries_as_json_and_csv_hold_the_same_rows(trained: Path) -> None:
    as_json = json.loads(ampo("inspect", "store", "queries", str(trained), "--json").stdout)
    as_csv = list(
        csv.DictReader(io.StringIO(ampo("inspect", "store", "queries", str(trained), "--csv").stdout))
    )
    assert [row["problem_id"] for row in as_json] == [row["problem_id"] for row in as_csv]
    assert {row["step"] for row in as_json} == {1, 2}
    one = ampo("inspect", "store", "queries", str(trained), "--json", "--step", "2", "--teacher", "ada")
    assert {row["step"] for row in json.loads(one.stdout)} == {2}
    last = ampo("inspect", "store", "queries", str(trained), "--json", "--limit", "1")
    assert len({(row["step"], row["problem_id"]) for row in json.loads(last.stdout)}) == 1
    assert "left out" in last.stderr
    stranger = ampo("inspect", "store", "queries", str(trained), "--teacher", "nope")
    assert stranger.stderr.count("\n") == 1
    assert "teachers: ada, bob" in stranger.stderr


def test_looking_loads_no_torch(trained: Path, world: Path, tmp_path: Path) -> None:
    run, store = str(trained), str(world / "traces")
    looks = [
        ["inspect", "run", run],
        ["inspect", "store", "queries", run],
        ["inspect", "store", "summary", store],
        ["inspect", "store", "traces", store],
        ["inspect", "store", "problems", store],
        ["inspect", "store", "agreement", store],
        ["inspect", "store", "sql", "FROM traces", store],
        ["report", run, "--out", str(tmp_path / "report.html")],
    ]
    code = (
        "import sys, cli\n"
        f"for look in {looks}:\n"
        "    sys.argv = ['ampo', *look]\n"
        "    try: cli.main()\n"
        "    except SystemExit as done: assert not done.code, look\n"
        "    assert not {'torch', 'transformers', 'math_verify'} & set(sys.modules), look\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_run_curves_are_drawn_as_text(trained: Path) -> None:
    done = ampo("inspect", "run", str(trained))
    assert done.returncode == 0, done.stderr
    assert "groups/all_fail" in done.stdout


def test_store_summary_traces_problems_and_reindex(world: Path) -> None:
    store = str(world / "traces")
    summary = ampo("inspect", "store", "summary", store)
    assert "ada" in summary.stdout
    assert "coverage" in summary.stdout
    body = json.loads(ampo("inspect", "store", "summary", store, "--json").stdout)
    # 12 problems, every third without a trace: 4 have none, 8 have both teachers.
    assert body["coverage"] == {"0": 4, "1": 0, "2": 8}
    problem = PROBLEMS[1].problem_id
    assert "we add and get" in ampo("inspect", "store", "traces", store, "--problem", problem).stdout
    uncovered = json.loads(ampo("inspect", "store", "problems", store, "--uncovered", "--json").stdout)
    assert len(uncovered) == 4
    assert "16 traces" in ampo("store", "reindex", store).stdout


def test_eval_gives_pass_at_k(world: Path, model_dir: Path) -> None:
    overrides = settings(world, model_dir)
    file = str(world / "train.jsonl")
    options = ["--problems", file, "--samples", "2", "--k", "1,2", "--json"]
    done = ampo("eval", str(model_dir), *options, *sets(overrides))
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) >= {"eval/pass@1", "eval/pass@2", "eval/avg@2"}


def test_dry_run_shows_everything_and_touches_nothing(world: Path, model_dir: Path) -> None:
    overrides = settings(world, model_dir, run__name="dry")
    done = ampo("train", "--dry-run", *sets(overrides))
    assert done.returncode == 0, done.stderr
    for said in ("learning_rate = 0.001", "<user>0+0<assistant>", "peak", "8 problems have a verified trace"):
        assert said in done.stdout
    assert not (world / "runs" / "dry").exists()


def test_a_warning_before_the_first_step_is_said_once(world: Path, model_dir: Path) -> None:
    overrides = settings(world, model_dir, run__name="warned", train__max_steps=0)
    done = ampo("train", *sets(overrides), "--set", "rollout.top_p=0.9")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("rollout.top_p below 1") == 1


def test_the_resolved_config_of_a_dry_run_is_a_config(world: Path, model_dir: Path, tmp_path: Path) -> None:
    overrides = settings(world, model_dir, run__name="dry")
    shown = ampo("train", "--dry-run", *sets(overrides)).stdout
    toml = shown[shown.index("[problems]") : shown.index("num_completions_to_print = 4") + 29]
    (tmp_path / "again.toml").write_text(toml)
    again = ampo("train", "--dry-run", "--config", str(tmp_path / "again.toml")).stdout
    assert toml in again


def start_long_run(world: Path, model: Path, name: str) -> tuple[subprocess.Popen[str], Path]:
    """A run of 500 steps that has done at least one, and its metrics file."""
    overrides = settings(world, model, run__name=name, train__max_steps=500, run__save_every=400)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "train", *sets(overrides)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = world / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process, metrics


def test_a_stopped_run_saves_and_names_the_way_to_resume(world: Path, model_dir: Path) -> None:
    process, metrics = start_long_run(world, model_dir, "stopped")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "stopped by SIGTERM" in output
    assert "--resume auto" in output
    steps = len(metrics.read_text().splitlines())
    assert (world / "runs" / "stopped" / "checkpoints" / f"step-{steps:06d}").is_dir()


def test_a_second_ctrl_c_stops_at_once_without_a_traceback(world: Path, model_dir: Path) -> None:
    process, _ = start_long_run(world, model_dir, "twice")
    process.send_signal(signal.SIGSTOP)  # so that both arrive before it can end the step
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "stopped at once" in output
    assert "Traceback" not in output


def test_a_reader_that_closes_the_pipe_is_no_error(world: Path) -> None:
    command = f"{sys.executable} -m cli inspect store traces {world / 'traces'} --csv | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr


def test_without_a_run_the_last_one_is_shown_wherever_it_lies(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "demo" / "ampo")
    done = ampo("inspect", "store", "queries", "--limit", "1", cwd=tmp_path)
    assert "hit rate" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "option", [("--config=~/a.toml",), ("--config", "~/a.toml"), ("--config", "$HOME/a.toml")]
)
def test_options_know_the_home_directory(option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert "no config file at /home/me/a.toml" in ampo("train", *option).stderr


def test_forget_counts_first_and_removes_with_yes(world: Path, tmp_path: Path) -> None:
    store = str(shutil.copytree(world / "traces", tmp_path / "traces"))
    counted = ampo("store", "forget", store, "--teacher", "bob")
    assert counted.returncode == 2
    assert f"this removes 8 traces of bob (8 verified) from {store} for good" in counted.stderr
    assert ampo("store", "forget", store, "--teacher", "nobody").returncode == 2
    assert ampo("store", "forget", store, "--teacher", "bob", "--yes").stdout == "forgot bob\n"
    assert "bob" not in ampo("inspect", "store", "summary", store).stdout
