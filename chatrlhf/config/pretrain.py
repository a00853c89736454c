"""The PRETRAIN stage: language modelling on long plain text, before the actor sees demonstrations."""

from __future__ import annotations

from pydantic import Field, model_validator

from chatrlhf.config.checks import check_micro_batch
from chatrlhf.config.datasets import DataKeys
from chatrlhf.config.optimizer import OptimizerKeys, Precision


class PretrainConfig(OptimizerKeys, DataKeys):
    """How long, on what, how fast. Model, adapters, bits, launcher and `rope_scaling` are actor_config's."""

    train_dataset_path: str | None = Field(None, description="a text file, or rows with a field 'text'")
    validation_dataset_path: str | None = None
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="of the documents; of one alone its end")
    max_sequence_length: int = Field(2048, ge=8, description="tokens of every row")
    steps: int = Field(100, ge=1, description="optimizer steps; text that does not suffice is seen again")
    batch_size: int = Field(8, ge=1, description="rows per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="rows per backward; null: batch_size")
    lr: float = Field(2e-5, ge=0)
    gradient_checkpointing: bool = Field(False, description="activations are computed again, not kept")
    precision: Precision = "auto"
    iteration_per_print: int = Field(10, ge=1, description="optimizer steps between two lines of metrics")
    eval_interval: int | None = Field(None, ge=1, description="optimizer steps; null: at the beginning and the end")
    checkpoint_steps: int = Field(100, ge=1, description="optimizer steps")
    n_checkpoints_to_keep: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _no_surprises(self) -> PretrainConfig:
        check_micro_batch(self)
        self.refuse_two_ways("train_dataset_path")
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
