"""What becomes of memory that is freed, and of threads that wait; each in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from chatrlhf.runtime.malloc import tune_malloc
{first}
for round in range(3):  # of 64 MiB, 16,384 pages
    faults = -resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'x' * 2**26
    faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(faults)
"""


def run(code: str, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "MALLOC_ARENA_MAX")}
    return subprocess.run(
        [sys.executable, "-c", code], env=plain | environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library's heap is left as it is")
def test_what_is_freed_need_not_be_mapped_again():
    pages = 2**26 // 4096
    assert int(run(FAULTS.format(first=""))) > pages / 2  # or this test could not fail
    assert int(run(FAULTS.format(first="tune_malloc()"))) < pages / 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library's heap is left as it is")
def test_what_was_kept_can_be_given_back():
    code = """
import psutil
from chatrlhf.runtime.malloc import trim_malloc, tune_malloc
tune_malloc()
parts = [b"x" * 2**20 for _ in range(64)]  # MiB
parts = parts[1::2]
resident = [psutil.Process().memory_info().rss]
trim_malloc()
resident.append(psutil.Process().memory_info().rss)
print((resident[0] - resident[1]) >> 20)
"""
    assert int(run(code)) >= 30  # of 32 that were free


def test_threads_wait_for_as_long_as_the_package_or_the_user_says():
    code = "import chatrlhf, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    assert run(code) == "10000 False\n"  # behind PyTorch it would be too late
    assert run(code, GOMP_SPINCOUNT="7") == "7 False\n"
