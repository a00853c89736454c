"""Critics, reward models and adapters of encoder–decoders: where they start from, and what is saved of them."""

import pytest
import torch
from tiny import ENCODER_DECODERS, PLAIN, flan_t5, llama, prompts, rollout, t5, tokenizer
from transformers import AutoModelForSeq2SeqLM

from chatrlhf.config.model import PeftConfig
from chatrlhf.config.schema import ActorConfig, Config, CriticConfig, RewardConfig
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.encoder_seq2seq import Seq2SeqEncoder
from chatrlhf.data.templates import FORMATS
from chatrlhf.errors import ConfigError
from chatrlhf.models.actor_critic import SeparateCritic, SharedTrunk
from chatrlhf.models.critic_init import make_actor_critic
from chatrlhf.models.for_stages import load_actor, new_reward_model, pooling_for
from chatrlhf.models.loading.backbone import backbone_of, read_by
from chatrlhf.models.loading.lora import add_adapters, base_of, save_model, task_type
from chatrlhf.models.loading.rope import positions
from chatrlhf.models.reward_model import (
    ReplyScorer,
    RewardModel,
    RewardScorer,
    load_reward_model,
    scorer_of_critic,
)
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.weight_sharing import merged_copy

WORDS = tokenizer()
BATCH = rollout(prompts([3, 1, 6]), [5, 2, 4])
IDS = torch.arange(2, 12)[None]


def sequences(made):
    return made.sequences(
        BATCH.prompts.input_ids, BATCH.prompts.attention_mask, BATCH.response_ids, BATCH.response_mask
    )


def actor_critic(family: str = "flan_t5", reward=None, model=None, reward_name=None):
    policy = ENCODER_DECODERS[family](vocab_size=len(WORDS))
    return make_actor_critic(policy, WORDS, reward, CriticConfig(model=model), PLAIN, True, reward_name)


def saved(model, folder):
    model.save_pretrained(folder)
    WORDS.save_pretrained(folder)
    return str(folder)


# ----- critics


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_critic_is_a_copy_of_the_policy_without_its_head(family):
    made, line = actor_critic(family)
    assert isinstance(made, SeparateCritic) and "a copy of the policy under a zero head" in line
    assert (made.evaluate(sequences(made)).values == 0).all()
    assert not {p.data_ptr() for p in made.critic.parameters()} & {p.data_ptr() for p in made.policy.parameters()}
    assert not any("lm_head" in name for name in made.critic.state_dict())
    assert all(each.requires_grad for each in made.critic.parameters())


@pytest.mark.parametrize("kind", ["causal", "start"])
def test_a_reward_model_that_reads_otherwise_is_no_critic(kind):
    if kind == "causal":
        model = RewardModel(llama(vocab=len(WORDS)).base_model, ScalarHead(16))
    else:
        model = RewardModel(backbone_of(flan_t5(vocab_size=len(WORDS))), ScalarHead(16), "start")
    scorer = RewardScorer(model, Encoder(WORDS, FORMATS["raw"], 64))
    line = actor_critic(reward=scorer)[1]
    assert line == (
        "critic: a copy of the policy under a zero head (the reward model does not read a prompt and its reply apart)"
    )
    with pytest.raises(ConfigError, match="cannot be the critic: the reward model does not read"):
        actor_critic(reward=scorer, model="judge", reward_name="judge")


def test_a_named_encoder_decoder_gets_a_zero_head_and_any_other_is_refused(tmp_path):
    made, line = actor_critic(model=saved(t5(vocab_size=len(WORDS)), tmp_path / "t5"))
    assert line == f"critic: {tmp_path / 't5'}" and (made.evaluate(sequences(made)).values == 0).all()
    with pytest.raises(ConfigError, match="is no encoder-decoder and the actor is one"):
        actor_critic(model=saved(llama(vocab=len(WORDS)), tmp_path / "llama"))
    with pytest.raises(ConfigError, match="is an encoder-decoder and the actor is none"):
        make_actor_critic(llama(vocab=len(WORDS)), WORDS, None, CriticConfig(model=str(tmp_path / "t5")), PLAIN, True)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_saved_critic_gives_the_value_behind_a_reply_and_starts_another(family, tmp_path):
    made, _ = actor_critic(family, model="shared")
    assert isinstance(made, SharedTrunk)
    torch.nn.init.normal_(made.value_head.out.weight)
    encoder = Seq2SeqEncoder(WORDS, FORMATS["raw"], 64)
    critic = scorer_of_critic(*made.value_function(), encoder)
    users, replies = ["the cat", "on the mat and the hat"], ["sat on the mat", "is"]
    scores = critic(users, replies)
    backbone, start = made.value_function()[0], made.policy.config.decoder_start_token_id
    for user, reply, score in zip(users, replies, scores, strict=True):
        decoder_ids = torch.tensor([[start, *encoder.completion("a", reply)]])
        with torch.no_grad():
            states = backbone(input_ids=torch.tensor([encoder.prompt(user)]), decoder_input_ids=decoder_ids)
            assert score == pytest.approx(made.value_head(states.last_hidden_state[0, -1]).item(), abs=1e-5)
    critic.save(tmp_path)
    loaded = load_reward_model(tmp_path)
    assert type(loaded) is ReplyScorer and loaded(users, replies) == pytest.approx(scores, abs=1e-5)
    # A reply that was cut has no EOS; one beyond the context costs its prompt's beginning.
    assert loaded.encode("the cat", "sat", finished=False)[1] == encoder.completion("a", "sat")[:-1]
    prompt, reply = loaded.encode("the cat " * 40, "sat on")
    assert reply == encoder.completion("a", "sat on") and len(prompt) + len(reply) == 64
    again, line = actor_critic(family, model=str(tmp_path))
    assert line == f"critic: {tmp_path}"
    torch.testing.assert_close(again.evaluate(sequences(again)).values, made.evaluate(sequences(made)).values)


# ----- reward models


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_as_a_reward_model_its_encoder_reads_the_whole_text(family, tmp_path):
    model = ENCODER_DECODERS[family](vocab_size=len(WORDS))
    name = saved(model, tmp_path / "actor")
    whole = Config(actor_config=ActorConfig(model=name, template="raw"), reward_config=RewardConfig(model="actor"))
    made = new_reward_model(whole, None, [], torch.device("cpu"))
    made.model.eval()
    assert made.model.pooling == pooling_for(backbone_of(model)) == "start"
    ids = made.encode("the cat", "sat on the mat")
    with torch.no_grad():
        start = torch.tensor([[model.config.decoder_start_token_id]])
        states = made.model.backbone(input_ids=torch.tensor([ids]), decoder_input_ids=start).last_hidden_state
        want = made.model.head(states[0, 0]).item()
    # Whatever stands beside it in a batch.
    scores = made(["the cat", "on the hat of the cat"], ["sat on the mat", "is the mat"])
    assert scores[0] == pytest.approx(want, abs=1e-5) and scores[0] != pytest.approx(scores[1], abs=1e-3)
    made.save(tmp_path / "reward")
    assert load_reward_model(tmp_path / "reward")(["the cat"], ["sat on the mat"]) == pytest.approx([want], abs=1e-5)
    # TRL's checkpoints: each weight once, and enough to go on with.
    state = {key: each.clone() for key, each in made.model.state_dict().items()}
    assert len({each.data_ptr() for each in made.model.state_dict().values()}) == len(state)
    with torch.no_grad():
        for each in made.model.parameters():
            each.zero_()
    made.model.load_state_dict(state, strict=False)
    assert made(["the cat"], ["sat on the mat"]) == pytest.approx([want], abs=1e-5)


def test_relative_positions_have_no_bound_and_absolute_ones_bound_both_together():
    assert positions(t5(n_positions=512).config) == 1 << 30
    assert positions(ENCODER_DECODERS["bart"]().config) == 64


@pytest.mark.parametrize("family", ["t5", "flan_t5", "bart"])
def test_more_embeddings_leave_the_rest_of_a_model_as_it_was(family, tmp_path):
    """Also a Flan-T5's head, which its configuration says is tied to the embeddings."""
    model = ENCODER_DECODERS[family](vocab_size=len(WORDS) - 3).eval()
    config = ActorConfig(model=saved(model, tmp_path / "small"), resize_embeddings=True)
    larger, _ = load_actor(config, [], torch.device("cpu"))
    larger.save_pretrained(tmp_path / "larger")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "larger")
    with torch.no_grad():
        want = model(**read_by(model.config, IDS)).logits
        for made in (larger.eval(), again.eval()):
            got = made(**read_by(model.config, IDS)).logits
            assert got.shape[-1] == len(WORDS)
            torch.testing.assert_close(got[..., :-3], want, rtol=0, atol=1e-4)


# ----- adapters


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_adapters_are_trained_put_aside_saved_and_loaded(family, targets, tmp_path):
    made, _ = actor_critic(family, model="shared")
    policy = made.policy
    base = saved(policy, tmp_path / "base")
    start = made.evaluate(sequences(made)).logprobs.detach()
    add_adapters(policy, PeftConfig(r=4, lora_alpha=12, target_modules=targets), base)
    reference = made.reference()
    with torch.no_grad():
        for each in policy.parameters():
            if each.requires_grad:
                each.add_(0.1 * torch.randn_like(each))
    now = made.evaluate(sequences(made)).logprobs
    assert (now - start).abs().max() > 0.05
    torch.testing.assert_close(reference.logprobs(sequences(made)), start, rtol=0, atol=1e-5)
    now.sum().backward()
    trained = {name for name, each in policy.named_parameters() if each.requires_grad}
    reached = {name for name, each in policy.named_parameters() if each.grad is not None and each.grad.any()}
    assert trained == reached and all(".lora_" in name for name in trained)
    assert any("encoder" in name for name in trained) and any("decoder" in name for name in trained)
    save_model(policy, tmp_path / "adapters")
    assert base_of(str(tmp_path / "adapters")) == base
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapters").eval()
    with torch.no_grad():
        want = policy(**read_by(policy.config, IDS)).logits
        torch.testing.assert_close(loaded(**read_by(policy.config, IDS)).logits, want, rtol=0, atol=1e-4)
        # Their sum, for a critic of its own, and as the shared one is saved.
        states = backbone_of(policy)(**read_by(policy.config, IDS)).last_hidden_state
        copied = merged_copy(backbone_of(policy))(**read_by(policy.config, IDS)).last_hidden_state
        torch.testing.assert_close(copied, states, rtol=0, atol=1e-4)
    scorer_of_critic(*made.value_function(), Seq2SeqEncoder(WORDS, FORMATS["raw"], 64)).save(tmp_path / "critic")
    with torch.no_grad():
        critic = load_reward_model(tmp_path / "critic").model.backbone
        torch.testing.assert_close(critic(**read_by(policy.config, IDS)).last_hidden_state, states, rtol=0, atol=1e-4)


def test_a_task_type_has_to_be_the_models():
    assert task_type(t5().config, PeftConfig()) == "SEQ_2_SEQ_LM"
    assert task_type(llama().config, PeftConfig(task_type="CAUSAL_LM")) == "CAUSAL_LM"
    with pytest.raises(ConfigError, match="task_type CAUSAL_LM is not that of a t5, which is SEQ_2_SEQ_LM"):
        task_type(t5().config, PeftConfig(task_type="CAUSAL_LM"))
