"""Sequence classifiers of a few thousand weights, with tokenizers as their families have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
SIZES |= dict(max_position_embeddings=64, initializer_range=0.3, num_labels=1, eos_token_id=0, bos_token_id=None)
GPT = dict(n_embd=16, n_layer=2, n_head=2, n_positions=64)
BART = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.3)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, decoder_start_token_id=0, forced_eos_token_id=None)
T5 = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=1)
DEBERTA = dict(type_vocab_size=0, relative_attention=True, pos_att_type=["c2p", "p2c"])
WINDOWS = dict(num_key_value_heads=1, head_dim=8, sliding_window=4)

# How each pools: the last token with a linear head.
LAST = {
    "llama": {},
    "mistral": dict(num_key_value_heads=1),
    "qwen3": dict(num_key_value_heads=1, head_dim=8),
    "gemma2": WINDOWS,
    "gpt2": GPT,
    "gpt_neox": {},
    "opt": dict(ffn_dim=32, word_embed_proj_dim=8, init_std=0.3, do_layer_norm_before=False),
    "bloom": dict(n_head=2),
}
# In a way of their own: a pooler or a dense layer on the first token, a mean, the last token of this id, the last EOS.
OWN = {
    "bert": {},
    "roberta": dict(pad_token_id=1),
    "electra": dict(embedding_size=8),
    "distilbert": dict(dim=16, hidden_dim=32, n_heads=2, n_layers=2),
    "deberta-v2": DEBERTA,
    "modernbert": dict(global_attn_every_n_layers=2, local_attention=8, classifier_pooling="mean"),
    "modernbert-decoder": dict(global_attn_every_n_layers=2, local_attention=8, bos_token_id=2),
    "t5": T5,
    "bart": BART,
}
# As those, and padding changes their scores: nothing is masked, convolved or summed up at the right end.
ONE_BY_ONE = {
    "fnet": {},
    "convbert": dict(embedding_size=16, conv_kernel_size=3),
    "xlnet": dict(d_model=16, n_layer=2, n_head=2, d_inner=32, max_position_embeddings=None),
}
FAMILIES = LAST | OWN | ONE_BY_ONE


def classifier(family: str = "llama", vocab: int = 24, seed: int = 0, **options: Any) -> nn.Module:
    """A classifier with one label, pad token 1 and EOS 0; no weight is 0."""
    settings = SIZES | dict(vocab_size=vocab, pad_token_id=1) | FAMILIES[family] | options
    if settings["max_position_embeddings"] is None:  # XLNet has no limit
        del settings["max_position_embeddings"]
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **settings)).eval()
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.3)
    return model


def chat_tokenizer(template: str | None, pad: str | None = "<|pad|>") -> PreTrainedTokenizerFast:
    """A causal model's, EOS 0 and pad token 1."""
    words = tokenizer()
    words.chat_template, words.pad_token = template, pad
    return words


def pair_tokenizer(types: bool = True, double: bool = False) -> PreTrainedTokenizerFast:
    """An encoder's: CLS (or <s>) before two texts, a separator behind each.

    Args:
        types: the second text has token type 1.
        double: two separators between the texts, as RoBERTa has them.
    """
    words = tokenizer()
    words.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    if types:
        words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        words.init_kwargs["model_input_names"] = words.model_input_names
    middle, second = "[SEP] [SEP]" if double else "[SEP]", int(types)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS]:0 $A:0 {middle} $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", words.cls_token_id), ("[SEP]", words.sep_token_id)],
    )
    return words


def save(folder: Path, model: nn.Module, words: Any) -> Path:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@torch.no_grad()
def alone(model: nn.Module, rows: list[list[int]], types: list[list[int]] | None = None) -> torch.Tensor:
    """The classifier's own scores, each row in a batch of its own without padding."""
    scores = []
    for i, row in enumerate(rows):
        ids = torch.tensor([row])
        given = {} if types is None else {"token_type_ids": torch.tensor([types[i]])}
        scores.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0, 0])
    return torch.stack(scores)
