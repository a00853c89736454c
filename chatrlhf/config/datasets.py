"""`datasets:` of a stage's section: what is mixed, and how much of each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from chatrlhf.config.base import Section
from chatrlhf.config.plain_values import MAX_SEED, MAX_STEPS


class DatasetEntry(Section):
    """One dataset of a mixture."""

    name: str = Field(description="a public dataset's name, or the path of a file of rows")
    source: str | None = Field(None, description="a local copy of a public dataset; null: the hub")
    subset: str | None = Field(None, description="configuration of a hub dataset")
    split: str = Field("train", description="split of a hub dataset")
    lang: str | None = Field(None, description="of a dataset in many languages only this one")
    columns: dict[str, str] = Field(default_factory=dict, description="of a file: our field -> its column")
    fraction: float = Field(1.0, gt=0, le=1, description="of its training rows, in an epoch")
    size: int | None = Field(None, ge=1, le=MAX_STEPS, description="training rows at most, in an epoch")
    weight: float = Field(1.0, gt=0, le=10**4, description="how often each of these rows is seen in an epoch")
    val_split: float | None = Field(None, ge=0, lt=1, description="held out; null: validation_fraction")
    max_val_set: int | None = Field(None, ge=0, le=MAX_STEPS, description="rows held out at most")
    loss_on: Literal["completion", "all_turns", "all"] | None = Field(None, description="null: actor_config.loss_on")
    drop_narrative: float = Field(0.0, ge=0, le=1, description="share of the records that lose their narrative")
    max_chunk_size: int | None = Field(None, ge=1, le=10**9, description="characters of a piece of plain text")


class DataKeys(Section):
    """Several datasets instead of one file; the same keys in all three stages."""

    datasets: list[DatasetEntry] = Field(default_factory=list, description="a mixture; no file is named then")
    deduplicate: bool = Field(True, description="of a mixture's rows that say the same only the first is taken")
    resample: bool = Field(True, description="where an epoch sees a part of a dataset, the next one sees other rows")
    mixing_seed: int = Field(
        0, ge=0, le=MAX_SEED, description="draws what is held out and what is taken; the run's seed does not"
    )

    @field_validator("datasets", mode="before")
    @classmethod
    def _as_people_write_them(cls, datasets: Any) -> Any:
        """A name, ``{name: {options}}`` as OpenAssistant's files have it, or the keys."""
        return [_entry(item) for item in datasets] if isinstance(datasets, list) else datasets

    def reads_from(self, section: str, file_key: str) -> str:
        """The key that says what is read, for messages."""
        return f"{section}.{'datasets' if self.datasets else file_key}"

    def refuse_two_ways(self, file_key: str) -> None:
        """Either a file or a mixture. Raises ValueError."""
        if self.datasets and getattr(self, file_key) is not None:
            raise ValueError(f"{file_key} and datasets both say what is read; name the file in datasets, too")


def _entry(item: Any) -> Any:
    if isinstance(item, str):
        return {"name": item}
    if isinstance(item, dict) and "name" not in item and len(item) == 1:
        ((name, options),) = item.items()
        if options is None or isinstance(options, dict):
            return {"name": name, **(options or {})}
    return item
