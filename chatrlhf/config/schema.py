"""Every key a configuration may have, its type, its default and what it means.

Sections carry ChatLLaMA's names, PPO's keys trlX's; `aliases.py` translates the rest. A key whose feature is
not there yet loads while it is off and is refused, by name, while it is on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from chatrlhf.config.datasets import DataKeys
from chatrlhf.config.quantization import QuantizationKeys
from chatrlhf.config.rope import RopeScaling
from chatrlhf.config.section import Section
from chatrlhf.config.vllm import VllmConfig

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
Precision = Literal["auto", "fp32", "bf16"]

DEFAULT_EPISODES = 3200


class OptimizerKeys(Section):
    """AdamW, its schedule and gradient clipping; the same keys in all three stages."""

    lr_scheduler: Scheduler = "linear"
    warmup_steps: int = Field(0, ge=0, description="optimizer steps")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = Field(1.0, gt=0, description="null: no clipping")

    @field_validator("betas")
    @classmethod
    def _betas_in_unit_interval(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each must lie in [0, 1), got {list(betas)}")
        return betas


def _check_micro_batch(section: Any) -> None:
    """Gradient accumulation takes whole microbatches."""
    if section.micro_batch_size is not None and section.micro_batch_size < section.batch_size:
        _must_divide("batch_size", section.batch_size, "micro_batch_size", section.micro_batch_size)


def _refuse_checkpoint_name(section: Any) -> None:
    """ChatLLaMA starts from a named checkpoint; here the newest valid one is found."""
    if section.checkpoint_name is not None:
        raise ValueError(
            f"checkpoint_name: {section.checkpoint_name!r} is not used; --resume goes on from the newest valid "
            "checkpoint, and a model's folder can be named as model; set checkpoint_name to null"
        )


class NotBuiltYet(Section):
    """ChatLLaMA's switches for launchers and adapters; a section says which of them it has."""

    built: ClassVar[tuple[str, ...]] = ()

    deepspeed_enable: bool = False
    deepspeed_config_path: str | None = None
    accelerate_enable: bool = False
    peft_enable: bool = False
    peft_config_path: str | None = None

    @model_validator(mode="after")
    def _refuse_what_is_on(self) -> NotBuiltYet:
        for key in ("deepspeed_enable", "accelerate_enable", "peft_enable"):
            if getattr(self, key) and key not in self.built:
                raise ValueError(f"{key}: True asks for a feature this version does not have yet; set it to False")
        return self


class PeftConfig(Section):
    """The file that `peft_config_path` names: low-rank adapters, by peft's names."""

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    inference_mode: Literal[False] = False
    r: int = Field(8, ge=1, description="rank")
    lora_alpha: int = Field(32, ge=1, description="what the adapters add is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="off in RL, where a fresh policy has to be its reference")
    bias: Literal["none"] = "none"
    target_modules: list[str] | str | None = Field(None, description="null: the family's usual layers")


class TinyConfig(Section):
    """Dimensions of the Llama that `model: tiny` makes on the spot, with a byte-level BPE tokenizer."""

    hidden_size: int = Field(128, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    intermediate_size: int | None = Field(None, ge=8, description="null: 8/3 of hidden_size, in steps of 32")
    vocab_size: int = Field(1024, ge=260, description="upper bound for the tokenizer trained on the data")
    max_position_embeddings: int = Field(512, ge=8)
    tie_word_embeddings: bool = True
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of fresh weights")

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyConfig:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 x num_attention_heads "
                f"({2 * self.num_attention_heads}): rotary positions turn pairs of channels"
            )
        return self


class ActorConfig(OptimizerKeys, DataKeys, QuantizationKeys, NotBuiltYet):
    """The ACTOR stage, and how text is rendered and bounded in every stage."""

    built: ClassVar[tuple[str, ...]] = ("peft_enable",)
    model: str = "tiny"
    tiny: TinyConfig = Field(default_factory=TinyConfig, description="read when model is 'tiny'")
    tokenizer_path: str | None = None
    model_folder: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    rope_scaling: RopeScaling | None = Field(None, description="stretches rotary positions; null: as the model has it")
    train_dataset_path: str | None = None
    validation_dataset_path: str | None = None
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="held out where no validation file is named")
    template: str = "chatllama"
    loss_on: Literal["completion", "all_turns", "all"] = "completion"
    lr: float = Field(9e-6, ge=0)
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(2, ge=1, description="sequences per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per backward; null: batch_size")
    sort_by_length: bool = Field(False, description="batches are of rows of similar length, so that less is padding")
    max_sequence_length: int = Field(2048, ge=4, description="tokens of prompt and completion together")
    over_length: Literal["drop", "cut"] = Field("drop", description="rows beyond it: left out, or their end cut off")
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="share of each label spread over all tokens")
    neftune_noise_alpha: float | None = Field(None, gt=0, description="noise on embeddings in training; null: none")
    gradient_checkpointing: bool = Field(False, description="ACTOR: activations are computed again, not kept")
    max_tokens: int | None = Field(None, ge=1, description="response limit; gen_kwargs.max_new_tokens wins")
    min_tokens: int | None = Field(None, ge=0, description="EOS is forbidden before; gen_kwargs wins")
    additonal_prompt_tokens: int = Field(20, ge=0, description="ChatLLaMA's room beside a prompt; not needed here")
    temperature: float | None = Field(None, gt=0, description="of rollouts; gen_kwargs.temperature wins")
    froze_embeddings: bool = False
    use_fairscale: bool = False
    precision: Precision = "auto"
    iteration_per_print: int = Field(10, ge=1, description="optimizer steps between two lines of metrics")
    eval_interval: int | None = Field(None, ge=1, description="optimizer steps; null: once an epoch")
    checkpoint_steps: int = Field(5000, ge=1, description="optimizer steps")
    n_checkpoints_to_keep: int = Field(2, ge=1)
    checkpoint_name: str | None = None

    @field_validator("tokenizer_path")
    @classmethod
    def _placeholder_is_absent(cls, path: str | None) -> str | None:
        return None if path == "path-to-tokenizer" else path

    @model_validator(mode="after")
    def _no_surprises(self) -> ActorConfig:
        _refuse_checkpoint_name(self)
        _check_micro_batch(self)
        self.refuse_two_ways("train_dataset_path")
        if self.use_fairscale:
            raise ValueError(
                "use_fairscale: True means Meta's original LLaMA files; convert them to the Hugging Face format "
                "(transformers' convert_llama_weights_to_hf.py), set model to that folder and use_fairscale to False"
            )
        return self


class RewardConfig(OptimizerKeys, DataKeys, NotBuiltYet):
    """The REWARD stage, or what stands in its place."""

    model: str | None = Field("actor", description="'actor': start from the fine-tuned actor; or a model")
    tokenizer_path: str | None = None
    model_folder: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    rope_scaling: RopeScaling | None = Field(None, description="of a model of its own; the actor's has the actor's")
    model_head_hidden_size: int | None = Field(None, ge=1, description="null: a linear head; else an MLP")
    train_dataset_path: str | None = None
    validation_dataset_path: str | None = None
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    template: str | None = Field(None, description="null: the actor's")
    loss: Literal["regression", "pairwise"] | None = Field(None, description="null: chosen by the data")
    reward_fn: str | None = Field(None, description="'package.module:function' or an http(s) URL; no model needed")
    lr: float = Field(9e-6, ge=0)
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(8, ge=1, description="rows (a pair is one row) per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1)
    sort_by_length: bool = Field(False, description="batches are of rows of similar length, so that less is padding")
    max_sequence_length: int = Field(2048, ge=4)
    over_length: Literal["drop", "cut"] = Field("drop", description="rows beyond it: left out, or their start cut off")
    precision: Precision = "auto"
    iteration_per_print: int = Field(10, ge=1)
    eval_interval: int | None = Field(None, ge=1)
    checkpoint_steps: int = Field(10000, ge=1)
    n_checkpoints_to_keep: int = Field(2, ge=1)
    checkpoint_name: str | None = None

    @field_validator("loss", mode="before")
    @classmethod
    def _other_names(cls, loss: Any) -> Any:
        return {"mse": "regression", "bradley_terry": "pairwise", "pairs": "pairwise"}.get(loss, loss)

    @model_validator(mode="after")
    def _no_surprises(self) -> RewardConfig:
        _refuse_checkpoint_name(self)
        _check_micro_batch(self)
        self.refuse_two_ways("train_dataset_path")
        return self


class CriticConfig(NotBuiltYet):
    """Where PPO's value function comes from."""

    model: str | None = Field(None, description="null: the reward model; 'shared': on the actor's trunk; or a model")
    model_head_hidden_size: int | None = Field(None, ge=1)
    model_folder: str | None = None
    max_sequence_length: int = Field(2048, ge=4)
    checkpoint_name: str | None = None

    @model_validator(mode="after")
    def _no_surprises(self) -> CriticConfig:
        _refuse_checkpoint_name(self)
        return self


class GenKwargs(Section):
    """How rollouts are sampled. What PPO cannot score is refused rather than ignored."""

    max_new_tokens: int | None = Field(None, ge=1)
    min_new_tokens: int | None = Field(None, ge=0)
    max_length: int | None = Field(None, ge=2, description="prompt and response together")
    min_length: int | None = Field(None, ge=0, description="prompt and response together")
    temperature: float | None = Field(None, gt=0)
    stop: list[str] = Field(default_factory=list, description="a response ends behind any of these strings")
    forbidden_tokens: list[int] = Field(default_factory=list, description="token ids that are never sampled")
    do_sample: bool = True
    top_k: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _only_the_plain_sampler(self) -> GenKwargs:
        why = "PPO needs the log-probabilities of the sampled distribution, for policy and reference alike"
        if not self.do_sample:
            raise ValueError(f"do_sample: False is refused, greedy rollouts have no distribution: {why}")
        if self.top_k not in (None, 0):
            raise ValueError(f"top_k: {self.top_k:g} is refused (use 0): it cuts the distribution's support; {why}")
        if self.top_p not in (None, 1):
            raise ValueError(f"top_p: {self.top_p:g} is refused (use 1.0): it cuts the distribution's support; {why}")
        if self.repetition_penalty not in (None, 1):
            raise ValueError(f"repetition_penalty: {self.repetition_penalty:g} is refused (use 1.0): {why}")
        return self


class TrainerConfig(OptimizerKeys, DataKeys):
    """The RL stage. An episode is one rollout; `batch_size` is sequences per optimizer step."""

    algorithm: Literal["ppo", "rloo", "grpo"] = "ppo"
    examples_path: str | None = None
    validation_examples_path: str | None = Field(None, description="held-out prompts")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="held out where no such file is named")
    total_episodes: int | None = Field(None, ge=1, description="null: ChatLLaMA's 3,200, in whole rollout batches")
    num_rollouts: int = Field(64, ge=1, description="sequences sampled between two updates")
    samples_per_prompt: int | None = Field(None, ge=1, description="null: 1 for ppo, 4 for rloo and grpo")
    chunk_size: int | None = Field(None, ge=1, description="sequences decoded side by side; null: num_rollouts")
    batch_size: int | None = Field(None, ge=1, description="null: a quarter of num_rollouts where that divides")
    micro_batch_size: int | None = Field(None, ge=1, description="longest sequences per backward; null: batch_size")
    ppo_epochs: int = Field(4, ge=1)
    actor_lr: float = Field(5e-6, ge=0)
    critic_lr: float = Field(9e-6, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    init_kl_coef: float = Field(0.05, ge=0)
    target: float | None = Field(None, gt=0, description="nats per sequence; null: the coefficient stays fixed")
    horizon: int = Field(10000, ge=1, description="sequences")
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    cliprange: float = Field(0.2, gt=0)
    cliprange_value: float | None = Field(0.2, gt=0)
    cliprange_reward: float | None = Field(10.0, gt=0)
    scale_reward: Literal["running", "ref"] | None = None
    ref_mean: float | None = None
    ref_std: float | None = Field(None, gt=0)
    vf_coef: float = Field(1.0, ge=0)
    entropy_coef: float = Field(0.0, ge=0, description="ChatLLaMA's beta_s")
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = Field(None, ge=0, description="taken off where a response did not finish")
    gen_kwargs: GenKwargs = Field(default_factory=GenKwargs)
    rollout_backend: Literal["chatrlhf", "vllm"] = Field(
        "chatrlhf", description="what samples rollouts: this package's engine, or vLLM through TRL"
    )
    vllm: VllmConfig = Field(default_factory=VllmConfig, description="read where rollout_backend is 'vllm'")
    importance_cap: float | None = Field(
        2.0,
        gt=0,
        description="a token that vLLM sampled counts by its probability here over the one there, at most this much; "
        "null: no cap",
    )
    precision: Precision = "auto"
    eval_interval: int | None = Field(None, ge=1, description="steps; null: only before and after")
    eval_fn: str | None = Field(None, description="'package.module:function': criteria of a completion, for the table")
    eval_best: float | None = Field(None, description="the best eval_fn can give, for the share of the gap closed")
    checkpoint_steps: int = Field(1000, ge=1, description="steps; a step is one rollout batch and its update")
    n_checkpoints_to_keep: int = Field(2, ge=1)
    checkpoint_name: str | None = None
    num_layers_unfrozen: int = Field(-1, ge=-1, description="top blocks of the policy that are trained; -1: all")

    # What ChatLLaMA counts in; `aliases.py` turns them into total_episodes and num_rollouts.
    num_episodes: int | None = Field(None, ge=1)
    max_timesteps: int | None = Field(None, ge=1)
    update_timesteps: int | None = Field(None, ge=1)
    num_examples: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _derive_and_divide(self) -> TrainerConfig:
        _refuse_checkpoint_name(self)
        self.refuse_two_ways("examples_path")
        if self.samples_per_prompt is None:
            self.samples_per_prompt = 1 if self.algorithm == "ppo" else 4
        if self.algorithm != "ppo" and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt: {self.samples_per_prompt} is too few for {self.algorithm}, "
                "which compares samples of one prompt; use at least 2"
            )
        if self.total_episodes is None:
            self.total_episodes = max(DEFAULT_EPISODES // self.num_rollouts, 1) * self.num_rollouts
        if self.batch_size is None:
            self.batch_size = self.num_rollouts // 4 if self.num_rollouts % 4 == 0 else self.num_rollouts
        if self.micro_batch_size is None or self.micro_batch_size > self.batch_size:
            self.micro_batch_size = self.batch_size
        if self.chunk_size is None or self.chunk_size > self.num_rollouts:
            self.chunk_size = self.num_rollouts
        _must_divide("num_rollouts", self.num_rollouts, "samples_per_prompt", self.samples_per_prompt)
        _must_divide("num_rollouts", self.num_rollouts, "batch_size", self.batch_size)
        _must_divide("total_episodes", self.total_episodes, "num_rollouts", self.num_rollouts)
        if self.num_layers_unfrozen == 0:
            raise ValueError("num_layers_unfrozen: 0 leaves nothing of the policy to train; use -1 (all) or 1 or more")
        return self

    @property
    def num_steps(self) -> int:
        """Rollout batches, each followed by one update."""
        return self.total_episodes // self.num_rollouts

    @property
    def num_optimizer_steps(self) -> int:
        return self.num_steps * self.ppo_epochs * (self.num_rollouts // self.batch_size)


class Config(Section):
    """A whole run."""

    seed: int = Field(1, ge=0)
    output_dir: str | None = Field(None, description="null: actor_config.model_folder, or ./models")
    trackers: list[str] = Field(default_factory=list, description="any of accelerate's: tensorboard, wandb, ...")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: its own choice")
    actor_config: ActorConfig = Field(default_factory=ActorConfig)
    reward_config: RewardConfig = Field(default_factory=RewardConfig)
    critic_config: CriticConfig = Field(default_factory=CriticConfig)
    trainer_config: TrainerConfig = Field(default_factory=TrainerConfig)

    @model_validator(mode="after")
    def _one_way_to_freeze(self) -> Config:
        if self.actor_config.peft_enable and self.trainer_config.num_layers_unfrozen != -1:
            raise ValueError(
                "actor_config.peft_enable: True and trainer_config.num_layers_unfrozen: "
                f"{self.trainer_config.num_layers_unfrozen} both choose what is trained; set one to False or -1"
            )
        return self

    # Where the YAML file stands; paths in it are tried relative to this folder, then to the working directory.
    _base_dir: Path | None = PrivateAttr(default=None)
    # What the reader should be told once: translated names, surprising values.
    _notes: list[str] = PrivateAttr(default_factory=list)
    # What was written, translated but not yet completed: overriding it derives the rest anew.
    _written: dict[str, Any] | None = PrivateAttr(default=None)

    @property
    def run_dir(self) -> Path:
        """Folder that holds everything this run leaves behind."""
        return Path(self.output_dir or self.actor_config.model_folder or "./models").expanduser()

    @property
    def notes(self) -> list[str]:
        return self._notes

    @property
    def base_dir(self) -> Path | None:
        return self._base_dir


def _must_divide(name: str, value: int, by_name: str, by: int) -> None:
    """Refuse a remainder and name the values that would work, rather than drop rows in silence."""
    if value % by == 0:
        return
    below, above = value // by * by, (value // by + 1) * by
    working = f"{below} or {above}" if below else f"{above}"
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    near = sorted(divisors, key=lambda d: (abs(d - by), d))[:3]
    raise ValueError(
        f"{name}: {value} is not divisible by {by_name} ({by}); set {name} to {working}, "
        f"or {by_name} to one of {', '.join(map(str, sorted(near)))}"
    )
