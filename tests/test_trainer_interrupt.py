"""Ctrl-C and SIGTERM, as real signals to this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from trainer.parallel.signals import StopRequest, stop_on_signals
from trainer.parallel.world import ALONE

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """Signals that reached the handlers of before the block; they would end the test run otherwise."""
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    before = {number: signal.signal(number, note) for number in BOTH}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_asks_to_stop_and_says_which(number: signal.Signals, caught: list[int]) -> None:
    with stop_on_signals() as request:
        assert request.agreed(ALONE) is None
        signal.raise_signal(number)
        assert request.agreed(ALONE) == request.signal == number.name
    assert caught == []


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_the_second_signal_interrupts_at_once(
    first: signal.Signals, second: signal.Signals, caught: list[int]
) -> None:
    with stop_on_signals() as request:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
        assert request.signal == first.name
    assert caught == []


def test_handlers_are_restored_after_the_block_and_after_an_error(caught: list[int]) -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with stop_on_signals():
        assert [signal.getsignal(number) for number in BOTH] != before
    assert [signal.getsignal(number) for number in BOTH] == before
    with pytest.raises(ZeroDivisionError), stop_on_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in BOTH] == before


def test_the_first_signal_says_at_once_what_happens_and_how_to_stop_sooner(
    caught: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_on_signals():
        assert capfd.readouterr().err == ""
        signal.raise_signal(signal.SIGINT)
        said = capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == ""
    assert said.strip() == "finishing this step, then saving; press again to stop at once"


def test_off_the_main_thread_it_never_fires_and_leaves_the_handlers_alone(caught: list[int]) -> None:
    entered, leave = threading.Event(), threading.Event()
    requests: list[StopRequest] = []

    def work() -> None:
        with stop_on_signals() as request:
            requests.append(request)
            entered.set()
            leave.wait(timeout=10)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert entered.wait(timeout=10)
        for number in BOTH:
            signal.raise_signal(number)
    finally:
        leave.set()
        thread.join()
    assert caught == list(BOTH)
    assert [request.signal for request in requests] == [None]
