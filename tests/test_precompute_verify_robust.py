"""The verifier over a long life: deadlines, kills, hostile strings, floods, and unusual surroundings."""

from __future__ import annotations

import multiprocessing.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from proc_examples import memory_kb, needs_proc, open_files, wait_until, workers_of, zombies_of

from precompute.config import VerifyConfig
from precompute.verify.verifier import Verifier
from store.errors import EngineError
from store.records import VERDICTS

ENDLESS = "\\boxed{{9^{{9^{{9^{{{}}}}}}}}}"
"""A power that no machine ever writes out; with a number in it, so that each is another."""


def is_half(verifier: Verifier, answer: str) -> bool:
    """Returns the verdict of a worker: the gold is not a plain number."""
    return verifier.submit(f"\\boxed{{{answer}}}", "2^{-1}", timeout=30.0).result(timeout=60).is_correct


HOSTILE = {
    "powers of nine": "9^{9^{9^{9}}}",
    "powers of ten": "10^{10^{10^{10}}}",
    "unbraced powers": "10^10^10^10",
    "factorial": "100000000!",
    "open braces": "{" * 2**20,
    "braces": "{" * 2**19 + "}" * 2**19,
    "fewer braces": "{" * 4000 + "}" * 4000,
    "spaces": "5" + " " * 9000 + "x",
    "digits": "9" * 9999,
    "import": "__import__('os').system('touch executed')",
    "nothing": "",
    "nul before": "\0" + "5",
    "nul after": "5\0",
    "surrogate": "\ud800" + "5",
    "times 100": "500",
    "over 100": "0.05",
}


def test_hostile_answers_get_a_verdict_in_time_and_are_never_correct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Verifier(VerifyConfig(workers=2, timeout=1.0, memory_mb=512)) as verifier:
        futures = {name: verifier.submit(f"\\boxed{{{text}}}", "5") for name, text in HOSTILE.items()}
        verdicts = {name: future.result(timeout=60) for name, future in futures.items()}
    assert [name for name, verdict in verdicts.items() if verdict.is_correct] == []
    assert {verdict.reason for verdict in verdicts.values()} <= set(VERDICTS) - {"match"}
    assert verdicts["powers of nine"].reason == "timeout"
    assert verdicts["import"].reason == "mismatch"
    assert verdicts["nothing"].reason == verdicts["open braces"].reason == "no_answer"
    assert verdicts["times 100"].reason == verdicts["over 100"].reason == "mismatch"
    assert not list(tmp_path.iterdir())


def test_each_request_has_a_deadline_of_its_own() -> None:
    with Verifier(VerifyConfig(workers=1, timeout=1.0)) as verifier:
        assert is_half(verifier, "0.5")
        before = time.monotonic()
        answers = [f"9^{{9^{{9^{{{n}}}}}}}" if n in (9, 19) else f"{n}.5" for n in range(30)]
        futures = [verifier.submit(f"\\boxed{{{answer}}}", "7+0.5") for answer in answers]
        reasons = [future.result(timeout=60).reason for future in futures]
    assert [n for n, reason in enumerate(reasons) if reason == "timeout"] == [9, 19]
    assert [n for n, reason in enumerate(reasons) if reason == "match"] == [7]
    assert reasons.count("mismatch") == 27
    # Two deadlines of a second; the rest is two starts of a worker on a busy machine.
    assert 2.0 <= time.monotonic() - before < 20.0


@needs_proc
def test_the_memory_of_a_worker_is_bounded() -> None:
    others = workers_of(os.getpid())
    with Verifier(VerifyConfig(workers=1, timeout=10.0, memory_mb=300)) as verifier:
        assert is_half(verifier, "0.5")
        (worker,) = workers_of(os.getpid()) - others
        # 2^9999999999 takes 1250 MB as an integer.
        pending, peak = verifier.submit("\\boxed{2^{9999999999}}", "5"), 0
        while not pending.done():
            peak = max(peak, memory_kb(worker, "VmPeak"))
            time.sleep(0.005)
        assert not pending.result().is_correct
        assert 0 < peak <= 300 * 1024


@needs_proc
def test_a_worker_that_dies_is_replaced_whether_it_was_busy_or_idle() -> None:
    others = workers_of(os.getpid())
    with Verifier(VerifyConfig(workers=1, timeout=20.0)) as verifier:
        assert is_half(verifier, "0.5")
        (busy,) = workers_of(os.getpid()) - others
        pending = verifier.submit(ENDLESS.format(9), "5")
        # A pair that is known needs no worker.
        assert is_half(verifier, "0.5")
        time.sleep(0.3)
        assert not pending.done()
        os.kill(busy, signal.SIGKILL)
        assert pending.result(timeout=60).reason == "error"
        for answer in ("0.50", "0.500", "0.5000"):
            assert is_half(verifier, answer)
            (idle,) = workers_of(os.getpid()) - others
            os.kill(idle, signal.SIGKILL)
            assert wait_until(lambda: idle not in workers_of(os.getpid()))  # noqa: B023
            time.sleep(0.2)
    assert wait_until(lambda: workers_of(os.getpid()) == others)


@needs_proc
def test_workers_end_with_a_parent_that_is_killed_while_they_compute(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from precompute.config import VerifyConfig\n"
        "from precompute.verify.verifier import Verifier\n"
        "verifier = Verifier(VerifyConfig(workers=2, timeout=1.0))\n"
        "verifier.submit('\\\\boxed{0.5}', '2^{-1}').result()\n"
        "verifier.submit('\\\\boxed{9^{9^{9^{9}}}}', '5')\n"
        "time.sleep(0.3)\n"
        "print('busy', flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"busy\n"
        workers = workers_of(parent.pid)
        assert len(workers) == 2
        parent.kill()
    # The idle one at once; the busy one after two seconds of its own time.
    assert wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 60.0)


def test_closing_with_cancel_ends_at_once() -> None:
    verifier = Verifier(VerifyConfig(workers=1, timeout=600.0))
    assert is_half(verifier, "0.5")
    pending = [verifier.submit(ENDLESS.format(n), "5") for n in range(9, 15)]
    time.sleep(0.2)
    before = time.monotonic()
    verifier.close(cancel=True)
    assert time.monotonic() - before < 10.0
    assert all(future.cancelled() for future in pending)
    with pytest.raises(RuntimeError, match="closed"):
        verifier.submit("\\boxed{x}", "5")


def test_workers_that_cannot_start_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # 8 MiB of address space do not hold a Python with sympy.
    too_small = VerifyConfig.model_construct(**VerifyConfig(workers=2).model_dump() | {"memory_mb": 8})
    with Verifier(too_small) as verifier:
        for answers in (("x", "y"), ("z",)):
            futures = [verifier.submit(f"\\boxed{{{answer}}}", "5") for answer in answers]
            for future in futures:
                with pytest.raises(EngineError, match=r"verify\.memory_mb = 8 too small"):
                    future.result(timeout=60)

    def no_room(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", no_room)
    with (
        Verifier(VerifyConfig(workers=1)) as verifier,
        pytest.raises(EngineError, match="no verification worker"),
    ):
        verifier.submit("\\boxed{x}", "5").result(timeout=60)


@needs_proc
@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_no_capacity_is_lost_however_many_workers_are_killed(kills: int) -> None:
    others = workers_of(os.getpid())
    with Verifier(VerifyConfig(workers=2, timeout=0.05)) as verifier:
        assert is_half(verifier, "0.5")
        files = open_files()
        endless = [verifier.submit(ENDLESS.format(n + 9), "5") for n in range(kills)]
        assert Counter(future.result().reason for future in endless) == {"timeout": kills}
        assert is_half(verifier, "0.50")
        assert wait_until(lambda: len(workers_of(os.getpid()) - others) == 2)
        assert zombies_of(os.getpid()) == 0
        assert open_files() <= files + 2
    assert wait_until(lambda: workers_of(os.getpid()) == others)


FRAGMENTS = r"""
\frac{ \sqrt{ \left( \right) \begin{pmatrix} \end{pmatrix} \text{ \boxed{ \binom{ \sum_{ \lim_{ \cup \in \le
\pm \infty \int \log \sin \pi \circ \% \\ \ { } }{ ( ) [ ] | & $ ^ _ = < > , ; : . ! + - * / − √ 0 1 2 7 12
500 0.5 1e9 10^ x y n e i d abc and or lambda __class__ np. 🙂 ٣ ½ ²
"""
PIECES = (*re.findall(r"\S+", FRAGMENTS), " ", " ", "\n", "\0", "\ud800", "import os", "\\cup ", "\\sin ")


def hostile(generator: random.Random) -> str:
    """LaTeX that was cut into pieces and shuffled."""
    return "".join(generator.choices(PIECES, k=generator.randint(1, 14)))


@needs_proc
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_whatever_string_comes_there_is_a_verdict_and_nothing_grows(count: int) -> None:
    generator = random.Random(20251124)
    golds = ("5", "\\frac{7}{4}", "x^2+1", "(1,2)", "\\{1,2\\}", "x=5", "[0, 1)")
    pairs = [(f"<answer>{hostile(generator)}</answer>", generator.choice(golds)) for _ in range(count)]
    others = workers_of(os.getpid())
    with Verifier(VerifyConfig(workers=2, timeout=2.0, memory_mb=1024)) as verifier:
        assert is_half(verifier, "0.5")
        before = memory_kb(os.getpid(), "VmRSS")
        started = time.monotonic()
        reasons = Counter(verdict.reason for verdict in verifier.stream(pairs))
        assert set(reasons) <= set(VERDICTS)
        assert reasons.total() == count
        assert reasons["error"] == 0
        assert reasons["timeout"] <= max(8, count / 50)
        assert time.monotonic() - started < 60 + count / 5
        assert len(workers_of(os.getpid()) - others) <= 2
        assert max(memory_kb(worker, "VmPeak") for worker in workers_of(os.getpid()) - others) <= 1024 * 1024
        # Verdicts are dropped as they come; what may remain is the cache.
        assert memory_kb(os.getpid(), "VmRSS") - before < 100_000


@needs_proc
@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_flood_of_answers_takes_no_more_memory_than_a_trickle(count: int) -> None:
    with Verifier(VerifyConfig(workers=2, timeout=20.0)) as verifier:
        # 50 problems, 10 answers to each: 500 distinct pairs, and texts of 4,000 characters.
        flood = (
            (f"{'so it goes, ' * 330}\\boxed{{{number % 10}}}", f"{number // 10 % 50}+0")
            for number in range(count)
        )
        correct = growth = 0
        before = memory_kb(os.getpid(), "VmRSS")
        for number, verdict in enumerate(verifier.stream(flood)):
            correct += verdict.is_correct
            if number % 1000 == 0:
                growth = max(growth, memory_kb(os.getpid(), "VmRSS") - before)
    # Ten in 500 are right: gold d with answer d for d = 0 ... 9.
    assert correct == count * 10 // 500
    # The texts alone are 80 MB; those in flight are 4 MB.
    assert growth < 30_000


def run(script: Path) -> subprocess.CompletedProcess[str]:
    """A script in an interpreter of its own that finds our packages."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_plain_script_runs_once_and_never_imports_the_mathematics(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\n"
        "from precompute.verify import verify_answer\n"
        "print(verify_answer(response='\\\\boxed{1.75}', gold='2-\\\\frac14').reason,\n"
        "      {'math_verify', 'sympy', 'torch'} & set(sys.modules))\n"
    )
    done = run(script)
    assert (done.stdout, done.stderr) == ("match set()\n", "")


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_of_any_kind_have_workers_of_their_own(tmp_path: Path, method: str) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, warnings\n"
        "from precompute.verify import verify_answer\n"
        "warnings.simplefilter('ignore')\n"
        "def reason(answer):\n"
        "    return verify_answer(response=f'\\\\boxed{{{answer}}}', gold='2-\\\\frac14').reason\n"
        "if __name__ == '__main__':\n"
        "    assert reason('1.75') == 'match'\n"
        f"    with multiprocessing.get_context({method!r}).Pool(1) as daemons:\n"
        "        print(*daemons.map(reason, ['1.75', '2']))\n"
    )
    done = run(script)
    assert done.stdout == "match mismatch\n", done.stderr


def test_a_directory_full_of_misleading_names_misleads_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sympy", "json", "precompute", "queue", "random"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('taken from the working directory')\n")
    monkeypatch.chdir(tmp_path)
    with Verifier(VerifyConfig(workers=1, timeout=20.0)) as verifier:
        assert is_half(verifier, "0.5")
