"""Where the critic starts from, which line says so, and which wishes are refused."""

import pytest
import torch
from tiny import PLAIN, gpt2, llama, opt, prompts, rollout, tokenizer
from transformers import BertConfig, BertModel

from chatrlhf.config.schema import CriticConfig
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import FORMATS
from chatrlhf.errors import ConfigError
from chatrlhf.models.actor_critic import PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.critic_init import make_actor_critic
from chatrlhf.models.reward_model import RewardModel, RewardScorer
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import join

WORDS = tokenizer()
OTHER_WORDS = tokenizer(vocab=262)
BATCH = rollout(prompts([3, 1, 6]), [5, 2, 4])
SEQUENCES = join(BATCH.prompts.input_ids, BATCH.prompts.attention_mask, BATCH.response_ids, BATCH.response_mask)


def reward(words=WORDS, model=None, pooling: str = "last", mlp_size: int | None = None) -> RewardScorer:
    backbone = model or llama(seed=7, vocab=len(words)).base_model
    head = ScalarHead(16, mlp_size)
    torch.nn.init.constant_(head.out.bias, 0.7)
    made = RewardModel(backbone, head, pooling, scale=2.0, shift=-3.0).eval()
    return RewardScorer(made, Encoder(words, FORMATS["raw"], 64))


def bert() -> BertModel:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertModel(BertConfig(vocab_size=len(WORDS), **sizes))


def actor_critic(reward=None, model=None, needs_critic=True, policy=None):
    policy = policy or llama(vocab=len(WORDS))
    return make_actor_critic(policy, WORDS, reward, CriticConfig(model=model), PLAIN, needs_critic)


@pytest.mark.parametrize("mlp_size", [None, 8])
def test_a_causal_reward_model_of_the_same_kind_becomes_the_critic(mlp_size):
    scorer = reward(mlp_size=mlp_size)
    made, line = actor_critic(scorer)
    assert line == "critic: starts from the reward model"
    with torch.no_grad():
        values = made.evaluate(SEQUENCES).values
    # V before token t is the *score* (scaled and shifted) of the prompt and the tokens before t.
    for i, length in enumerate(BATCH.lengths.tolist()):
        prompt = BATCH.prompts.input_ids[i][BATCH.prompts.attention_mask[i]].tolist()
        prefixes = [prompt + BATCH.response_ids[i, :t].tolist() for t in range(length)]
        torch.testing.assert_close(values[i, :length], scorer.score_ids(prefixes), rtol=0, atol=1e-5)


def test_the_critic_is_a_copy_and_the_reward_model_stays_as_it_was():
    scorer = reward()
    scorer.model.requires_grad_(False)
    before = scorer.score(["the cat"], ["sat"])
    made, _ = actor_critic(scorer)
    assert all(parameter.requires_grad for parameter in made.critic.parameters())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    assert scorer.score(["the cat"], ["sat"]) == before


@pytest.mark.parametrize(
    "scorer, reason",
    [
        (None, "the reward is not a model"),
        (reward(OTHER_WORDS), "the reward model has another tokenizer"),
        (reward(model=bert(), pooling="first"), "the reward model is not causal"),
        (reward(model=gpt2().base_model), "the reward model is a gpt2, the policy a llama"),
    ],
    ids=["none", "tokenizer", "bidirectional", "family"],
)
def test_otherwise_the_critic_is_a_copy_of_the_policy_that_predicts_0(scorer, reason):
    made, line = actor_critic(scorer)
    assert line == f"critic: a copy of the policy under a zero head ({reason})"
    assert isinstance(made, SeparateCritic)
    assert (made.evaluate(SEQUENCES).values == 0).all()
    policy, critic = made.policy.base_model.state_dict(), made.critic.state_dict()
    assert all(torch.equal(policy[name], critic[name]) for name in policy)
    assert not {p.data_ptr() for p in made.critic.parameters()} & {p.data_ptr() for p in made.policy.parameters()}


def test_a_shared_critic_is_a_zero_head_on_the_trunk():
    made, line = actor_critic(model="shared")
    assert isinstance(made, SharedTrunk)
    assert "on the policy's trunk" in line
    assert (made.evaluate(SEQUENCES).values == 0).all()


@pytest.mark.parametrize("model", [None, "shared"])
def test_a_policy_whose_states_are_narrower_than_its_layers_gets_a_critic_that_fits(model):
    policy = opt(vocab_size=len(WORDS), word_embed_proj_dim=8, do_layer_norm_before=False)
    made, _ = actor_critic(model=model, policy=policy)
    assert (made.evaluate(SEQUENCES).values == 0).all()


def test_an_algorithm_without_values_has_no_critic():
    made, line = actor_critic(reward(), model="shared", needs_critic=False)
    assert type(made) is PolicyOnly
    assert made.evaluate(SEQUENCES).values is None
    assert line.startswith("no critic")


# ----- a critic by name


def test_a_named_reward_model_becomes_the_critic(tmp_path):
    scorer = reward()
    scorer.save(tmp_path)
    made, line = actor_critic(reward(OTHER_WORDS), model=str(tmp_path))
    expected, _ = actor_critic(scorer)
    assert line == f"critic: {tmp_path}"
    with torch.no_grad():
        torch.testing.assert_close(made.evaluate(SEQUENCES).values, expected.evaluate(SEQUENCES).values)


def test_a_named_language_model_gets_a_zero_head(tmp_path):
    llama(seed=3, vocab=len(WORDS)).save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    made, line = actor_critic(model=str(tmp_path))
    assert line == f"critic: {tmp_path}"
    assert (made.evaluate(SEQUENCES).values == 0).all()


def test_a_named_reward_model_with_another_tokenizer_is_refused(tmp_path):
    reward(OTHER_WORDS).save(tmp_path)
    with pytest.raises(ConfigError, match="critic_config.model.*another tokenizer"):
        actor_critic(model=str(tmp_path))


def test_a_named_model_with_another_tokenizer_is_refused(tmp_path):
    llama(vocab=len(OTHER_WORDS)).save_pretrained(tmp_path)
    OTHER_WORDS.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="critic_config.model.*another tokenizer"):
        actor_critic(model=str(tmp_path))


def test_a_named_model_that_is_not_causal_is_refused(tmp_path):
    bert().save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="critic_config.model.*not causal"):
        actor_critic(model=str(tmp_path))


def test_a_name_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="critic_config.model"):
        actor_critic(model=str(tmp_path / "nothing"))
