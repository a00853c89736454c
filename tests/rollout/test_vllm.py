"""vLLM's rollouts obey the alignment law: TRL's own code on a stand-in for vLLM, which samples with a real model."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from tiny import llama
from transformers import AutoModelForCausalLM
from vllm_standin import (
    DISTRIBUTIONS,
    ENDS,
    EOS,
    PAD,
    PLAIN,
    TOKENIZER,
    VOCAB,
    assert_lawful,
    decode,
    ragged,
    sampler,
    scored,
    without_vllm,
)

from chatrlhf.config.model import PeftConfig
from chatrlhf.errors import ConfigError, DivergedError, RolloutError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import PolicyOnly
from chatrlhf.models.loading.lora import add_adapters
from chatrlhf.rl.master_weights import prepare_models
from chatrlhf.rollout.vllm import VllmSampler


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("limits", [{}, {"min_new_tokens": 3}, {"min_length": 8}, {"max_length": 12}], ids=str)
def test_what_vllm_samples_is_what_is_scored(vllm, folder, name, limits):
    made = sampler(folder, DISTRIBUTIONS[name], **limits)
    rollout = made.generate(ragged(), seed=0)
    assert_lawful(rollout, DISTRIBUTIONS[name], made)
    assert rollout.lengths.unique().numel() > 1 and rollout.prompts.texts == ragged().texts


def test_rows_keep_their_places_through_requests_of_other_limits(vllm, folder):
    """Fewest and most tokens differ by row, so several requests are made, in another order than the rows'."""
    made = sampler(folder, min_length=11, max_length=14)
    rollout = made.generate(ragged(), seed=0)
    assert rollout.min_new_tokens.tolist() == [8, 2, 8, 5, 7, 8]
    assert [request.min_tokens for request in vllm.LLM.started[-1].requests] == [2, 5, 7, 8]
    assert_lawful(rollout, PLAIN, made)


def test_a_response_may_fill_the_room_behind_its_prompt_and_no_more(vllm, folder):
    no_end = SamplingDistribution(eos_token_ids=(EOS,), forbidden_ids=(PAD,))
    made = sampler(folder, no_end, max_new_tokens=10, max_length=12)
    rollout = made.generate(ragged(), seed=0)
    ended = rollout.finished
    assert (rollout.lengths[~ended] == torch.tensor([9, 3, 10, 6, 8, 10])[~ended]).all() and (~ended).sum() >= 4
    assert len(vllm.LLM.started[-1].requests) == 1
    assert_lawful(rollout, no_end, made)


def test_samples_of_one_prompt_differ_and_stand_in_a_row(vllm, folder):
    rollout = sampler(folder).generate(ragged((3, 4), samples=5), seed=0)
    assert rollout.prompts.group_ids.tolist() == [0] * 5 + [1] * 5
    said = {tuple(ids.tolist()) for ids in rollout.response_ids[:5]}
    assert len(said) >= 4


def test_padding_of_the_prompts_is_not_sent(vllm, folder):
    made, sent = sampler(folder), []
    generate = made.vllm.llm.generate
    made.vllm.llm.generate = lambda prompts, **kw: sent.extend(prompts) or generate(prompts, **kw)
    batch = ragged()
    made.generate(batch, seed=0)
    want = sorted(ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True))
    assert sorted(row["prompt_token_ids"] for row in sent) == want


# ----- weights


def test_every_rollout_is_of_the_weights_as_they_are_now(vllm, folder):
    made = sampler(folder)
    first = made.generate(ragged(), seed=0)
    assert_lawful(first, PLAIN, made)
    with torch.no_grad():
        for weight in made.policy.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    second = made.generate(ragged(), seed=0)
    assert_lawful(second, PLAIN, made)
    assert (scored(made.policy, PLAIN, first) - first.sampling_logprobs).abs().max() > 0.1
    names = [name for name, _ in made.policy.named_parameters()]
    assert vllm.LLM.started[-1].weights.loaded == names * 2
    assert vllm.LLM.started[-1].calls == ["reset_prefix_cache", "generate"] * 2


def test_a_bfloat16_working_copy_is_what_is_sent(vllm, folder):
    made = sampler(folder)
    masters = prepare_models([made.policy], [], "bf16", torch.device("cpu"))
    with torch.no_grad():
        for group in masters.groups([{"params": list(made.policy.parameters())}]):
            for master in group["params"]:
                master.add_(0.05 * torch.randn_like(master))
    masters.sync_working_copy()
    made.generate(ragged(), seed=0)
    got = dict(vllm.LLM.started[-1].model.named_parameters())
    for name, weight in made.policy.named_parameters():
        assert weight.dtype == torch.bfloat16 and torch.equal(got[name], weight.float())


def test_adapters_are_merged_into_what_is_sent_and_not_into_the_policy(vllm, folder):
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    PolicyOnly(policy, PLAIN)
    add_adapters(policy, PeftConfig(), str(folder))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    before = copy.deepcopy(policy.state_dict())
    made = sampler(folder, policy=policy)
    rollout = made.generate(ragged(), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert_lawful(rollout, PLAIN, made)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (scored(plain, PLAIN, rollout) - rollout.sampling_logprobs).abs().max() > 0.1
    assert vllm.LLM.started[-1].weights.loaded == [name for name, _ in plain.named_parameters()]


def test_a_sleeping_engine_is_woken_with_new_weights_for_every_request(vllm, folder):
    made = sampler(folder, enable_sleep_mode=True, min_length=11)
    assert_lawful(made.generate(ragged((3, 9)), seed=0), PLAIN, made)
    one = ["wake_up weights", "reset_prefix_cache", "wake_up kv_cache", "generate", "sleep"]
    assert vllm.LLM.started[-1].calls == ["sleep", *one, *one]


# ----- what is handed to TRL


def test_settings_reach_vllm(vllm, folder):
    made = sampler(
        folder, SamplingDistribution(0.7, ENDS, (PAD,)), gpu_memory_utilization=0.45, chunk_size=5, max_length=30
    )
    given = vllm.LLM.started[-1].given
    assert given["model"] == str(folder) and given["gpu_memory_utilization"] == 0.45
    assert given["max_model_len"] == 30 and given["max_num_seqs"] == 5 and not given["enable_sleep_mode"]
    assert given["logprobs_mode"] == "processed_logprobs" and given["tensor_parallel_size"] == 1
    made.generate(ragged(), seed=0)
    request = vllm.LLM.started[-1].requests[-1]
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.7, 1.0, 0, 0.0)
    assert (request.repetition_penalty, request.seed, request.n, request.logprobs) == (1.0, None, 1, 0)
    assert request.logit_bias == {PAD: -100.0} and request.stop_token_ids == list(ENDS) and request.ignore_eos


def test_trl_still_has_what_this_stands_on():
    """By TRL's own signatures: a release that changes them turns this red, and not a run on somebody's GPU."""
    from trl.generation.vllm_generation import VLLMGeneration

    wants = inspect.signature(VLLMGeneration.__init__).parameters
    keys = "model accelerator processing_class mode server_base_url server_timeout group_port gpu_memory_utilization "
    keys += "max_model_length max_num_seqs enable_sleep_mode trust_remote_code temperature repetition_penalty top_p "
    keys += "top_k min_p logprobs max_completion_length generation_kwargs"
    assert set(keys.split()) <= wants.keys()
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[1:4] == ["prompts", "images", "num_generations"]
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]


# ----- stop strings


def test_stop_strings_end_rows_where_the_engine_would(vllm, folder):
    """Token by token, also before the minimum, which vLLM waits for."""
    stops = ["t", "e", "ca"]
    made = sampler(folder, SamplingDistribution(1.3, (EOS,), (PAD,)), stop=stops, max_new_tokens=24, min_new_tokens=6)
    rollout = made.generate(ragged((3, 9, 1, 6, 4, 2, 5, 5, 5, 5)), seed=0)
    assert_lawful(rollout, made.distribution, made)
    stopped = 0
    for i, n in enumerate(rollout.lengths.tolist()):
        ids = rollout.response_ids[i, :n].tolist()
        assert not any(stop in decode(ids[:-1]) for stop in stops)
        if found := [decode(ids).find(stop) for stop in stops if stop in decode(ids)]:
            stopped += 1
            assert rollout.finished[i] and rollout.completions[i] == decode(ids)[: min(found)]
        else:
            assert bool(rollout.finished[i]) == (ids[-1] == EOS)
    lengths = rollout.lengths[rollout.finished]
    assert stopped >= 4 and lengths.min() < 6 < lengths.max()
    assert vllm.LLM.started[-1].requests[-1].stop == stops


# ----- answers by hand


def answered(made: VllmSampler, ids: list[list[int]], **changes) -> None:
    """Let vLLM say this: one row a prompt, log-probabilities -1, -2, …"""

    def generate(prompts, images, num_generations):
        logprobs = [[[-1.0 - t] for t in range(len(row))] for row in ids]
        answer = {"prompts": prompts, "ids": ids, "logprobs": logprobs, "of": [[[token] for token in r] for r in ids]}
        return tuple((answer | changes).values())

    made.vllm.generate = generate


def test_a_rollout_by_hand(vllm, folder):
    plain = SamplingDistribution(eos_token_ids=(EOS, 41), forbidden_ids=(PAD,))
    made = sampler(folder, plain, max_new_tokens=4)
    answered(made, [[20, 21, EOS], [22, 23, 24, 25], [41]])
    rollout = made.generate(ragged((2, 2, 2)), seed=0)
    assert rollout.response_ids.tolist() == [[20, 21, EOS, PAD], [22, 23, 24, 25], [41, PAD, PAD, PAD]]
    assert rollout.response_mask.tolist() == [[True] * 3 + [False], [True] * 4, [True] + [False] * 3]
    assert rollout.sampling_logprobs.tolist() == [[-1.0, -2.0, -3.0, 0.0], [-1.0, -2.0, -3.0, -4.0], [-1.0, 0, 0, 0]]
    assert rollout.finished.tolist() == [True, False, True]
    assert rollout.completions == [decode([20, 21]), decode([22, 23, 24, 25]), ""]


def test_a_row_is_cut_at_its_own_limit(vllm, folder):
    made = sampler(folder, SamplingDistribution(eos_token_ids=(EOS,)), max_new_tokens=4, max_length=7)
    # Rows of 2 and 5 prompt tokens may say 4 and 2; what vLLM says behind that, EOS too, does not count.
    answered(made, [[20, 21, 22, 23], [24, 25, EOS]])
    rollout = made.generate(ragged((2, 5)), seed=0)
    assert rollout.response_ids.tolist() == [[20, 21, 22, 23], [24, 25, PAD, PAD]]
    assert rollout.sampling_logprobs[1].tolist() == [-1.0, -2.0, 0.0, 0.0]
    assert rollout.finished.tolist() == [False, False] and rollout.completions[1] == decode([24, 25])


def test_vllm_may_see_a_stop_string_where_this_package_has_none(vllm, folder):
    """A template's lead is not in this package's text: the row has ended all the same."""
    made = sampler(folder, SamplingDistribution(eos_token_ids=(EOS,)), stop=[" the"], max_new_tokens=6)
    made.decode = lambda ids: decode(ids).removeprefix(" ")
    ids = TOKENIZER(" the")["input_ids"]
    answered(made, [ids])
    rollout = made.generate(ragged((2,)), seed=0)
    assert rollout.finished.tolist() == [True] and rollout.lengths.tolist() == [len(ids)]
    assert rollout.completions == ["the"]


@pytest.mark.parametrize(
    "ids, changes, said",
    [
        ([[20, 21]], {"prompts": [[9, 9]]}, "answered for other prompts"),
        ([[20, 21]], {"of": [[[20], [22]]]}, "log-probabilities of other tokens"),
        ([[20, 21]], {"of": [[[21]]]}, "log-probabilities of other tokens"),
        ([[20, 21]], {"of": None, "logprobs": None}, "log-probabilities of other tokens"),
        ([[]], {}, "answered for other prompts"),
        ([[20, PAD]], {}, f"forbids \\(tokens \\[{PAD}\\]"),
        ([[20, EOS]], {}, "EOS before 2 tokens"),
        ([[20, 21, EOS, 22]], {}, "tokens behind EOS"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(vllm, folder, ids, changes, said):
    only_eos = SamplingDistribution(eos_token_ids=(EOS,), forbidden_ids=(PAD,))
    made = sampler(folder, only_eos, min_new_tokens=2)
    answered(made, ids, **changes)
    with pytest.raises(RolloutError, match=said):
        made.generate(ragged((2,)), seed=0)


def test_a_policy_that_has_diverged_is_an_error(vllm, folder):
    made = sampler(folder)
    with torch.no_grad():
        made.policy.model.norm.weight[0] = torch.nan
    with pytest.raises(DivergedError, match="6 of 6 rollouts by vLLM.*actor_lr"):
        made.generate(ragged(), seed=0)


def test_an_error_inside_vllm_keeps_its_traceback(vllm, folder):
    made = sampler(folder)

    def generate(*_, **__):
        raise RuntimeError("CUDA out of memory")

    made.vllm.llm.generate = generate
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        made.generate(ragged(), seed=0)


# ----- refused before anything starts


@without_vllm
def test_without_vllm_the_error_says_what_to_install(folder):
    with pytest.raises(ConfigError, match=r"rollout_backend: 'vllm' .* pip install \"chatrlhf\[vllm\]\""):
        sampler(folder)


@pytest.mark.parametrize(
    "distribution, options, said",
    [
        (SamplingDistribution(2.5, (EOS,)), {}, "temperatures from 0.01 to 2, got 2.5"),
        (SamplingDistribution(0.005, (EOS,)), {}, "temperatures from 0.01 to 2, got 0.005"),
        (SamplingDistribution(1.0, (EOS,), tuple(range(1025))), {}, "forbids 1024 tokens at most, got 1025"),
        (SamplingDistribution(1.0, (41,)), {"min_new_tokens": 2}, rf"also \[{EOS}\], which end no response here"),
        (SamplingDistribution(1.0, (41,)), {"min_length": 2}, "min_new_tokens .* and min_length to 0"),
        (PLAIN, {"max_length": 65}, "rollout_backend: vLLM did not start .*max_model_len"),
    ],
)
def test_what_vllm_cannot_sample_is_refused(vllm, folder, distribution, options, said):
    with pytest.raises(ConfigError, match=said):
        sampler(folder, distribution, **options)


def test_another_end_without_a_minimum_is_sampled(vllm, folder):
    """Then the model's own EOS is a token like any other."""
    other = SamplingDistribution(eos_token_ids=tuple(range(40, 100)), forbidden_ids=(PAD,))
    made = sampler(folder, other)
    with torch.no_grad():
        made.policy.lm_head.weight[EOS] *= 4
    rollout = made.generate(ragged((3,) * 12), seed=0)
    assert (rollout.response_ids == EOS).any()
    assert_lawful(rollout, other, made)


def test_a_model_without_files_is_refused(vllm, folder):
    with pytest.raises(ConfigError, match="created on the fly; run --type ACTOR first"):
        sampler(folder, policy=llama(vocab=VOCAB))


def test_several_processes_are_refused(vllm, folder, monkeypatch):
    monkeypatch.setattr("chatrlhf.rollout.vllm.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="samples for one process, got 2"):
        sampler(folder)
