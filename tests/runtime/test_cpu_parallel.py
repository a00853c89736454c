"""Two pieces of work at once: what they give, who has which cores, and what becomes of an error."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from chatrlhf.runtime import cpu_parallel
from chatrlhf.runtime.cpu_parallel import run_in_parallel

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def where() -> tuple[str, int]:
    return threading.current_thread().name, torch.get_num_threads()


def test_both_run_at_once_each_with_its_share_of_the_cores(two_threads):
    meeting = threading.Barrier(2, timeout=30)  # whoever came alone would wait in vain

    def meet() -> tuple[str, int]:
        meeting.wait()
        return where()

    (first, cores), (second, others) = run_in_parallel(meet, meet, CPU)
    assert first != second
    assert cores == others == 1
    assert torch.get_num_threads() == 2


def test_threads_that_others_start_have_all_cores(two_threads):
    cpu_parallel._pool.cache_clear()
    run_in_parallel(where, where, CPU)
    found = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_core_or_a_gpu_takes_them_one_after_the_other(one_thread, device):
    here = where()
    if device == "cuda":
        torch.set_num_threads(2)
        here = where()
    assert run_in_parallel(where, where, torch.device(device)) == (here, here)


def test_gradients_are_wanted_where_the_caller_wants_them(two_threads):
    assert run_in_parallel(torch.is_grad_enabled, torch.is_grad_enabled, CPU) == (True, True)
    with torch.no_grad():
        assert run_in_parallel(torch.is_grad_enabled, torch.is_grad_enabled, CPU) == (False, False)


def test_an_error_is_raised_once_both_have_ended(two_threads):
    failed, ended = threading.Event(), []

    def fail() -> None:
        failed.set()
        raise ValueError("of the first")

    def end() -> None:
        failed.wait(30)
        time.sleep(0.2)
        ended.append(True)

    with pytest.raises(ValueError, match="of the first"):
        run_in_parallel(fail, end, CPU)
    assert ended
    with pytest.raises(ValueError, match="of the first"):
        run_in_parallel(end, fail, CPU)
    assert run_in_parallel(lambda: 1, lambda: 2, CPU) == (1, 2)  # and there is a next time
