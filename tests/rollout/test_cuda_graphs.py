"""Decoding by recorded steps: on a CPU a step's operations are put on tape and played again, as a GPU plays a graph."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import EOS, FAMILIES, PAD, engine, gemma2, llama, prompts, same_responses
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.kernels.attention import patch_attention
from chatrlhf.rl.master_weights import MasterWeights
from chatrlhf.rollout import cuda_graphs

ENDS = SamplingDistribution(temperature=1.1, eos_token_ids=(EOS, 2, 3, 4), forbidden_ids=(PAD,))
STATIC = [family for family in FAMILIES if family != "gemma2"]
RECORDED = [family for family in STATIC if family != "bloom"]
# What a host has to wait for, or what it would have to send.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "lift_fresh", "_unique2"}


class Tape(TorchDispatchMode):
    """Operations with the very tensors and numbers they were called with: played again, nothing else is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING, name
        if name in ("index", "index_put", "index_put_"):
            assert all(each is None or each.dtype != torch.bool for each in args[1]), "a mask as index"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Taped(cuda_graphs.Graphs):
    def run(self, key, step):
        self.runs[key] += 1
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self.graphs[key] = tape = Tape()
        with tape:
            step()


@pytest.fixture
def small(monkeypatch):
    """Several widths and numbers of slots, small as the models are."""
    monkeypatch.setattr(cuda_graphs, "WIDTH", 16)
    monkeypatch.setattr(cuda_graphs.StaticBatchKVCache, "block", 16)
    monkeypatch.setattr(cuda_graphs, "FEWEST_SLOTS", 2)


@pytest.fixture
def taped(small, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Graphs", Taped)


RAGGED = [3, 1, 6, 4, 2, 5, 9, 2, 12, 1, 7]


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("family", RECORDED)
def test_what_is_played_again_says_the_same(family, size, taped):
    model, options = FAMILIES[family]().eval(), dict(max_new_tokens=30, min_length=6, chunk_size=size, look_every=3)
    static, dynamic = (engine(model, ENDS, static=each, **options) for each in (True, False))
    for seed in range(3):
        batch = prompts(RAGGED, seed=seed)
        want, got = dynamic.generate(batch, seed), static.generate(batch, seed)
        assert same_responses(want, got)
        torch.testing.assert_close(got.sampling_logprobs, want.sampling_logprobs, rtol=0, atol=1e-5)
    runs = static.graphs.held.graphs.runs
    assert len(runs) > 2  # widths and numbers of slots
    assert sum(runs.values()) > 3 * len(runs)


@pytest.mark.parametrize("size", [None, 1, 4])
@pytest.mark.parametrize("family", ["llama", "llama with our attention", "bloom"])
def test_without_a_tape_too(family, size, small):
    """Groups, stop strings and limits of all kinds."""
    model = FAMILIES[family.split()[0]]()
    if "our attention" in family:
        patch_attention(model, torch.device("cpu"))
    options = dict(max_new_tokens=30, max_length=24, min_new_tokens=2, stop=["f", "kk"], chunk_size=size)
    batch = prompts([4, 1, 6, 3], samples=3).select(torch.tensor([8, 0, 3, 4, 11, 1, 6, 2, 7, 5, 9, 10]))
    static, dynamic = (engine(model, ENDS, static=each, **options) for each in (True, False))
    for seed in range(3):
        assert same_responses(dynamic.generate(batch, seed), static.generate(batch, seed))


def test_weights_that_are_updated_in_place_are_those_that_are_played(taped, monkeypatch):
    """Steps of the first rollout are on tape: all later ones see the weights as an update has left them."""
    monkeypatch.setattr("chatrlhf.rollout.engine.llama_step", lambda model: None)  # it rounds otherwise
    torch.set_num_threads(1)
    model = llama()
    masters = MasterWeights(model)
    make = partial(engine, model, ENDS, max_new_tokens=20)
    static, batch = make(static=True), prompts(RAGGED)
    static.generate(batch, seed=0)
    held, said = static.graphs.held, []
    for seed in range(1, 4):
        with torch.no_grad():
            for master in masters._masters:
                master.mul_(1.0 + 0.2 * torch.rand_like(master))
        if seed == 2:
            with masters.fp32_weights():  # as a checkpoint does
                pass
        masters.sync_working_copy()
        got, want = static.generate(batch, seed), make(static=False).generate(batch, seed)
        assert same_responses(got, want)
        said.append(got.response_ids)
    assert static.graphs.held is held
    assert len(held.graphs.graphs) < sum(held.graphs.runs.values()) / 3


def test_weights_that_lie_elsewhere_are_noticed(taped):
    model, batch = llama(), prompts(RAGGED)
    static = engine(model, ENDS, static=True)
    static.generate(batch, seed=0)
    held, other = static.graphs.held, llama(seed=1)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data
    assert same_responses(static.generate(batch, seed=0), engine(other, ENDS).generate(batch, seed=0))
    assert static.graphs.held is not held


def test_more_or_longer_prompts_find_room(taped):
    model = llama(max_position_embeddings=128)
    static, dynamic = (engine(model, ENDS, static=each, max_length=128) for each in (True, False))
    for lengths in ([3, 2], RAGGED, [60, 3], [3, 2]):
        assert same_responses(static.generate(prompts(lengths), 0), dynamic.generate(prompts(lengths), 0))
    assert static.graphs.held.width >= 60 + 8 and len(static.graphs.held.slots) == 2


def test_what_was_remembered_of_another_rollout_cannot_spoil_one(taped):
    """A hidden number counts nothing, a hidden NaN does."""
    model, batch = llama(), prompts(RAGGED)
    static = engine(model, ENDS, static=True)
    want = static.generate(batch, seed=0)
    for layer in static.graphs.held.kv_cache.cache.layers:
        for each in layer.held:
            each.fill_(torch.nan)
    assert same_responses(static.generate(batch, seed=0), want)


def test_few_shapes_are_recorded(taped):
    """Slots in powers of two and whole widths, however the rows end."""
    static = engine(llama(), ENDS, static=True, max_new_tokens=40)
    for seed in range(6):
        static.generate(prompts([3] * 24, seed=seed), seed)
    assert {slots for slots, _ in static.graphs.held.graphs.runs} <= {24, 16, 8, 4, 2}
    assert {width for _, width in static.graphs.held.graphs.runs} <= {16, 32, 48, 64}


def test_a_window_is_decoded_the_usual_way():
    model = gemma2().eval()
    static, dynamic = (engine(model, static=each) for each in (True, False))
    assert same_responses(static.generate(prompts(RAGGED), 0), dynamic.generate(prompts(RAGGED), 0))
    assert static.graphs.held is None


def test_a_model_that_cannot_be_recorded_goes_on(monkeypatch):
    """As a GPU says it: while a step is recorded something is refused."""

    class Refused:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Refused)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(cuda_graphs.Graphs, "_step_aside", lambda self, step: step())
    monkeypatch.setattr(cuda_graphs.Graphs, "_step_watched", lambda self, step: step())
    static = engine(llama(), ENDS, static=True, max_new_tokens=20)
    want = static.generate(prompts(RAGGED), seed=0)
    static.graphs.held.graphs.records = True
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted"):
        assert same_responses(static.generate(prompts(RAGGED), seed=0), want)
    assert not static.graphs.held.graphs.records


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("family", RECORDED)
def test_recorded_on_a_gpu(family, size, small):
    model = FAMILIES[family]().eval().cuda()
    options = dict(max_new_tokens=30, chunk_size=size, look_every=3)
    static, dynamic = (engine(model, ENDS, static=each, **options) for each in (True, False))
    for seed in range(3):
        batch = prompts(RAGGED, seed=seed)
        want, got = dynamic.generate(batch, seed), static.generate(batch, seed)
        assert same_responses(want, got)
        torch.testing.assert_close(got.sampling_logprobs, want.sampling_logprobs, rtol=0, atol=1e-4)
    assert static.graphs.held.graphs.graphs


WAITS = """
import warnings
import torch
from rollout.test_cuda_graphs import ENDS, RAGGED
from tiny import engine, llama, prompts, same_responses
model = llama().cuda()
def waits(module, args, given):
    if given["input_ids"].shape[1] == 1:
        given["input_ids"].sum().item()
want = engine(model, ENDS, static=False, max_new_tokens=20).generate(prompts(RAGGED), 0)
model.register_forward_pre_hook(waits, with_kwargs=True)
static = engine(model, ENDS, static=True, max_new_tokens=20)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert same_responses(static.generate(prompts(RAGGED), 0), want)
assert any("without CUDA graphs" in str(each.message) for each in said)
assert torch.cuda.current_stream() == torch.cuda.default_stream()
torch.cuda.empty_cache()
torch.rand(3, device="cuda")
assert same_responses(static.generate(prompts(RAGGED), 0), want)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_waits_is_not_recorded():
    """In a process of its own: PyTorch's generator of a GPU is lost to a recording that fails (2.11)."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", WAITS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([f"{tests}:{tests.parent}", os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
