"""What ``precision: auto`` means on which machine."""

from __future__ import annotations

import pytest
import torch

from chatrlhf.runtime.device import resolve_precision, resolve_rl_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_what_is_asked_for_is_taken(chosen, device):
    assert resolve_precision(chosen, device) == resolve_rl_precision(chosen, device) == chosen


@pytest.mark.parametrize("supported, found", [(True, "bf16"), (False, "fp32")])
def test_a_gpu_decides_for_all_stages(supported, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert resolve_precision("auto", GPU) == resolve_rl_precision("auto", GPU) == found


@pytest.mark.parametrize(
    "capabilities, found",
    [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False, "amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_a_cpu_with_bfloat16_products_uses_them_for_rl(capabilities, found, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_rl_precision("auto", CPU) == found


def test_a_torch_that_cannot_tell_stays_with_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_rl_precision("auto", CPU) == "fp32"
