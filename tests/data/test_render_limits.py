"""Templates whose loops do not end are ended, in every thread; what asks for gigabytes gets no memory."""

from __future__ import annotations

import resource
import signal
import sys
import threading

import pytest

from chatrlhf.data import render_limits
from chatrlhf.data.render_limits import cpu_limit, memory_limit, refuse_long
from chatrlhf.data.templates import Template
from chatrlhf.errors import DataError


def test_a_template_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(render_limits, "RENDERING_SECONDS", 0.1)
    endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="it has not ended after 0.1 seconds"):
        Template(endless).frame(())


def test_the_timer_is_put_back_and_other_threads_are_ended_by_another_one():
    before, ran = signal.getsignal(signal.SIGVTALRM), []
    with cpu_limit(60):
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0 and signal.getsignal(signal.SIGVTALRM) is before

    def elsewhere():
        with cpu_limit(60):
            ran.append(signal.getitimer(signal.ITIMER_VIRTUAL)[0])
        try:
            with cpu_limit(0.1):
                while True:
                    pass
        except TimeoutError as error:
            ran.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ran == [0, "it has not ended after 0.1 seconds"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_is_limited_inside_and_not_behind():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError, match="it needs more than 0.25 GiB"), memory_limit(2**28):
        bytes(2**29)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with memory_limit(2**28):
        assert resource.getrlimit(resource.RLIMIT_AS) != before
    assert len(bytes(2**29)) == 2**29


def test_a_rendering_is_compared_with_what_it_was_made_of():
    long = "x" * (render_limits.MOST_CHARS + 9)
    with pytest.raises(ValueError, match="it prints 1,000,009 characters for a conversation of 2"):
        refuse_long(long, {"messages": [{"content": "ab"}]})
    refuse_long(long, {"messages": [{"content": "abc"}]})
