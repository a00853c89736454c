"""Configurations: names that people bring along load as they are; what cannot be used is refused by name."""

import re
from pathlib import Path

import pytest
import yaml

from chatrlhf.config import Config, load_config
from chatrlhf.config.aliases import FLAT_GENERATION_KEYS, RENAMED
from chatrlhf.config.load import load_peft_config, resolve_path
from chatrlhf.data.inputs import read_inputs
from chatrlhf.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CHATLLAMA = ROOT / "artifacts" / "config" / "config.yaml"

# The values ChatLLaMA published, by section.
PUBLISHED = {
    "trainer_config": {
        "actor_lr": 0.000005,
        "critic_lr": 0.000009,
        "actor_eps_clip": 0.2,
        "critic_eps_clip": 0.2,
        "beta_s": 0.02,
        "gamma_discounted": 1,
        "examples_path": "./datasets/rlhf_training_data.json",
        "num_episodes": 100,
        "max_timesteps": 32,
        "update_timesteps": 32,
        "num_examples": 1,
        "batch_size": 1,
        "epochs": 1,
        "checkpoint_steps": 1000,
        "checkpoint_name": None,
    },
    "actor_config": {
        "model": "facebook/opt-1.3b",
        "model_folder": "./models",
        "tokenizer_path": "path-to-tokenizer",
        "train_dataset_path": "./datasets/actor_training_data.json",
        "validation_dataset_path": None,
        "froze_embeddings": True,
        "use_fairscale": False,
        "max_sequence_length": 2048,
        "max_tokens": 2048,
        "min_tokens": 100,
        "additonal_prompt_tokens": 20,
        "temperature": 0.1,
        "batch_size": 2,
        "iteration_per_print": 1,
        "lr": 0.000009,
        "epochs": 1,
        "checkpoint_steps": 5000,
        "n_checkpoints_to_keep": 5,
        "checkpoint_name": None,
        "deepspeed_enable": False,
        "deepspeed_config_path": "./artifacts/config/ds_config.json",
        "accelerate_enable": False,
        "peft_enable": False,
        "peft_config_path": "./artifacts/config/peft_config.yaml",
    },
    "reward_config": {
        "model": "facebook/opt-125m",
        "model_folder": "./models",
        "model_head_hidden_size": 2048,
        "max_sequence_length": 2048,
        "train_dataset_path": "./datasets/reward_training_data.json",
        "validation_dataset_path": None,
        "batch_size": 8,
        "epochs": 1,
        "iteration_per_print": 1,
        "checkpoint_steps": 10000,
        "checkpoint_name": None,
        "lr": 0.000009,
        "deepspeed_enable": False,
        "deepspeed_config_path": "./artifacts/config/ds_config.json",
        "accelerate_enable": False,
    },
    "critic_config": {
        "model": "facebook/opt-125m",
        "model_head_hidden_size": 2048,
        "max_sequence_length": 2048,
        "model_folder": "./models",
        "checkpoint_name": None,
    },
}

STABLE_VICUNA = """
trainer_config:
  num_rollouts: 128
  chunk_size: 16
  ppo_epochs: 4
  init_kl_coef: 0.1
  target: 6
  horizon: 10000
  gamma: 1
  lam: 0.95
  cliprange: 0.2
  cliprange_value: 0.2
  vf_coef: 1.0
  scale_reward: None
  cliprange_reward: 10
  generation_kwargs:
    max_length: 512
    min_length: 48
    top_k: 0.0
    top_p: 1.0
    do_sample: True
    temperature: 1.0
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def trainer(**keys) -> dict:
    return {"trainer_config": keys}


# --- other projects' files


def test_chatllamas_published_file_is_whole_and_loads():
    assert yaml.safe_load(CHATLLAMA.read_text(encoding="utf-8")) == PUBLISHED
    config = load_config(CHATLLAMA)
    actor, reward, critic, ppo = (
        config.actor_config,
        config.reward_config,
        config.critic_config,
        config.trainer_config,
    )
    assert (ppo.cliprange, ppo.cliprange_value, ppo.entropy_coef, ppo.gamma, ppo.ppo_epochs) == (
        0.2,
        0.2,
        0.02,
        1,
        1,
    )
    assert (ppo.total_episodes, ppo.num_rollouts, ppo.num_steps) == (3200, 32, 100)  # 100 x 32 x 1 and 32 x 1
    assert (ppo.actor_lr, ppo.critic_lr, ppo.batch_size) == (5e-6, 9e-6, 1)
    assert actor.tokenizer_path is None  # the published value is a placeholder
    assert (actor.model, reward.model, critic.model) == (
        "facebook/opt-1.3b",
        "facebook/opt-125m",
        "facebook/opt-125m",
    )
    assert (actor.min_tokens, actor.max_tokens, actor.additonal_prompt_tokens) == (100, 2048, 20)
    assert actor.froze_embeddings and reward.model_head_hidden_size == 2048
    assert config.run_dir == Path("./models")
    assert any("temperature 0.1 is low" in note for note in config.notes)


@pytest.mark.parametrize("flat", [False, True])
def test_stable_vicunas_table_loads_nested_and_flat(write, flat):
    text = STABLE_VICUNA
    if flat:
        text = re.sub(r"^    ", "  ", text, flags=re.MULTILINE)
        assert "\n  max_length: 512" in text
    config = load_config(write(text))
    ppo = config.trainer_config
    assert (ppo.num_rollouts, ppo.chunk_size, ppo.ppo_epochs, ppo.horizon) == (128, 16, 4, 10000)
    assert (ppo.init_kl_coef, ppo.target, ppo.gamma, ppo.lam, ppo.vf_coef) == (0.1, 6, 1, 0.95, 1)
    assert (ppo.cliprange, ppo.cliprange_value, ppo.cliprange_reward, ppo.scale_reward) == (
        0.2,
        0.2,
        10,
        None,
    )
    assert (ppo.gen_kwargs.max_length, ppo.gen_kwargs.min_length, ppo.gen_kwargs.temperature) == (512, 48, 1)
    assert sum("trlX compares" in note for note in config.notes) == 1


@pytest.mark.parametrize(
    ("section", "theirs", "ours"),
    [(section, theirs, ours) for section, names in RENAMED.items() for theirs, ours in names.items()],
)
def test_every_alias(section, theirs, ours):
    other = {"gen_kwargs": {"max_new_tokens": 7}, "micro_batch_size": 8, "ppo_epochs": 3, "label_smoothing_factor": 0.1}
    other |= {"gradient_checkpointing": True, "froze_embeddings": True}
    value = other.get(ours, 1)
    by_alias = load_config({section: {theirs: value}}).model_dump()
    assert by_alias == load_config({section: {ours: value}}).model_dump()
    # A value that is not the default, or nothing would show.
    assert (by_alias != load_config({}).model_dump()) or ours == "gamma"
    with pytest.raises(ConfigError, match=f"{section}: '{theirs}' and '{ours}' are one setting"):
        load_config({section: {theirs: value, ours: value}})


def test_a_generation_key_twice_is_refused():
    for nested in ("gen_kwargs", "generation_kwargs"):
        with pytest.raises(ConfigError, match="'max_length' stands in gen_kwargs and beside it"):
            load_config(trainer(**{nested: {"max_length": 64}, "max_length": 64}))
    for key in FLAT_GENERATION_KEYS:
        value = {"do_sample": True, "top_k": 0, "max_length": 9, "max_new_tokens": 9}.get(key, 1)
        assert getattr(load_config(trainer(**{key: value})).trainer_config.gen_kwargs, key) == value


def test_episodes_are_counted():
    counts = dict(num_episodes=3, max_timesteps=8, update_timesteps=4, num_examples=2)
    ppo = load_config(trainer(**counts)).trainer_config
    assert (ppo.total_episodes, ppo.num_rollouts) == (48, 8)
    # Overriding one factor changes the product; our own names win over it.
    ppo = load_config(trainer(**counts), ["trainer_config.num_episodes=5"]).trainer_config
    assert ppo.total_episodes == 80
    ppo = load_config(load_config(trainer(**counts)), {"trainer_config.num_episodes": 5}).trainer_config
    assert ppo.total_episodes == 80
    ppo = load_config(trainer(**counts), ["trainer_config.total_episodes=16"]).trainer_config
    assert (ppo.total_episodes, ppo.num_rollouts) == (16, 8)
    with pytest.raises(ConfigError, match="'num_episodes' counts only with 'max_timesteps'"):
        load_config(trainer(num_episodes=3))


# --- reading


@pytest.mark.parametrize("written", ["5e-6", "'5e-6'", "0.000005", "5.0e-6"])
def test_numbers_as_people_write_them(write, written):
    # YAML 1.1 reads 5e-6 as text, because the point is missing.
    config = load_config(write(f"trainer_config:\n  actor_lr: {written}\nactor_config: {{lr: {written}}}\n"))
    assert config.trainer_config.actor_lr == config.actor_config.lr == 5e-6
    assert load_config({}, [f"trainer_config.actor_lr={written}"]).trainer_config.actor_lr == 5e-6


@pytest.mark.parametrize("written", ["None", "null", "~", ""])
def test_a_bare_none_is_null(write, written):
    config = load_config(
        write(f"trainer_config:\n  target: {written}\n  checkpoint_name: {written}\ncritic_config: {written}\n")
    )
    assert config.trainer_config.target is None and config.trainer_config.checkpoint_name is None
    assert load_config(trainer(target=6), [f"trainer_config.target={written}"]).trainer_config.target is None


def test_an_empty_file_is_the_default(write):
    assert load_config(write("")).model_dump() == load_config({}).model_dump() == Config().model_dump()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"config.yaml, line \d: not valid YAML"),
        ("- 1", "expected sections such as 'actor_config:', got a list"),
        ("actor_config: 3", "config.yaml: actor_config: .*got 3"),
        ("trainer_config: {actor_lr: fast}", "config.yaml: trainer_config.actor_lr: .*got 'fast'"),
        ("trainer_config: {actor_lr: .nan}", "trainer_config.actor_lr: .*finite"),
        ("actor_config: {epochs: 0}", "actor_config.epochs: .*got 0"),
        ("seed: -1", "seed: .*got -1"),
    ],
)
def test_broken_files_name_file_and_key(write, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(text))
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_working_directory():
    with pytest.raises(
        ConfigError, match=f"'nowhere.yaml' does not exist .working directory {re.escape(str(Path.cwd()))}"
    ):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainer_config.num_rolouts", "trainer_config.num_rollouts"),
        ("trainer_config.actor_eps_clp", "trainer_config.actor_eps_clip"),
        ("trainer_config.max_lenght", "trainer_config.max_length"),
        ("trainer_config.gen_kwargs.temprature", "trainer_config.gen_kwargs.temperature"),
        ("actor_config.tiny.hiden_size", "actor_config.tiny.hidden_size"),
        ("actor_config.actor_lr", "trainer_config.actor_lr"),
        ("traner_config", "trainer_config"),
        ("output_dri", "output_dir"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; did you mean '{nearest}'"):
        load_config({}, {key: 1})


def test_an_unknown_key_like_no_other():
    with pytest.raises(ConfigError, match="unknown key 'actor_config.zzz'$"):
        load_config({"actor_config": {"zzz": 1}})


# --- overrides


def test_overrides_cover_the_file_and_derive_anew(write):
    path = write("trainer_config: {num_rollouts: 64, actor_eps_clip: 0.1}\nseed: 4\n")
    assert load_config(path).trainer_config.batch_size == 16
    words = [
        "trainer_config.num_rollouts=32",
        "trainer_config.cliprange=0.3",
        "actor_config.tiny.hidden_size=64",
        "seed=5",
    ]
    config = load_config(path, words)
    assert config.trainer_config.batch_size == 8  # a quarter of the new number
    assert (config.trainer_config.cliprange, config.actor_config.tiny.hidden_size, config.seed) == (
        0.3,
        64,
        5,
    )
    config = load_config(config, {"trainer_config.num_rollouts": 16})
    assert (config.trainer_config.batch_size, config.trainer_config.cliprange) == (4, 0.3)
    lists = load_config(
        {}, ["trackers=[tensorboard]", "trainer_config.gen_kwargs.stop=['\\n']", "actor_config.model=a=b"]
    )
    assert lists.trackers == ["tensorboard"] and lists.actor_config.model == "a=b"


def test_an_override_may_use_anybodys_name():
    table = trainer(generation_kwargs={"max_length": 512, "temperature": 1.0})
    config = load_config(table, ["trainer_config.max_length=64", "trainer_config.epochs=2"])
    assert (config.trainer_config.gen_kwargs.max_length, config.trainer_config.gen_kwargs.temperature) == (
        64,
        1,
    )
    assert config.trainer_config.ppo_epochs == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed"], "--set 'seed': expected section.key=value"),
        (["=3"], "--set '=3': expected"),
        (["seed=[1"], "--set seed: the value .* is not valid YAML"),
        (["seed=1", "seed.deep=2"], "--set seed.deep: 'seed' is a value"),
        (["trainer_config.actor_lr=fast"], "trainer_config.actor_lr: .*'fast'"),
    ],
)
def test_broken_overrides(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config({}, words)


def test_loading_leaves_the_callers_dictionary_alone():
    raw = trainer(generation_kwargs={"top_k": 0}, max_length=64, num_episodes=2, max_timesteps=64)
    before = yaml.safe_dump(raw)
    load_config(raw, {"trainer_config.epochs": 2})
    assert yaml.safe_dump(raw) == before


# --- paths


def test_paths_are_tried_beside_the_yaml_file_then_in_the_working_directory(tmp_path, monkeypatch):
    beside, working = tmp_path / "beside", tmp_path / "working"
    for folder in (beside, working):
        folder.mkdir()
        (folder / "both.json").touch()
    (working / "here.json").touch()
    (beside / "config.yaml").touch()
    monkeypatch.chdir(working)
    config = load_config(beside / "config.yaml")
    assert resolve_path(config, "key", "both.json") == beside / "both.json"
    assert resolve_path(config, "key", "./here.json") == working / "here.json"
    assert resolve_path(config, "key", str(working / "both.json")) == working / "both.json"
    with pytest.raises(ConfigError) as error:
        resolve_path(config, "actor_config.train_dataset_path", "no.json")
    message = str(error.value)
    assert message.startswith("actor_config.train_dataset_path: file 'no.json' does not exist")
    assert str(beside / "no.json") in message and str(working / "no.json") in message


@pytest.mark.parametrize(
    ("stage", "section", "train", "held_out", "row"),
    [
        (
            "ACTOR",
            "actor_config",
            "train_dataset_path",
            "validation_dataset_path",
            '{"user_input": "a", "completion": "b"}',
        ),
        ("RL", "trainer_config", "examples_path", "validation_examples_path", '{"user_input": "a"}'),
    ],
)
def test_a_missing_held_out_file_is_named_by_its_own_key(tmp_path, stage, section, train, held_out, row):
    (tmp_path / "rows.jsonl").write_text(row, encoding="utf-8")
    config = load_config({section: {train: str(tmp_path / "rows.jsonl"), held_out: "no.json"}})
    with pytest.raises(ConfigError, match=f"^{section}.{held_out}: file 'no.json' does not exist"):
        read_inputs(config, [stage], needs_judgements=False)


# --- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            dict(num_rollouts=10, batch_size=4),
            r"num_rollouts: 10 .*\(4\); set num_rollouts to 8 or 12, or batch_size to one of 1, 2, 5",
        ),
        (dict(num_rollouts=2, batch_size=4), r"set num_rollouts to 4, or batch_size to one of 1, 2"),
        (dict(num_rollouts=64, total_episodes=100), r"total_episodes: 100 .*to 64 or 128"),
        (
            dict(algorithm="grpo", num_rollouts=10),
            r"by samples_per_prompt \(4\); set num_rollouts to 8 or 12",
        ),
    ],
)
def test_a_remainder_names_values_that_work(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_config(trainer(**keys))


def test_the_values_it_names_do_work():
    for keys in (
        dict(num_rollouts=12, batch_size=4),
        dict(num_rollouts=10, batch_size=5),
        dict(total_episodes=128),
    ):
        load_config(trainer(**keys))


# ----- what is trained


def test_adapters_by_the_usual_file_and_without_one(tmp_path):
    artifacts = Path(__file__).parent.parent.parent / "artifacts" / "config" / "peft_config.yaml"
    for path in (str(artifacts), None):
        config = load_config({"actor_config": {"peft_enable": True, "peft_config_path": path}})
        adapters = load_peft_config(config)
        assert (adapters.r, adapters.lora_alpha, adapters.lora_dropout) == (8, 32, 0.1)
        # The other sections have the actor's where they name none.
        assert load_peft_config(config, "critic_config") == adapters
        assert adapters.target_modules is None


def test_adapters_of_ones_own(tmp_path):
    (tmp_path / "peft.yaml").write_text("r: 4\nlora_alpha: 8\ntarget_modules: [q_proj]\n")
    (tmp_path / "config.yaml").write_text("actor_config: {peft_enable: True, peft_config_path: peft.yaml}\n")
    adapters = load_peft_config(load_config(tmp_path / "config.yaml"))
    assert (adapters.r, adapters.lora_alpha, adapters.target_modules) == (4, 8, ["q_proj"])


@pytest.mark.parametrize(
    "text, said",
    [
        ("lora_alfa: 8", "unknown key 'lora_alfa'; did you mean 'lora_alpha'"),
        ("r: 0", "r: input should be greater"),
        ("inference_mode: True", "inference_mode: input should be False, got True"),
        ("peft_type: IA3", "peft_type: input should be 'lora', got 'IA3'"),
        ("[1", "not valid YAML"),
    ],
)
def test_adapters_that_cannot_be(tmp_path, text, said):
    (tmp_path / "peft.yaml").write_text(text)
    config = load_config({"actor_config": {"peft_enable": True, "peft_config_path": str(tmp_path / "peft.yaml")}})
    with pytest.raises(ConfigError, match=r"peft\.yaml") as error:
        load_peft_config(config)
    assert said.lower() in str(error.value).lower()


def test_a_file_of_adapters_that_is_not_there():
    config = load_config({"actor_config": {"peft_enable": True, "peft_config_path": "no.yaml"}})
    with pytest.raises(ConfigError, match="actor_config.peft_config_path: file 'no.yaml' does not exist"):
        load_peft_config(config)


def test_a_file_of_adapters_is_not_read_while_they_are_off():
    load_config({"actor_config": {"peft_enable": False, "peft_config_path": "no.yaml"}})


def test_adapters_and_frozen_blocks_exclude_each_other():
    both = {"actor_config": {"peft_enable": True}, "trainer_config": {"num_layers_unfrozen": 2}}
    with pytest.raises(ConfigError, match="peft_enable: True and .*num_layers_unfrozen: 2 both choose what is trained"):
        load_config(both)


def test_no_blocks_at_all_leave_nothing_to_train():
    with pytest.raises(ConfigError, match="num_layers_unfrozen: 0 leaves nothing"):
        load_config({"trainer_config": {"num_layers_unfrozen": 0}})


def test_metas_own_llama_files_are_refused_with_the_conversion():
    with pytest.raises(ConfigError, match="use_fairscale: True .*convert them to the Hugging Face format"):
        load_config({"actor_config": {"use_fairscale": True}})


@pytest.mark.parametrize(
    ("key", "refused", "plain"),
    [("do_sample", False, True), ("top_k", 50, 0), ("top_p", 0.9, 1.0), ("repetition_penalty", 1.2, 1.0)],
)
def test_samplers_that_ppo_cannot_score_are_refused(key, refused, plain):
    load_config(trainer(gen_kwargs={key: plain}))
    for keys in ({key: refused}, {"gen_kwargs": {key: refused}}, {"generation_kwargs": {key: refused}}):
        with pytest.raises(ConfigError, match=rf"trainer_config.gen_kwargs.{key}: .* is refused.*log-probabilities"):
            load_config(trainer(**keys))


@pytest.mark.parametrize(("temperature", "warned"), [(0.1, True), (0.49, True), (0.5, False), (1.0, False)])
def test_a_low_temperature_is_a_warning(temperature, warned):
    for raw in ({"actor_config": {"temperature": temperature}}, trainer(temperature=temperature)):
        assert any("explores little" in note for note in load_config(raw).notes) is warned


def test_a_setting_given_twice_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("trainer_config: {cliprange: 0.2, actor_eps_clip: 0.2}\n")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: trainer_config: .* are one setting"):
        load_config(path)
    with pytest.raises(ConfigError, match="^--set: trainer_config: .* are one setting"):
        load_config({}, ["trainer_config.cliprange=0.2", "trainer_config.actor_eps_clip=0.2"])
