"""The judge: exact, never longer than its deadline, never inside this process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from verify_processes import memory_kb, needs_proc, wait_until, workers_of

from precompute.verify.verifier import MAX_ANSWER_CHARS, VERIFIER_VERSION, Verifier, verify_answer
from store.errors import EngineError
from store.records import VERDICTS


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, timeout=5.0) as shared:
        yield shared


def is_match(verifier: Verifier, gold: str, answer: str) -> bool:
    verdict = verifier.submit(f"so \\boxed{{{answer}}}", gold).result()
    assert verdict.is_correct is (verdict.reason == "match")
    return verdict.is_correct


EQUAL = [
    ("\\frac{7}{4}", "7/4"),
    ("\\frac{7}{4}", "1.75"),
    ("7.0", "7"),
    ("7425000", "7,425,000"),
    ("1000", "1 000"),
    ("11111111100", "11,\\! 111,\\! 111,\\! 100"),
    ("\\frac{7}{4}", "1 3/4"),
    ("\\frac{7}{4}", "1\\frac{3}{4}"),
    ("1/3", "0.333333"),
    ("1/12", "0.0833333333333333"),
    ("1/60", "0.0166667"),
    ("6.63e-34", "6.63 \\times 10^{-34}"),
    ("2^{31}", "2147483648"),
    ("\\sqrt{6}", "\\sqrt2\\sqrt3"),
    ("\\tan^2(y)+1", "\\sec^2(y)"),
    ("6", "2(3)"),
    ("12", "2\\binom{4}{2}"),
    ("x = 5", "5"),
    ("5", "x = 5"),
    ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}"),
    ("x^2/4 + y^2/3 = 1", "x^2/16 + y^2/12 = 1/4"),
    ("x < 1", "-x > -1"),
    ("-2 \\le x \\le 7", "x \\in [-2,7]"),
    ("{1,3} \\cup {2,4}", "{1,2,3,4}"),
    ("-2,1", "1,-2"),
    ("(1,\\frac{9}{2})", "(1,4.5)"),
    ("3 \\pm 2\\sqrt{2}", "3 \\pm 2 \\sqrt{2}"),
    ("\\begin{pmatrix}6 & 8\\\\10 & 12\\end{pmatrix}", "\\begin{bmatrix}6 & 8\\\\10 & 12\\end{bmatrix}"),
    ("90^\\circ", "90"),
    ("15\\mbox{ cm}^2", "15"),
    ("C", "\\text{(C)}"),
    ("\\text{Evelyn}", "\\text{Evelyn}"),
    ("$42$", "\\(42\\)."),
    ("42", "\\boxed{42}"),
    ("42", "The final answer is $42$."),
    ("28\\%", "28"),
    ("5\\%", "5\\%"),
    ("1/2", "50\\%"),
    ("-5", "−5"),
]

DIFFERENT = [
    ("1/3", "0.3333"),
    ("\\pi", "3.14159"),
    ("2", "2.0001"),
    ("1", "1.0000001"),
    ("10^{20}", "10^{20}+1"),
    ("10^{-20}", "10^{-22}"),
    ("6.63e-34", "6.63e-36"),
    ("0", "10^{-20}"),
    ("1/60", "0.016667"),
    ("\\{10^{-9}, 1\\}", "\\{0, 1\\}"),
    ("5", "500"),
    ("500", "5"),
    ("5", "0.05"),
    ("0.28", "28"),
    ("28", "28/100"),
    ("5\\%", "500\\%"),
    ("10", "10^10^10^10"),
    ("6", "4 2"),
    ("2t", "2"),
    ("2", "2t"),
    ("\\frac{1}{m} t", "\\frac{1}{m}"),
    ("2", "2\\mathrm{i}"),
    ("1-\\frac{1}{\\mathrm{e}}", "1+\\frac{1}{\\mathrm{e}}"),
    ("5", "2(3)"),
    ("42", "41 or 42"),
    ("42", "it is not 42"),
    ("4", "4\\sqrt{2}"),
    ("x=5", "y=5"),
    ("x^2+1=0", "x^2+2=0"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    ("1,2,3", "1,2,3,..."),
    ("32349", "32, 349"),
    ("x \\in [-2,7]", "-2 \\le x \\le 7"),
    ("\\begin{pmatrix}1 & 2\\end{pmatrix}", "\\begin{pmatrix}1 & 3\\end{pmatrix}"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_mathematics_matches(verifier: Verifier, gold: str, answer: str) -> None:
    assert is_match(verifier, gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_mathematics_does_not(verifier: Verifier, gold: str, answer: str) -> None:
    assert not is_match(verifier, gold, answer)


@pytest.mark.parametrize(
    "gold", ["np.arcsin(10/13)", "E_{1},E_{2}", "1/0", "", "5\0", "{" * 20, "9" * 20_000]
)
def test_a_gold_that_cannot_be_parsed_earns_nothing(verifier: Verifier, gold: str) -> None:
    verdict = verifier.submit(f"<answer>{gold or 5}</answer>", gold).result()
    assert not verdict.is_correct
    if len(gold) <= MAX_ANSWER_CHARS:
        assert verdict.reason == "gold_unparseable"
    assert verifier.check_golds([gold, "5"]) == [False, True]


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
    with Verifier(workers=2, timeout=1.0, memory_mb=512) as judge:
        futures = {name: judge.submit(f"\\boxed{{{text}}}", "5") for name, text in HOSTILE.items()}
        verdicts = {name: future.result(timeout=60) for name, future in futures.items()}
    assert [name for name, verdict in verdicts.items() if verdict.is_correct] == []
    assert {verdict.reason for verdict in verdicts.values()} <= set(VERDICTS) - {"match"}
    assert verdicts["powers of nine"].reason == "timeout"
    assert verdicts["import"].reason == "mismatch"
    assert verdicts["nothing"].reason == verdicts["open braces"].reason == "no_answer"
    assert verdicts["times 100"].reason == verdicts["over 100"].reason == "mismatch"
    assert not list(tmp_path.iterdir())


def test_the_deadline_holds_and_the_next_item_is_served() -> None:
    with Verifier(workers=1, timeout=1.0) as judge:
        assert is_match(judge, "5", "5")
        before = time.monotonic()
        assert judge.submit("\\boxed{9^{9^{9^{9}}}}", "5").result().reason == "timeout"
        # One second of deadline; the rest is the scheduling of a busy machine.
        assert 0.9 < time.monotonic() - before < 2.5
        assert is_match(judge, "6", "6")


@needs_proc
def test_the_memory_of_a_worker_is_bounded() -> None:
    others = workers_of(os.getpid())
    with Verifier(workers=1, timeout=10.0, memory_mb=300) as judge:
        assert is_match(judge, "5", "5")
        (worker,) = workers_of(os.getpid()) - others
        # 2^9999999999 takes 1250 MB as an integer.
        pending, peak = judge.submit("\\boxed{2^{9999999999}}", "5"), 0
        while not pending.done():
            peak = max(peak, memory_kb(worker, "VmPeak"))
            time.sleep(0.005)
        assert not pending.result().is_correct
        assert 0 < peak <= 300 * 1024


@needs_proc
def test_a_worker_that_dies_gives_error_and_is_replaced() -> None:
    others = workers_of(os.getpid())
    with Verifier(workers=1, timeout=20.0) as judge:
        assert is_match(judge, "5", "5")
        (busy,) = workers_of(os.getpid()) - others
        pending = judge.submit("\\boxed{9^{9^{9^{9}}}}", "5")
        time.sleep(0.3)
        os.kill(busy, signal.SIGKILL)
        assert pending.result().reason == "error"
        assert is_match(judge, "6", "6")
        (idle,) = workers_of(os.getpid()) - others
        os.kill(idle, signal.SIGKILL)
        # Z: dead, and nobody has waited for it.
        assert wait_until(lambda: ") Z " in Path(f"/proc/{idle}/stat").read_text())
        assert is_match(judge, "7", "7")
    assert workers_of(os.getpid()) == others


@needs_proc
def test_workers_end_with_a_parent_that_is_killed_while_they_compute(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from precompute.verify.verifier import Verifier\n"
        "judge = Verifier(workers=1, timeout=600.0)\n"
        "judge.submit('\\\\boxed{5}', '5').result()\n"
        "judge.submit('\\\\boxed{9^{9^{9^{9}}}}', '5')\n"
        "time.sleep(0.3)\n"
        "print('busy', flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"busy\n"
        workers = workers_of(parent.pid)
        assert workers
        parent.kill()
    assert wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def test_equal_pairs_are_judged_once_also_while_the_first_still_waits(verifier: Verifier) -> None:
    # Two distinct pairs in a thousand submissions; one judgement takes more than 1 ms.
    before = time.monotonic()
    futures = [verifier.submit(f"\\boxed{{{i % 2}.125}}", "0.125") for i in range(1000)]
    assert [future.result().is_correct for future in futures] == [True, False] * 500
    assert time.monotonic() - before < 2.0


def test_a_known_pair_never_goes_to_a_worker_again() -> None:
    with Verifier(workers=1, timeout=20.0) as judge:
        assert is_match(judge, "5", "5")
        busy = judge.submit("\\boxed{9^{9^{9^{9}}}}", "5")
        assert is_match(judge, "5", "5")
        assert not busy.done(), "the only worker is busy, so the answer came from memory"
        judge.close(cancel=True)


def test_any_thread_and_any_event_loop_may_ask(verifier: Verifier) -> None:
    verdicts = []
    threads = [
        threading.Thread(
            target=lambda i=i: verdicts.append(verifier.submit(f"\\boxed{{{i}}}", str(i)).result())
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.is_correct for verdict in verdicts] == [True] * 8

    async def ask() -> bool:
        return (await asyncio.wrap_future(verifier.submit("\\boxed{5}", "5"))).is_correct

    assert asyncio.run(ask())


def test_one_who_cancels_leaves_the_others_their_verdict() -> None:
    with Verifier(workers=1, timeout=5.0) as judge:
        first, second = judge.submit("\\boxed{5}", "5"), judge.submit("\\boxed{5}", "5")
        first.cancel()
        assert second.result().is_correct


def test_closing_with_cancel_ends_at_once() -> None:
    judge = Verifier(workers=1, timeout=600.0)
    judge.submit("\\boxed{5}", "5").result()
    running = judge.submit("\\boxed{9^{9^{9^{9}}}}", "5")
    queued = [judge.submit(f"\\boxed{{{i}}}", "5") for i in range(10, 15)]
    time.sleep(0.2)
    before = time.monotonic()
    judge.close(cancel=True)
    assert time.monotonic() - before < 10.0
    assert running.result().reason == "error"
    assert all(future.cancelled() for future in queued)
    with pytest.raises(RuntimeError, match="closed"):
        judge.submit("\\boxed{99}", "5")


def test_workers_that_cannot_start_are_one_clear_error() -> None:
    # 8 MiB of address space do not hold a Python with sympy.
    with Verifier(workers=2, memory_mb=8) as judge:
        for answer in ("5", "6"):
            with pytest.raises(EngineError, match=r"verify\.memory_mb too small"):
                judge.submit(f"\\boxed{{{answer}}}", "5").result(timeout=60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_a_thread_nobody_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "stranger.py"
    stranger.write_text("print('no JSON', flush=True)\ninput()\n")
    monkeypatch.setattr("precompute.verify.process._WORKER_FILE", stranger)
    with Verifier(workers=2) as judge:
        for answer in ("5", "6"):
            with pytest.raises(EngineError, match="a verification thread ended: JSONDecodeError"):
                judge.submit(f"\\boxed{{{answer}}}", "5").result(timeout=60)


def test_a_machine_without_room_for_a_process_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with Verifier(workers=1, timeout=1.0) as judge:
        assert is_match(judge, "5", "5")
        monkeypatch.setattr(subprocess, "Popen", no_room)
        # The worker is killed for the first, and cannot be replaced for the second.
        futures = [judge.submit(f"\\boxed{{9^{{9^{{9^{{{n}}}}}}}}}", "5") for n in (8, 9)]
        for future in futures:
            with pytest.raises(EngineError, match="a verification worker cannot be started"):
                future.result(timeout=60)


def test_pairs_handed_over_together_have_a_deadline_each() -> None:
    with Verifier(workers=1, timeout=1.0) as judge:
        assert is_match(judge, "0", "0")
        # 150 pairs: the worker gets 16 at once; three of them take for ever and are timed out alone.
        answers = [f"9^{{9^{{9^{{{n}}}}}}}" if n % 50 == 49 else str(n) for n in range(150)]
        futures = [judge.submit(f"\\boxed{{{answer}}}", "7") for answer in answers]
        reasons = [future.result(timeout=60).reason for future in futures]
    assert [n for n, reason in enumerate(reasons) if reason == "timeout"] == [49, 99, 149]
    assert [n for n, reason in enumerate(reasons) if reason == "match"] == [7]
    assert reasons.count("mismatch") == 146


def test_verdicts_come_in_the_order_of_the_pairs(verifier: Verifier) -> None:
    pairs = [("\\boxed{5}", "5"), ("none", "5"), ("<answer>5</answer>", "6"), ("\\boxed{4} \\boxed{5}", "5")]
    verdicts = verifier.verify_all(pairs)
    assert [verdict.reason for verdict in verdicts] == ["match", "no_answer", "mismatch", "match"]
    assert [verdict.n_answers for verdict in verdicts] == [1, 0, 1, 2]
    assert [verdict.answer_start for verdict in verdicts] == [7, None, 8, 17]
    assert [verdict.reason for verdict in verifier.verify_all(pairs[2:], "boxed")] == ["no_answer", "match"]


def test_verify_answer_needs_nothing_but_strings() -> None:
    verdict = verify_answer(response="so \\boxed{1.75}", gold="\\frac{7}{4}")
    assert (verdict.parsed_answer, verdict.parsed_gold) == ("1.75000000000000", "7/4")
    # s=0, o=1, blank=2, the backslash=3, the brace=9
    assert (verdict.is_correct, verdict.reason, verdict.answer_start) == (True, "match", 10)
    assert not verify_answer(response="so 1.75", gold="\\frac{7}{4}", timeout=1.0).is_correct
    assert VERIFIER_VERSION.startswith("0.9")


def test_this_process_never_imports_the_mathematics() -> None:
    program = (
        "import sys; from precompute.verify.verifier import verify_answer;"
        "print(verify_answer(response='\\\\boxed{5}', gold='5').is_correct,"
        "{'math_verify', 'sympy', 'torch'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "True set()\n", done.stderr
