"""`--dry-run`: what it counts, what it needs, and what it does where something is not here."""

from __future__ import annotations

import json

import pytest
import yaml
from small_run import settings, write_config, write_files
from transformers import T5Config

from chatrlhf.cli import main
from chatrlhf.config import load_config
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.tools.plan.data_counts import Assumed
from chatrlhf.tools.plan.flops import Dimensions
from chatrlhf.tools.plan.hardware import hardware
from chatrlhf.tools.plan.run_plan import plan_run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


def planned(files, stage, gpu="24GB", assumed=None, **changes):
    config = load_config(settings(files), changes)
    return plan_run(config, [stage], hardware(gpu) if gpu else None, assumed)


def rows_of(batch, rows):
    """The steps of an epoch of so many rows."""
    tree = {"actor_config": {"model": "gpt2", "batch_size": batch, "micro_batch_size": 1, "max_sequence_length": 8}}
    tree["actor_config"]["train_dataset_path"] = "nowhere.json"
    (stage,) = plan_run(load_config(tree), ["ACTOR"], hardware("24GB"), Assumed({"ACTOR": rows}, {})).stages
    return stage.steps


def test_orcas_steps_follow():
    # The card counts 3,319 whole batches of 128; 32 rows are left, and here they are a step.
    rows = 188_842 + 47_760 + 188_262
    assert divmod(rows, 128) == (3319, 32) and rows_of(128, rows) == 3320


def test_shurales_steps_follow_and_are_not_those_of_its_card():
    assert divmod(1_119_582, 64) == (17_493, 30) and rows_of(64, 1_119_582) == 17_494
    assert 17_494 < 18_500


def test_rows_and_tokens_are_counted_where_the_data_are_here(files):
    (actor,) = planned(files, "ACTOR").stages
    rows = actor.counted.rows
    assert actor.counted.how == "counted" and rows + actor.counted.held_out == 60
    assert actor.steps == -(-rows // 8) and actor.tokens == rows * actor.counted.mean
    assert 0 < actor.counted.mean <= actor.counted.longest <= 96


@pytest.mark.slow
def test_without_data_or_tokenizer_there_is_a_plan_that_says_so(tmp_path, capsys):
    tree = {"actor_config": {"model": "facebook/opt-125m", "train_dataset_path": "nowhere.json", "batch_size": 8}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    words = [str(tmp_path / "config.yaml"), "--type", "ACTOR", "--dry-run", "--gpu", "A100-80GB"]
    words += ["--set", "actor_config.max_sequence_length=64"]
    assert main(words) == 0
    out = capsys.readouterr().out.split("# plan")[1]
    assert "125,239,296 parameters" in out and "in bf16" in out and "fits: " in out
    assert "actor_config.train_dataset_path: file 'nowhere.json' does not exist" in out
    assert "'facebook/opt-125m' cannot be reached from here; its dimensions are those in" in out
    assert "not known; --rows ACTOR=N says how many" in out
    assert main([*words, "--rows", "ACTOR=1000", "--tokens", "ACTOR=32"]) == 0
    out = capsys.readouterr().out.split("# plan")[1]
    assert "125 optimizer steps of 8 rows" in out and "32,000 tokens read, about" in out
    assert main([*words, "--rows", "ACTOR=many"]) == 2
    assert "--rows 'ACTOR=many': expected STAGE=N" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, said",
    [
        (["actor_config.model=missing/nothing"], "actor_config.model: 'missing/nothing' cannot be loaded"),
        (["actor_config.batch_size=3"], "actor_config.batch_size: 3 is not divisible by the 2 processes"),
        (["actor_config.template=nothing.jinja"], "actor_config.template"),
    ],
)
def test_what_is_wrong_is_refused_all_the_same(files, capsys, changes, said):
    words = [word for change in changes for word in ("--set", change)]
    assert main([str(write_config(files)), "--type", "ACTOR", "--dry-run", "--gpu", "2x24GB", *words]) == 2
    assert said in capsys.readouterr().err


def test_zero_deals_out_what_one_device_would_hold(files, tmp_path):
    """The optimizer's states of four devices are a quarter each, whatever else there is."""
    from chatrlhf.tools.plan.fake_run import FakeDevice
    from chatrlhf.tools.plan.meta_models import Models
    from chatrlhf.tools.plan.sft_reward_memory import Batch, actor_stage
    from chatrlhf.tools.plan.zero_memory import Sharding

    config = load_config(settings(files))
    four, one = (
        actor_stage(Models(config, FakeDevice("cuda")), Batch(2, 16), Sharding("deepspeed", ranks, 2, low=True)).phases[
            0
        ]
        for ranks in (4, 1)
    )
    assert four.parts["optimizer"] == -(-one.parts["optimizer"] // 4)
    assert (
        four.parts["weights"]
        < 0.6 * actor_stage(Models(config, FakeDevice("cuda")), Batch(2, 16), Sharding()).phases[0].parts["weights"]
    )


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({}, {"policy", "critic", "reference", "optimizer"}),
        ({"critic_config.model": "shared"}, {"policy", "reference", "optimizer"}),
        ({"trainer_config.num_layers_unfrozen": 1}, {"policy", "critic", "frozen trunk's states"}),
        ({"trainer_config.precision": "bf16"}, {"float32 masters"}),
        ({"trainer_config.algorithm": "rloo"}, {"policy", "reference"}),
    ],
)
def test_the_parts_of_rl_are_those_of_its_topology(files, changes, parts):
    changes = {"reward_config.reward_fn": "small_run:length", **changes}
    (rl,) = planned(files, "RL", **changes).stages
    update = next(phase for phase in rl.phases if phase.name == "RL update").parts
    assert parts <= {name for name, size in update.items() if size}
    if "shared" in changes.values():
        assert update["critic"] < 1000  # a head alone
    if changes.get("trainer_config.algorithm") == "rloo":
        assert not update.get("critic")


def test_adapters_share_their_base(files):
    """A policy by adapters and its reference: one base in memory, and little to optimize."""
    tree = {"actor_config": {"model": "gpt2", "peft_enable": True}, "reward_config": {"reward_fn": "small_run:length"}}
    tree["trainer_config"] = {
        "examples_path": "nowhere.json",
        "num_rollouts": 4,
        "gen_kwargs": {"max_new_tokens": 8},
        "precision": "fp32",
    }
    config = load_config(tree | {"critic_config": {"model": "shared"}}, {"actor_config.max_sequence_length": 16})
    (rl,) = plan_run(config, ["RL"], hardware("24GB")).stages
    update = rl.most.parts
    assert update["policy"] >= 4 * 124_439_808 > 100 * update.get("reference", 0)
    assert update["optimizer"] == 8 * rl.made.trained and rl.made.trained < 0.01 * rl.made.parameters


def test_few_bits_are_an_eighth_of_whole_weights(files):
    whole, bits = (planned_weights({"peft_enable": True, **more}) for more in ({}, {"load_in_4bit": True}))
    linear = 12 * 12 * 768**2  # the blocks' matrices of GPT-2
    assert whole - bits == pytest.approx(linear * (4 - 0.5 - 4 / 64), rel=0.01)


def planned_weights(keys):
    tree = {"actor_config": {"model": "gpt2", "train_dataset_path": "nowhere.json", "max_sequence_length": 8, **keys}}
    (stage,) = plan_run(load_config(tree), ["ACTOR"], hardware("24GB")).stages
    return stage.phases[0].parts["weights"]


def test_an_encoder_decoder_reads_prompts_and_writes_replies(files, tmp_path):
    tokenizer = train_tokenizer([], 258)  # a token a byte
    tokenizer.save_pretrained(tmp_path)
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(vocab_size=258, d_model=32, d_kv=128, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    T5Config(**sizes, **ids).save_pretrained(tmp_path)
    changes = {"actor_config.model": str(tmp_path), "actor_config.template": "{user_input}"}
    changes |= {"actor_config.validation_fraction": 0.0}
    plan = plan_run(load_config(settings(files), changes), ["ACTOR", "REWARD"], hardware("24GB"))
    actor, reward = plan.stages
    rows = json.loads((files / "actor.json").read_text())
    assert actor.batch.tokens == max(len(row["user_input"]) for row in rows)
    assert actor.batch.reply == 1 + max(len(row["completion"]) for row in rows)  # EOS
    assert actor.counted.longest == actor.batch.tokens + actor.batch.reply  # here they are one row's
    # A reward model's encoder reads both; its decoder a token of each text.
    assert reward.batch.tokens == reward.counted.longest and reward.batch.reply is None
    changes |= {"reward_config.reward_fn": "small_run:length", "trainer_config.gen_kwargs.max_new_tokens": 64}
    (rl,) = plan_run(load_config(settings(files), changes), ["RL"], hardware("24GB")).stages
    rollout, update = (next(each for each in rl.phases if each.name == name) for name in ("RL rollout", "RL update"))
    # Keys and values of 2 heads of 128: of the prompts in both blocks, and of the responses, for which the first block
    # has room for 64 tokens already while the second's 32 are about to be replaced.
    assert (rl.batch.slots, rl.batch.prompt, rl.batch.response) == (8, 13, 64)
    assert rollout.parts["KV cache"] == (2 * 2 * 128 * 4) * 8 * (13 + 13 + 64 + 32)
    assert update.parts["policy"] == 4 * rl.made.parameters


def test_a_forward_costs_what_is_counted_by_hand():
    sizes = dict(products=10, layers=1, width=2, cached=2, hidden=2, vocab=3)
    assert Dimensions(**sizes).forward(5, 2) == 2 * 10 * 5 + 2 * 1 * 2 * 25 + 2 * 2 * 3 * 2 == 224
    # 3 tokens in the encoder, where each sees 3; 2 in the decoder, which see those 3 and a triangle.
    assert (
        Dimensions(**sizes, in_encoder=4).forward(5, 2) == 24 + 4 * 2 * 9 + 24 + 4 * 2 * 2 * 3 + 2 * 2 * 4 + 24 == 208
    )


@pytest.mark.slow
def test_compare_puts_models_side_by_side(capsys):
    from chatrlhf.tools.plan.compare import WAYS, compare

    found = list(compare(["opt-125m"], hardware("1GB"), 16, ways=[WAYS[0], WAYS[2]]))
    assert [each.fits for each in found] == [False, False]
    (found,) = compare(["opt-125m"], hardware("24GB"), 16, ways=[WAYS[0]])
    assert found.rows >= 1 and found.parameters == 125_239_296 and found.memory > 16 * found.parameters
    assert main(["plan", "--compare", "missing/nothing", "--gpu", "24GB"]) == 2
    assert "missing/nothing" in capsys.readouterr().err
    assert main(["plan", "--models"]) == 0 and "llama-7b" in capsys.readouterr().out


def test_shapes_are_json_with_ids():
    from chatrlhf.runtime.bundled_files import artifacts_root
    from chatrlhf.tools.plan.published_shapes import FOLDER

    for path in (artifacts_root() / FOLDER).glob("*.json"):
        assert json.loads(path.read_text())["ids"], path
