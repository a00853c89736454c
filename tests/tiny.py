"""Models of a few thousand weights, created on the fly, and batches for them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from chatrlhf.data.collate import pad_right, prompt_batch
from chatrlhf.data.encoder import Encoder
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic
from chatrlhf.models.kernels import attention
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.rl.gradient_backend import PlainBackend
from chatrlhf.rl.update import Updater, UpdateSettings
from chatrlhf.rollout.context import Limits
from chatrlhf.rollout.engine import RolloutEngine
from chatrlhf.types import PromptBatch, Rollout

VOCAB, EOS, PAD = 24, 1, 0
IDS = dict(bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)
PLAIN = SamplingDistribution(eos_token_ids=(EOS,))


# Weights are drawn wider than usual: at the usual 0.02 a model this small gives every token the same probability.


def llama(seed: int = 0, vocab: int = VOCAB, width: int = 16, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(vocab_size=vocab, max_position_embeddings=64)
    config = LlamaConfig(initializer_range=0.3, **sizes | IDS | options)
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0, dropout: float = 0.1, **options) -> GPT2LMHeadModel:
    """With dropout, and in training mode: what uses it has to see to that."""
    torch.manual_seed(seed)
    drop = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    sizes = dict(vocab_size=VOCAB, n_embd=16, num_hidden_layers=2, n_head=2, n_positions=64)
    config = GPT2Config(initializer_range=0.3, **drop, **sizes | IDS | options)
    return GPT2LMHeadModel(config).train()


def opt(seed: int = 0, **options) -> OPTForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16)
    sizes |= dict(vocab_size=VOCAB, max_position_embeddings=64)
    config = OPTConfig(init_std=0.3, **sizes | IDS | options)
    return OPTForCausalLM(config).eval()


def bloom(seed: int = 0, **options) -> BloomForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, n_head=2)
    config = BloomConfig(initializer_range=0.3, **sizes | IDS | options)
    return BloomForCausalLM(config).eval()


def gpt_neox(seed: int = 0, **options) -> GPTNeoXForCausalLM:
    """Attention and MLP side by side; a quarter of each head is rotated."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(vocab_size=VOCAB, max_position_embeddings=64)
    config = GPTNeoXConfig(initializer_range=0.3, **sizes | IDS | options)
    return GPTNeoXForCausalLM(config).eval()


def gptj(seed: int = 0, **options) -> GPTJForCausalLM:
    """Its output embedding has a bias; half of each head is rotated."""
    torch.manual_seed(seed)
    sizes = dict(n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=64)
    config = GPTJConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes | IDS | options)
    model = GPTJForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias)  # is made 0
    return model


# Two heads that share one head of keys and values.
GROUPED = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def qwen2(seed: int = 0, **options) -> Qwen2ForCausalLM:
    """Queries, keys and values have a bias."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCAB, max_position_embeddings=64)
    config = Qwen2Config(initializer_range=0.3, **GROUPED | sizes | IDS | options)
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # are made 0
            nn.init.normal_(parameter, std=0.3)
    return model


def qwen3(seed: int = 0, **options) -> Qwen3ForCausalLM:
    """Queries and keys are normalized."""
    torch.manual_seed(seed)
    sizes = dict(head_dim=8, max_position_embeddings=64)
    config = Qwen3Config(vocab_size=VOCAB, initializer_range=0.3, **GROUPED | sizes | IDS | options)
    return Qwen3ForCausalLM(config).eval()


def gemma(seed: int = 0, **options) -> GemmaForCausalLM:
    """Embeddings are scaled by the root of their width."""
    torch.manual_seed(seed)
    sizes = dict(head_dim=8, max_position_embeddings=64)
    config = GemmaConfig(vocab_size=VOCAB, initializer_range=0.3, **GROUPED | sizes | IDS | options)
    return GemmaForCausalLM(config).eval()


def gemma2(seed: int = 0, **options) -> Gemma2ForCausalLM:
    """Caps its logits, so they are not its head applied to its states; attends to 4 tokens in every other layer."""
    torch.manual_seed(seed)
    sizes = dict(head_dim=8, max_position_embeddings=64, sliding_window=4)
    scale = dict(initializer_range=0.5, final_logit_softcapping=2.0)
    sizes |= GROUPED | dict(vocab_size=VOCAB)
    config = Gemma2Config(**sizes | IDS | scale | options)
    return Gemma2ForCausalLM(config).eval()


FAMILIES = {
    "llama": llama,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "opt": opt,
    "bloom": bloom,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
}


# Encoder–decoders. The decoder has another number of blocks than the encoder.


def t5(seed: int = 0, kind=(T5Config, T5ForConditionalGeneration), **options) -> T5ForConditionalGeneration:
    """The head is the embedding, applied to scaled states; with dropout, and in training mode."""
    torch.manual_seed(seed)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=VOCAB)
    ids = dict(eos_token_id=EOS, pad_token_id=PAD, decoder_start_token_id=PAD)
    return kind[1](kind[0](**sizes | ids | options)).train()


def flan_t5(seed: int = 0, **options) -> T5ForConditionalGeneration:
    """As Flan-T5 is: a gated network, and a head of its own."""
    model = t5(seed, tie_word_embeddings=False, feed_forward_proj="gated-gelu", **options)
    # transformers ties a new model's whatever its configuration says, and leaves those of a checkpoint apart.
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight))
    return model


def mt5(seed: int = 0, **options) -> MT5ForConditionalGeneration:
    return flan_t5(seed, kind=(MT5Config, MT5ForConditionalGeneration), **options)


def bart(seed: int = 0, **options) -> BartForConditionalGeneration:
    """Counts positions from the first one; its decoder starts at EOS, and its head has a bias."""
    torch.manual_seed(seed)
    sizes = dict(d_model=16, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=32, decoder_ffn_dim=32)
    sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, vocab_size=VOCAB)
    sizes |= dict(decoder_start_token_id=EOS, forced_eos_token_id=None)
    config = BartConfig(init_std=0.3, **sizes | IDS | options)
    model = BartForConditionalGeneration(config).train()
    nn.init.normal_(model.final_logits_bias)  # is made 0
    return model


ENCODER_DECODERS = {"t5": t5, "flan_t5": flan_t5, "mt5": mt5, "bart": bart}


class Bigram(nn.Module):
    """A causal model whose distribution is written down: logits behind a token are that token's row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.base_model = _Lookup(table)
        self.head = nn.Linear(table.shape[1], table.shape[1], bias=False)
        nn.init.eye_(self.head.weight)
        self.config = LlamaConfig(num_hidden_layers=1)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        return SimpleNamespace(logits=self.head(self.base_model(input_ids).last_hidden_state))


class _Lookup(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table.clone(), freeze=False)

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def script(successors: dict[int, int], vocab: int = 8) -> Bigram:
    """A model that says one thing only: behind token ``a`` always ``successors[a]``."""
    table = torch.zeros(vocab, vocab)
    for token, following in successors.items():
        table[token, following] = 1000.0
    return Bigram(table)


def prompts(
    lengths: list[int], seed: int = 0, width: int | None = None, pad: int = PAD, samples: int = 1
) -> PromptBatch:
    """Random prompts of given lengths, left-padded (to ``width``, where given)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    batch = prompt_batch(rows, [words(row) for row in rows], pad, samples)
    return widened(batch, width - batch.input_ids.shape[1], pad) if width else batch


def widened(batch: PromptBatch, columns: int, pad: int = PAD) -> PromptBatch:
    """The same prompts with more padding on the left."""
    ids = torch.nn.functional.pad(batch.input_ids, (columns, 0), value=pad)
    mask = torch.nn.functional.pad(batch.attention_mask, (columns, 0), value=False)
    return PromptBatch(ids, mask, batch.group_ids, batch.prompts)


def ragged_mask(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def rollout(
    prompt_batch: PromptBatch, lengths: list[int], seed: int = 1, finished: bool = True, pad: int = PAD
) -> Rollout:
    """Random responses of given lengths, closed by EOS where finished, without a model."""
    generator = torch.Generator().manual_seed(seed)
    mask = ragged_mask(lengths)
    ids = torch.randint(2, VOCAB, mask.shape, generator=generator)
    if finished:
        ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = EOS
    ids = torch.where(mask, ids, pad)
    texts = [words(row[: n - finished].tolist()) for row, n in zip(ids, lengths, strict=True)]
    flags, fewest = torch.full((len(lengths),), finished), torch.zeros(len(lengths), dtype=torch.long)
    return Rollout(prompt_batch, ids, mask, torch.zeros(mask.shape), flags, fewest, texts)


def same_responses(first: Rollout, second: Rollout) -> bool:
    """Whether two rollouts say the same, however wide they are."""
    return (
        torch.equal(first.response_mask, second.response_mask)
        and torch.equal(first.response_ids[first.response_mask], second.response_ids[second.response_mask])
        and torch.equal(first.finished, second.finished)
        and first.completions == second.completions
    )


def words(ids: list[int]) -> str:
    """Ids as text: one letter each."""
    return "".join(chr(ord("a") + i) for i in ids)


def engine(model: nn.Module, distribution: SamplingDistribution = PLAIN, pad: int = PAD, **options) -> RolloutEngine:
    """An engine over a tiny model; limits may be given directly."""
    limits = {"max_new_tokens": 8, "max_length": 64} | {
        name: options.pop(name)
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
        if name in options
    }
    return RolloutEngine(model, distribution, Limits(**limits), pad, words, **options)


# Ways through `models/kernels/attention.py`.
BRANCHES = ("short", "beyond short", "as on a GPU")


def take(branch: str, monkeypatch) -> None:
    if branch == "beyond short":
        monkeypatch.setattr(attention, "SHORT", 4)
    if branch == "as on a GPU":
        monkeypatch.setattr(attention, "MATMUL_DEVICES", set())


def tokenizer(vocab: int = 270, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on two lines."""
    made = train_tokenizer(["the cat sat on the mat", "the hat of the cat is on the mat"] * 3, vocab)
    if pad_is_eos:
        made.pad_token = made.eos_token
    return made


def said(encoder: Encoder, users: list[str], replies: list[str], finished: bool = True) -> Rollout:
    """A rollout as if the policy of ``encoder`` had answered each user with a reply, tokenized the usual way."""
    batch = prompt_batch([encoder.prompt(user) for user in users], users, encoder.tokenizer.pad_token_id)
    rows = [encoder.completion("a", reply) for reply in replies]
    ids, mask = pad_right([row if finished else row[:-1] for row in rows], encoder.tokenizer.pad_token_id)
    flags, fewest = torch.full((len(rows),), finished), torch.zeros(len(rows), dtype=torch.long)
    return Rollout(batch, ids, mask, torch.zeros(mask.shape), flags, fewest, list(replies))


def updater(actor_critic: ActorCritic, algorithm: str = "ppo", lr: float = 0.0, masters=None, **settings) -> Updater:
    """An updater with plain gradient descent."""
    groups = actor_critic.parameter_groups(lr, lr)
    optimizer = torch.optim.SGD(masters.groups(groups) if masters else groups, lr=lr)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    settings = UpdateSettings(**dict(epochs=1, batch_size=8, micro_batch_size=8) | settings)
    cpu = torch.device("cpu")
    backend = PlainBackend(actor_critic, optimizer, scheduler, cpu, masters)
    return Updater(actor_critic, ALGORITHMS[algorithm], settings, cpu, backend)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to a fraction of each tensor's largest entry: sums in another order round in another way."""
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        difference = (got[name].double() - gradient.double()).abs().max()
        assert difference <= tolerance * gradient.abs().max(), name
