"""A reward model reads the last real token, whatever the padding, and scores the same after it was saved."""

import pytest
import torch
from tiny import llama, opt, tokenizer
from transformers import BertConfig, BertModel

from chatrlhf.config.schema import ActorConfig, Config, RewardConfig, TinyConfig
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import FORMATS
from chatrlhf.errors import CheckpointError
from chatrlhf.models import reward_network
from chatrlhf.models.for_stages import new_reward_model
from chatrlhf.models.kernels.attention import patch_attention
from chatrlhf.models.kernels.packing import pack
from chatrlhf.models.reward_model import RewardModel, RewardScorer, load_reward_model
from chatrlhf.models.scalar_head import ScalarHead

PROMPTS = ["the cat", "a much longer prompt about the mat", "hat"]
COMPLETIONS = ["sat on the mat", "is", "the cat is on the hat of the mat"]


def scorer(mlp_size: int | None = None, max_length: int = 64, pad_is_eos: bool = False) -> RewardScorer:
    words = tokenizer(pad_is_eos=pad_is_eos)
    backbone = llama(vocab=len(words)).base_model
    model = RewardModel(backbone, ScalarHead(16, mlp_size), scale=2.5, shift=-0.5).eval()
    return RewardScorer(model, Encoder(words, FORMATS["chatllama"], max_length))


def bidirectional() -> RewardModel:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=24, initializer_range=0.3, **sizes)
    return RewardModel(BertModel(config), ScalarHead(16), pooling="first").eval()


def test_score_is_the_head_on_the_last_tokens_state_scaled_and_shifted():
    made = scorer()
    ids = made.encode("the cat", "sat")
    states = made.model.backbone(input_ids=torch.tensor([ids])).last_hidden_state
    weight, bias = made.model.head.out.weight[0], made.model.head.out.bias[0]
    expected = 2.5 * (states[0, -1] @ weight + bias) - 0.5
    assert made.score(["the cat"], ["sat"])[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("make", [lambda: scorer().model, bidirectional], ids=["causal", "bidirectional"])
def test_score_does_not_depend_on_side_or_width_of_the_padding(make):
    model, ids = make(), torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        alone = model.score(ids, mask)
        for left, right in [(3, 0), (0, 3), (2, 5)]:
            padded = [torch.nn.functional.pad(x, (left, right)) for x in (ids, mask)]
            torch.testing.assert_close(model.score(*padded), alone, rtol=0, atol=1e-5)


def test_scores_do_not_depend_on_batch_or_order():
    made = scorer()
    together = made.score(PROMPTS, COMPLETIONS)
    assert made.score(PROMPTS[::-1], COMPLETIONS[::-1]) == pytest.approx(together[::-1], abs=1e-5)
    rows = [made.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert made.score_ids(rows, batch_size=2).tolist() == pytest.approx(together, abs=1e-5)
    alone = [made.score([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert alone == pytest.approx(together, abs=1e-5)
    assert len(set(together)) == 3


def test_packed_rows_have_the_scores_of_padded_ones(monkeypatch):
    made, rows = scorer(), [[5, 6, 7, 8, 9, 10, 11, 12] * 3, [5], [6, 7], [8, 9, 10], [7]]
    padded = made.score_ids(rows)
    patch_attention(made.model.backbone, torch.device("cpu"))
    packed = []
    monkeypatch.setattr(reward_network, "pack", lambda *rows: packed.append(pack(*rows)) or packed[-1])
    torch.testing.assert_close(made.score_ids(rows), padded, rtol=1e-5, atol=1e-6)
    assert packed[0] is not None


def test_pad_may_be_eos():
    apart, same = (scorer(pad_is_eos=flag).score(PROMPTS, COMPLETIONS) for flag in (False, True))
    assert same == pytest.approx(apart, abs=1e-5)


def test_an_unfinished_completion_has_no_eos():
    made = scorer()
    whole, cut = made.encode("the cat", "sat"), made.encode("the cat", "sat", finished=False)
    assert whole == [*cut, made.tokenizer.eos_token_id]
    assert made.tokenizer.eos_token_id not in cut


def test_a_long_row_loses_the_front_of_its_prompt():
    whole, short = scorer().encode(PROMPTS[1], "sat"), scorer(max_length=8).encode(PROMPTS[1], "sat")
    assert short == whole[-8:]


@pytest.mark.parametrize("mlp_size", [None, 8])
def test_a_saved_model_scores_identically(tmp_path, mlp_size):
    made = scorer(mlp_size)
    made.save(tmp_path)
    loaded = load_reward_model(tmp_path)
    assert loaded(PROMPTS, COMPLETIONS) == made(PROMPTS, COMPLETIONS)  # bit for bit
    assert loaded.encoder.chat_template == made.encoder.chat_template
    assert loaded.encoder.max_length == made.encoder.max_length


def test_a_folder_without_a_reward_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no reward model here"):
        load_reward_model(tmp_path)


def test_a_backbone_whose_states_are_narrower_than_its_layers_gets_a_head_that_fits(tmp_path):
    # OPT-350M: layers of 1024, states projected down to the embeddings' 512. Here 16 and 8.
    words = tokenizer()
    base = opt(vocab_size=len(words), word_embed_proj_dim=8, do_layer_norm_before=False)
    base.save_pretrained(tmp_path / "opt")
    words.save_pretrained(tmp_path / "opt")
    made = new_reward_model(
        Config(reward_config=RewardConfig(model=str(tmp_path / "opt"))), None, [], torch.device("cpu")
    )
    scores = made(PROMPTS, COMPLETIONS)
    made.save(tmp_path / "saved")
    assert load_reward_model(tmp_path / "saved")(PROMPTS, COMPLETIONS) == scores


@pytest.mark.parametrize("mlp_size", [None, 8])
def test_a_new_tiny_reward_model_has_the_configured_head(mlp_size):
    tiny = TinyConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=270)
    reward = RewardConfig(model="tiny", model_head_hidden_size=mlp_size)
    whole = Config(actor_config=ActorConfig(tiny=tiny), reward_config=reward)
    made = new_reward_model(whole, None, PROMPTS, torch.device("cpu"))
    assert made.model.pooling == "last"
    assert made.model.head.mlp_size == mlp_size
