"""Activations that are computed again: the same gradients from less memory, and rollouts as they were."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, PLAIN, assert_same_gradients, engine, gradients, llama, prompts, rollout, same_responses

from chatrlhf.config.model import PeftConfig
from chatrlhf.errors import ConfigError
from chatrlhf.models.actor_critic import PolicyOnly
from chatrlhf.models.kernels.activation_checkpointing import recompute_activations
from chatrlhf.models.loading.lora import add_adapters
from chatrlhf.models.sequences import join

KEY = "trainer_config.gradient_checkpointing"
BATCH = rollout(prompts([3, 1, 6, 5]), [5, 2, 4, 7])


def losses(model) -> torch.Tensor:
    texts = BATCH.prompts
    joined = join(texts.input_ids, texts.attention_mask, BATCH.response_ids, BATCH.response_mask)
    return PolicyOnly(model, PLAIN).evaluate(joined).logprobs.sum()


def kept_bytes(model) -> int:
    """What a forward keeps for its backward, weights aside."""
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = losses(model)
    size = sum(kept.values())
    total.backward()
    return size


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_and_less_is_kept(family, adapters):
    usual, again = FAMILIES[family]().eval(), FAMILIES[family]().eval()
    if adapters:
        for model in (usual, again):
            torch.manual_seed(3)
            add_adapters(model, PeftConfig(), "nowhere")
    recompute_activations(again, KEY)
    most, least = kept_bytes(usual), kept_bytes(again)
    assert least < 0.75 * most
    assert_same_gradients(gradients(again), gradients(usual))


def test_rollouts_are_not_computed_twice():
    model = llama()
    want = engine(model).generate(prompts([3, 1, 6]), seed=0)
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    engine(model, static=False).generate(prompts([3, 1, 6]), seed=0)
    once = len(calls)
    recompute_activations(model, KEY)
    got = engine(model, static=False).generate(prompts([3, 1, 6]), seed=0)
    assert same_responses(got, want) and len(calls) == 2 * once


def test_a_model_whose_blocks_are_unknown_is_named():
    with pytest.raises(ConfigError, match="gradient_checkpointing: transformers cannot compute"):
        recompute_activations(llama().model.layers[0].mlp, KEY)
