"""Every family through every stage, in its whole weights, by adapters, and by adapters on four bits.

`pytest tests/end_to_end/test_families.py -m "" -s` ends with the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from families import CAUSAL, VOCAB
from small_run import settings, write_files
from tiny import flan_t5
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DebertaV2Config,
    PreTrainedTokenizerFast,
)

from chatrlhf import load_config, load_reward_model, run
from chatrlhf.models import reward_model
from chatrlhf.models.loading.backbone import read_by
from chatrlhf.models.loading.lora import base_of, config_of, has_adapters, save_model
from chatrlhf.models.loading.quantization import never_repack
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.stages import context as stages

ROWS = 24
IDS = torch.arange(3, 27).view(2, 12)
PROMPTS, REPLIES = ["hello there 1", "who is it 2", "see you"], ["well hello", "no 3", "well"]


def _flan_t5(**ids):
    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=64)
    return flan_t5(**sizes, **ids, decoder_start_token_id=ids["pad_token_id"])


PAIRED = {"Flan-T5": _flan_t5}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
METHODS = {"full": {}, "LoRA": {"peft_enable": True}, "QLoRA": {"peft_enable": True} | NF4}

TABLE: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def table(request) -> Iterator[None]:
    """What was found, behind everything else."""
    yield
    if not TABLE:
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n| family | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
        for family, cells in TABLE.items():
            print(f"| {family} | " + " | ".join(cells.get(method, "failed") for method in METHODS) + " |")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, ROWS)
    (folder / "peft.yaml").write_text(
        yaml.safe_dump({"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": "all"})
    )
    return folder


@pytest.fixture
def saved(monkeypatch) -> dict[str, torch.Tensor]:
    """What each model that was written computed at that moment, by the name of its folder."""
    seen: dict[str, torch.Tensor] = {}

    def save(model, folder: Path) -> None:
        if has_adapters(model):  # trained a few steps, adapters add next to nothing: it would be equal by accident
            torch.manual_seed(11)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if ".lora_" in name:
                        weight.copy_(torch.randn_like(weight) * 0.1)
        save_model(model, folder)
        training = model.training
        seen[_published_as(folder)] = _states(model)
        model.train(training)

    monkeypatch.setattr(stages, "save_model", save)
    monkeypatch.setattr(reward_model, "save_model", save)
    return seen


def _published_as(folder: Path) -> str:
    """A folder is written under a hidden name and then renamed."""
    return next(name for name in ("actor_rl", "actor", "reward", "critic") if name in folder.name)


@torch.no_grad()
def _states(model) -> torch.Tensor:
    """Logits, or the last hidden states of a backbone."""
    out = model.eval()(**read_by(model.config, IDS % model.config.vocab_size))
    return (out.logits if "logits" in out else out.last_hidden_state).float()


def _loaded(auto, folder: Path, method: str):
    bits = {name: value for name, value in NF4.items()}
    quantization = {"quantization_config": BitsAndBytesConfig(**bits)} if method == "QLoRA" else {}
    return never_repack(auto.from_pretrained(folder, dtype=torch.float32, **quantization))


def _config(files: Path, base: Path, out: Path, method: str, **changes):
    keys = {
        f"{section}.{key}": value
        for section in ("actor_config", "reward_config")
        for key, value in METHODS[method].items()
    }
    keys |= {
        "actor_config.model": str(base),
        "actor_config.peft_config_path": str(files / "peft.yaml"),
        "critic_config.peft_enable": method != "full",
        "output_dir": str(out),
        "actor_config.precision": "fp32",
        "reward_config.precision": "fp32",
        "actor_config.checkpoint_steps": 100,
        "reward_config.checkpoint_steps": 100,
        "trainer_config.checkpoint_steps": 100,
        "trainer_config.total_episodes": 8,
        "trainer_config.eval_interval": None,
    }
    return load_config(settings(files), keys | changes)


# The oracle runs every family in CI, and recomputes it; here an archetype of each build.
ARCHETYPES = ("LLaMA", "GPT-2", "BLOOM", "Mixtral", "Flan-T5")
FAMILIES = [
    family if family in ARCHETYPES else pytest.param(family, marks=pytest.mark.nightly) for family in (*CAUSAL, *PAIRED)
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_all_stages_and_is_read_back(family, method, files, saved, tmp_path, monkeypatch):
    torch.manual_seed(0)
    base, out = tmp_path / "base", tmp_path / "run"
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, VOCAB)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family in CAUSAL:
        config = CAUSAL[family]
        config.update(ids | {"bos_token_id": None})
        auto, model = AutoModelForCausalLM, AutoModelForCausalLM.from_config(config)
    else:
        auto, model = AutoModelForSeq2SeqLM, PAIRED[family](**ids)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainers = []
    train = PPOTrainer.train
    monkeypatch.setattr(PPOTrainer, "train", lambda self, *args: trainers.append(self) or train(self, *args))
    result = run(_config(files, base, out, method))
    assert result.stages["RL"].metrics["ppo/first_ratio_error"] < 1e-3
    assert set(saved) == {"actor", "reward", "actor_rl", "critic"}
    start = _states(_loaded(auto, base, method))
    for name in ("actor", "actor_rl"):
        assert (base_of(str(out / name)) is not None) == (method != "full")
        made = AutoConfig.from_pretrained(config_of(str(out / name)))
        assert not getattr(made, "output_router_logits", False)  # which TRL turns on for experts
        got = _states(_loaded(auto, out / name, method))
        torch.testing.assert_close(got, saved[name], rtol=1e-4, atol=1e-4)
        assert (got - start).abs().max() > 1e-2
    for name in ("reward", "critic"):
        got = _states(_loaded(AutoModel, out / name, method))
        torch.testing.assert_close(got, saved[name], rtol=1e-4, atol=1e-4)
        ours = load_reward_model(out / name)
        torch.testing.assert_close(_states(ours.model.backbone), saved[name], rtol=1e-4, atol=1e-4)
    # The reference is the model that ACTOR left.
    reference = _states(trainers[-1].scorer.reference.model)
    torch.testing.assert_close(reference, saved["actor"], rtol=1e-3, atol=1e-3)
    TABLE.setdefault(family, {})[method] = "SFT, reward, PPO"


# ----- encoders as reward models


def _words(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer as encoders have it: words, and special tokens around a text and between two."""
    words = sorted({word for text in (*PROMPTS, *REPLIES) for word in text.split()} | {"good", "day", "how", "are"})
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *words]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


DEBERTA = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=96,
    relative_attention=True,
    position_biased_input=False,
    pos_att_type=["p2c", "c2p"],
    type_vocab_size=0,
    initializer_range=0.3,
    pooler_hidden_size=32,
)


@pytest.fixture
def deberta(tmp_path) -> Path:
    """A reward model of OpenAssistant's kind."""
    folder = tmp_path / "deberta"
    tokenizer = _words(folder)
    torch.manual_seed(1)
    config = DebertaV2Config(**DEBERTA, vocab_size=len(tokenizer), num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_with_a_tokenizer_of_its_own_is_trained_to_judge(method, files, saved, deberta, sft, tmp_path):
    changes = {"reward_config.model": str(deberta), "reward_config.fresh_head": True}
    changes |= {"critic_config.peft_enable": False}
    config = _config(files, sft / "actor", tmp_path / "run", method, **changes)
    run(config, type="REWARD")
    got = _states(_loaded(AutoModel, tmp_path / "run" / "reward", method))
    torch.testing.assert_close(got, saved["reward"], rtol=1e-4, atol=1e-4)
    scorer = load_reward_model(tmp_path / "run" / "reward")
    assert scorer.model.pooling == "first" and scorer.tokenizer.eos_token == "[SEP]"
    assert len(set(scorer(PROMPTS, REPLIES))) == len(PROMPTS)
    result = run(config, type="RL").stages["RL"]
    assert result.metrics["ppo/first_ratio_error"] < 1e-3
    TABLE.setdefault("DeBERTa-v3 (reward model)", {})[method] = "reward, PPO by it"


def test_an_encoder_that_somebody_trained_is_the_reward_as_it_is(files, deberta, sft, monkeypatch, capsys):
    """Without a REWARD stage, and in ALL where there is nothing to train it on."""
    given: list[tuple[list[str], list[str], torch.Tensor]] = []
    rewards = FunctionReward.texts
    monkeypatch.setattr(
        FunctionReward,
        "texts",
        lambda self, prompts, replies: (
            given.append((prompts, replies, made := rewards(self, prompts, replies))) or made
        ),
    )
    changes = {"output_dir": str(sft), "reward_config.model": str(deberta), "trainer_config.total_episodes": 8}
    run(load_config(settings(files), changes), type="RL")
    model = AutoModelForSequenceClassification.from_pretrained(deberta, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(deberta)
    prompts, replies, scores = given[-1]
    with torch.no_grad():
        for prompt, reply, score in zip(prompts, replies, scores.tolist(), strict=True):
            alone = model(**tokenizer(prompt, reply, return_tensors="pt")).logits.item()
            assert score == pytest.approx(alone, abs=1e-4)
    changes |= {"reward_config.train_dataset_path": None, "output_dir": str(sft.parent / "all")}
    run(load_config(settings(files), changes))
    assert f"REWARD: skipped, the reward is {deberta}" in capsys.readouterr().out
