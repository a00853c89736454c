"""Templates whose loops do not end are ended, in the main thread."""

from __future__ import annotations

import signal
import threading

import pytest

from chatrlhf.data import templates
from chatrlhf.data.templates import Template
from chatrlhf.data.time_limit import cpu_limit
from chatrlhf.errors import DataError


def test_a_template_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(templates, "RENDERING_SECONDS", 0.1)
    endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="it has not ended after 0.1 seconds"):
        Template(endless).frame(())


def test_the_timer_is_put_back_and_other_threads_have_none():
    before, ran = signal.getsignal(signal.SIGVTALRM), []
    with cpu_limit(60):
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0 and signal.getsignal(signal.SIGVTALRM) is before

    def elsewhere():
        with cpu_limit(60):
            ran.append(signal.getitimer(signal.ITIMER_VIRTUAL)[0])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ran == [0]
