"""Configurations of the families of causal models, two blocks each."""

from __future__ import annotations

from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

VOCAB = 270

WIDE = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
LLAMA = WIDE | dict(intermediate_size=64, max_position_embeddings=96)
GROUPED = LLAMA | dict(num_key_value_heads=1, head_dim=16)
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=96, initializer_range=0.3)
OPT = dict(vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, init_std=0.3)
OPT |= dict(max_position_embeddings=96)

CAUSAL = {
    "LLaMA": LlamaConfig(**LLAMA),
    "GPT-J": GPTJConfig(**GPT, rotary_dim=8),
    "GPT-NeoX": GPTNeoXConfig(**LLAMA),
    "OPT": OPTConfig(**OPT, word_embed_proj_dim=32),
    "OPT-350M": OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "Galactica": OPTConfig(**OPT, word_embed_proj_dim=32, activation_function="gelu", enable_bias=False),
    "BLOOM": BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3),
    "GPT-2": GPT2Config(**GPT),
    "Qwen2": Qwen2Config(**GROUPED),
    "Qwen3": Qwen3Config(**GROUPED),
    "Mistral": MistralConfig(**GROUPED),
    "Gemma": GemmaConfig(**GROUPED),
    "Gemma 2": Gemma2Config(**GROUPED, sliding_window=8),
    "Gemma 3": Gemma3TextConfig(**GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "Falcon": FalconConfig(**WIDE, alibi=True),
    "StableLM": StableLmConfig(**LLAMA, num_key_value_heads=2, partial_rotary_factor=0.5),
    "Mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
}
