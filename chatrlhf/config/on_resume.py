"""What `--resume` does with a configuration key that has changed: one rule for every key of the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from pydantic import BaseModel

from chatrlhf.config.schema import STAGES, Config


class OnResume(Enum):
    """What becomes of a changed key."""

    TAKES_EFFECT = "takes effect"
    REFUSED = "is refused"  # the run would become another one, or its rows would be skipped or seen twice
    BY_CONTENT = "may name another place with the same content"  # which `stages/sources.py` compares by hash
    NO_EFFECT = "has no effect on training"


@dataclass(frozen=True)
class Rule:
    """Keys of a section with one fate. ``stages`` read them; a stage that has not begun takes any change."""

    section: str
    on_resume: OnResume
    stages: tuple[str, ...]
    names: str  # separated by blanks

    def dotted(self) -> list[str]:
        """The keys."""
        return [f"{self.section}.{name}".lstrip(".") for name in self.names.split()]


PRETRAIN, ACTOR, REWARD, RL = ((stage,) for stage in STAGES)
TRAINS_ACTOR = PRETRAIN + ACTOR + RL  # by the launcher and the adapters of actor_config
EFFECT, REFUSED, CONTENT, NONE = OnResume
OPTIMIZER = "lr_scheduler warmup_steps weight_decay betas max_grad_norm precision gradient_checkpointing"
BATCHES = "lr batch_size micro_batch_size eval_interval checkpoint_steps n_checkpoints_to_keep"
DATA = "datasets deduplicate resample mixing_seed validation_fraction"
WEIGHTS = (
    "revision trust_remote_code resize_embeddings froze_embeddings rope_scaling load_in_4bit load_in_8bit "
    "bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype"
)
LAUNCH = "deepspeed_enable accelerate_enable peft_enable"
LAUNCH_FILES = "deepspeed_config_path peft_config_path"

RULES = (
    Rule("", REFUSED, STAGES, "seed"),
    Rule("", NONE, (), "output_dir trackers num_threads"),
    Rule("pretrain_config", EFFECT, PRETRAIN, f"{OPTIMIZER} {BATCHES} steps"),
    Rule("pretrain_config", REFUSED, PRETRAIN, f"{DATA} max_sequence_length"),
    Rule("pretrain_config", CONTENT, PRETRAIN, "train_dataset_path validation_dataset_path"),
    Rule("pretrain_config", NONE, (), "iteration_per_print"),
    Rule("actor_config", EFFECT, ACTOR, f"{OPTIMIZER} {BATCHES} epochs label_smoothing_factor neftune_noise_alpha"),
    Rule("actor_config", EFFECT, TRAINS_ACTOR, "attn_implementation"),
    Rule("actor_config", EFFECT, RL, "max_tokens min_tokens temperature"),
    Rule("actor_config", REFUSED, ACTOR, f"{DATA} loss_on over_length sort_by_length"),
    Rule("actor_config", REFUSED, STAGES, f"{WEIGHTS} model chat_template_kwargs"),
    Rule("actor_config", REFUSED, ACTOR + RL, "max_sequence_length"),
    Rule("actor_config", REFUSED, TRAINS_ACTOR, LAUNCH),
    Rule("actor_config", CONTENT, TRAINS_ACTOR, LAUNCH_FILES),
    Rule("actor_config", CONTENT, ACTOR, "train_dataset_path validation_dataset_path"),
    Rule("actor_config", CONTENT, STAGES, "tokenizer_path template"),
    Rule("actor_config", NONE, (), "model_folder additonal_prompt_tokens use_fairscale iteration_per_print"),
    Rule("actor_config", NONE, (), "checkpoint_name"),
    Rule("actor_config.tiny", REFUSED, STAGES, "hidden_size num_hidden_layers num_attention_heads intermediate_size"),
    Rule("actor_config.tiny", REFUSED, STAGES, "vocab_size max_position_embeddings tie_word_embeddings"),
    Rule("actor_config.tiny", REFUSED, STAGES, "initializer_range"),
    Rule("reward_config", EFFECT, REWARD, f"{OPTIMIZER} {BATCHES} epochs neftune_noise_alpha attn_implementation"),
    Rule("reward_config", REFUSED, REWARD, f"{DATA} {LAUNCH} loss over_length sort_by_length model_head_hidden_size"),
    Rule("reward_config", REFUSED, REWARD, "fresh_head chat_template_kwargs"),
    Rule("reward_config", REFUSED, REWARD + RL, f"{WEIGHTS} model max_sequence_length"),
    Rule("reward_config", REFUSED, RL, "reward_fn"),
    Rule("reward_config", EFFECT, RL, "reward_timeout"),
    Rule("reward_config", CONTENT, REWARD, f"{LAUNCH_FILES} train_dataset_path validation_dataset_path template"),
    Rule("reward_config", CONTENT, REWARD + RL, "tokenizer_path"),
    Rule("reward_config", NONE, (), "model_folder iteration_per_print checkpoint_name"),
    Rule("critic_config", REFUSED, RL, f"{LAUNCH} model model_head_hidden_size"),
    Rule("critic_config", CONTENT, RL, LAUNCH_FILES),
    Rule("critic_config", NONE, (), "model_folder max_sequence_length checkpoint_name"),
    Rule("trainer_config", EFFECT, RL, f"{OPTIMIZER} actor_lr critic_lr batch_size micro_batch_size ppo_epochs"),
    Rule("trainer_config", EFFECT, RL, "total_episodes num_rollouts samples_per_prompt chunk_size"),
    Rule("trainer_config", EFFECT, RL, "init_kl_coef target horizon gamma lam cliprange cliprange_value vf_coef"),
    Rule("trainer_config", EFFECT, RL, "entropy_coef whiten_advantages cliprange_reward scale_reward ref_std"),
    Rule("trainer_config", EFFECT, RL, "missing_eos_penalty rollout_backend importance_cap model_kernels"),
    Rule("trainer_config", EFFECT, RL, "eval_interval checkpoint_steps n_checkpoints_to_keep"),
    Rule("trainer_config", REFUSED, RL, f"{DATA} algorithm num_layers_unfrozen eval_fn"),
    Rule("trainer_config", CONTENT, RL, "examples_path validation_examples_path"),
    # The last four are counted into total_episodes and num_rollouts.
    Rule("trainer_config", NONE, (), "ref_mean checkpoint_name num_episodes max_timesteps update_timesteps"),
    Rule("trainer_config", NONE, (), "num_examples eval_best"),
    Rule("trainer_config.gen_kwargs", EFFECT, RL, "max_new_tokens min_new_tokens min_length temperature stop"),
    Rule("trainer_config.gen_kwargs", EFFECT, RL, "forbidden_tokens eos_token_id"),
    Rule("trainer_config.gen_kwargs", REFUSED, RL, "max_length"),  # it decides which prompts leave room
    # Of these only values that change nothing are accepted; the tokenizer gives the pad token.
    Rule("trainer_config.gen_kwargs", NONE, (), "do_sample top_k top_p repetition_penalty pad_token_id"),
    Rule("trainer_config.vllm", EFFECT, RL, "mode gpu_memory_utilization enable_sleep_mode server_base_url"),
    Rule("trainer_config.vllm", EFFECT, RL, "server_timeout group_port"),
    Rule("guards_config", EFFECT, STAGES, "skipped_steps silence"),
    Rule("guards_config", EFFECT, RL, "allow_untrained_actor stop_at_coin_flip window kl_per_token kl_per_reply"),
    Rule("guards_config", EFFECT, RL, "entropy repetition distinct_2 length_change finished_drop clip_fraction"),
    Rule("guards_config", EFFECT, RL, "explained_variance flat_rewards forgotten"),
)

# What takes effect by facts that checkpoints of earlier versions do not hold.
NEEDS_PROGRESS = frozenset(
    {f"{section}_config.batch_size" for section in ("pretrain", "actor", "reward", "trainer")}
    | {f"trainer_config.{name}" for name in ("num_rollouts", "samples_per_prompt", "ppo_epochs")}
    | {"pretrain_config.steps", "trainer_config.init_kl_coef", "trainer_config.scale_reward"}
)

# How the base model is read: of no effect on a stage that starts from what another stage has left.
OF_THE_BASE = frozenset(
    [f"actor_config.{name}" for name in ("tokenizer_path", "template", "chat_template_kwargs")]
    + [f"actor_config.{name}" for name in ("revision", "rope_scaling", "resize_embeddings")]
    + [key for rule in RULES if rule.section == "actor_config.tiny" for key in rule.dotted()]
)

# Of each stage, the key that a finished one is asked for more by.
LENGTH = {
    "PRETRAIN": "pretrain_config.steps",
    "ACTOR": "actor_config.epochs",
    "REWARD": "reward_config.epochs",
    "RL": "trainer_config.total_episodes",
}


@cache
def rules() -> dict[str, Rule]:
    """The rule of each key, by its dotted name."""
    return {key: rule for rule in RULES for key in rule.dotted()}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped configuration as dotted keys and values; a key it lacks, as an older one may, has its default."""
    return dict(_flat(Config, settings, Config().model_dump(mode="json")))


def settings_of(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a dumped configuration the keys that a stage reads, dotted."""
    return {key: value for key, value in flat(settings).items() if stage in rules()[key].stages}


def _flat(
    schema: type[BaseModel], settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, info in schema.model_fields.items():
        value, key = settings.get(name, defaults[name]), f"{prefix}{name}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _flat(info.annotation, value, defaults[name], f"{key}.")
        else:
            yield key, value
