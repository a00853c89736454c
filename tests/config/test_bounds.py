"""What a configuration is bounded by: size, depth and aliases of YAML, and keys that contradict each other."""

import time

import pytest

from chatrlhf.config import load_config
from chatrlhf.errors import ConfigError

PLAIN = "a: &a [x, x, x, x, x, x, x, x, x]\n"
MAPPING = "a: &a {x: 1, y: 2}\n"
NEXT = list(zip("abcdefghijklmn", "bcdefghijklmno", strict=True))
BOMB = PLAIN + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in NEXT)
MERGES = MAPPING + "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in NEXT)


def said_about(tmp_path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 20,000 values"),
        (MERGES, "more than 20,000 values"),
        ("".join(f"k{i}: 1\n" for i in range(30_000)), "more than 20,000 values"),
        ("".join(f"k{i}: 1\n" for i in range(300)), "unknown key 'k7'; and 292 more"),
        ("actor_config: " + "[" * 100_000, "nested more than 100 levels"),
        ("# " + "x" * 1_100_000 + "\nseed: 1\n", "more than 1,000,000 characters"),
        ("actor_config:\n  ? " + "m" * 100_000 + "\n  : 1\n", "unknown key 'actor_config.mmm"),
        ("seed: 010\n", "'010' is not a decimal number"),
        ("seed: 1:30\n", "'1:30' is not a decimal number"),
        ("actor_config: {lr: 1:30.5}\n", "'1:30.5' is not a decimal number"),
        ("actor_config: {model: yes}\n", "actor_config.model: expected text; in quotes"),
    ],
    ids=["aliases", "merges", "keys", "unknown keys", "depth", "characters", "a key", "octal", "60", "60.", "yes"],
)
def test_yaml_is_bounded(tmp_path, text, said):
    start = time.process_time()
    assert said in said_about(tmp_path, text)
    assert time.process_time() - start < 20  # some of these would take hours


def test_anchors_and_merges_that_people_use_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "actor_config: &stage {lr: 1e-4, batch_size: 4, betas: &betas [0.9, 0.95]}\n"
        "reward_config:\n  <<: *stage\n  lr: 2e-4\ntrainer_config: {betas: *betas}\nseed: 1_000\n"
    )
    config = load_config(path)
    assert (config.reward_config.lr, config.reward_config.batch_size, config.seed) == (2e-4, 4, 1000)
    assert config.trainer_config.betas == config.actor_config.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"actor_config.micro_batch_size": 3}, r"actor_config.micro_batch_size: 3 is more than batch_size \(2\)"),
        ({"trainer_config.micro_batch_size": 17}, r"trainer_config.micro_batch_size: 17 is more than batch_size"),
        ({"actor_config.min_tokens": 9, "actor_config.max_tokens": 8}, "actor_config.min_tokens: 9 is more than max_t"),
        ({"trainer_config.min_length": 9, "trainer_config.max_length": 8}, "min_length: 9 is more than max_length"),
        ({"trainer_config.min_new_tokens": 9, "trainer_config.max_new_tokens": 8}, "min_new_tokens: 9 is more than"),
        ({"pretrain_config.warmup_steps": 101}, r"pretrain_config.warmup_steps: 101 is more than steps \(100\)"),
        ({"trainer_config.warmup_steps": 10_000}, "trainer_config.warmup_steps: 10000 is more than all optimizer"),
        ({"trainer_config.gen_kwargs.eos_token_id": []}, r"gen_kwargs.eos_token_id: \[\] leaves nothing"),
        ({"trainer_config.total_episodes": 10**12 - 1}, r"total_episodes: 999999999999 is not divisible"),
        (
            {"actor_config.tiny.hidden_size": 100_000, "actor_config.tiny.num_hidden_layers": 100},
            "hidden_size 100000.* make 1.2e.13 parameters",
        ),
    ],
)
def test_keys_that_contradict_each_other(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config({}, overrides)


def test_a_file_that_nothing_reads_may_be_missing_and_is_named():
    config = load_config({"actor_config": {"peft_config_path": "no/such.yaml", "deepspeed_config_path": "no.json"}})
    (note,) = (note for note in config.notes if "do not exist" in note)
    assert "actor_config.peft_config_path (peft_enable is False)" in note and "deepspeed_config_path" in note
