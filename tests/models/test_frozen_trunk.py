"""Top blocks trained on a frozen trunk: the same numbers and gradients as the whole model, and nothing run twice."""

import copy

import pytest
import torch
from tiny import (
    FAMILIES,
    PLAIN,
    VOCAB,
    assert_same_gradients,
    engine,
    gemma2,
    gpt2,
    gradients,
    llama,
    prompts,
    rollout,
    tokenizer,
    updater,
)

from chatrlhf.config.schema import CriticConfig
from chatrlhf.errors import ConfigError
from chatrlhf.models import frozen_trunk
from chatrlhf.models.actor_critic import PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.critic_init import make_actor_critic
from chatrlhf.models.frozen_trunk import FrozenTrunk, SplitModel, freeze_trunk
from chatrlhf.models.reference import Reference
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import Sequences, join
from chatrlhf.models.weight_sharing import copy_sharing_frozen
from chatrlhf.rl.experience import ALGORITHMS, Estimation, make_experience
from chatrlhf.rl.master_weights import MasterWeights, to_bfloat16
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.rl.scoring import Scorer
from chatrlhf.types import Rollout

BLOCKS = 4
# Longer than Gemma's window of 4, so that the kind of a block's attention shows.
BATCH = rollout(prompts([3, 1, 6, 5]), [5, 2, 4, 7])


def joined(batch: Rollout, **options) -> Sequences:
    texts = batch.prompts
    return join(texts.input_ids, texts.attention_mask, batch.response_ids, batch.response_mask, **options)


def deep(family: str, **options):
    return FAMILIES[family](num_hidden_layers=BLOCKS, **options)


def head() -> ScalarHead:
    torch.manual_seed(5)
    return ScalarHead(16)


def trunk(policy, unfrozen: int, kind: str = "shared") -> FrozenTrunk:
    freeze_trunk(policy, unfrozen)
    if kind == "none":
        return FrozenTrunk(PolicyOnly(policy, PLAIN), unfrozen)
    if kind == "shared":
        return FrozenTrunk(SharedTrunk(policy, head(), PLAIN), unfrozen)
    backbone = copy_sharing_frozen(policy.base_model) if kind == "copy" else llama(seed=3).base_model
    return FrozenTrunk(SeparateCritic(policy, backbone, head(), PLAIN), unfrozen)


KINDS = ["none", "shared", "copy", "foreign"]


def blocks_of(policy) -> list:
    return list(frozen_trunk._blocks(policy.base_model))


def names(module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def perturb(module, scale: float = 0.3) -> None:
    """What training would do to what is trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


# ----- the same model


@pytest.mark.parametrize("unfrozen", [1, 2, 3, BLOCKS])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_states_give_the_numbers_and_gradients_of_the_whole_model(family, unfrozen):
    made = trunk(deep(family), unfrozen)
    whole = copy.deepcopy(made.inner)  # reads ids, and has the same weights frozen
    sequences = joined(BATCH)
    states = made.trunk_states(sequences)
    got = made.evaluate(joined(BATCH, trunk_states=states), with_entropy=True)
    want = whole.evaluate(sequences, with_entropy=True)
    weights = torch.rand(BATCH.response_mask.shape)
    for name in ("logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-5)
    for each in (got, want):
        (weights * (each.logprobs + each.values + each.entropy)).sum().backward()
    assert_same_gradients(gradients(made.inner), gradients(whole))
    assert gradients(whole).keys() == names(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_do_not_depend_on_the_width_they_are_used_at(family):
    made = trunk(deep(family), 2)
    states = made.trunk_states(joined(BATCH))
    rows = torch.tensor([1, 0])  # narrower than the longest row
    part = Rollout(
        BATCH.prompts.select(rows),
        *(getattr(BATCH, name)[rows] for name in ("response_ids", "response_mask", "sampling_logprobs")),
        BATCH.finished[rows],
        BATCH.min_new_tokens[rows],
        [BATCH.completions[i] for i in rows],
    )
    narrow = joined(part, trunk_states=states[rows])
    assert narrow.trunk_states.shape[1] < states.shape[1]
    with torch.no_grad():
        got, want = made.evaluate(narrow).logprobs, made.inner.evaluate(joined(BATCH)).logprobs[rows]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_policy_is_its_reference_and_a_trained_one_is_not(kind):
    policy = deep("llama")
    separate = Reference(copy.deepcopy(policy), PLAIN)
    made = trunk(policy, 2, kind)
    reference = made.reference()
    sequences = joined(BATCH)
    sequences.trunk_states = made.trunk_states(sequences)
    for _ in range(2):
        torch.testing.assert_close(reference.logprobs(sequences), separate.logprobs(joined(BATCH)), rtol=0, atol=1e-5)
        perturb(made)  # the second time with a trained policy: the reference has not moved
    assert (made.evaluate(sequences).logprobs - separate.logprobs(joined(BATCH))).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_without_captured_states_they_are_made(family):
    made = trunk(deep(family), 1)
    reference = made.reference()
    sequences = joined(BATCH)
    filled = joined(BATCH, trunk_states=made.trunk_states(sequences))
    assert torch.equal(made.evaluate(sequences).logprobs, made.evaluate(filled).logprobs)
    assert torch.equal(reference.logprobs(sequences), reference.logprobs(filled))


def test_the_model_is_whole_again_behind_each_evaluation():
    policy = deep("gemma2")
    ids = joined(BATCH).input_ids
    with torch.no_grad():
        before = policy(input_ids=ids).logits
        made = trunk(policy, 1)
        made.evaluate(joined(BATCH))
        with pytest.raises(RuntimeError):
            made.evaluate(joined(BATCH, trunk_states=torch.zeros(4, 12, 3)))  # a wrong width fails inside
        assert torch.equal(policy(input_ids=ids).logits, before)


# ----- what is trained, what is shared


@pytest.mark.parametrize(
    "family, tied, above",
    [
        ("llama", False, {"model.norm.weight", "lm_head.weight"}),
        ("llama", True, {"model.norm.weight"}),
        ("gpt2", True, {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("opt", True, {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"}),
        ("bloom", True, {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("gemma2", True, {"model.norm.weight"}),
    ],
)
def test_the_top_blocks_the_norm_and_an_untied_head_are_trained(family, tied, above):
    policy = deep(family, tie_word_embeddings=tied)
    freeze_trunk(policy, 2)
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    top = {id(p) for block in blocks_of(policy)[2:] for p in block.parameters()}
    assert trained - top == {id(p) for name, p in policy.named_parameters() if name in above}
    assert top <= trained


def test_opts_projections_lie_on_their_own_sides():
    policy = deep("opt", word_embed_proj_dim=8, do_layer_norm_before=False)
    freeze_trunk(policy, 1)
    assert {name for name in names(policy) if "project" in name} == {"model.decoder.project_out.weight"}


def test_what_was_frozen_before_stays_so():
    policy = deep("llama", tie_word_embeddings=False)
    policy.lm_head.requires_grad_(False)
    freeze_trunk(policy, 1)
    assert "lm_head.weight" not in names(policy) and "model.norm.weight" in names(policy)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_is_in_the_optimizers_groups(kind):
    made = trunk(deep("llama"), 1, kind)
    grouped = [id(p) for group in made.parameter_groups(1e-3, 1e-4) for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in made.parameters() if p.requires_grad})
    assert [group["lr"] for group in made.parameter_groups(1e-3, 1e-4)] == [1e-3, 1e-4][: 1 + (kind != "none")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_copies_nothing_but_what_is_trained(family):
    policy = deep(family)
    made = trunk(policy, 1)
    reference = made.reference()
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in reference.model.parameters()}
    assert shared == {id(p) for p in policy.parameters() if not p.requires_grad}
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert names(policy)  # the policy's own have not been frozen with it


def test_a_critic_copied_from_the_policy_stands_on_the_same_trunk():
    made = trunk(deep("llama"), 2, "copy")
    assert len(made.cuts) == 2
    policy, critic = made.policy.base_model, made.inner.critic
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in critic.parameters()}
    assert shared == {id(p) for p in policy.parameters() if not p.requires_grad}
    with torch.no_grad():
        want = made.inner.evaluate(joined(BATCH)).values
        torch.testing.assert_close(made.evaluate(joined(BATCH)).values, want, rtol=0, atol=1e-5)


def test_a_critic_with_blocks_of_its_own_is_trained_whole():
    made = trunk(deep("llama"), 2, "foreign")
    assert len(made.cuts) == 1
    made.evaluate(joined(BATCH)).values.sum().backward()
    assert all(p.grad is not None for p in made.inner.critic.parameters())


@pytest.mark.parametrize("model, kind", [("shared", SharedTrunk), (None, SeparateCritic)])
def test_the_factory_freezes_first(model, kind):
    words = tokenizer()
    policy = llama(vocab=len(words), num_hidden_layers=BLOCKS)
    made, line = make_actor_critic(policy, words, None, CriticConfig(model=model), PLAIN, True, unfrozen=3)
    assert isinstance(made, FrozenTrunk) and type(made.inner) is kind
    assert line.endswith("all but the top 3 blocks are frozen and shared")
    assert "model.layers.0.self_attn.q_proj.weight" not in names(policy)
    assert len(made.cuts) == 1 + (kind is SeparateCritic)


# ----- refused


@pytest.mark.parametrize("unfrozen", [BLOCKS + 1, 40])
def test_more_blocks_than_there_are(unfrozen):
    with pytest.raises(ConfigError, match=rf"num_layers_unfrozen: {unfrozen} is more than the 4 blocks"):
        freeze_trunk(deep("llama"), unfrozen)


def test_a_model_whose_blocks_need_more_than_states_is_refused(monkeypatch):
    # As in models whose every block mixes in the embeddings anew.
    policy = deep("llama")
    forward = type(policy.model.layers[0]).forward

    def mixing(self, hidden_states, **kwargs):
        self.seen = getattr(self, "seen", 0) + 1
        return forward(self, hidden_states, **kwargs) * (1 + self.seen)

    monkeypatch.setattr(type(policy.model.layers[0]), "forward", mixing)
    with pytest.raises(ConfigError, match="num_layers_unfrozen: 2 is not supported for a llama"):
        freeze_trunk(policy, 2)


def test_a_model_without_a_list_of_blocks_is_refused():
    policy = llama()
    policy.config.num_hidden_layers = 3
    with pytest.raises(ConfigError, match="num_layers_unfrozen: no list of 3 blocks was found in a llama"):
        freeze_trunk(policy, 1)


# ----- through scoring and update


def counted(module) -> list[int]:
    """One entry each time a module is run."""
    seen: list[int] = []
    module.register_forward_hook(lambda _, inputs, output: seen.append(1))
    return seen


def learn(made, reference, masters=None, epochs: int = 3, **settings):
    """A rollout scored, and the update that learns from it, before it has begun."""
    sampled = engine(made.policy, PLAIN, min_new_tokens=2).generate(prompts([3, 1, 6, 4], samples=2), seed=0)
    reward = FunctionReward(lambda users, replies: [float(len(reply)) for reply in replies], "length")
    scored = Scorer(made, reference, reward, RewardScaling(), torch.device("cpu"), 3).score(sampled)
    algorithm = "ppo" if scored.values is not None else "rloo"
    given = make_experience(scored, ALGORITHMS[algorithm], Estimation(kl_coef=0.1))
    steps = updater(made, algorithm, lr=1e-2, epochs=epochs, batch_size=4, micro_batch_size=2, masters=masters)
    return scored, lambda: steps.update(given, 0.1, torch.Generator().manual_seed(0)), steps


@pytest.mark.parametrize("kind", ["none", "shared", "copy"])
def test_the_update_never_runs_the_lower_blocks(kind):
    policy = deep("llama")
    made = trunk(policy, 1, kind)
    reference = made.reference()
    scored, update, _ = learn(made, reference)
    *lower, top = (counted(block) for block in blocks_of(policy))
    also = [counted(block) for model in (made.inner.backbones()[-1], reference.model) for block in blocks_of(model)[:3]]
    update()
    assert len(top) >= 6  # 3 epochs of 2 minibatches
    assert not any(lower) and not any(also)


def test_scoring_runs_the_lower_blocks_once_for_policy_values_and_reference():
    policy = deep("llama")
    made = trunk(policy, 2, "copy")
    reference = made.reference()
    models = (policy, made.inner.critic, reference.model)
    sampled = engine(policy, PLAIN).generate(prompts([3, 1, 6, 4]), seed=0)
    runs = [[counted(block) for block in blocks_of(model)] for model in models]
    reward = FunctionReward(lambda users, replies: [1.0] * len(users), "one")
    Scorer(made, reference, reward, RewardScaling(), torch.device("cpu")).score(sampled)
    pieces = len(runs[0][3])
    assert pieces >= 1
    assert [[len(seen) for seen in each] for each in runs] == [
        [pieces] * 4,
        [0, 0, pieces, pieces],
        [0, 0, pieces, pieces],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_is_that_of_the_whole_model(family):
    made = trunk(deep(family), 2)
    whole = copy.deepcopy(made.inner)
    start = copy.deepcopy(whole.state_dict())
    for each in (made, whole):
        scored, update, _ = learn(each, each.reference())
        stats = update()
        assert abs(scored.kl_to_reference) < 1e-5 and stats["ppo/first_ratio_error"] < 1e-5
        assert stats["ppo/approx_kl"] > 1e-6
    got, want = made.inner.state_dict(), whole.state_dict()
    moved = {name for name in want if not torch.equal(want[name], start[name])}
    assert moved and moved == {name for name in got if not torch.equal(got[name], start[name])}
    for name in moved:
        torch.testing.assert_close(got[name] - start[name], want[name] - start[name], rtol=2e-3, atol=2e-6)


def test_a_minibatch_has_the_states_of_its_rows():
    made = trunk(deep("llama"), 2, "none")
    scored, _, _ = learn(made, made.reference())
    states = scored.trunk_states
    lengths = scored.rollout.prompts.attention_mask.sum(1) + scored.rollout.lengths
    assert states.shape == (8, int(lengths.max()), 16)
    given = make_experience(scored, ALGORITHMS["rloo"], Estimation(0.1))
    rows = torch.tensor([5, 2])
    picked = given.select(rows)
    for i, row in enumerate(rows.tolist()):
        sampled = scored.rollout
        prompt = sampled.prompts.input_ids[row][sampled.prompts.attention_mask[row]]
        ids = torch.cat([prompt, sampled.response_ids[row][sampled.response_mask[row]]])
        want = made.cuts[0].states(ids[None])[0]
        torch.testing.assert_close(picked.trunk_states[i, : len(ids)], want, rtol=0, atol=1e-5)


def test_a_whole_policy_carries_no_states():
    made = SharedTrunk(llama(), head(), PLAIN)
    scored, _, _ = learn(made, made.reference())
    assert scored.trunk_states is None


# ----- in bfloat16


def test_bf16_keeps_frozen_bytes_shares_the_working_copy_and_captures_in_it():
    policy = deep("llama")
    made = trunk(policy, 2, "copy")
    reference = made.reference()
    before = copy.deepcopy(made.state_dict())
    masters = MasterWeights(*made.backbones())
    to_bfloat16(reference.model)
    scored, update, steps = learn(made, reference, masters)
    stats = update()
    assert scored.trunk_states.dtype == torch.bfloat16
    assert stats["ppo/first_ratio_error"] < 0.1 and abs(scored.kl_to_reference) < 1e-6
    frozen = {id(p) for p in policy.parameters() if not p.requires_grad}
    assert frozen <= {id(p) for p in reference.model.parameters()}
    with steps.backend.full_precision():
        after = made.state_dict()
        trained = names(made)
        assert all(value.dtype == torch.float32 for value in after.values())
        assert all(torch.equal(after[name], before[name]) == (name not in trained) for name in after)
    assert all(p.dtype == torch.bfloat16 for p in reference.model.parameters())


def test_probing_leaves_the_mode_and_no_gradient_behind():
    policy = gpt2(num_hidden_layers=BLOCKS)
    SplitModel(policy, 2).freeze()
    assert policy.training and all(p.grad is None for p in policy.parameters())


def test_gemmas_alternation_keeps_its_place():
    # Under a cut at an odd block a list that counted anew would swap the two kinds of attention.
    policy = gemma2(num_hidden_layers=BLOCKS)
    policy.set_attn_implementation("eager")  # masks are tensors then, whatever they hide
    assert policy.config.layer_types == ["sliding_attention", "full_attention"] * 2
    cut = SplitModel(policy, 3)
    seen = []
    for block in blocks_of(policy):
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    ids = torch.randint(2, VOCAB, (1, 9))
    states = cut.states(ids)
    policy.base_model(input_ids=ids)
    whole = seen[1:]
    seen.clear()
    with cut.entering(states):
        policy.base_model(input_ids=ids)
    assert len(seen) == 3 and not torch.equal(whole[0], whole[1])
    assert all(torch.equal(got, want) for got, want in zip(seen, whole[1:], strict=True))
