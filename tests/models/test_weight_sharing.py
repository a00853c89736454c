"""Models on one set of weights: what is shared, what is not, and what each computes."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, gpt2, llama
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from chatrlhf.config.model import PeftConfig, RopeScaling
from chatrlhf.models.loading.lora import add_adapters, backbone_with_adapters, has_adapters, save_model
from chatrlhf.models.loading.quantization import how_quantized, never_repack, ready_for_adapters
from chatrlhf.models.loading.rope import stretch_positions
from chatrlhf.models.weight_sharing import Base, copy_sharing_frozen, copy_without_adapters, merged_copy, with_lora

IDS = torch.arange(2, 14).view(2, 6)
LORA = PeftConfig(r=2, lora_alpha=6, lora_dropout=0, target_modules="all")


def states(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).last_hidden_state.float()


def perturb(model) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))


def adapted(family: str = "llama", base: str = "nowhere"):
    policy = FAMILIES[family]().eval()
    add_adapters(policy, LORA, base)
    perturb(policy)
    return policy


def in_bits(model, folder, **how):
    model.save_pretrained(folder)
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"} | how
    made = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**how)
    )
    return ready_for_adapters(never_repack(made))


def weights(model) -> dict[int, str]:
    return {id(weight): name for name, weight in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_has_the_frozen_weights_and_adapters_of_its_own(family):
    policy = adapted(family)
    copied = copy_sharing_frozen(policy)
    both = weights(policy).keys() & weights(copied).keys()
    assert {weights(policy)[each] for each in both} == {n for n, _ in policy.named_parameters() if ".lora_" not in n}
    want = states(policy.base_model)
    assert torch.equal(states(copied.base_model), want)
    perturb(copied)
    assert torch.equal(states(policy.base_model), want) and not torch.equal(states(copied.base_model), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_copy_is_the_base_and_a_whole_one_computes_the_same_in_weights_of_its_own(family):
    policy = adapted(family)
    plain, want = FAMILIES[family]().eval(), states(policy.base_model)
    bare, whole = copy_without_adapters(policy.base_model), merged_copy(policy.base_model)
    assert torch.equal(states(bare), states(plain.base_model))
    assert (states(bare) - want).abs().max() > 0.01
    torch.testing.assert_close(states(whole), want, rtol=1e-4, atol=1e-4)
    assert not has_adapters(bare) and not has_adapters(whole)
    assert weights(bare).keys() <= weights(policy).keys() and not weights(whole).keys() & weights(policy).keys()
    assert all(weight.requires_grad for weight in whole.parameters())
    assert [name for name, _ in whole.named_parameters()] == [name for name, _ in plain.base_model.named_parameters()]


@pytest.mark.parametrize("how", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4", "8"])
@pytest.mark.parametrize("make", [llama, lambda: gpt2(dropout=0.0)], ids=["llama", "gpt2"])
def test_few_bits_are_shared_and_a_whole_copy_reads_them_back(make, how, tmp_path):
    policy = in_bits(make(), tmp_path / "base", **how)
    add_adapters(policy, LORA, "nowhere")
    perturb(policy)
    want = states(policy.base_model)
    copied, whole = copy_sharing_frozen(policy), merged_copy(policy.base_model)
    packed = {id(weight) for weight in policy.parameters() if not weight.is_floating_point()}
    assert packed and packed <= weights(copied).keys()
    torch.testing.assert_close(states(copied.base_model), want)
    # Eight bits round what goes in, too, which whole weights do not.
    torch.testing.assert_close(states(whole), want, rtol=0, atol=1e-4 if "load_in_4bit" in how else 0.15)
    assert how_quantized(policy) is not None and how_quantized(whole) is None
    # It is saved as what its family is, and read back.
    whole.save_pretrained(tmp_path / "whole")
    again = AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(states(again), states(whole), rtol=0, atol=1e-5)


def test_what_is_trained_by_adapters_goes_on_with_those_it_has_or_is_given_some():
    policy = adapted()
    critic = with_lora(backbone_with_adapters(policy), PeftConfig(r=7), "elsewhere")
    torch.testing.assert_close(states(critic), states(policy.base_model))
    assert critic.layers[0].mlp.up_proj.lora_A["default"].weight.shape[0] == 2
    fresh = with_lora(llama().base_model, PeftConfig(r=7), "elsewhere")
    assert fresh.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0] == 7
    for model in (critic, fresh):
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert trained and all(".lora_" in name for name in trained)


def test_adapters_that_nobody_trains_are_copied_too():
    """Of a reward model, from which a critic starts."""
    reward = backbone_with_adapters(adapted()).requires_grad_(False)
    critic = with_lora(reward, LORA, "elsewhere")
    want = states(reward)
    perturb(critic)
    assert torch.equal(states(reward), want) and not torch.equal(states(critic), want)


def test_a_base_carries_what_was_trained_upon_the_same_weights_only(tmp_path):
    place, folder = tmp_path / "base", tmp_path / "reward"
    llama().save_pretrained(place)
    policy = adapted(base=str(place))
    reward = backbone_with_adapters(adapted(base=str(place)))
    save_model(reward, folder)
    base, settings = Base(policy, str(place)), reward.config
    assert base.matches(folder, settings, None)
    torch.testing.assert_close(states(base.backbone(folder)), states(reward))
    assert not base.matches(folder, settings, {"load_in_4bit": True})
    assert not base.matches(place, settings, None)  # no adapters
    assert not Base(policy, "another").matches(folder, settings, None)
    stretched = llama().config
    stretch_positions(stretched, RopeScaling(type="linear", factor=2.0), "key")
    assert not base.matches(folder, stretched, None)
