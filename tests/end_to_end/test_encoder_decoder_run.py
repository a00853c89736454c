"""An encoder–decoder actor through all stages: what is trained, saved, read again, and refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_run import differences, left_behind, length, policy_of, reference_of, settings, write_config
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from chatrlhf import load_config, load_reward_model, run
from chatrlhf.cli import main
from chatrlhf.data.encoder_seq2seq import Seq2SeqEncoder
from chatrlhf.data.records import read_demonstrations
from chatrlhf.data.templates import FORMATS, Template
from chatrlhf.errors import OutsideError
from chatrlhf.models.loading.backbone import read_by
from chatrlhf.models.loading.lora import base_of
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.rl.update import Updater
from chatrlhf.stages.hf_trainer import StageCallback

IDS = torch.arange(2, 30)[None]


@pytest.fixture(scope="module")
def base(files, tmp_path_factory):
    """Folder of a tiny encoder–decoder with a tokenizer, by family."""
    tokenizer = train_tokenizer([str(row) for row in json.loads((files / "actor.json").read_text())], 300)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = dict(vocab_size=len(tokenizer), pad_token_id=pad, eos_token_id=eos, decoder_start_token_id=pad)

    def made(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / family
        if not folder.exists():
            options = {"bart": {"max_position_embeddings": 96, "d_model": 32}}.get(family, {"d_model": 32})
            tiny.ENCODER_DECODERS[family](**ids, **options).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return made


@pytest.fixture
def config(files, base, tmp_path):
    """Settings of a short run from such a model; with changes."""
    (tmp_path / "peft.yaml").write_text("r: 4\nlora_alpha: 12\nlora_dropout: 0.0\n")

    def made(name: str, family: str = "flan_t5", **changes):
        here = {
            "output_dir": str(tmp_path / name),
            "actor_config.model": str(base(family)),
            "actor_config.template": "raw",
            "actor_config.lr": 3e-2,
            "actor_config.peft_config_path": str(tmp_path / "peft.yaml"),
            "trainer_config.total_episodes": 16,
            "trainer_config.eval_interval": None,
        }
        return load_config(settings(files), here | {name.replace("__", "."): value for name, value in changes.items()})

    return made


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**read_by(model.config, IDS)).logits


def loaded(folder: Path) -> torch.Tensor:
    return logits(AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32))


def lines(run_dir: Path, name: str) -> list[float]:
    return [row[name] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if name in row]


CASES = {
    "T5": dict(family="t5", reward_config__model="tiny"),
    "Flan-T5 by adapters": dict(family="flan_t5", actor_config__peft_enable=True, trainer_config__actor_lr=3e-2),
    "BART by RLOO": dict(family="bart", trainer_config__algorithm="rloo", trainer_config__samples_per_prompt=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_three_stages_and_what_they_leave_behind(case, config, base, tmp_path, trainers, capsys):
    changes = CASES[case]
    whole = config("run", **changes)
    result = run(whole)
    out, run_dir, start = capsys.readouterr().out, tmp_path / "run", base(changes["family"])
    held_out = lines(run_dir, "loss/eval")
    assert held_out[1] < held_out[0] - 0.01  # of the ACTOR stage, before and after
    before, sft, improved = loaded(start), loaded(run_dir / "actor"), loaded(run_dir / "actor_rl")
    assert (sft - before).abs().max() > 0.1 and (improved - sft).abs().max() > 0.01
    torch.testing.assert_close(logits(policy_of(trainers[-1])), improved, rtol=0, atol=1e-4)
    metrics = result.stages["RL"].metrics
    assert metrics["ppo/first_ratio_error"] < 1e-5 and metrics["sampling/logprob_gap_max"] < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "actor_rl")
    assert len(tokenizer) == improved.shape[-1] and Template.load(run_dir / "actor_rl") is not None
    assert isinstance(load_reward_model(run_dir / "reward")(["hello"], ["well"])[0], float)
    if whole.actor_config.peft_enable:
        saved = json.loads((run_dir / "actor" / "adapter_config.json").read_text())
        assert saved["task_type"] == "SEQ_2_SEQ_LM" and set(saved["target_modules"]) == {"q", "v"}
        assert base_of(str(run_dir / "actor_rl")) == str(start.resolve())
        torch.testing.assert_close(logits(reference_of(trainers[-1])), sft, rtol=0, atol=1e-4)
        merged = tmp_path / "merged"
        words = ["--model", str(run_dir / "actor_rl"), "--output", str(merged), "--dtype", "float32"]
        assert main(["export", "merge", *words]) == 0
        torch.testing.assert_close(loaded(merged), improved, rtol=0, atol=1e-4)
    if whole.trainer_config.algorithm == "ppo":
        assert "critic: a copy of the policy under a zero head" in out
        critic = load_reward_model(run_dir / "critic")
        assert type(critic.model.backbone) is type(AutoModel.from_pretrained(run_dir / "critic"))
        assert not any("lm_head" in name or "lora" in name for name in load_file(run_dir / "critic/model.safetensors"))


def test_a_shared_critic_is_saved_as_what_it_is_read_as(config, tmp_path, trainers):
    """V behind a reply's last token, from the folder that the run leaves."""
    run(config("run", critic_config__model="shared"), type="RL", reward_fn=length)
    critic = load_reward_model(tmp_path / "run" / "critic")
    policy, head, encoder = policy_of(trainers[-1]), trainers[-1].updater.actor_critic.value_head, critic.encoder
    assert isinstance(encoder, Seq2SeqEncoder)
    prompts, replies = ["hello there", "good day to you"], ["well hello", "no 3"]
    for prompt, reply, score in zip(prompts, replies, critic(prompts, replies), strict=True):
        start = policy.config.decoder_start_token_id
        given = torch.tensor([encoder.prompt(prompt)]), torch.tensor([[start, *encoder.completion("a", reply)]])
        with torch.no_grad():
            states = policy(input_ids=given[0], decoder_input_ids=given[1], output_hidden_states=True)
            want = head(states.decoder_hidden_states[-1][0, -1]).item()
        assert score == pytest.approx(want, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_the_tokens_of_replies(smoothing, files, config, base, tmp_path):
    """However the batch is cut: T5 itself averages each part."""
    model = AutoModelForSeq2SeqLM.from_pretrained(base("flan_t5"), dropout_rate=0.0).eval()
    tokenizer = AutoTokenizer.from_pretrained(base("flan_t5"))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "still")
    changes = dict(lr=0.0, warmup_steps=0, validation_fraction=0.0, batch_size=60, micro_batch_size=15)
    changes |= dict(model=str(tmp_path / "still"), label_smoothing_factor=smoothing)
    run(config("run", **{f"actor_config__{name}": value for name, value in changes.items()}), type="ACTOR")
    encoder = Seq2SeqEncoder.of(tokenizer, FORMATS["raw"], 96)
    total = count = 0
    for row in read_demonstrations(files / "actor.json"):
        prompt, reply = (torch.tensor([ids]) for ids in encoder.actor_row(row, "completion"))
        with torch.no_grad():
            logprobs = model(input_ids=prompt, labels=reply).logits[0].log_softmax(-1)
        for t, token in enumerate(reply[0].tolist()):
            total += -(1 - smoothing) * logprobs[t, token].item() - smoothing * logprobs[t].mean().item()
            count += 1
    assert lines(tmp_path / "run", "loss/train")[0] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_a_run_that_died_is_resumed_to_the_same_bytes(config, tmp_path, monkeypatch):
    changes = {"trainer_config__total_episodes": 32, "actor_config__neftune_noise_alpha": 5.0}

    def go(name: str, resume: bool = False) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        run(config("", output_dir="run", **changes), reward_fn=length, resume=resume)

    go("whole")
    step_end, step, calls = StageCallback.on_step_end, Updater.step, []

    def dies(self, args, state, control, **rest):
        if state.global_step == 5:
            raise MemoryError
        return step_end(self, args, state, control, **rest)

    def dies_later(self, *args):
        calls.append(1)
        if len(calls) == 11:
            raise MemoryError
        return step(self, *args)

    for owner, name, deadly in ((StageCallback, "on_step_end", dies), (Updater, "step", dies_later)):
        with monkeypatch.context() as patched, pytest.raises(OutsideError, match="out of memory"):
            patched.setattr(owner, name, deadly)
            go("parts", resume=(tmp_path / "parts" / "run").exists())
    go("parts", resume=True)
    found = [left_behind(tmp_path / name / "run") for name in ("parts", "whole")]
    assert any(name.startswith("actor_rl/") for name in found[0]) and "critic/model.safetensors" in found[0]
    assert differences(*found) == []


@pytest.mark.slow
@pytest.mark.parametrize("in_rl", [True, False], ids=["RL quantized", "RL in whole weights"])
def test_adapters_upon_four_bits_learn_and_rl_goes_on_with_them(in_rl, config, base, tmp_path, trainers):
    pytest.importorskip("bitsandbytes")
    adapters = {"actor_config__peft_enable": True, "trainer_config__actor_lr": 3e-2}
    bits = {"actor_config__load_in_4bit": True, "actor_config__bnb_4bit_use_double_quant": True}
    result = run(config("run", **adapters, **bits), type="ACTOR").stages["ACTOR"]
    first, last = lines(tmp_path / "run", "loss/eval")
    assert last < first - 0.1
    assert base_of(str(result.checkpoint)) == str(base("flan_t5").resolve())
    stage = run(config("run", **adapters, **(bits if in_rl else {})), type="RL", reward_fn=length).stages["RL"]
    assert stage.metrics["ppo/first_ratio_error"] < 1e-5 and abs(stage.metrics["kl/ref"]) > 1e-3
    policy, reference = policy_of(trainers[-1]), reference_of(trainers[-1])
    shared = {id(weight) for weight in policy.parameters()} & {id(weight) for weight in reference.parameters()}
    assert {id(weight) for name, weight in policy.named_parameters() if ".lora_" not in name} == shared
    critic = AutoModel.from_pretrained(tmp_path / "run" / "critic", dtype=torch.float32)
    assert not any("lora" in name or each.dtype == torch.uint8 for name, each in critic.named_parameters())
    if not in_rl:
        torch.testing.assert_close(logits(reference), loaded(result.checkpoint), rtol=0, atol=1e-4)
        torch.testing.assert_close(logits(policy), loaded(stage.checkpoint), rtol=0, atol=1e-4)


# ----- refused, or said, before anything starts


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--type", "ACTOR", "--set", "actor_config.loss_on=all"],
            "actor_config.loss_on: 'all' asks for a loss on prompts",
        ),
        (
            ["--type", "RL", "--set", "trainer_config.num_layers_unfrozen=1"],
            "trainer_config.num_layers_unfrozen: 1 parts",
        ),
        (
            ["--type", "RL", "--set", "actor_config.rope_scaling={type: linear, factor: 2}"],
            "actor_config.rope_scaling: t5 has no rotary positions",
        ),
        (["--type", "RL", "--set", "critic_config.model={llama}"], "is no encoder-decoder and the actor is one"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_cannot_be_is_refused_before_anything_starts(words, said, dry, files, base, sft, tmp_path, capsys):
    config = write_config(files, actor_config__model=str(base("t5")), reward_config__reward_fn="small_run:length")
    words = [word.replace("{llama}", str(sft / "actor")) for word in words]
    assert main([str(config), "--output-dir", str(tmp_path / "run"), *words, *dry]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ----- learned


def echoes(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of a completion that is the prompt's first letter; 1/4 for whoever does not read the prompt."""
    return [completion.count(prompt[0]) / 4 for prompt, completion in zip(prompts, completions, strict=True)]


@pytest.mark.slow
def test_ppo_learns_what_depends_on_what_the_encoder_reads(tmp_path, one_thread):
    letters = "abcd"
    tokenizer = train_tokenizer([letters], 260)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = dict(vocab_size=len(tokenizer), pad_token_id=pad, eos_token_id=eos, decoder_start_token_id=pad)
    tiny.t5(seed=1, d_model=32, **ids).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"user_input": a + b + c} for a in letters for b in letters for c in letters]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    made = settings(tmp_path)
    made["actor_config"] |= {"model": str(tmp_path / "base"), "template": "raw"}
    said = {tokenizer(letter).input_ids[0] for letter in letters}
    made["trainer_config"] = {
        "examples_path": str(tmp_path / "prompts.json"),
        "validation_fraction": 0.25,
        "precision": "fp32",
        "total_episodes": 3200,
        "num_rollouts": 64,
        "batch_size": 32,
        "actor_lr": 5e-3,
        "critic_lr": 5e-3,
        "init_kl_coef": 0.0,
        "gen_kwargs": {"max_new_tokens": 4, "forbidden_tokens": [i for i in range(len(tokenizer)) if i not in said]},
    }
    result = run(load_config(made | {"output_dir": str(tmp_path / "run")}), type="RL", reward_fn=echoes)
    first = lines(tmp_path / "run", "eval/reward")[0]
    assert first < 0.35 and result.stages["RL"].metrics["eval/reward"] > 0.6, first
