"""bfloat16 working copies with float32 masters: what is rounded, what is not, and what is saved."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import PLAIN, gpt2, llama, opt, prompts, rollout, updater

from chatrlhf.config.model import PeftConfig
from chatrlhf.models.actor_critic import PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.kernels import attention
from chatrlhf.models.loading.lora import add_adapters
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import join
from chatrlhf.rl.master_weights import MasterWeights, prepare_models
from chatrlhf.types import Experience


def experience(rows: int = 8) -> Experience:
    sampled = rollout(prompts([3, 1, 6, 4, 2, 5, 3, 2][:rows]), [2, 7, 4, 5, 1, 3, 6, 2][:rows])
    mask, generator = sampled.response_mask, torch.Generator().manual_seed(0)
    numbers = [torch.randn(mask.shape, generator=generator) * mask for _ in range(3)]
    return Experience(
        prompt_ids=sampled.prompts.input_ids,
        prompt_mask=sampled.prompts.attention_mask,
        response_ids=sampled.response_ids,
        response_mask=mask,
        min_new_tokens=sampled.min_new_tokens,
        old_logprobs=-2.0 * mask,
        ref_logprobs=-2.0 * mask,
        sampling_logprobs=-2.0 * mask,
        advantages=numbers[0],
        returns=numbers[1],
        old_values=numbers[2],
    )


def both(made) -> tuple:
    """An updater in float32 and one with a working copy, of equal actor-critics."""
    twin = copy.deepcopy(made)
    return updater(made, lr=1e-3), updater(twin, lr=1e-3, masters=MasterWeights(*twin.backbones()))


@pytest.mark.parametrize("family", [llama, gpt2, opt])  # gpt2 and opt tie their embeddings: one weight, one master
def test_the_working_copy_is_the_masters_rounded(family):
    _, mixed = both(SharedTrunk(family(), ScalarHead(16), PLAIN))
    assert all(weight.dtype == torch.bfloat16 for weight in mixed.actor_critic.policy.parameters())
    assert all(weight.dtype == torch.float32 for weight in mixed.actor_critic.value_head.parameters())
    mixed.step(experience(), kl_coef=0.0)
    rounded = {name: weight.detach().clone() for name, weight in mixed.actor_critic.policy.named_parameters()}
    with mixed.backend.full_precision():
        for name, weight in mixed.actor_critic.policy.named_parameters():
            assert weight.dtype == torch.float32
            assert torch.equal(weight.bfloat16(), rounded[name]), name
    assert all(torch.equal(weight, rounded[name]) for name, weight in mixed.actor_critic.policy.named_parameters())


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    made = PolicyOnly(llama(), PLAIN)
    masters = MasterWeights(*made.backbones())
    group = masters.groups(made.parameter_groups(1.0, 1.0))[0]["params"]
    weight = made.policy.model.norm.weight  # all ones; bfloat16's next number is 1 + 1/128
    with torch.no_grad():
        for _ in range(64):
            for master in group:
                master += 1 / 8192
            masters.sync_working_copy()
    torch.testing.assert_close(weight, torch.full_like(weight, 1 + 1 / 128), rtol=0, atol=0)


def test_gradients_of_microbatches_are_summed_in_float32():
    """Equal up to the rounding of each product, wherever the minibatch is cut; and none stays in bfloat16."""
    made = SeparateCritic(llama(), llama(seed=1).model, ScalarHead(16), PLAIN)
    found = []
    for size in (8, 1):
        _, mixed = both(made)
        mixed.settings = type(mixed.settings)(epochs=1, batch_size=8, micro_batch_size=size)
        mixed.backward(experience(), kl_coef=0.0)
        assert all(weight.grad is None for part in mixed.actor_critic.backbones() for weight in part.parameters())
        masters = [weight for group in mixed.backend.optimizer.param_groups for weight in group["params"]]
        assert all(weight.grad.dtype == torch.float32 for weight in masters if weight.grad is not None)
        found.append(torch.cat([weight.grad.flatten() for weight in masters if weight.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999


def test_gradients_are_near_those_of_float32():
    exact, mixed = both(SharedTrunk(llama(), ScalarHead(16), PLAIN))
    grads = []
    for each in (exact, mixed):
        each.backward(experience(), kl_coef=0.0)
        weights = [weight for group in each.backend.optimizer.param_groups for weight in group["params"]]
        grads.append(torch.cat([weight.grad.flatten() for weight in weights]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999
    assert not torch.equal(*grads)


def test_frozen_weights_come_out_as_they_went_in():
    policy = llama()
    policy.get_input_embeddings().requires_grad_(False)
    before = copy.deepcopy(policy.state_dict())
    _, mixed = both(PolicyOnly(policy, PLAIN))
    mixed.step(experience(), kl_coef=0.0)
    with mixed.backend.full_precision():
        after = mixed.actor_critic.policy.state_dict()
        assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_what_is_loaded_at_full_precision_is_computed_with():
    sampled = rollout(prompts([3, 2]), [4, 5])
    sequences = join(
        sampled.prompts.input_ids, sampled.prompts.attention_mask, sampled.response_ids, sampled.response_mask
    )
    _, mixed = both(PolicyOnly(llama(), PLAIN))
    _, other = both(PolicyOnly(llama(seed=9), PLAIN))
    with other.backend.full_precision(), mixed.backend.full_precision():
        mixed.actor_critic.load_state_dict(other.actor_critic.state_dict())
    with torch.no_grad():
        first, second = (each.actor_critic.evaluate(sequences).logprobs for each in (mixed, other))
    assert torch.equal(first, second)


# ----- models made ready


def test_in_float32_a_model_keeps_its_weights_and_gets_its_kernels(monkeypatch):
    kept = []
    monkeypatch.setattr("chatrlhf.rl.master_weights.tune_malloc", lambda: kept.append(True))
    trained, frozen = llama(), llama(seed=1)
    assert prepare_models([trained], [frozen], "fp32", torch.device("cpu")) is None
    for model in (trained, frozen):
        assert model.config._attn_implementation == attention.NAME
        assert "forward" in vars(model.model.norm)
        assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
        assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert kept


def test_weights_shared_with_a_frozen_model_have_masters_of_their_own_bytes():
    trained, frozen = llama(), llama(seed=1)
    frozen.model.embed_tokens.weight = trained.model.embed_tokens.weight
    before = trained.model.embed_tokens.weight.detach().clone()
    masters = prepare_models([trained], [frozen], "bf16", torch.device("cpu"))
    assert all(weight.dtype == torch.bfloat16 for model in (trained, frozen) for weight in model.parameters())
    with masters.fp32_weights():
        assert torch.equal(trained.model.embed_tokens.weight, before)


@pytest.mark.parametrize("wanted", [True, False])
def test_frozen_weights_have_masters_only_where_they_are_saved(wanted):
    trained = llama()
    if not wanted:
        add_adapters(trained, PeftConfig(), "nowhere")
    trained.model.embed_tokens.weight.requires_grad_(False)
    masters = prepare_models([trained], [], "bf16", torch.device("cpu"))
    with masters.fp32_weights():
        assert (trained.model.embed_tokens.weight.dtype == torch.float32) == wanted
        own = [weight for weight in trained.parameters() if weight.requires_grad]
        assert own and all(weight.dtype == torch.float32 for weight in own)
