"""A signal, a closed output and a time limit: at once outside a loop that trains, after the step inside it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from small_run import ROOT

from chatrlhf.errors import TIME_IS_UP, Interrupted
from chatrlhf.runtime import signals
from chatrlhf.runtime.signals import NUMBERS, StopRequest, limited, listening, output_closed, stop_if_asked

NAMES = [signal.Signals(number).name for number in NUMBERS]

pytestmark = pytest.mark.usefixtures("signals_arrive")


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # where a signal's handler may run


@pytest.fixture(autouse=True)
def left_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    assert {number: signal.getsignal(number) for number in NUMBERS} == before
    stop_if_asked()  # nothing is remembered


@pytest.mark.parametrize("number", NUMBERS, ids=NAMES)
def test_outside_a_loop_it_is_raised_where_it_arrives(number):
    with pytest.raises(Interrupted) as stopped, listening():
        send(number)
    assert stopped.value.exit_status == 128 + number
    assert str(stopped.value) == f"stopped by {signal.Signals(number).name}"
    assert str(stopped.value.or_else("start it again")).endswith("; start it again")


@pytest.mark.parametrize("number", NUMBERS, ids=NAMES)
def test_in_a_loop_it_is_said_and_waits_to_be_asked_for(number, capfd):
    with StopRequest() as stop:
        assert stop.any_rank_stopped() is None
        send(number)
        assert stop.any_rank_stopped() == number
        assert stop.any_rank_stopped() == number  # whoever asks later is told, too
    assert capfd.readouterr().err.startswith(f"{signal.Signals(number).name}: finishing this step, then saving")


def test_what_a_loop_was_told_in_its_last_step_stops_the_run_behind_it():
    with pytest.raises(Interrupted, match="stopped by SIGTERM; RL is next"), listening():
        with StopRequest():
            send(signal.SIGTERM)
        stop_if_asked("RL is next")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_one_does_not_wait(second, monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST", 0.0)
    with pytest.raises(KeyboardInterrupt), StopRequest():
        send(signal.SIGTERM)
        send(second)


def test_the_echo_of_a_launcher_is_no_second_one():
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            send(number)
        assert stop.any_rank_stopped() == signal.SIGINT


def test_one_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGHUP)  # as under nohup
            assert stop.any_rank_stopped() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone():
    seen: list[object] = []

    def work() -> None:
        with listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_a_worker_that_was_forked_dies_of_it_as_ever():
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert stop.any_rank_stopped() is None


def test_it_stops_before_the_step_that_would_end_behind_the_limit(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with limited(10), StopRequest() as stop:
        answers = []
        for took in (3.0, 3.0, 3.0):  # at 106 another step ends at 109; at 109 at 112, behind 110
            now[0] += took
            answers.append(stop.any_rank_stopped())
    assert answers == [None, None, TIME_IS_UP]
    assert Interrupted(TIME_IS_UP, "continue with --resume").exit_status == 124
    assert str(Interrupted(TIME_IS_UP)) == "stopped at the time limit"


def test_between_stages_the_limit_counts_too(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with limited(10):
        now[0] = 9.0
        stop_if_asked()
        now[0] = 11.0
        with pytest.raises(Interrupted, match="at the time limit"):
            stop_if_asked()
    stop_if_asked()


def test_a_closed_output_is_a_request(capfd):
    with StopRequest() as stop:
        output_closed(BrokenPipeError(errno.EPIPE, "closed"))
        print("dropped", flush=True)
        assert stop.any_rank_stopped() == signal.SIGPIPE
    with pytest.raises(OSError, match="no room"):
        output_closed(OSError(errno.ENOSPC, "no room"))


COMMAND = """
import os, signal, sys, time
from chatrlhf.runtime.signals import StopRequest, listening
with listening(ends_process=True), StopRequest():
    for number in map(int, sys.argv[1:]):
        os.kill(os.getpid(), number)
        time.sleep(0.4)
    print("still here")
"""


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGINT"), ("SIGINT", "SIGUSR1"), ("SIGHUP", "SIGHUP")])
def test_a_second_one_ends_a_command_at_once(first, second):
    numbers = [str(signal.Signals[name].value) for name in (first, second)]
    done = subprocess.run([sys.executable, "-c", COMMAND, *numbers], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 128 + signal.Signals[second]
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [first, second]
