"""The attention kernel is changed where it is faster, and changes no number beyond rounding."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, llama, opt

from chatrlhf.models.attention import SHORT, prefer_fast_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_what_they_were(family):
    model, ids = FAMILIES[family]().eval(), torch.randint(2, 24, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        prefer_fast_attention(model, CPU, 64)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-5)


def test_short_sequences_on_a_cpu_get_plain_products():
    model = llama()
    assert model.config._attn_implementation == "sdpa"
    prefer_fast_attention(model, CPU, SHORT)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("device, longest", [(CPU, SHORT + 1), (torch.device("cuda"), 64)])
def test_elsewhere_the_kernel_stays(device, longest):
    model = opt()
    prefer_fast_attention(model, device, longest)
    assert model.config._attn_implementation == "sdpa"


def test_the_choice_is_not_saved_with_the_model(tmp_path):
    model = llama()
    prefer_fast_attention(model, CPU, 64)
    model.save_pretrained(tmp_path)
    assert "eager" not in (tmp_path / "config.json").read_text()
