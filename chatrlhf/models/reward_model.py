"""A reward model with its tokenizer and template: text in, scores out; and the folder that keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from chatrlhf.conversation import Prompt
from chatrlhf.data.collate import pad_right
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.encoder_seq2seq import Seq2SeqEncoder
from chatrlhf.data.templates import FORMATS, Template
from chatrlhf.data.text_pairs import TextPairEncoder
from chatrlhf.errors import CheckpointError, WeightsError, one_line
from chatrlhf.errors.boundary import doing
from chatrlhf.models.loading.adapter_loading import attach
from chatrlhf.models.loading.adapter_merging import merged
from chatrlhf.models.loading.backbone import is_encoder_decoder
from chatrlhf.models.loading.error_texts import not_finite
from chatrlhf.models.loading.loading_report import UNUSED_BY_BACKBONES, explained, load_pretrained
from chatrlhf.models.loading.lora import (
    base_of,
    config_of,
    has_adapters,
    revision_of_base,
    save_model,
)
from chatrlhf.models.loading.quantization import how_quantized, never_repack, quantization_from
from chatrlhf.models.loading.safe_config import auto_config
from chatrlhf.models.loading.sequence_classifier import head_names, leave_head_whole
from chatrlhf.models.loading.tokenizer import load_tokenizer
from chatrlhf.models.loading.weight_files import damage
from chatrlhf.models.reward_network import RewardModel
from chatrlhf.models.scalar_head import ScalarHead, state_size
from chatrlhf.models.sequences import response_states
from chatrlhf.models.sequences_seq2seq import sequences_for
from chatrlhf.models.weight_sharing import Base
from chatrlhf.runtime.fault_points import reached
from chatrlhf.runtime.whole_folders import require_whole

SETTINGS, HEAD = "reward_model.json", "reward_head.safetensors"
OWN = "own"  # the pooling of a classifier that is kept whole
KEPT = ("pooling", "scale", "shift", "skipped", "separator", "takes_padding")  # of a `RewardModel`, beside its weights
LATER = {"quantization": None, "skipped": None, "separator": None, "takes_padding": True, "reads_pairs": False}
KEY = "reward model"  # for messages about folders that no configuration names


@dataclass
class RewardScorer:
    """A reward model with the tokenizer and template it was trained with: text in, scores out."""

    model: RewardModel
    encoder: Encoder
    place: str | None = None  # the folder its weights are from, or that its adapters' base is in
    head_from: str | None = None  # where its head was trained before; None: here, or not at all

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    def encode(self, prompt: Prompt | str, completion: str, finished: bool = True) -> list[int]:
        """Ids of a prompt and its completion; EOS at the end only of a completion that came to one.

        A row beyond the context loses tokens from the front of its prompt: the completion is what is judged.
        """
        return self.encoder.judged(prompt, completion, finished)[-self.encoder.max_length :]

    @torch.no_grad()
    def score_ids(self, rows: list[Any], batch_size: int = 64) -> Tensor:
        """Scores of what `encode` gave, [len(rows)] float32 on the CPU, in batches of rows of similar length."""
        self.model.eval()
        device = next(self.model.parameters()).device
        scores = torch.empty(len(rows))
        by_length = sorted(range(len(rows)), key=lambda i: self._length(rows[i]))
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            scores[chosen] = self._scores([rows[i] for i in chosen], device).float().cpu()
        return scores

    def _length(self, row: list[int]) -> int:
        return len(row)

    def _scores(self, rows: list[list[int]], device: torch.device) -> Tensor:
        ids, mask = pad_right(rows, self.tokenizer.pad_token_id)
        return self.model.score(ids.to(device), mask.to(device))

    def score(self, prompts: Sequence[Prompt | str], completions: list[str]) -> list[float]:
        """Scores of texts, each completion taken as a whole reply (closed by EOS)."""
        rows = [self.encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return self.score_ids(rows).tolist()

    __call__ = score

    def save(self, folder: Path) -> None:
        """Backbone or its adapters (for AutoModel), tokenizer, template, head and settings."""
        model = self.model
        save_model(model.trunk if has_adapters(model.backbone) else model.backbone, folder)
        self.encoder.save(folder)
        reached("reward_model.head", folder)
        save_file({name: t.contiguous() for name, t in model.head_weights().items()}, folder / HEAD)
        settings = {name: getattr(model, name) for name in KEPT} | {
            "mlp_size": model.head.mlp_size if model.head is not None else None,
            "reads_pairs": isinstance(self.encoder, TextPairEncoder),
            "max_length": self.encoder.max_length,
            "quantization": how_quantized(model.backbone),
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class TextPairScorer(RewardScorer):
    """A classifier that reads prompt and completion as two texts, which it wants closed whether they ended or not."""

    def encode(self, prompt: Prompt | str, completion: str, finished: bool = True) -> list[int]:
        return self.encoder.row(prompt, completion)


class ReplyScorer(RewardScorer):
    """The critic of an encoder–decoder, which reads a prompt in its encoder and the reply in its decoder.

    Rows are pairs: the ids of the prompt and those of the reply.
    """

    def encode(self, prompt: Prompt | str, completion: str, finished: bool = True) -> tuple[list[int], list[int]]:
        reply = self.encoder.completion(prompt, completion)
        reply = reply if finished else reply[:-1]
        return self.encoder.prompt(prompt)[-max(self.encoder.max_length - len(reply), 1) :], reply

    def _length(self, row: tuple[list[int], list[int]]) -> int:
        return sum(map(len, row))

    def _scores(self, rows: list[tuple[list[int], list[int]]], device: torch.device) -> Tensor:
        pad = self.tokenizer.pad_token_id
        prompts, replies = ([row[side] for row in rows] for side in (0, 1))
        # What would follow a reply is predicted where its last token is read.
        padded = [*pad_right(prompts, pad), *pad_right([[*reply, pad] for reply in replies], pad)]
        sequences = sequences_for(self.model.config)(*(each.to(device) for each in padded))
        last = sequences.response_mask.sum(dim=1).cumsum(dim=0) - 1
        states = response_states(self.model.backbone, sequences)[last]
        return self.model.scale * self.model.head(states) + self.model.shift


def scorer_of_critic(backbone: nn.Module, head: ScalarHead, encoder: Encoder) -> RewardScorer:
    """A critic in the reward model's form: its score of a prompt and a reply is V behind the reply's last token."""
    if is_encoder_decoder(backbone.config):
        return ReplyScorer(RewardModel(backbone, head, "reply"), encoder)
    return RewardScorer(RewardModel(backbone, head), encoder)


def load_reward_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    base: Base | None = None,
    keep_adapters: bool = False,
    **kwargs: Any,
) -> RewardScorer:
    """A trained reward model; calling it with (prompts, completions) scores exactly as in training.

    Args:
        base: weights in memory that its adapters are built on where they were trained on the same.
        keep_adapters: they are not merged, for a critic that trains them further.
        kwargs: for `from_pretrained`.

    Raises:
        CheckpointError: the folder holds none.
        WeightsError, OutsideError: it is damaged, or lacks tensors; see `load_pretrained`.
    """
    folder = Path(path)
    if not is_reward_model(path):
        raise CheckpointError(f"{folder}: no reward model here ({SETTINGS} is missing); train one with --type REWARD")
    require_whole(folder)
    with doing("reading the reward model in", folder, untrusted=True):
        settings = saved_settings(folder)
        backbone, place = read_backbone(folder, settings, settings["quantization"], base, keep_adapters, **kwargs)
        model = assembled(folder, settings, backbone)
        tokenizer = load_tokenizer(str(folder), key="reward_config.model")
        template = Template.load(folder) or FORMATS["raw"]
        scorer, encoder = scorer_class(model, settings["reads_pairs"])
        return scorer(model.to(device).eval(), encoder(tokenizer, template, settings["max_length"]), place)


def is_reward_model(path: str | Path) -> bool:
    """Whether a folder holds a reward model in this package's format."""
    return (Path(path) / SETTINGS).exists()


def saved_settings(folder: Path) -> dict[str, Any]:
    """What a folder says of its reward model; of an older one what was true of all then.

    Raises:
        WeightsError: it is damaged.
    """
    path = folder / SETTINGS
    try:
        settings = LATER | json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} cannot be read ({one_line(error)}); copy the reward model again") from None
    if lacking := [name for name in ("mlp_size", "pooling", "scale", "shift", "max_length") if name not in settings]:
        raise WeightsError(f"{path} lacks {', '.join(lacking)}; copy the reward model again")
    return settings


def assembled(folder: Path, settings: dict[str, Any], backbone: nn.Module) -> RewardModel:
    """A backbone with the head and the pooling that a folder keeps.

    Raises:
        WeightsError: the head is damaged, or of another model.
    """
    head = None if settings["pooling"] == OWN else ScalarHead(state_size(backbone), settings["mlp_size"])
    model = RewardModel(backbone, head, **{name: settings[name] for name in KEPT})
    weights = _head_weights(folder / HEAD)
    try:
        model.load_head(weights)
    except RuntimeError as error:
        raise WeightsError(
            f"{folder / HEAD}: this head does not fit the model and mlp_size beside it ({one_line(error)}); copy the "
            "reward model again"
        ) from None
    return model


def scorer_class(model: RewardModel, reads_pairs: bool) -> tuple[type[RewardScorer], type[Encoder]]:
    """What scores texts by a model, and what encodes them for it.

    Args:
        reads_pairs: prompt and completion are two texts for it, parted as its tokenizer parts them.
    """
    if reads_pairs:
        return TextPairScorer, TextPairEncoder
    return (ReplyScorer, Seq2SeqEncoder) if model.pooling == "reply" else (RewardScorer, Encoder)


def read_backbone(
    folder: Path,
    settings: dict[str, Any],
    how: dict[str, Any] | None,
    base: Base | None = None,
    keep_adapters: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, str]:
    """A reward model's backbone, and where its weights are.

    Adapters on whole weights are merged into them, unless others are built on these; on quantized weights they stay
    apart, or what they add would be rounded away.

    Args:
        settings: of `saved_settings`.
        how: the weights are to be quantized; None: not at all.
    """
    place = base_of(str(folder))
    if place is None:
        kind, fresh = auto_class(settings), () if settings["pooling"] == OWN else UNUSED_BY_BACKBONES
        whole = load_pretrained(kind, str(folder), KEY, fresh, **{"dtype": torch.float32, **kwargs})
        return whole, str(folder.resolve())
    if base is not None and settings["pooling"] != OWN and base.matches(folder, _config_of_base(folder), how):
        return base.backbone(folder), place
    bits = quantization_from(how, "reward_config")
    backbone = read_base(folder, settings, **bits, **kwargs)
    if bits or keep_adapters:
        attach(backbone.base_model, folder)
    else:
        merged(backbone.base_model, str(folder))
    return backbone, place


def read_base(folder: Path, settings: dict[str, Any], **kwargs: Any) -> nn.Module:
    """The model that the adapters in a reward model's folder belong to, without them."""
    config, name = _config_of_base(folder), str(folder)
    fresh = UNUSED_BY_BACKBONES
    if settings["pooling"] == OWN:
        kwargs, fresh = leave_head_whole(config, kwargs), head_names(config)  # which lies beside the adapters
    # float32 unless asked otherwise: that is what was trained.
    fetched = {"dtype": torch.float32, **kwargs, **revision_of_base(name)}
    key = f"{KEY}: the base of the adapters in {folder}"
    return never_repack(load_pretrained(auto_class(settings), base_of(name), key, fresh, config=config, **fetched))


def auto_class(settings: dict[str, Any]) -> Any:
    """What loads a reward model's backbone; a classifier with its own pooling is one itself."""
    return AutoModelForSequenceClassification if settings["pooling"] == OWN else AutoModel


def _config_of_base(folder: Path) -> Any:
    with explained(KEY, config_of(str(folder))):
        return auto_config(config_of(str(folder)), **revision_of_base(str(folder)))


def _head_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a head. Raises WeightsError where they are damaged or not finite."""
    if (wrong := damage(path)) is not None:
        raise WeightsError(f"{path.parent}: the reward model's head cannot be loaded: {wrong}")
    weights = load_file(path)
    if wrong := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise WeightsError(f"{path} {not_finite(wrong)}")
    return weights
