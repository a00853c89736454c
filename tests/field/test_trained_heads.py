"""Reward models that somebody trained, trained further: their head is kept, or dropped when that is asked for."""

import json
from pathlib import Path

import pytest
import torch
from classifiers import alone, chat_tokenizer, classifier, pair_tokenizer, save
from field_reports import report
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import PLAIN, llama
from torch import nn
from transformers import AutoModelForSequenceClassification

from chatrlhf import load_config, load_reward_model, run
from chatrlhf.config.model import PeftConfig
from chatrlhf.config.schema import Config, CriticConfig, RewardConfig
from chatrlhf.errors import ConfigError
from chatrlhf.models.classifier import is_used_as_it_is, load_classifier
from chatrlhf.models.critic_init import make_actor_critic
from chatrlhf.models.for_stages import new_reward_model, require_reward_model
from chatrlhf.models.own_pooling import token_types
from chatrlhf.models.trained_heads import has_head

CPU = torch.device("cpu")
PROMPTS, REPLIES = ["the cat", "hat", "what is on the mat?"], ["sat on the mat", "the hat is on the cat", "a"]
LORA = PeftConfig(r=4, lora_alpha=8, lora_dropout=0.0)


def tokenizer_of(family: str):
    encoder = {"bert": (True, False), "deberta-v2": (True, False), "roberta": (False, True), "fnet": (True, False)}
    return pair_tokenizer(*encoder[family]) if family in encoder else chat_tokenizer(None)


def reward_folder(path: Path, family: str = "llama", **options) -> tuple[Path, nn.Module]:
    words = tokenizer_of(family)
    made = classifier(family, len(words), **options)
    return save(path, made, words), made


def start(folder: Path, adapters: PeftConfig | None = None, **keys):
    section = RewardConfig(model=str(folder), peft_enable=adapters is not None, **{"template": "raw"} | keys)
    return new_reward_model(Config(reward_config=section), None, [], CPU, adapters)


def own_scores(made: nn.Module, scorer) -> torch.Tensor:
    """What the classifier itself gives the rows that a scorer reads."""
    rows = [scorer.encode(*row) for row in zip(PROMPTS, REPLIES, strict=True)]
    separator = scorer.model.separator
    types = None if separator is None else [token_types(torch.tensor([row]), separator)[0].tolist() for row in rows]
    return alone(made, rows, types)


def changed(scorer, tmp_path: Path):
    """The reward model with all that is trained moved, saved and loaded again."""
    for weight in scorer.model.parameters():
        if weight.requires_grad:
            with torch.no_grad():
                weight.add_(torch.randn_like(weight), alpha=0.05)
    scorer.model.eval()
    scorer.save(tmp_path)
    return load_reward_model(tmp_path)


@report(
    "modelscope/ms-swift#9239",
    "huggingface/trl#1379",
    fault="a trained reward model is named with data: its head is dropped, nothing is said",
    expected="head and pooling are kept: the start has the classifier's own scores, what is saved those of training",
)
@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "roberta", "deberta-v2", "fnet"])
def test_a_classifiers_head_is_trained_further(family, peft, tmp_path):
    folder, made = reward_folder(tmp_path / "rm", family)
    scorer = start(folder, peft)
    torch.testing.assert_close(scorer.score_ids(rows_of(scorer)), own_scores(made, scorer), rtol=0, atol=1e-4)
    before = scorer.score(PROMPTS, REPLIES)
    again = changed(scorer, tmp_path / "saved")
    assert again.score(PROMPTS, REPLIES) == pytest.approx(scorer.score(PROMPTS, REPLIES), abs=1e-4)
    assert again.score(PROMPTS, REPLIES) != pytest.approx(before, abs=1e-2)
    # And once more from there, by the same name.
    further = start(tmp_path / "saved", peft, template=None)
    assert further.score(PROMPTS, REPLIES) == pytest.approx(again.score(PROMPTS, REPLIES), abs=1e-4)


def rows_of(scorer) -> list[list[int]]:
    return [scorer.encode(*row) for row in zip(PROMPTS, REPLIES, strict=True)]


@pytest.mark.parametrize("pad", [None, 0], ids=["none", "eos"])
def test_a_classifier_that_skips_eos_is_read_where_it_reads_itself(pad, tmp_path):
    folder, made = reward_folder(tmp_path / "rm", pad_token_id=pad)
    scorer = changed(start(folder), tmp_path / "saved")
    assert scorer.model.skipped == pad
    bare = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        bare.model.load_state_dict(scorer.model.backbone.state_dict())
        bare.score.weight.copy_(scorer.model.head.out.weight)
    moved = own_scores(bare, scorer) + scorer.model.head.out.bias
    torch.testing.assert_close(scorer.score_ids(rows_of(scorer)), moved, rtol=0, atol=1e-4)
    assert (moved - own_scores(made, scorer)).abs().max() > 1e-2


def test_an_encoder_reads_in_training_as_it_is_read_as_it_is(tmp_path):
    folder, _ = reward_folder(tmp_path / "rm", "bert")
    as_it_is = load_classifier(RewardConfig(model=str(folder)), CPU)
    scorer = start(folder, template=None)
    assert rows_of(scorer) == [ids for ids, _ in as_it_is._rows(PROMPTS, REPLIES)]
    assert scorer.encode("the cat", "sat", finished=False) == scorer.encode("the cat", "sat")  # closed in any case
    assert scorer.score(PROMPTS, REPLIES) == pytest.approx(as_it_is(PROMPTS, REPLIES), abs=1e-4)


def test_a_checkpoint_of_adapters_on_an_encoder_holds_its_head_and_no_base(tmp_path):
    model = start(reward_folder(tmp_path / "rm", "roberta")[0], LORA).model
    state = model.state_dict()
    assert {name.split(".")[1] for name in state} == {"classifier", "roberta"}
    assert all(".lora_" in name for name in state if ".roberta." in name)
    assert state.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}


@report(
    "hiyouga/LlamaFactory#7342",
    fault="TRL's LoRA adapters of a sequence classifier, as a reward and as a start: not found, or head dropped",
    expected="used with their head as peft loads them; trained further as adapters, or merged",
)
@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_adapters_of_a_classifier(family, tmp_path):
    adapters, expected = classifier_adapters(tmp_path, family)
    assert is_used_as_it_is(RewardConfig(model=str(adapters)), ["RL"], tmp_path / "none")
    as_it_is = load_classifier(RewardConfig(model=str(adapters)), CPU)
    ids, types = zip(*as_it_is._rows(PROMPTS, REPLIES), strict=True)
    own = alone(expected, list(ids), list(types) if family == "bert" else None).tolist()
    assert as_it_is(PROMPTS, REPLIES) == pytest.approx(own, abs=1e-4)
    for peft in (None, LORA):
        scorer = start(adapters, peft)
        torch.testing.assert_close(scorer.score_ids(rows_of(scorer)), own_scores(expected, scorer), rtol=0, atol=1e-4)
        folder = tmp_path / f"saved-{peft is None}"
        again = changed(scorer, folder)
        assert again.score(PROMPTS, REPLIES) == pytest.approx(scorer.score(PROMPTS, REPLIES), abs=1e-4)
        assert (folder / "adapter_model.safetensors").exists() == (peft is not None)
        if peft is not None:
            assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3  # they are the same ones
            assert start(folder, peft, template=None).score(PROMPTS, REPLIES) == pytest.approx(
                again.score(PROMPTS, REPLIES), abs=1e-4
            )


def classifier_adapters(tmp_path: Path, family: str) -> tuple[Path, nn.Module]:
    """Adapters as TRL saves them (of a language model, where it is causal), and what peft makes of them."""
    words = tokenizer_of(family)
    if family == "llama":
        base = save(tmp_path / "base", llama(vocab=len(words), eos_token_id=0, pad_token_id=1), words)
    else:
        base = save(tmp_path / "base", classifier(family, len(words)), words)
    bare = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    made = get_peft_model(bare, LoraConfig(task_type="SEQ_CLS", r=3, target_modules="all-linear"))
    for weight in made.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.5)
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(tmp_path / "adapters")
    words.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapters", num_labels=1
    ).eval()


def test_adapters_without_their_head_are_refused(tmp_path):
    adapters, _ = classifier_adapters(tmp_path, "llama")
    weights = load_file(adapters / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "score" not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, adapters / "adapter_model.safetensors", metadata={"format": "pt"})
    for section in (RewardConfig(model=str(adapters)), RewardConfig(model=str(adapters), train_dataset_path="x.json")):
        with pytest.raises(ConfigError, match="is a classifier without score.weight"):
            has_head(section) if section.train_dataset_path else is_used_as_it_is(section, ["RL"], tmp_path / "none")


def test_a_head_is_dropped_when_that_is_asked_for(tmp_path):
    folder, made = reward_folder(tmp_path / "rm")
    scorer = start(folder, fresh_head=True, model_head_hidden_size=8)
    assert scorer.head_from is None and scorer.model.head.mlp_size == 8
    torch.testing.assert_close(
        scorer.model.backbone.layers[0].mlp.up_proj.weight, made.model.layers[0].mlp.up_proj.weight
    )
    adapters, expected = classifier_adapters(tmp_path / "lora", "llama")
    trunk = start(adapters, fresh_head=True).model.backbone
    merged = expected.merge_and_unload()
    torch.testing.assert_close(trunk.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "options, keys, reason",
    [
        ({"num_labels": 3}, {}, "has|classifier with 3 labels.*reward_config.fresh_head"),
        ({}, {"model_head_hidden_size": 8}, "reward_config.model_head_hidden_size: 8 .*reward_config.fresh_head"),
    ],
    ids=["labels", "size"],
)
def test_a_head_that_cannot_be_kept_is_refused_with_the_remedy(options, keys, reason, tmp_path):
    folder, _ = reward_folder(tmp_path / "rm", **options)
    with pytest.raises(ConfigError, match=reason):
        has_head(RewardConfig(model=str(folder), **keys))
    dropped = RewardConfig(model=str(folder), fresh_head=True, **keys)
    assert not has_head(dropped)
    with pytest.raises(ConfigError, match="reward_config.fresh_head: True .*nothing to train another"):
        is_used_as_it_is(dropped, ["RL"], tmp_path / "none")


def test_a_named_reward_model_that_was_only_the_start_gives_way_to_what_was_trained(tmp_path):
    for name in ("start", "run"):
        start(reward_folder(tmp_path / f"rm-{name}")[0]).save(tmp_path / name)
    named = {"model": str(tmp_path / "start")}
    assert require_reward_model(tmp_path / "run", RewardConfig(**named)) == tmp_path / "start"
    assert require_reward_model(tmp_path / "run", RewardConfig(**named, train_dataset_path="x")) == tmp_path / "run"
    assert require_reward_model(tmp_path / "none", RewardConfig(**named, train_dataset_path="x")) == tmp_path / "start"
    assert not is_used_as_it_is(RewardConfig(**named), ["RL"], tmp_path / "none")


@pytest.mark.parametrize("adapters", [None, LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("kind", ["classifier", "adapters of one"])
def test_a_classifier_as_critic_starts_from_its_own_head(kind, adapters, tmp_path):
    if kind == "classifier":
        folder, made = reward_folder(tmp_path / "rm")
    else:
        folder, made = classifier_adapters(tmp_path, "llama")
    words = tokenizer_of("llama")
    config = CriticConfig(model=str(folder), peft_enable=adapters is not None)
    policy = llama(vocab=len(words))
    actor_critic, line = make_actor_critic(policy, words, None, config, PLAIN, True, adapters=adapters, base="nowhere")
    assert line.startswith(f"critic: {folder}")
    critic, head = actor_critic.value_function()
    rows = [[5, 6, 7], [9, 10, 11, 12]]
    with torch.no_grad():
        values = [head(critic(input_ids=torch.tensor([row])).last_hidden_state[0, -1]) for row in rows]
    torch.testing.assert_close(torch.stack(values), alone(made, rows), rtol=0, atol=1e-4)


@pytest.fixture
def config(tmp_path):
    """Settings of a REWARD stage on a classifier; pairs, or scores."""
    users = [f"is {i} on the mat?" for i in range(8)]
    pairs = [{"user_input": user, "chosen": "the cat", "rejected": "no hat"} for user in users]
    scores = [
        {"user_input": user, "completion": "the cat" * (1 + i % 3), "score": i % 5} for i, user in enumerate(users)
    ]
    for name, rows in (("pairs", pairs), ("scores", scores)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(model: Path, data: str, **keys):
        section = {
            "model": str(model),
            "train_dataset_path": str(tmp_path / f"{data}.jsonl"),
            "batch_size": 4,
            "lr": 0.0,
        }
        section |= {"validation_fraction": 0, "max_sequence_length": 64, "precision": "fp32"} | keys
        settings = {"output_dir": str(tmp_path / "run"), "num_threads": 1, "reward_config": section}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return load_config(tmp_path / "config.json")

    return made


@pytest.mark.parametrize("family, data", [("llama", "pairs"), ("bert", "scores")])
def test_the_stage_with_rate_0_leaves_the_classifiers_scores_normalised(family, data, config, tmp_path, capsys):
    folder, made = reward_folder(tmp_path / "rm", family)
    if data == "scores":  # with a spread beyond 1, as those have that were trained
        made.classifier.weight.data.mul_(1000)
        made.save_pretrained(folder)
    run(config(folder, data), type="REWARD")
    assert f"REWARD: trains the head of {folder} further" in capsys.readouterr().out
    saved = load_reward_model(tmp_path / "run" / "reward")
    own = own_scores(made, saved)
    expected = (saved.model.scale * own + saved.model.shift).tolist()
    assert saved.score(PROMPTS, REPLIES) == pytest.approx(expected, abs=1e-4)
    rows = [json.loads(line) for line in (tmp_path / f"{data}.jsonl").read_text().splitlines()]
    replies = [
        (row["user_input"], row[key]) for row in rows for key in ("chosen", "rejected", "completion") if key in row
    ]
    scores = torch.tensor(saved.score(*map(list, zip(*replies, strict=True))))
    targets = torch.tensor([float(row["score"]) for row in rows]) if data == "scores" else torch.tensor([-1.0, 1.0])
    assert scores.mean().item() == pytest.approx(targets.mean().item(), abs=1e-3)
    assert scores.std(correction=0).item() == pytest.approx(targets.std(correction=0).item(), abs=1e-3)
