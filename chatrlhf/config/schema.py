"""Every key a configuration may have, its type, its default and what it means.

Sections carry ChatLLaMA's names, PPO's keys trlX's; `aliases.py` translates the rest.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from chatrlhf.config.base import Section, check_micro_batch, refuse_checkpoint_name, refuse_larger
from chatrlhf.config.datasets import DataKeys
from chatrlhf.config.guards import GuardsConfig
from chatrlhf.config.model import ModelKeys, QuantizationKeys, RopeScaling
from chatrlhf.config.plain_values import MAX_ROWS, MAX_SEED, MAX_STEPS, MAX_TOKENS
from chatrlhf.config.rl import TrainerConfig
from chatrlhf.config.training import LaunchKeys, OptimizerKeys, Precision
from chatrlhf.errors.boundary import doing


class PretrainConfig(OptimizerKeys, DataKeys):
    """How long, on what, how fast. Model, adapters, bits, launcher and `rope_scaling` are actor_config's."""

    train_dataset_path: str | None = Field(None, description="a text file, or rows with a field 'text'")
    validation_dataset_path: str | None = Field(None, description="held-out text; null: a part of the training text")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="of the documents; of one alone its end")
    max_sequence_length: int = Field(2048, ge=8, le=MAX_TOKENS, description="tokens of every row")
    steps: int = Field(100, ge=1, le=MAX_STEPS, description="optimizer steps; text that does not suffice is seen again")
    batch_size: int = Field(8, ge=1, le=MAX_ROWS, description="rows per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, le=MAX_ROWS, description="rows per backward; null: batch_size")
    lr: float = Field(2e-5, ge=0, le=1, description="peak learning rate of AdamW")
    gradient_checkpointing: bool = Field(False, description="activations are computed again, not kept")
    precision: Precision = Field(
        "auto", description="auto: bfloat16 products where the device has them, float32 weights"
    )
    iteration_per_print: int = Field(10, ge=1, le=MAX_STEPS, description="optimizer steps between two lines of metrics")
    eval_interval: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="optimizer steps; null: at the beginning and the end"
    )
    checkpoint_steps: int = Field(100, ge=1, le=MAX_STEPS, description="optimizer steps")
    n_checkpoints_to_keep: int = Field(2, ge=1, le=10**6, description="older checkpoints are deleted")

    @model_validator(mode="after")
    def _no_surprises(self) -> PretrainConfig:
        check_micro_batch(self)
        self.refuse_two_ways("train_dataset_path")
        refuse_larger("warmup_steps", self.warmup_steps, "steps", self.steps)
        return self

    @property
    def names_data(self) -> bool:
        """Whether there is anything to be trained on; `--type ALL` begins with this stage where there is."""
        return bool(self.datasets) or self.train_dataset_path is not None

    @property
    def epochs(self) -> int:
        """Of the trainer, to which all steps are one."""
        return 1

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.steps * self.batch_size * self.max_sequence_length


STAGES = ("PRETRAIN", "ACTOR", "REWARD", "RL")


MAX_TINY = 10**10  # parameters


class TinyConfig(Section):
    """Dimensions of the Llama that `model: tiny` creates, with a byte-level BPE tokenizer."""

    hidden_size: int = Field(128, ge=8, le=10**6, description="width of the hidden states")
    num_hidden_layers: int = Field(4, ge=1, le=2000, description="blocks")
    num_attention_heads: int = Field(4, ge=1, le=10**5, description="attention heads of a block")
    intermediate_size: int | None = Field(None, ge=8, le=10**7, description="null: 8/3 of hidden_size, in steps of 32")
    vocab_size: int = Field(1024, ge=260, le=10**7, description="upper bound for the tokenizer trained on the data")
    max_position_embeddings: int = Field(512, ge=8, le=MAX_TOKENS, description="tokens that it can read")
    tie_word_embeddings: bool = Field(True, description="the output head is the embeddings")
    initializer_range: float = Field(0.02, gt=0, le=10, description="standard deviation of fresh weights")

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyConfig:
        width = self.intermediate_size or 8 * self.hidden_size // 3
        block = 4 * self.hidden_size**2 + 3 * self.hidden_size * width
        weights = self.num_hidden_layers * block + self.vocab_size * self.hidden_size
        if weights > MAX_TINY:
            raise ValueError(
                f"hidden_size {self.hidden_size}, intermediate_size {width} and num_hidden_layers "
                f"{self.num_hidden_layers} make {weights:.1e} parameters, and a model that starts from nothing has at "
                f"most {MAX_TINY:.0e}; lower them, or name a model"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 x num_attention_heads "
                f"({2 * self.num_attention_heads}): rotary positions turn pairs of channels"
            )
        return self


class ActorConfig(OptimizerKeys, DataKeys, ModelKeys, QuantizationKeys, LaunchKeys):
    """The ACTOR stage, and how text is rendered and bounded in every stage."""

    model: str = Field("tiny", description="a hub id, a folder, or 'tiny' for a small Llama made for the data")
    tiny: TinyConfig = Field(default_factory=TinyConfig, description="read when model is 'tiny'")
    tokenizer_path: str | None = Field(None, description="null: the model's own tokenizer")
    model_folder: str | None = Field(None, description="ChatLLaMA's output folder; output_dir wins")
    rope_scaling: RopeScaling | None = Field(None, description="stretches rotary positions; null: as the model has it")
    train_dataset_path: str | None = Field(None, description="rows of prompts and completions; null: datasets")
    validation_dataset_path: str | None = Field(None, description="held-out rows; null: validation_fraction")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="held out where no validation file is named")
    template: str = Field(
        "chatllama",
        description="a built-in name, chat (the model's own), chat:NAME, a .jinja file, or a text around {user_input}",
    )
    chat_template_kwargs: dict[str, bool | int | str] = Field(
        default_factory=dict, description="values that the template asks for, such as enable_thinking: false"
    )
    loss_on: Literal["completion", "all_turns", "all"] = Field(
        "completion", description="what is trained: the last completion, every reply, or all text"
    )
    lr: float = Field(9e-6, ge=0, le=1, description="peak learning rate of AdamW")
    epochs: int = Field(1, ge=1, le=10**6, description="passes over the rows")
    batch_size: int = Field(2, ge=1, le=MAX_ROWS, description="sequences per optimizer step")
    micro_batch_size: int | None = Field(
        None, ge=1, le=MAX_ROWS, description="sequences per backward; null: batch_size"
    )
    sort_by_length: bool = Field(False, description="batches are of rows of similar length, so that less is padding")
    max_sequence_length: int = Field(2048, ge=4, le=MAX_TOKENS, description="tokens of prompt and completion together")
    over_length: Literal["drop", "cut"] = Field("drop", description="rows beyond it: left out, or their end cut off")
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="share of each label spread over all tokens")
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=10**4, description="noise on embeddings in training; null: none"
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="response limit; gen_kwargs.max_new_tokens wins"
    )
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="EOS is forbidden before; gen_kwargs wins")
    additonal_prompt_tokens: int = Field(
        20, ge=0, le=MAX_TOKENS, description="ChatLLaMA's room beside a prompt; not needed here"
    )
    temperature: float | None = Field(None, ge=1e-4, le=100, description="of rollouts; gen_kwargs.temperature wins")
    use_fairscale: bool = Field(
        False, description="Meta's original LLaMA files; True is refused with the conversion command"
    )
    precision: Precision = Field(
        "auto", description="auto: bfloat16 products where the device has them, float32 weights"
    )
    iteration_per_print: int = Field(10, ge=1, le=MAX_STEPS, description="optimizer steps between two lines of metrics")
    eval_interval: int | None = Field(None, ge=1, le=MAX_STEPS, description="optimizer steps; null: once an epoch")
    checkpoint_steps: int = Field(5000, ge=1, le=MAX_STEPS, description="optimizer steps")
    n_checkpoints_to_keep: int = Field(2, ge=1, le=10**6, description="older checkpoints are deleted")
    checkpoint_name: str | None = Field(
        None, description="ChatLLaMA's; refused, --resume takes the newest valid checkpoint"
    )

    @field_validator("tokenizer_path")
    @classmethod
    def _placeholder_is_absent(cls, path: str | None) -> str | None:
        return None if path == "path-to-tokenizer" else path

    @model_validator(mode="after")
    def _no_surprises(self) -> ActorConfig:
        refuse_checkpoint_name(self)
        check_micro_batch(self)
        self.refuse_two_ways("train_dataset_path")
        refuse_larger("min_tokens", self.min_tokens, "max_tokens", self.max_tokens)
        if self.use_fairscale:
            raise ValueError(
                "use_fairscale: True means Meta's original LLaMA files; convert them to the Hugging Face format: set "
                "use_fairscale to False, and the command for the folder that model names is printed"
            )
        return self


class RewardConfig(OptimizerKeys, DataKeys, ModelKeys, QuantizationKeys, LaunchKeys):
    """The REWARD stage, or what stands in its place."""

    model: str | None = Field("actor", description="'actor': start from the fine-tuned actor; or a model")
    tokenizer_path: str | None = Field(None, description="null: the model's own tokenizer")
    model_folder: str | None = Field(None, description="ChatLLaMA's; the run's folder is used")
    rope_scaling: RopeScaling | None = Field(None, description="of a model of its own; the actor's has the actor's")
    model_head_hidden_size: int | None = Field(None, ge=1, le=10**6, description="null: a linear head; else an MLP")
    fresh_head: bool = Field(False, description="drop the head of a classifier or reward model that model names")
    train_dataset_path: str | None = Field(None, description="rows with scores or preferences; null: datasets")
    validation_dataset_path: str | None = Field(None, description="held-out rows; null: validation_fraction")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="held out where no validation file is named")
    template: str | None = Field(None, description="null: the actor's; a head that is kept has its model's own")
    chat_template_kwargs: dict[str, bool | int | str] = Field(
        default_factory=dict, description="values that the template asks for, such as enable_thinking: false"
    )
    loss: Literal["regression", "pairwise"] | None = Field(None, description="null: chosen by the data")
    reward_fn: str | None = Field(None, description="'package.module:function' or an http(s) URL; no model needed")
    reward_timeout: float = Field(300.0, gt=0, le=10**6, description="seconds that reward_fn may take for a batch")
    lr: float = Field(9e-6, ge=0, le=1, description="peak learning rate of AdamW")
    epochs: int = Field(1, ge=1, le=10**6, description="passes over the rows")
    batch_size: int = Field(8, ge=1, le=MAX_ROWS, description="rows (a pair is one row) per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, le=MAX_ROWS, description="rows per backward; null: batch_size")
    sort_by_length: bool = Field(False, description="batches are of rows of similar length, so that less is padding")
    max_sequence_length: int = Field(2048, ge=4, le=MAX_TOKENS, description="tokens of prompt and completion together")
    over_length: Literal["drop", "cut"] = Field("drop", description="rows beyond it: left out, or their start cut off")
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=10**4, description="noise on embeddings in training; null: none"
    )
    precision: Precision = Field(
        "auto", description="auto: bfloat16 products where the device has them, float32 weights"
    )
    iteration_per_print: int = Field(10, ge=1, le=MAX_STEPS, description="optimizer steps between two lines of metrics")
    eval_interval: int | None = Field(None, ge=1, le=MAX_STEPS, description="optimizer steps; null: once an epoch")
    checkpoint_steps: int = Field(10000, ge=1, le=MAX_STEPS, description="optimizer steps")
    n_checkpoints_to_keep: int = Field(2, ge=1, le=10**6, description="older checkpoints are deleted")
    checkpoint_name: str | None = Field(
        None, description="ChatLLaMA's; refused, --resume takes the newest valid checkpoint"
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _other_names(cls, loss: Any) -> Any:
        names = {"mse": "regression", "bradley_terry": "pairwise", "pairs": "pairwise"}
        return names.get(loss, loss) if isinstance(loss, str) else loss

    @model_validator(mode="after")
    def _no_surprises(self) -> RewardConfig:
        refuse_checkpoint_name(self)
        check_micro_batch(self)
        self.refuse_two_ways("train_dataset_path")
        return self


class CriticConfig(LaunchKeys):
    """Where PPO's value function comes from."""

    model: str | None = Field(None, description="null: the reward model; 'shared': on the actor's trunk; or a model")
    model_head_hidden_size: int | None = Field(None, ge=1, le=10**6, description="null: a linear head; else an MLP")
    model_folder: str | None = Field(None, description="ChatLLaMA's; the run's folder is used")
    max_sequence_length: int = Field(
        2048, ge=4, le=MAX_TOKENS, description="ChatLLaMA's; rollouts are bounded by the actor's"
    )
    checkpoint_name: str | None = Field(
        None, description="ChatLLaMA's; refused, --resume takes the newest valid checkpoint"
    )

    @model_validator(mode="after")
    def _no_surprises(self) -> CriticConfig:
        refuse_checkpoint_name(self)
        return self


class Config(Section):
    """A whole run."""

    seed: int = Field(1, ge=0, le=MAX_SEED, description="of everything random in a run")
    output_dir: str | None = Field(None, description="null: actor_config.model_folder, or ./models")
    trackers: list[str] = Field(default_factory=list, description="any of accelerate's: tensorboard, wandb, ...")
    num_threads: int | None = Field(None, ge=1, le=65536, description="CPU threads of torch; null: its own choice")
    pretrain_config: PretrainConfig = Field(
        default_factory=PretrainConfig, description="language modeling on long text before ACTOR"
    )
    actor_config: ActorConfig = Field(
        default_factory=ActorConfig, description="the ACTOR stage, and how text is rendered in every stage"
    )
    reward_config: RewardConfig = Field(
        default_factory=RewardConfig, description="the REWARD stage, or what gives rewards instead"
    )
    critic_config: CriticConfig = Field(
        default_factory=CriticConfig, description="where the value function starts from"
    )
    trainer_config: TrainerConfig = Field(default_factory=TrainerConfig, description="the RL stage")
    guards_config: GuardsConfig = Field(
        default_factory=GuardsConfig, description="what a run warns of, and what ends it"
    )

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
    # The day that templates show which ask for the date; None: today.
    _day: date | None = PrivateAttr(default=None)
    # What was written, translated but not yet completed: overriding it derives the rest anew.
    _written: dict[str, Any] | None = PrivateAttr(default=None)

    def stages(self, type: str) -> list[str]:
        """The stages of a run of ``type``; ALL begins with PRETRAIN only where that is given text."""
        if type != "ALL":
            return [type]
        return list(STAGES if self.pretrain_config.names_data else STAGES[1:])

    @property
    def run_dir(self) -> Path:
        """Folder that holds everything this run leaves behind."""
        folder = self.output_dir or self.actor_config.model_folder or "./models"
        with doing("output_dir", folder, untrusted=True):  # "~user" may be unknown
            return Path(folder).expanduser()

    @property
    def notes(self) -> list[str]:
        return self._notes

    @property
    def base_dir(self) -> Path | None:
        return self._base_dir

    @property
    def day(self) -> date:
        """The date that is shown to a model whose template asks for one; the same for a whole run, also resumed."""
        return self._day or date.today()

    def fix_day(self, day: date) -> None:
        """Set `day`."""
        self._day = day
