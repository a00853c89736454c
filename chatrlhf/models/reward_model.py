"""A model that scores completions: a backbone, a scalar head, pooling by mask, and its normalisation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from chatrlhf.boundary import doing
from chatrlhf.conversation import Prompt
from chatrlhf.data.collate import Encoder, pad_right
from chatrlhf.data.pairs import PairEncoder
from chatrlhf.data.templates import FORMATS, Template
from chatrlhf.errors import CheckpointError
from chatrlhf.models.adapters import (
    base_of,
    config_of,
    has_adapters,
    is_adapter,
    merged,
    revision_of_base,
    save_model,
)
from chatrlhf.models.backbone import decoder_start, is_encoder_decoder
from chatrlhf.models.packing import pack, packs
from chatrlhf.models.pairs import sequences_for
from chatrlhf.models.quantization import how_quantized, never_repack, quantization_from
from chatrlhf.models.scalar_head import ScalarHead, state_size
from chatrlhf.models.sequences import response_states
from chatrlhf.models.sharing import Base
from chatrlhf.models.tokenizer import load_tokenizer

SETTINGS, HEAD = "reward_model.json", "reward_head.safetensors"


class RewardModel(nn.Module):
    """score = scale * head(hidden state of the pooled token) + shift.

    Pooling is ``last`` for causal backbones and ``first`` for bidirectional ones, whose first token sees all. An
    encoder–decoder reads the text in its encoder and is read at its decoder's ``start`` token; the critic of one is
    read behind the ``reply``'s last token (`ReplyScorer`).
    The head is trained on targets of mean 0 and deviation 1 (regression) or on differences (pairs); scale and
    shift bring its output back to the user's units, or to mean 0 and deviation 1 over the training
    completions, and are stored with it.
    """

    def __init__(
        self, backbone: nn.Module, head: ScalarHead, pooling: str = "last", scale: float = 1.0, shift: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.pooling, self.scale, self.shift = pooling, scale, shift
        self.backbone.config.use_cache = False
        self.backbone.config.num_labels = 1  # TRL's trainer asks for it
        self.register_state_dict_post_hook(_each_once)
        if has_adapters(backbone):
            self.register_state_dict_post_hook(_without_base)

    @property
    def config(self) -> Any:
        """The backbone's configuration; TRL's trainer reads it."""
        return self.backbone.config

    def add_model_tags(self, tags: Any) -> None:
        """TRL tags models for the hub; nothing is published from here."""

    # What a Trainer asks of a model.

    _keys_to_ignore_on_save = None

    def get_input_embeddings(self) -> nn.Module:
        """For noise on embeddings: of what reads the text, since T5's own are never called."""
        return (self.backbone.get_encoder() if self.pooling == "start" else self.backbone).get_input_embeddings()

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """For activations that are computed again."""
        self.backbone.gradient_checkpointing_enable(**kwargs)

    def raw(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The head's output before normalisation, [B], for ids [B, T] padded on either side."""
        mask = attention_mask.bool()
        # Padding to the right, whatever came in: then positions count from 0 and the result is the same.
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        if self.pooling == "last":  # a causal model: right-padding cannot reach the last real token
            last = torch.arange(len(mask), device=mask.device) * mask.shape[1] + mask.sum(dim=1) - 1
            stream = pack(input_ids, mask) if packs(self.backbone) else None
            if stream is None:
                states = self.backbone(input_ids=input_ids).last_hidden_state
            else:
                states, last = self.backbone(**stream.inputs).last_hidden_state, stream.positions_of[last]
            return self.head(states.flatten(0, 1)[last])
        given = {"input_ids": input_ids, "attention_mask": mask.long()}
        if self.pooling == "start":
            given["decoder_input_ids"] = torch.full_like(input_ids[:, :1], decoder_start(self.config))
        return self.head(self.backbone(**given).last_hidden_state[:, 0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        """What TRL's RewardTrainer expects: ``.logits`` [B, 1], before normalisation."""
        return SequenceClassifierOutput(logits=self.raw(input_ids, attention_mask)[:, None])

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Normalised scores, [B] float32."""
        # Not `raw` itself: a model that is dealt out over ranks comes together where it is called.
        return self.scale * self(input_ids, attention_mask).logits[:, 0] + self.shift


def _each_once(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Leave out a weight's second names (T5's embeddings have three), which safetensors would not write."""
    seen: set[int] = set()
    for name, weight in list(state.items()):
        if weight.numel() and weight.data_ptr() in seen:
            del state[name]
        seen.add(weight.data_ptr())


@dataclass
class RewardScorer:
    """A reward model with the tokenizer and template it was trained with: text in, scores out."""

    model: RewardModel
    encoder: Encoder
    place: str | None = None  # the folder its weights are from, or that its adapters' base is in

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    def encode(self, prompt: Prompt | str, completion: str, finished: bool = True) -> list[int]:
        """Ids of a prompt and its completion; EOS at the end only of a completion that came to one.

        A row beyond the context loses tokens from the front of its prompt: the completion is what is judged.
        """
        ids = self.encoder.completion(completion)
        ids = self.encoder.prompt(prompt) + (ids if finished else ids[:-1])
        return ids[-self.encoder.max_length :]

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
        save_model(self.model.backbone, folder)
        self.encoder.save(folder)
        save_file({name: t.contiguous() for name, t in self.model.head.state_dict().items()}, folder / HEAD)
        settings = {
            "mlp_size": self.model.head.mlp_size,
            "pooling": self.model.pooling,
            "scale": self.model.scale,
            "shift": self.model.shift,
            "max_length": self.encoder.max_length,
            "quantization": how_quantized(self.model.backbone),
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class ReplyScorer(RewardScorer):
    """The critic of an encoder–decoder, which reads a prompt in its encoder and the reply in its decoder.

    Rows are pairs: the ids of the prompt and those of the reply.
    """

    def encode(self, prompt: Prompt | str, completion: str, finished: bool = True) -> tuple[list[int], list[int]]:
        reply = self.encoder.completion(completion)
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
    path: str | Path, device: str | torch.device = "cpu", base: Base | None = None, **kwargs: Any
) -> RewardScorer:
    """A trained reward model; calling it with (prompts, completions) scores exactly as in training.

    Args:
        base: weights in memory that its adapters stand upon where they were trained upon the same.
        kwargs: for `from_pretrained`.

    Raises:
        CheckpointError, OutsideError: the folder holds none, or a damaged one.
    """
    folder = Path(path)
    if not (folder / SETTINGS).exists():
        raise CheckpointError(f"{folder}: no reward model here ({SETTINGS} is missing); train one with --type REWARD")
    with doing("reading the reward model in", folder, untrusted=True):
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        backbone, place = _backbone(folder, settings.get("quantization"), base, kwargs)
        head = ScalarHead(state_size(backbone), settings["mlp_size"])
        head.load_state_dict(load_file(folder / HEAD))
        model = RewardModel(backbone, head, settings["pooling"], settings["scale"], settings["shift"]).to(device).eval()
        tokenizer = load_tokenizer(str(folder), key="reward_config.model")
        template = Template.load(folder) or FORMATS["raw"]
        scorer, encoder = (ReplyScorer, PairEncoder) if model.pooling == "reply" else (RewardScorer, Encoder)
        return scorer(model, encoder(tokenizer, template, settings["max_length"]), place)


def _backbone(
    folder: Path, how: dict[str, Any] | None, base: Base | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, str]:
    """A reward model's backbone, and where its weights are.

    Adapters upon whole weights are merged into them, unless others stand upon these; upon few bits they stay apart,
    or what they add would be rounded away.
    """
    # float32 unless asked otherwise: that is what was trained.
    kwargs = {"dtype": torch.float32, **kwargs}
    place = base_of(str(folder))
    if place is None:
        return AutoModel.from_pretrained(folder, **kwargs), str(folder.resolve())
    config = AutoConfig.from_pretrained(config_of(str(folder)), **revision_of_base(str(folder)))
    if base is not None and base.carries(folder, config, how):
        return base.backbone(folder), place
    bits, fetched = quantization_from(how, "reward_config"), kwargs | revision_of_base(str(folder))
    backbone = never_repack(AutoModel.from_pretrained(place, config=config, **bits, **fetched))
    if not bits:
        return merged(backbone, str(folder)), place
    backbone.load_adapter(str(folder))
    return backbone, place


def _without_base(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    """Of a reward model with adapters these and the head are its state: a checkpoint leaves the base out."""
    for name in [name for name in state if name.startswith(f"{prefix}backbone.") and not is_adapter(name)]:
        del state[name]
