"""Which test calls which function: Python loads this file by itself where its folder is on PYTHONPATH.

Every process of a run of pytest, its workers and what tests start included, adds a line to the file that CALLERS names
for each function of the package that it enters for the first time in a test: the test and its phase, the function's
file, its first line and its name. `tests/mutants.py` reads them. It is a plugin of pytest as well, since what a test
runs may end the tracing of its process.
"""

import os
import sys
import threading
from pathlib import Path

PACKAGE = str(Path(__file__).resolve().parents[2] / "chatrlhf") + os.sep


def recorder(path: str):
    """A trace function that writes what is entered."""
    ours, seen = {}, set()
    # One write a line, appended: lines of several processes do not mix.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def entered(frame, event, argument):
        code = frame.f_code
        if code not in ours:
            ours[code] = code.co_filename.startswith(PACKAGE)
        if ours[code]:
            test = os.environ.get("PYTEST_CURRENT_TEST")
            if (test, code) not in seen:
                seen.add((test, code))
                line = f"{test}\t{code.co_filename.removeprefix(PACKAGE)}\t{code.co_firstlineno}\t{code.co_name}\n"
                os.write(file, line.encode("utf-8", "backslashreplace"))
        # None: no line of it is followed.

    return entered


def begin():
    sys.settrace(ENTERED)
    threading.settrace(ENTERED)


def pytest_runtest_setup():
    begin()


def pytest_runtest_call():
    begin()


ENTERED = recorder(os.environ["CALLERS"]) if "CALLERS" in os.environ else None
if ENTERED:
    begin()
