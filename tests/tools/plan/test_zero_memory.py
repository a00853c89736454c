"""What a device holds under ZeRO, by hand: 1,000 weights, float32 or 16 bit, over 4 devices."""

from __future__ import annotations

import json

import pytest

from chatrlhf import load_config
from chatrlhf.errors import ConfigError
from chatrlhf.tools.plan.zero_memory import Sharding, sharding_of

N, RANKS = 1000, 4


def test_alone_a_device_holds_adams_two_states():
    alone = Sharding()
    assert alone.optimizer(N, 4 * N) == (8 * N, 0) and alone.optimizer(N, 2 * N) == (4 * N, 0)
    assert alone.weights(4 * N, N) == (4 * N, 0) and alone.gradient(4 * N) == 4 * N and alone.in_transit(4 * N, N) == 0


def test_data_parallelism_has_gradients_twice():
    ddp = Sharding("ddp", RANKS)
    assert ddp.gradient(4 * N) + ddp.in_transit(4 * N, N) == 8 * N


@pytest.mark.parametrize("stage, gradients, weights", [(1, 2 * N, 2 * N), (2, 2 * N / RANKS, 2 * N)])
def test_stages_deal_out_states_then_gradients(stage, gradients, weights):
    zero = Sharding("deepspeed", RANKS, stage, low=True)
    # Two states, the weights in float32, and their gradients in float32.
    assert zero.optimizer(N, 2 * N) == (16 * N / RANKS, 0)
    assert zero.gradient(2 * N) == gradients and zero.weights(2 * N, N) == (weights, 0)


def test_stage_3_has_no_more_whole_than_it_may():
    zero = Sharding("deepspeed", RANKS, 3, live=100)
    assert zero.weights(2 * N, N) == (2 * N / RANKS + 200, 0)
    assert Sharding("deepspeed", RANKS, 3, offload_weights=True, live=100).weights(2 * N, N) == (200, 2 * N / RANKS)


def test_an_offloaded_optimizer_is_on_the_host():
    zero = Sharding("deepspeed", RANKS, 2, offload_optimizer=True)
    assert zero.optimizer(N, 2 * N) == (0, 16 * N / RANKS) and zero.gradient(2 * N) == 0


def test_deepspeeds_file_is_read(tmp_path):
    path = tmp_path / "ds.json"
    settings = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"}}
    path.write_text(json.dumps(settings | {"bf16": {"enabled": "auto"}}))
    config = load_config({"actor_config": {"deepspeed_enable": True, "deepspeed_config_path": str(path)}})
    found = sharding_of(config, "actor_config", 4)
    assert (found.stage, found.offload_optimizer, found.offload_weights, found.low) == (2, True, False, True)
    assert found.line == "4 devices, DeepSpeed ZeRO-2, optimizer in the CPU's memory"
    path.write_text("{")
    with pytest.raises(ConfigError, match="deepspeed_config_path: .*cannot be read as JSON"):
        sharding_of(config, "actor_config", 4)
