"""One token of every row through a Llama-like model on a CPU: its arithmetic, without its modules.

A step of a small model is some sixty modules, and calling them is a fifth to a third of its time. Here a block is
twenty operations; products that read the same states are one. Prompts are read by the model itself, and models of any
other build are asked for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import DynamicCache, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from chatrlhf.rollout.kv_cache import BatchKVCache, make_cache

# The others' frequencies depend on the length so far, and the module keeps what they are now: a step runs in inference
# mode, and what is made there may not meet autograd again.
FIXED_ROTATIONS = ("default", "linear", "yarn", "llama3")
AHEAD = 512  # positions whose rotations are worked out at once
FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def llama_step(model: nn.Module) -> LlamaStep | None:
    """A model's step; None where it has to be asked itself.

    It has to be where it is not on a CPU, uses dropout, is of another family, or was changed by somebody: with
    adapters, for instance. What looks right is tried on two short rows.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not on_cpu or model.training or type(model) not in FAMILIES:
        return None
    if model.model.rotary_emb.rope_type not in FIXED_ROTATIONS or not all(map(_is_plain, model.model.layers)):
        return None
    step = LlamaStep(model)
    return step if step.matches_model() else None


class LlamaStep:
    """What follows a prompt that the model has read, token by token."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.backbone = model, model.model
        self.blocks = [_Block(layer) for layer in self.backbone.layers]
        self._cos_and_sin: tuple[Tensor, Tensor] | None = None

    @property
    def is_valid(self) -> bool:
        """Whether the weights are still where they were put; `MasterWeights`, for instance, may have moved them."""
        return not self.model.training and all(each.is_valid for block in self.blocks for each in block.together)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Next-token logits, [n, V].

        Args:
            ids: [n] int64, the newest tokens.
            positions: [n] int64, how many of its own each has before it.
            mask: [n, width] bool, of the memory with those tokens in it.
            cache: the memory without them; they are added.
        """
        states = self.backbone.embed_tokens(ids)
        cos, sin = self._rotations(positions, states)
        bias = torch.zeros(mask.shape, dtype=states.dtype).masked_fill_(~mask, torch.finfo(states.dtype).min)
        bias = bias.repeat_interleave(self.blocks[0].kv_heads, dim=0)[:, None]
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            states = block(states, cos, sin, bias, layer)
        return self.model.lm_head(_normed(self.backbone.norm, states))

    def _rotations(self, positions: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position, [n, 1, e]; worked out for whole blocks of them ahead."""
        if self._cos_and_sin is None or int(positions.max()) >= len(self._cos_and_sin[0]):
            ahead = torch.arange(int(positions.max()) + AHEAD)
            cos, sin = self.backbone.rotary_emb(states, ahead[None])
            # Rotated is x cos + (-x_2, x_1) sin (Su et al. 2021, eq. 34, in halves): the sign goes with the sine.
            half = sin.shape[-1] // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._cos_and_sin = cos[0, :, None], sin[0, :, None]
        cos, sin = self._cos_and_sin
        return cos[positions], sin[positions]

    @torch.no_grad()
    def matches_model(self) -> bool:
        """Whether it says what the model says, of a padded row and one that is not, two tokens on."""
        vocab = self.backbone.embed_tokens.num_embeddings
        ids = torch.tensor([[0, 1, 2], [1, 2, 3]]) % vocab
        mask = torch.tensor([[False, True, True], [True, True, True]])
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        own, asked = (BatchKVCache(make_cache(self.model.config), mask) for _ in range(2))
        for memory in (own, asked):
            self._ask(ids, mask, positions, memory.cache)
        place = positions[:, -1]
        for token in (torch.tensor([3, 1]) % vocab, torch.tensor([2, 2]) % vocab):
            place = place + 1
            want = self._ask(token[:, None], asked.extend(), place[:, None], asked.cache)
            got = self(token, place, own.extend(), own.cache)
        tolerance = 1e-4 if want.dtype == torch.float32 else 5e-2
        return bool((got - want).abs().max() <= tolerance * want.abs().max())

    def _ask(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """The model's own next-token logits."""
        return self.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache
        ).logits[:, -1]


class FusedLinear:
    """Linear layers that read the same states, as one product: their weights are moved behind each other in memory.

    They stay the layers' own: what an optimizer or anybody else writes into them is what is multiplied by.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weights = [layer.weight for layer in layers]
        self.weight = _moved(self.weights)
        self.biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = _moved(self.biases) if self.biases else None
        self.places = self._places()

    def __call__(self, states: Tensor) -> Tensor:
        return linear(states, self.weight, self.bias)

    @property
    def is_valid(self) -> bool:
        return self._places() == self.places

    def _places(self) -> list[int]:
        return [each.data_ptr() for each in (*self.weights, *self.biases)]


class _Block:
    """A block's attention and gated feed-forward network, each added to what enters it."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_and_up = FusedLinear(mlp.gate_proj, mlp.up_proj)
        self.together = (self.qkv, self.gate_and_up)
        self.out, self.down, self.activation = attention.o_proj, mlp.down_proj, mlp.act_fn
        self.norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self.size, self.scaling = attention.head_dim, attention.scaling
        heads, self.kv_heads = (size // self.size for size in self.qkv.sizes[:2])
        self.heads, self.groups = heads, heads // self.kv_heads

    def __call__(self, states: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, layer: object) -> Tensor:
        """[n, d] to [n, d]; cos and sin [n, 1, e], bias [n times key heads, 1, width]."""
        n, size, rotated = len(states), self.size, self.heads + self.kv_heads
        qkv = self.qkv(_normed(self.before, states)).view(n, -1, size)
        qk = qkv[:, :rotated]
        if self.norms is not None:
            qk = torch.cat([_normed(norm, each) for norm, each in zip(self.norms, self._parts(qk), strict=True)], dim=1)
        qk = (qk * cos).addcmul_(qk.roll(size // 2, dims=-1), sin)
        query, key = self._parts(qk)
        keys, values = layer.update(key[:, :, None], qkv[:, rotated:, None])
        # Query heads that share a key head are the rows of one product with it.
        query = query.reshape(n * self.kv_heads, self.groups, size)
        shares = torch.baddbmm(bias, query, keys.view(n * self.kv_heads, -1, size).transpose(1, 2), alpha=self.scaling)
        mixed = torch.bmm(shares.softmax(dim=-1), values.view(n * self.kv_heads, -1, size))
        states = states + self.out(mixed.view(n, -1))
        gate, up = self.gate_and_up(_normed(self.between, states)).chunk(2, dim=-1)
        return states + self.down(self.activation(gate).mul_(up))

    def _parts(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        return qk[:, : self.heads], qk[:, self.heads :]


def _normed(norm: nn.Module, states: Tensor) -> Tensor:
    """A family's norm as one operation, which rounds less often than the module does."""
    return rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a block's linear layers are just that, and those side by side have a bias all or none."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_and_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    alike = all(len({each.bias is None for each in group}) == 1 for group in (qkv, gate_and_up))
    return alike and all(type(each) is nn.Linear for each in (*qkv, *gate_and_up, attention.o_proj, mlp.down_proj))


def _moved(parameters: list[nn.Parameter]) -> Tensor:
    """Parameters behind each other in one tensor, of which they are parts from now on."""
    whole = torch.cat([each.data for each in parameters])
    for each, part in zip(parameters, whole.split([len(each) for each in parameters]), strict=True):
        each.data = part
    return whole
