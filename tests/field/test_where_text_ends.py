"""Where a reply ends, in rollouts and by `generate()` of finished folders; and scores that are too large."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from field_reports import report
from small_run import length, settings, write_files
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

from chatrlhf import load_config, run
from chatrlhf.cli import main
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import FORMATS
from chatrlhf.errors import DivergedError, RewardError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import PolicyOnly
from chatrlhf.models.reference import Reference
from chatrlhf.models.reward_model import RewardModel, RewardScorer
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward, ModelReward
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rollout.engine import RolloutEngine
from chatrlhf.runtime.finite import require_finite, trained

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PADDING = 32  # rows of the head that no token has, and which a random model likes best


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder as Qwen's: a template that closes by <|im_end|>, a padded head, and a generation_config.json."""
    folder = tmp_path_factory.mktemp("qwen")
    write_files(folder)
    words = tiny.tokenizer()
    words.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template = CHATML
    model = tiny.llama(
        vocab=len(words) + PADDING, width=32, max_position_embeddings=96, eos_token_id=words.eos_token_id
    )
    with torch.no_grad():
        model.lm_head.weight[len(words) :] *= 20
    model.save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    generation = {"eos_token_id": [words.eos_token_id, 50, 9999], "top_k": 50, "top_p": 0.8, "repetition_penalty": 1.05}
    (folder / "base" / "generation_config.json").write_text(json.dumps(generation))
    return folder


def configured(base: Path, run_dir: Path, **changes):
    tree = settings(base)
    tree["actor_config"] |= {"model": str(base / "base"), "template": "chat", "epochs": 1}
    tree["trainer_config"] |= {"total_episodes": 16, "gen_kwargs": {"max_new_tokens": 24}}
    return load_config(tree, {"output_dir": str(run_dir), **changes})


class Says(LogitsProcessor):
    """Makes every model say these tokens, and then others for ever."""

    def __init__(self, prompt: int, *tokens: int) -> None:
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids, scores):
        said = input_ids.shape[1] - self.prompt
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[said] if said < len(self.tokens) else 60] = 0.0
        return forced


def assert_generate_stops(folder: Path, *ends: int) -> None:
    """Plain `generate()`, with what is in the folder and nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for end in ends:
        said = model.generate(torch.tensor([[60, 61]]), max_new_tokens=9, logits_processor=[Says(2, 61, 50, end)])
        assert said[0, 2:].tolist() == [61, 50, end]


@report(
    "huggingface/trl#351",
    "huggingface/trl#925",
    "hiyouga/LlamaFactory#7454",
    "huggingface/transformers#29988",
    "NVIDIA-NeMo/RL#237",
    fault="a base whose generation_config.json has top_k, top_p and a repetition penalty, whose template closes "
    "replies with another token than its EOS, and whose head has more rows than the tokenizer has tokens: KL below 0, "
    "replies that never end, an error at the first checkpoint, ids without text",
    expected="KL 0 before the first update, rollouts and generate() end at each EOS, the folder loads, no such id",
)
def test_a_policy_with_the_files_of_qwen(base, tmp_path, monkeypatch):
    rollouts = []
    generate = RolloutEngine.generate
    monkeypatch.setattr(RolloutEngine, "generate", lambda *args: rollouts.append(generate(*args)) or rollouts[-1])
    run(configured(base, tmp_path / "run"), type="RL", reward_fn=length)
    words = AutoTokenizer.from_pretrained(tmp_path / "run" / "actor_rl")
    im_end, eos = words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert words.eos_token_id == im_end
    for each in rollouts:
        assert int(each.response_ids.max()) < len(words) and not (each.response_ids == 1)[each.response_mask].any()
        last = each.response_ids.gather(1, each.lengths[:, None] - 1).squeeze(1)
        assert torch.equal(each.finished, torch.isin(last, torch.tensor([im_end, eos])))
    ended = [int(row[n - 1]) for each in rollouts for row, n in zip(each.response_ids, each.lengths, strict=True)]
    assert {im_end, eos} <= set(ended)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "kl/ref" in row)
    assert first["step"] == 1 and abs(first["kl/ref"]) < 1e-5
    assert next(row for row in rows if row["step"] == 0)["eval/kl"] == pytest.approx(0, abs=1e-5)
    left = GenerationConfig.from_pretrained(tmp_path / "run" / "actor_rl")
    assert (left.eos_token_id, left.do_sample, left.top_p) == ([im_end, eos], True, 0.8)
    assert_generate_stops(tmp_path / "run" / "actor_rl", im_end, eos)


@report(
    "huggingface/trl#2059",
    "huggingface/open-r1#663",
    fault="adapters trained with ChatML on a base whose EOS is <|endoftext|>, then merged: generate() never stops",
    expected="generation_config.json of the adapters and of the merged model names the EOS that was trained",
)
def test_adapters_and_what_is_merged_of_them_know_the_eos(base, tmp_path, capsys):
    run(configured(base, tmp_path / "run", **{"actor_config.peft_enable": True}), type="ACTOR")
    assert "transformers reads the generation_config.json of their base" in capsys.readouterr().out
    adapters, merged = tmp_path / "run" / "actor", tmp_path / "merged"
    assert main(["export", "merge", "--model", str(adapters), "--output", str(merged), "--dtype", "float32"]) == 0
    words = AutoTokenizer.from_pretrained(merged)
    ends = [words.eos_token_id, 0]
    assert words.eos_token == "<|im_end|>"
    for folder in (adapters, merged):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == ends
    assert_generate_stops(merged, *ends)
    given = AutoModelForCausalLM.from_pretrained(adapters, generation_config=GenerationConfig.from_pretrained(adapters))
    assert given.generation_config.eos_token_id == ends
    old = tmp_path / "adapters"
    files = shutil.ignore_patterns("contents.json", "generation_config.json")
    shutil.copytree(adapters, old, ignore=files)  # as peft leaves them behind
    words_of_old = ["--model", str(old), "--output", str(tmp_path / "old"), "--dtype", "float32"]
    assert main(["export", "merge", *words_of_old]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "old").eos_token_id == ends
    assert "50 ('" in (said := capsys.readouterr().out) and "9999 (the model has the ids" in said


@report(
    "deepspeedai/DeepSpeedExamples#474",
    fault="text behind the end of a reply is scored",
    expected="the text that is scored ends before the first EOS, of whichever of several",
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5", "bart"])
def test_no_text_behind_an_eos_reaches_the_reward(family):
    model = (tiny.FAMILIES | tiny.ENCODER_DECODERS)[family]().eval()
    ends = SamplingDistribution(eos_token_ids=(tiny.EOS, *range(12, 20)))
    seen: list[str] = []
    for options in ({}, {"static": True}, {"chunk_size": 3}):
        rollout = tiny.engine(model, ends, max_new_tokens=12, **options).generate(tiny.prompts([3, 1, 5] * 8), seed=1)
        FunctionReward(lambda prompts, replies: seen.extend(replies) or [0.0] * len(replies), "f")(rollout)
    assert len(seen) == 72 and len({len(text) for text in seen}) > 3
    assert not set("".join(seen)) & set(tiny.words(list(ends.eos_token_ids)))


def test_a_reply_that_another_eos_ended_is_scored_as_the_reward_model_was_trained():
    words = tiny.tokenizer()
    words.add_special_tokens({"extra_special_tokens": ["<|eom|>"]})
    encoder = Encoder(words, FORMATS["chatllama"], 128)
    judge = RewardModel(tiny.llama(vocab=len(words)).base_model, ScalarHead(16)).eval()
    users, replies = ["the cat", "is the hat on the mat?"], ["sat on the mat", "no"]
    rollout = tiny.said(encoder, users, replies)
    want = ModelReward(RewardScorer(judge, encoder), encoder)(rollout)
    rollout.response_ids[rollout.response_ids == words.eos_token_id] = words.convert_tokens_to_ids("<|eom|>")
    got = ModelReward(RewardScorer(judge, encoder), encoder)(rollout)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def scored(scores: list[float], **scaling) -> torch.Tensor:
    policy = tiny.llama()
    judge = Scorer(
        PolicyOnly(policy, tiny.PLAIN),
        Reference(policy, tiny.PLAIN),
        FunctionReward(lambda prompts, completions: scores, "huge"),
        RewardScaling(**scaling),
        torch.device("cpu"),
    )
    return judge.score(tiny.rollout(tiny.prompts([3, 2]), [4, 5])).scores


@report(
    "huggingface/trl#5773",
    fault="scores of 1e25: an infinite value loss, a policy gradient of 0, and training continues",
    expected="refused before the update, with the two keys that bound scores; scaled or clipped they are learned from",
)
def test_scores_whose_squares_overflow_are_refused():
    with pytest.raises(RewardError, match="reach 2e.25.*cliprange_reward or scale_reward"):
        scored([-2e25, 1e25])
    assert scored([-2e25, 1e25], cliprange=10.0).tolist() == [-10.0, 10.0]
    assert scored([-2e25, 1e25], mode="running").abs().max() < 2
    assert scored([-1e15, 1e15]).tolist() == pytest.approx([-1e15, 1e15])


@report(
    "OpenRLHF/OpenRLHF#1120",
    "volcengine/verl#498",
    fault="a loss becomes NaN, the run continues and saves weights that say token 0 for ever",
    expected="the run ends with the step, the metric and the weight, before anything of that step is saved",
)
def test_an_update_that_diverged_is_not_saved():
    policy = tiny.llama()
    made = PolicyOnly(policy, SamplingDistribution(1.0, (tiny.EOS,), ()))
    with torch.no_grad():
        policy.lm_head.weight[3] = torch.nan
    with pytest.raises(DivergedError, match=r"^RL step 3: policy.lm_head.weight is not finite, so nothing is saved"):
        require_finite("RL step 3", trained(made), "resume")


@report(
    "DLR-RM/stable-baselines3#440",
    fault="a reward function with trlX's three arguments: a TypeError traceback in the middle of the run",
    expected="one line before the run that says what is passed",
)
def test_a_reward_function_of_trlx_is_refused_in_one_line(base, tmp_path, capsys, monkeypatch):
    (tmp_path / "of_trlx.py").write_text(
        "def score(samples, prompts, outputs, **kwargs):\n    return [0.0] * len(samples)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "c.yaml").write_text(json.dumps(settings(base) | {"reward_config": {"reward_fn": "of_trlx:score"}}))
    assert main([str(tmp_path / "c.yaml"), "--type", "RL", "--output-dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "reward_config.reward_fn: of_trlx:score takes (samples, prompts, outputs, **kwargs), but is called" in line
