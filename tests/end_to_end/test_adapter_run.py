"""Adapters from the first stage on: trained by ACTOR, taken as they are for the reference, trained on by RL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import length, policy_of, reference_of, settings
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from chatrlhf import load_config, load_reward_model, run
from chatrlhf.errors import ConfigError, OutsideError
from chatrlhf.models.loading.lora import BASE_CONFIG, base_of
from chatrlhf.models.loading.quantization import never_repack
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.stages.hf_trainer import StageCallback

IDS = torch.arange(2, 30)[None]


@pytest.fixture
def base(sft, tmp_path) -> Path:
    """A model in its whole weights, somewhere else."""
    shutil.move(sft / "actor", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def config(files, base, tmp_path):
    """Settings of a run of adapters on the base, rates high enough for them to matter; with changes."""
    (tmp_path / "peft.yaml").write_text("r: 4\nlora_alpha: 12\nlora_dropout: 0.0\n")

    def made(name: str, **changes):
        here = {
            "output_dir": str(tmp_path / name),
            "actor_config.model": str(base),
            "actor_config.peft_enable": True,
            "actor_config.peft_config_path": str(tmp_path / "peft.yaml"),
            "actor_config.lr": 3e-2,
            "trainer_config.actor_lr": 3e-2,
            "trainer_config.total_episodes": 16,
            "trainer_config.eval_interval": None,
        }
        return load_config(settings(files), here | {name.replace("__", "."): value for name, value in changes.items()})

    return made


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def loaded(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@contextmanager
def dies_at_step_5(monkeypatch) -> Iterator[None]:
    """Inside, a stage on others' trainers does."""
    step_end = StageCallback.on_step_end

    def dies(self, args, state, control, **rest):
        if state.global_step == 5:
            raise MemoryError("no more")
        return step_end(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(StageCallback, "on_step_end", dies)
        yield


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic_config__model": "shared"},
        {"trainer_config__algorithm": "rloo", "trainer_config__samples_per_prompt": 2},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "separate critic",
)
def test_rl_goes_on_with_the_actors_adapters_and_is_held_to_them(config, base, tmp_path, trainers, changes, capsys):
    result = run(config("run", **changes), reward_fn=length)
    out = capsys.readouterr().out
    assert "ACTOR: trains adapters alone" in out
    assert "its reference is built on the same weights" in out
    for folder in ("actor", "actor_rl"):
        path = tmp_path / "run" / folder
        assert [each.name for each in path.glob("*.safetensors")] == ["adapter_model.safetensors"]
        assert base_of(str(path)) == str(base.resolve())
        assert json.loads((path / "adapter_config.json").read_text())["r"] == 4
        assert not (path / "README.md").exists()
    start, sft, improved = loaded(base), loaded(tmp_path / "run" / "actor"), loaded(tmp_path / "run" / "actor_rl")
    assert (sft - start).abs().max() > 0.1 and (improved - sft).abs().max() > 0.01
    policy, reference = policy_of(trainers[-1]), reference_of(trainers[-1])
    torch.testing.assert_close(logits(policy), improved, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(reference), sft, rtol=0, atol=1e-5)
    both = {id(weight) for weight in policy.parameters()} & {id(weight) for weight in reference.parameters()}
    assert {id(weight) for name, weight in policy.named_parameters() if ".lora_" not in name} == both
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained and all(".lora_" in name and ".default." in name for name in trained)
    metrics = result.stages["RL"].metrics
    assert metrics["ppo/first_ratio_error"] < 1e-5
    names = load_file(sorted((tmp_path / "run" / "checkpoints" / "RL").glob("step-*"))[-1] / "model.safetensors").keys()
    assert any(".lora_A.default" in name for name in names) and not any(".reference." in name for name in names)


def test_a_fresh_policy_is_its_reference(config, tmp_path, trainers):
    result = run(config("run", trainer_config__actor_lr=0), reward_fn=length)
    assert abs(result.stages["RL"].metrics["kl/ref"]) < 1e-4
    torch.testing.assert_close(loaded(tmp_path / "run" / "actor_rl"), loaded(tmp_path / "run" / "actor"))


def test_a_critic_that_is_a_copy_of_the_policy_is_the_fine_tuned_one_whole(config, tmp_path):
    run(config("run", trainer_config__critic_lr=0), reward_fn=length)
    critic = AutoModel.from_pretrained(tmp_path / "run" / "critic", dtype=torch.float32).eval()
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "actor", dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = (model(input_ids=IDS).last_hidden_state for model in (actor.base_model, critic))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_reward_model_of_the_actor_starts_from_what_it_computes(config, files, tmp_path):
    run(config("run", reward_config__lr=0))
    reward = load_reward_model(tmp_path / "run" / "reward").model.backbone
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "actor", dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = (model(input_ids=IDS).last_hidden_state for model in (actor.base_model, reward))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_without_peft_rl_trains_what_base_and_adapters_are_together(config, tmp_path):
    run(config("run"), type="ACTOR")
    changes = {"actor_config__peft_enable": False, "trainer_config__actor_lr": 0}
    stage = run(config("run", **changes), type="RL", reward_fn=length).stages["RL"]
    assert (stage.checkpoint / "model.safetensors").exists()
    torch.testing.assert_close(loaded(stage.checkpoint), loaded(tmp_path / "run" / "actor"), rtol=0, atol=1e-5)


def test_rl_goes_on_with_adapters_that_somebody_names(config, tmp_path, trainers):
    run(config("first"), type="ACTOR")
    here = str(tmp_path / "first" / "actor")
    stage = run(config("second", actor_config__model=here), type="RL", reward_fn=length).stages["RL"]
    torch.testing.assert_close(logits(reference_of(trainers[-1])), loaded(Path(here)), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(policy_of(trainers[-1])), loaded(stage.checkpoint), rtol=0, atol=1e-5)


def test_the_actor_stage_is_resumed_with_its_adapters(config, tmp_path, monkeypatch):
    run(config("whole"), type="ACTOR")
    with dies_at_step_5(monkeypatch), pytest.raises(OutsideError, match="out of memory"):
        run(config("parts"), type="ACTOR")
    run(config("parts"), type="ACTOR", resume=True)
    name = Path("actor") / "adapter_model.safetensors"
    whole, parts = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_stretched_positions_are_kept_beside_the_adapters(config, tmp_path, trainers):
    run(config("run", actor_config__rope_scaling={"type": "linear", "factor": 2}), reward_fn=length)
    for folder in ("actor", "actor_rl"):
        saved = json.loads((tmp_path / "run" / folder / BASE_CONFIG).read_text())
        assert saved["rope_parameters"]["factor"] == 2.0
    assert policy_of(trainers[-1]).config.rope_parameters["factor"] == 2.0


# ----- quantized weights

FOUR_BITS = {"actor_config__load_in_4bit": True, "actor_config__bnb_4bit_use_double_quant": True}


def test_adapters_upon_four_bits_learn_and_rl_goes_on_upon_whole_weights(config, base, tmp_path, trainers):
    changes = FOUR_BITS | {"actor_config__epochs": 4, "actor_config__lr": 5e-3}
    result = run(config("run", **changes), type="ACTOR").stages["ACTOR"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["loss/eval"] for line in lines if "loss/eval" in line]
    assert held_out[-1] < held_out[0] - 0.01  # the base is too small to learn much
    assert [each.name for each in result.checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert base_of(str(result.checkpoint)) == str(base.resolve())
    run(config("run"), type="RL", reward_fn=length)
    torch.testing.assert_close(logits(reference_of(trainers[-1])), loaded(result.checkpoint), rtol=0, atol=1e-5)


@pytest.mark.parametrize("critic", [{}, {"critic_config__model": "shared"}, {"critic_config__peft_enable": True}])
def test_rl_upon_four_bits_is_held_to_what_sft_made_of_them(config, tmp_path, trainers, critic):
    changes = FOUR_BITS | critic | {"actor_config__bnb_4bit_compute_dtype": "float32"}
    stage = run(config("run", **changes), reward_fn=length).stages["RL"]
    policy, reference = policy_of(trainers[-1]), reference_of(trainers[-1])

    def in_four_bits(folder: Path) -> torch.Tensor:
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4")
        made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=bits)
        return logits(never_repack(made))  # bitsandbytes cannot repack a model as narrow as this

    packed = {name for name, weight in policy.named_parameters() if weight.dtype == torch.uint8}
    assert len(packed) == 14  # seven a block
    assert {id(w) for w in policy.parameters() if w.dtype == torch.uint8} <= {id(w) for w in reference.parameters()}
    torch.testing.assert_close(logits(reference), in_four_bits(tmp_path / "run" / "actor"), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(policy), in_four_bits(stage.checkpoint), rtol=0, atol=1e-4)
    assert (logits(policy) - logits(reference)).abs().max() > 0.01
    assert stage.metrics["ppo/first_ratio_error"] < 1e-4
    critic_folder = tmp_path / "run" / "critic"
    assert (critic_folder / "adapter_model.safetensors").exists() == bool(critic)
    scorer = load_reward_model(critic_folder)
    backbone, head = trainers[-1].updater.actor_critic.value_function()
    with torch.no_grad():
        want = backbone.eval()(input_ids=IDS).last_hidden_state
        got = scorer.model.backbone(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


# ----- reward model and critic on the policy's weights


@pytest.mark.parametrize("bits", [False, True], ids=["whole", "four bits"])
@pytest.mark.parametrize("start", ["adapters", "weights"])
def test_one_base_carries_policy_reference_critic_and_reward_model(
    config, files, base, tmp_path, trainers, start, bits, capsys
):
    """``start``: whether the actor is adapters on the base, whose reward model continues with them, or the base."""
    changes = {
        "reward_config__peft_enable": True,
        "critic_config__peft_enable": True,
        "reward_config__lr": 1e-2,
        "trainer_config__critic_lr": 1e-2,
    }
    if bits:
        changes |= {
            f"{section}__{key}": value
            for section in ("actor_config", "reward_config")
            for key, value in {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}.items()
        }
    made = config("run", **changes)
    for stage in ("ACTOR", "REWARD", "RL") if start == "adapters" else ("REWARD", "RL"):
        run(made, type=stage)
    out = capsys.readouterr().out
    assert "trains adapters and a head alone" in out and "critic: starts from the reward model, trained by" in out
    assert "is built on the same weights, and so does the reward model" in out
    trainer, reward = trainers[-1], tmp_path / "run" / "reward"
    scorer = trainer.scorer.reward.scorer
    actor_critic = trainer.updater.actor_critic
    models = [
        policy_of(trainer).base_model,
        reference_of(trainer).base_model,
        actor_critic.critic,
        scorer.model.backbone,
    ]
    frozen = [{id(w) for name, w in model.named_parameters() if ".lora_" not in name} for model in models]
    assert frozen[0] and all(each == frozen[0] for each in frozen)
    own = [{id(w) for name, w in model.named_parameters() if ".lora_" in name} for model in models]
    assert all(own) and len(set.union(*own)) == sum(map(len, own))
    # Each computes what is on disk, and they differ.
    for name in ("reward", "critic"):
        folder = tmp_path / "run" / name
        assert sorted(each.name for each in folder.glob("adapter_model*")) == ["adapter_model.safetensors"]
        assert not (folder / "model.safetensors").exists() and base_of(str(folder)) == str(base.resolve())
    prompts, replies = ["hello there 1", "who is it 2"], ["well hello", "no 3"]
    alone = load_reward_model(reward)(prompts, replies)
    assert alone == pytest.approx(scorer(prompts, replies), abs=1e-4)
    value = load_reward_model(tmp_path / "run" / "critic")
    with torch.no_grad():
        want = actor_critic.critic.eval()(input_ids=IDS).last_hidden_state
        got = value.model.backbone(input_ids=IDS).last_hidden_state
        first = scorer.model.backbone(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (want - first).abs().max() > 1e-3


def test_a_critic_by_adapters_stands_upon_a_reward_model_in_whole_weights(config, tmp_path, trainers):
    run(config("run", critic_config__peft_enable=True, actor_config__peft_enable=False))
    scorer, actor_critic = trainers[-1].scorer.reward.scorer, trainers[-1].updater.actor_critic
    assert {id(w) for n, w in actor_critic.critic.named_parameters() if ".lora_" not in n} == {
        id(w) for w in scorer.model.backbone.parameters()
    }
    critic = tmp_path / "run" / "critic"
    assert base_of(str(critic)) == str((tmp_path / "run" / "reward").resolve())
    with torch.no_grad():
        want = actor_critic.critic.eval()(input_ids=IDS).last_hidden_state
        got = load_reward_model(critic).model.backbone(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_reward_stage_is_resumed_with_its_adapters(config, tmp_path, monkeypatch):
    changes = {"reward_config__peft_enable": True}
    run(config("whole", **changes), type="REWARD")
    with dies_at_step_5(monkeypatch), pytest.raises(OutsideError, match="out of memory"):
        run(config("parts", **changes), type="REWARD")
    newest = sorted((tmp_path / "parts" / "checkpoints" / "REWARD").glob("step-*"))[-1]
    assert all("lora_" in name or name.startswith("head.") for name in load_file(newest / "model.safetensors"))
    run(config("parts", **changes), type="REWARD", resume=True)
    for name in ("adapter_model.safetensors", "reward_head.safetensors"):
        whole, parts = (load_file(tmp_path / which / "reward" / name) for which in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_rl_is_resumed_with_the_actors_adapters_and_the_critics(config, tmp_path, monkeypatch):
    changes = {"critic_config__peft_enable": True, "trainer_config__total_episodes": 32}
    run(config("whole", **changes), reward_fn=length)
    record = PPOTrainer._record

    def dies(self, step, *args):
        if step == 3:
            raise MemoryError("no more")
        record(self, step, *args)

    monkeypatch.setattr(PPOTrainer, "_record", dies)
    with pytest.raises(OutsideError, match="out of memory"):
        run(config("parts", **changes), reward_fn=length)
    monkeypatch.setattr(PPOTrainer, "_record", record)
    run(config("parts", **changes), resume=True, reward_fn=length)
    for folder in ("actor_rl", "critic"):
        whole, parts = (load_file(tmp_path / w / folder / "adapter_model.safetensors") for w in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"critic_config__peft_enable": True, "critic_config__model": "shared"}, "no weights to add to"),
        ({"actor_config__resize_embeddings": True}, "rows that are added would be lost"),
        ({"reward_config__peft_enable": True, "reward_config__model": "tiny"}, "reward_config.peft_enable: .*'tiny'"),
        ({"actor_config__attn_implementation": "flash_attention_2"}, "needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(config, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        run(config("run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_reward_model_by_adapters_upon_an_actor_nobody_fine_tuned_has_its_positions(config, tmp_path):
    stretched = {"actor_config__rope_scaling": {"type": "linear", "factor": 2}, "actor_config__peft_enable": False}
    run(config("run", reward_config__peft_enable=True, **stretched), type="REWARD")
    saved = json.loads((tmp_path / "run" / "reward" / BASE_CONFIG).read_text())
    assert saved["rope_parameters"]["factor"] == 2.0
    assert load_reward_model(tmp_path / "run" / "reward").model.config.rope_parameters["factor"] == 2.0


def test_a_base_is_fetched_in_the_revision_that_its_adapters_were_trained_upon(config, tmp_path, monkeypatch):
    made = config("run", actor_config__revision="v2", reward_config__peft_enable=True)
    run(made, type="ACTOR")
    asked = []
    for auto in (AutoModel, AutoModelForCausalLM):
        usual = auto.from_pretrained
        monkeypatch.setattr(
            auto, "from_pretrained", lambda *a, usual=usual, **k: asked.append(k.get("revision")) or usual(*a, **k)
        )
    run(config("run", reward_config__peft_enable=True), type="REWARD")
    run(config("run", critic_config__model="shared"), type="RL")
    load_reward_model(tmp_path / "run" / "reward")
    assert asked and set(asked) == {"v2"}
