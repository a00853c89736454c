"""The RL stage: what is sampled, how PPO learns from it, and for how long."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from chatrlhf.config.base import Section, must_divide, refuse_checkpoint_name, refuse_larger
from chatrlhf.config.datasets import DataKeys
from chatrlhf.config.plain_values import MAX_ROWS, MAX_SCORE, MAX_STEPS, MAX_TOKENS
from chatrlhf.config.training import OptimizerKeys, Precision


class VllmConfig(Section):
    """Where vLLM samples, for `rollout_backend: vllm`; how it samples is `gen_kwargs`, as for any backend."""

    mode: Literal["colocate", "server"] = Field(
        "colocate", description="colocate: in this process, on its GPU; server: a `vllm serve` of its own"
    )
    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="colocate: share of the GPU's memory that vLLM takes for weights and cache"
    )
    enable_sleep_mode: bool = Field(False, description="colocate: vLLM gives that memory back between two rollouts")
    server_base_url: str = Field("http://localhost:8000", description="server: the address it answers at")
    server_timeout: float = Field(
        240.0, gt=0, le=10**6, description="server: seconds until it has to answer at the start"
    )
    group_port: int = Field(51216, ge=1, le=65535, description="server: a free port, for sending weights")

    @field_validator("server_base_url")
    @classmethod
    def _address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"expected http://host:port or https://…, got {url!r}")
        return url.rstrip("/")


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
DEFAULT_EPISODES = 3200


class GenKwargs(Section):
    """How rollouts are sampled. What PPO cannot score is refused rather than ignored."""

    max_new_tokens: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        description="response tokens at most; null: actor_config.max_tokens, or what max_length leaves",
    )
    min_new_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="EOS is forbidden before so many")
    max_length: int | None = Field(None, ge=2, le=MAX_TOKENS, description="prompt and response together")
    min_length: int | None = Field(None, ge=0, le=MAX_TOKENS, description="prompt and response together")
    temperature: float | None = Field(
        None, ge=1e-4, le=100, description="of the sampled distribution; null: actor_config.temperature, or 1"
    )
    stop: list[str] = Field(default_factory=list, description="a response ends behind any of these strings")
    forbidden_tokens: list[TokenId] = Field(default_factory=list, description="token ids that are never sampled")
    do_sample: bool = Field(True, description="must be True: greedy rollouts are refused")
    top_k: float | None = Field(None, description="must be 0 or null: PPO cannot score a cut distribution")
    top_p: float | None = Field(None, description="must be 1 or null: PPO cannot score a cut distribution")
    repetition_penalty: float | None = Field(None, description="must be 1 or null: PPO cannot score it")
    eos_token_id: TokenId | list[TokenId] | None = Field(
        None, description="null: all EOS of tokenizer, template and model"
    )
    pad_token_id: int | None = Field(
        None, ge=-1, le=MAX_TOKENS, description="without effect: padding is known by masks, never by an id"
    )

    @model_validator(mode="after")
    def _only_the_plain_sampler(self) -> GenKwargs:
        why = "PPO needs the log-probabilities of the sampled distribution, for policy and reference alike"
        if self.eos_token_id == []:
            raise ValueError("eos_token_id: [] leaves nothing that ends a reply; write null, or the ids")
        refuse_larger("min_new_tokens", self.min_new_tokens, "max_new_tokens", self.max_new_tokens)
        refuse_larger("min_new_tokens", self.min_new_tokens, "max_length", self.max_length)
        refuse_larger("min_length", self.min_length, "max_length", self.max_length)
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

    algorithm: Literal["ppo", "rloo", "grpo"] = Field(
        "ppo", description="how advantages are made: a critic with GAE, or samples of one prompt compared"
    )
    examples_path: str | None = Field(None, description="rows of prompts; null: datasets")
    validation_examples_path: str | None = Field(None, description="held-out prompts")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="held out where no such file is named")
    total_episodes: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="null: ChatLLaMA's 3,200, in whole rollout batches"
    )
    num_rollouts: int = Field(64, ge=1, le=MAX_ROWS, description="sequences sampled between two updates")
    samples_per_prompt: int | None = Field(None, ge=1, le=MAX_ROWS, description="null: 1 for ppo, 4 for rloo and grpo")
    chunk_size: int | None = Field(
        None, ge=1, le=MAX_ROWS, description="sequences decoded side by side; null: num_rollouts"
    )
    batch_size: int | None = Field(
        None, ge=1, le=MAX_ROWS, description="null: a quarter of num_rollouts where that divides"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, le=MAX_ROWS, description="longest sequences per backward; null: batch_size"
    )
    ppo_epochs: int = Field(4, ge=1, le=1000, description="passes over a rollout batch")
    actor_lr: float = Field(5e-6, ge=0, le=1, description="learning rate of the policy")
    critic_lr: float = Field(9e-6, ge=0, le=1, description="learning rate of the critic")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's")
    init_kl_coef: float = Field(
        0.05,
        ge=0,
        le=1000,
        description="beta: weight of the KL to the reference; fixed, or where the controller starts",
    )
    target: float | None = Field(
        None, gt=0, le=10**6, description="nats per sequence; null: the coefficient stays fixed"
    )
    horizon: int = Field(10000, ge=1, le=MAX_STEPS, description="sequences")
    gamma: float = Field(1.0, ge=0, le=1, description="discount a token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of GAE")
    cliprange: float = Field(0.2, gt=0, le=10, description="epsilon of the policy's ratio")
    cliprange_value: float | None = Field(
        0.2, gt=0, le=MAX_SCORE, description="how far a value may move from its old one; null: not clipped"
    )
    cliprange_reward: float | None = Field(
        10.0, gt=0, le=MAX_SCORE, description="scores are clipped to plus and minus this; null: not clipped"
    )
    scale_reward: Literal["running", "ref"] | None = Field(
        None, description="scores are divided by their running deviation, or by ref_std"
    )
    ref_mean: float | None = Field(
        None, ge=-MAX_SCORE, le=MAX_SCORE, description="trlX's; without effect: a score's mean stays in it"
    )
    ref_std: float | None = Field(
        None, gt=0, le=MAX_SCORE, description="of scores, for scale_reward: ref; null: measured at the start"
    )
    vf_coef: float = Field(1.0, ge=0, le=10**4, description="weight of the value loss")
    entropy_coef: float = Field(0.0, ge=0, le=100, description="ChatLLaMA's beta_s")
    whiten_advantages: bool = Field(True, description="to mean 0 and deviation 1 over the batch's tokens")
    missing_eos_penalty: float | None = Field(
        None, ge=0, le=MAX_SCORE, description="taken off where a response did not finish"
    )
    gen_kwargs: GenKwargs = Field(default_factory=GenKwargs, description="how rollouts are sampled")
    rollout_backend: Literal["chatrlhf", "vllm"] = Field(
        "chatrlhf", description="what samples rollouts: this package's engine, or vLLM through TRL"
    )
    vllm: VllmConfig = Field(default_factory=VllmConfig, description="read where rollout_backend is 'vllm'")
    importance_cap: float | None = Field(
        2.0,
        gt=0,
        le=10**6,
        description="a token that vLLM sampled counts by its probability here over the one there, at most this much; "
        "null: no cap",
    )
    gradient_checkpointing: bool = Field(
        False, description="the update computes activations of policy and critic again, and does not keep them"
    )
    model_kernels: Literal["auto", "off"] = Field(
        "auto", description="off: models compute as transformers made them; CHATRLHF_MODEL_KERNELS=off does the same"
    )
    precision: Precision = Field(
        "auto", description="auto: bfloat16 working weights under float32 masters where the device multiplies them"
    )
    eval_interval: int | None = Field(None, ge=1, le=MAX_STEPS, description="steps; null: only before and after")
    eval_fn: str | None = Field(None, description="'package.module:function': criteria of a completion, for the table")
    eval_best: float | None = Field(
        None, ge=-MAX_SCORE, le=MAX_SCORE, description="the best eval_fn can give, for the share of the gap closed"
    )
    checkpoint_steps: int = Field(
        1000, ge=1, le=MAX_STEPS, description="steps; a step is one rollout batch and its update"
    )
    n_checkpoints_to_keep: int = Field(2, ge=1, le=10**6, description="older checkpoints are deleted")
    checkpoint_name: str | None = Field(
        None, description="ChatLLaMA's; refused, --resume takes the newest valid checkpoint"
    )
    num_layers_unfrozen: int = Field(
        -1, ge=-1, le=10**4, description="top blocks of the policy that are trained; -1: all"
    )

    # What ChatLLaMA counts in; `aliases.py` turns them into total_episodes and num_rollouts.
    num_episodes: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="ChatLLaMA's: with max_timesteps and num_examples gives total_episodes"
    )
    max_timesteps: int | None = Field(None, ge=1, le=MAX_STEPS, description="ChatLLaMA's: see num_episodes")
    update_timesteps: int | None = Field(
        None, ge=1, le=MAX_ROWS, description="ChatLLaMA's: with num_examples gives num_rollouts"
    )
    num_examples: int | None = Field(None, ge=1, le=MAX_STEPS, description="ChatLLaMA's: see num_episodes")

    @model_validator(mode="after")
    def _derive_and_divide(self) -> TrainerConfig:
        refuse_checkpoint_name(self)
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
        refuse_larger("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        if self.micro_batch_size is None:
            self.micro_batch_size = self.batch_size
        if self.chunk_size is None or self.chunk_size > self.num_rollouts:
            self.chunk_size = self.num_rollouts
        must_divide("num_rollouts", self.num_rollouts, "samples_per_prompt", self.samples_per_prompt)
        must_divide("num_rollouts", self.num_rollouts, "batch_size", self.batch_size)
        must_divide("total_episodes", self.total_episodes, "num_rollouts", self.num_rollouts)
        refuse_larger("warmup_steps", self.warmup_steps, "all optimizer steps of the stage", self.num_optimizer_steps)
        if self.num_layers_unfrozen == 0:
            raise ValueError("num_layers_unfrozen: 0 leaves nothing of the policy to train; use -1 (all) or 1 or more")
        return self

    @property
    def num_steps(self) -> int:
        """Rollout batches, each followed by one update."""
        assert self.total_episodes is not None  # filled in by a validator
        return self.total_episodes // self.num_rollouts

    @property
    def num_optimizer_steps(self) -> int:
        assert self.batch_size is not None  # filled in by a validator
        return self.num_steps * self.ppo_epochs * (self.num_rollouts // self.batch_size)
