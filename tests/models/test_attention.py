"""The attention of short sequences gives the numbers, and the gradients, of the usual kernels."""

from __future__ import annotations

import pytest
import torch
from tiny import BRANCHES, FAMILIES, assert_same_gradients, gradients, llama, opt, qwen2, take
from transformers import BertConfig, BertModel

from chatrlhf.models.kernels.attention import NAME, attention, cudnn_for_decoding, patch_attention
from chatrlhf.models.kernels.packing import supports_packing
from chatrlhf.runtime.device import pick_device

CPU = torch.device("cpu")
IDS = torch.randint(2, 24, (3, 12), generator=torch.Generator().manual_seed(0))
OURS = {"llama", "gpt2", "gpt_neox", "opt", "qwen2", "qwen3", "gemma"}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_stay_what_they_were(family):
    model = FAMILIES[family]().eval()
    found = []
    for _ in range(2):
        model.zero_grad()
        logits = model(input_ids=IDS).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        found.append((logits.detach(), gradients(model)))
        patch_attention(model, CPU)
    assert (model.config._attn_implementation == NAME) == (family in OURS)
    (want, want_gradients), (got, got_gradients) = found
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    # The gradient of OPT's key biases is 0: only rounding is left of it.
    some = [name for name in want_gradients if "k_proj.bias" not in name]
    assert_same_gradients({n: got_gradients[n] for n in some}, {n: want_gradients[n] for n in some})


def grouped():
    """Four heads, two to a head of keys and values."""
    return qwen2(num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("make", [llama, grouped])
@pytest.mark.parametrize("branch", BRANCHES)
def test_left_padding_is_hidden(make, branch, monkeypatch):
    take(branch, monkeypatch)
    model, mask = make(), torch.ones_like(IDS)
    mask[0, :5] = mask[1, :2] = 0
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=mask).logits
        patch_attention(model, CPU)
        got = model(input_ids=IDS, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("make", [llama, grouped])
def test_one_token_at_a_time(make, branch, padded, monkeypatch):
    take(branch, monkeypatch)
    model, mask = make(), torch.ones_like(IDS)
    if padded:
        mask[0, :5] = mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
        patch_attention(model, CPU)
        cache, steps = None, []
        for t in range(IDS.shape[1]):
            here = dict(attention_mask=mask[:, : t + 1], position_ids=positions[:, t : t + 1])
            output = model(input_ids=IDS[:, t : t + 1], past_key_values=cache, use_cache=True, **here)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1)[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("padded", [True, False])
def test_a_bidirectional_model_looks_both_ways(padded, branch, monkeypatch):
    take(branch, monkeypatch)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model, mask = BertModel(BertConfig(vocab_size=24, initializer_range=0.3, **sizes)).eval(), torch.ones_like(IDS)
    if padded:
        mask[0, 8:] = 0
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=mask).last_hidden_state
        patch_attention(model, CPU)
        got = model(input_ids=IDS, attention_mask=mask).last_hidden_state
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5)
    assert not supports_packing(model)


def test_in_bfloat16_it_is_as_close_to_float32_as_the_plain_way():
    exact, plain = (llama(width=64) for _ in range(2))
    plain.bfloat16().set_attn_implementation("eager")
    ours = llama(width=64).bfloat16()
    patch_attention(ours, CPU)
    ids = torch.randint(2, 24, (8, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = exact(input_ids=ids).logits
        errors = [(model(input_ids=ids).logits.float() - want).square().mean().sqrt() for model in (ours, plain)]
    assert 0 < errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_rows_are_packed(device):
    model = opt()
    patch_attention(model, torch.device(device))
    assert model.config._attn_implementation == NAME


def test_on_another_device_the_kernel_stays():
    model = opt()
    patch_attention(model, torch.device("mps"))
    assert model.config._attn_implementation == "sdpa"


def test_a_kernel_that_somebody_chose_stays():
    model = llama()
    model.set_attn_implementation("eager")
    patch_attention(model, CPU)
    assert model.config._attn_implementation == "eager"


def test_the_choice_is_not_saved_with_the_model(tmp_path):
    model = llama()
    patch_attention(model, CPU)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_only_decoding_on_hopper_asks_for_cudnn(monkeypatch):
    """Its backward behind a mask gives NaN, and Blackwell's decoding is corrupt."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    before = enabled()
    try:
        assert pick_device().type == "cuda"
        assert not enabled()
        for major, asked in ((8, False), (9, True), (10, False), (12, False)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, major=major: (major, 0))
            with pytest.raises(KeyError), cudnn_for_decoding(torch.device("cuda")):
                assert enabled() == asked
                raise KeyError
            assert not enabled()
        with cudnn_for_decoding(CPU):
            assert not enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (12, 12), (8, 1)], ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_one_token_in_bfloat16_on_a_gpu(heads, size):
    """Left-padded rows, over several widths, against float32 and plain products."""
    device, worst = pick_device(), 0.0
    for width in (128, 384, 1024):
        drawn = torch.Generator(device).manual_seed(width)
        query, key, value = (
            torch.randn(64, count, length, size, device=device, generator=drawn).bfloat16()
            for count, length in ((heads[0], 1), (heads[1], width), (heads[1], width))
        )
        seen = torch.arange(width, device=device) >= torch.randint(
            0, width - 1, (64, 1), device=device, generator=drawn
        )
        bias = torch.zeros(64, 1, 1, width, device=device, dtype=torch.bfloat16)
        bias.masked_fill_(~seen[:, None, None], torch.finfo(torch.bfloat16).min)
        with torch.no_grad(), cudnn_for_decoding(device):
            got = attention(None, query, key, value, bias)[0]
        key, value = (each.float().repeat_interleave(heads[0] // heads[1], dim=1) for each in (key, value))
        scores = (query.float() @ key.transpose(-1, -2)) * size**-0.5 + bias.float()
        want = (scores.softmax(-1) @ value).transpose(1, 2)
        worst = max(worst, float((got.float() - want).norm() / want.norm()))
    assert worst < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [64, 192, 704, 700])
def test_no_nan_behind_a_mask_on_a_gpu(length):
    """pytorch issue 196678: cuDNN's backward where a row's logsumexp is below -88."""
    device = pick_device()
    query, key, value = (torch.randn(1, 1, length, 64, device=device).bfloat16() for _ in range(3))
    query, key = query * 0.1, key * 0.1
    query[..., 0], key[..., 0] = 1.0, -960.0
    query, key, value = (each.detach().requires_grad_() for each in (query, key, value))
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).backward(torch.randn_like(value))
    assert all(each.grad.isfinite().all() for each in (query, key, value))
