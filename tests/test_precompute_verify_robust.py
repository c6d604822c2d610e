"""The judge over a long life: kills, hostile strings, floods, and surroundings that are not as usual."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from verify_processes import memory_kb, needs_proc, open_files, workers_of, zombies_of

from precompute.verify.verifier import STREAM_WINDOW, Verifier
from store.records import VERDICTS

ENDLESS = "9^{{9^{{9^{{{}}}}}}}"
"""A power that no machine ever writes out; with a number in it, so that each is another."""


@needs_proc
@pytest.mark.parametrize("kills", [8, pytest.param(1_000, marks=pytest.mark.slow)])
def test_no_capacity_is_lost_however_many_workers_are_killed(kills: int) -> None:
    others = workers_of(os.getpid())
    with Verifier(workers=2, timeout=0.05) as judge:
        assert judge.submit("\\boxed{5}", "5", timeout=30.0).result().is_correct
        files = open_files()
        endless = [judge.submit(f"\\boxed{{{ENDLESS.format(n + 9)}}}", "5") for n in range(kills)]
        assert Counter(future.result().reason for future in endless) == {"timeout": kills}
        assert judge.submit("\\boxed{6}", "6", timeout=30.0).result().is_correct
        assert len(workers_of(os.getpid()) - others) == 2
        assert zombies_of(os.getpid()) == 0
        assert open_files() <= files + 2
    assert workers_of(os.getpid()) == others


PIECES = (
    *(
        "\\frac{",
        "\\sqrt{",
        "\\left(",
        "\\right)",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\text{",
        "\\boxed{",
    ),
    *("\\cup ", "\\in ", "\\le ", "\\pm ", "\\infty ", "\\binom{", "\\sum_{", "\\int ", "\\lim_{", "\\log "),
    *("\\sin ", "\\pi ", "\\circ ", "\\%", "\\\\", "\\", "{", "}", "}{", "(", ")", "[", "]", "|", "&", "$"),
    *(
        "^",
        "_",
        "=",
        "<",
        ">",
        ",",
        ";",
        ":",
        ".",
        "!",
        "+",
        "-",
        "*",
        "/",
        " ",
        "\n",
        "\0",
        "\ud800",
        "−",
        "√",
    ),
    *("0", "1", "2", "7", "12", "500", "0.5", "1e9", "10^", "x", "y", "n", "e", "i", "d", "abc", "and", "or"),
    *("lambda", "import os", "__class__", "np.", "🙂", "٣", "½", "²"),
)


def hostile(generator: random.Random) -> str:
    """LaTeX that was cut into pieces and shuffled."""
    return "".join(generator.choices(PIECES, k=generator.randint(1, 14)))


@needs_proc
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_whatever_string_comes_there_is_a_verdict_and_nothing_grows(count: int) -> None:
    generator = random.Random(20251124)
    golds = (
        "5",
        "\\frac{7}{4}",
        "x^2+1",
        "(1,2)",
        "\\{1,2\\}",
        "x=5",
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
    )
    pairs = [(f"<answer>{hostile(generator)}</answer>", generator.choice(golds)) for _ in range(count)]
    others = workers_of(os.getpid())
    with Verifier(workers=2, timeout=2.0, memory_mb=1024) as judge:
        assert judge.verify_all([("\\boxed{5}", "5")])[0].is_correct
        before = memory_kb(os.getpid(), "VmRSS")
        started = time.monotonic()
        reasons = Counter(verdict.reason for verdict in judge.stream(pairs))
        assert set(reasons) <= set(VERDICTS)
        assert reasons.total() == count
        assert reasons["error"] == 0
        assert reasons["timeout"] <= count / 50
        assert time.monotonic() - started < 60 + count / 5
        assert len(workers_of(os.getpid()) - others) <= 2
        assert max(memory_kb(worker, "VmPeak") for worker in workers_of(os.getpid()) - others) <= 1024 * 1024
        # Verdicts are dropped as they come; what may stay is the cache's 64 million characters.
        assert memory_kb(os.getpid(), "VmRSS") - before < 100_000


@needs_proc
@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_flood_of_answers_takes_no_more_memory_than_a_trickle(count: int) -> None:
    with Verifier(workers=2, timeout=20.0) as judge:
        # 50 problems, 10 answers to each: 500 distinct pairs, and texts of 4,000 characters.
        flood = (
            (f"{'so it goes, ' * 330}\\boxed{{{number % 10}}}", str(number // 10 % 50))
            for number in range(count)
        )
        correct = growth = 0
        before = memory_kb(os.getpid(), "VmRSS")
        for number, verdict in enumerate(judge.stream(flood)):
            correct += verdict.is_correct
            if number % 1000 == 0:
                growth = max(growth, memory_kb(os.getpid(), "VmRSS") - before)
    # Ten in 500 are right: gold d with answer d for d = 0 ... 9.
    assert correct == count * 10 // 500
    # The texts alone are 80 MB; STREAM_WINDOW of them would be 4 MB.
    assert growth < 30_000


def test_a_stream_is_read_only_a_window_ahead() -> None:
    read = 0

    def pairs() -> object:
        nonlocal read
        for number in range(10 * STREAM_WINDOW):
            read += 1
            yield f"\\boxed{{{ENDLESS.format(number + 9)}}}", "5"

    with Verifier(workers=1, timeout=1.0) as judge:
        verdicts = judge.stream(pairs())  # type: ignore[arg-type]
        assert next(verdicts).reason == "timeout"
        assert read <= STREAM_WINDOW
        judge.close(cancel=True)


def run(*program: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program in an interpreter of its own that finds our packages, and first of all what `path` holds."""
    parts = [str(path)] if path else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*parts, *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_platform_that_refuses_limits_and_signals_still_judges(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import resource, sys\n"
        "def refuse(*_):\n"
        "    raise ValueError('current limit exceeds maximum limit')\n"
        "if any('verify/worker' in word for word in sys.orig_argv):\n"
        "    resource.setrlimit = refuse\n"
        "    sys.platform = 'darwin'\n"
    )
    done = run(
        "-c",
        "from precompute.verify.verifier import Verifier\n"
        "with Verifier(workers=1, timeout=2.0) as judge:\n"
        "    print(*[judge.submit(f'\\\\boxed{{{a}}}', '5').result().reason\n"
        "            for a in ('5', '9^{9^{9^{9}}}', '6')])\n",
        path=tmp_path,
    )
    assert done.stdout == "match timeout mismatch\n", done.stderr


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_children_of_any_kind_have_a_judge_of_their_own(tmp_path: Path, method: str) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, warnings\n"
        "from precompute.verify.verifier import verify_answer\n"
        "warnings.simplefilter('ignore')\n"
        "def judge(queue):\n"
        "    queue.put(verify_answer(response='\\\\boxed{1.75}', gold='\\\\frac{7}{4}').reason)\n"
        "if __name__ == '__main__':\n"
        "    assert verify_answer(response='\\\\boxed{5}', gold='5').is_correct\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    queue = context.Queue()\n"
        "    child = context.Process(target=judge, args=(queue,))\n"
        "    child.start()\n"
        "    print(queue.get(timeout=60))\n"
        "    child.join()\n"
    )
    done = run(str(script))
    assert done.stdout == "match\n", done.stderr


def test_a_directory_full_of_misleading_names_misleads_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sympy", "json", "precompute", "config"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('taken from the working directory')\n")
    monkeypatch.chdir(tmp_path)
    with Verifier(workers=1, timeout=20.0) as judge:
        assert judge.submit("\\boxed{5}", "5").result().is_correct
