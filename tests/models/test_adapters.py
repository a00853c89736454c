"""Adapters in a policy: trained alone, off in the reference, and saved so that others can load them."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import (
    FAMILIES,
    PLAIN,
    assert_same_gradients,
    engine,
    gpt2,
    gradients,
    llama,
    prompts,
    rollout,
    tokenizer,
    updater,
)
from transformers import AutoModel, AutoModelForCausalLM

from chatrlhf.config.model import PeftConfig
from chatrlhf.data.templates import FORMATS
from chatrlhf.errors import ConfigError
from chatrlhf.models.actor_critic import PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.for_stages import load_policy
from chatrlhf.models.loading.lora import add_adapters, backbone_with_adapters, base_of, has_adapters, save_model
from chatrlhf.models.reference import Reference, reference_of
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import Sequences, join
from chatrlhf.models.weight_sharing import copy_without_adapters
from chatrlhf.rl.experience import ALGORITHMS, Estimation, make_experience
from chatrlhf.rl.master_weights import MasterWeights, to_bfloat16
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.rl.scoring import Scorer

BATCH = rollout(prompts([3, 1, 6, 5]), [5, 2, 4, 7])
CPU = torch.device("cpu")


def joined() -> Sequences:
    texts = BATCH.prompts
    return join(texts.input_ids, texts.attention_mask, BATCH.response_ids, BATCH.response_mask)


def adapted(family: str = "llama", base: str = "nowhere", **settings):
    policy = FAMILIES[family]()
    add_adapters(policy, PeftConfig(**settings), base)
    return policy


def perturb(model, scale: float = 0.3) -> None:
    """What training would do to what is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=joined().input_ids).logits


# ----- the reference is the policy without its adapters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_adapters_every_logit_is_the_sft_models(family, precision):
    sft, policy = FAMILIES[family]().eval(), adapted(family).eval()
    if precision == "bf16":
        MasterWeights(policy)
        to_bfloat16(sft)
    want = logits(sft)
    assert torch.equal(logits(policy), want)  # fresh adapters add nothing
    perturb(policy)
    assert (logits(policy) - want).abs().max() > 0.05
    assert torch.equal(logits(copy_without_adapters(policy)), want)
    assert not torch.equal(logits(policy), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_references_logprobs_are_the_sft_models(family):
    separate = Reference(FAMILIES[family](), PLAIN)
    made = PolicyOnly(adapted(family), PLAIN)
    reference = made.reference()
    own, others = ({id(p) for p in model.parameters()} for model in (reference.model, made.policy))
    names = {name for name, p in reference.model.named_parameters() if id(p) not in others}
    assert names and all(".lora_" in name for name in names) and own & others
    for _ in range(2):
        torch.testing.assert_close(reference.logprobs(joined()), separate.logprobs(joined()), rtol=0, atol=1e-6)
        perturb(made.policy)
    difference = made.evaluate(joined()).logprobs - reference.logprobs(joined())
    assert difference.abs().max() > 0.05


def test_asking_the_reference_leaves_the_policy_trainable():
    made = PolicyOnly(adapted(), PLAIN)
    before = {name for name, p in made.named_parameters() if p.requires_grad}
    made.reference().logprobs(joined())
    assert before == {name for name, p in made.named_parameters() if p.requires_grad} != set()


def test_a_policy_without_adapters_has_a_reference_of_its_own():
    policy = llama()
    reference = reference_of(policy, PLAIN)
    assert type(reference) is Reference and not has_adapters(policy)
    assert not {id(p) for p in reference.model.parameters()} & {id(p) for p in policy.parameters()}


# ----- what is trained


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_are_trained(family):
    policy = adapted(family)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    (group,) = PolicyOnly(policy, PLAIN).parameter_groups(1e-3, 1e-3)
    assert {id(p) for p in group["params"]} == {id(p) for n, p in policy.named_parameters() if n in trained}


def test_rank_scale_and_targets_are_those_of_the_file():
    policy = adapted(r=3, lora_alpha=12, target_modules=["o_proj"])
    layer = policy.model.layers[0].self_attn.o_proj
    assert layer.lora_A["default"].weight.shape == (3, 16) and layer.scaling["default"] == 4
    assert not hasattr(policy.model.layers[0].self_attn.q_proj, "lora_A")


def test_a_family_without_usual_layers_gets_adapters_in_all_linear_ones(monkeypatch):
    policy = llama()
    policy.config.model_type = "something new"
    add_adapters(policy, PeftConfig(), "nowhere")
    block = policy.model.layers[0]
    assert all(hasattr(layer, "lora_A") for layer in (block.self_attn.k_proj, block.mlp.up_proj))
    assert not hasattr(policy.lm_head, "lora_A")


def test_layers_that_are_not_there_are_a_named_error():
    with pytest.raises(ConfigError, match=r"peft_config_path: no adapters for target_modules \['attention'\]"):
        adapted(target_modules=["attention"])


def test_dropout_of_adapters_is_off():
    policy = gpt2(dropout=0.0)
    add_adapters(policy, PeftConfig(lora_dropout=0.5), "nowhere")
    perturb(policy)
    made = PolicyOnly(policy, PLAIN)
    assert torch.equal(made.evaluate(joined()).logprobs, made.evaluate(joined()).logprobs)
    # And where they are added behind it, as the pipeline does.
    made = PolicyOnly(gpt2(dropout=0.0), PLAIN)
    add_adapters(made.policy, PeftConfig(lora_dropout=0.5), "nowhere")
    perturb(made.policy)
    assert torch.equal(made.evaluate(joined()).logprobs, made.evaluate(joined()).logprobs)


def test_a_trunk_with_adapters_carries_the_value_head():
    torch.manual_seed(5)
    made = SharedTrunk(adapted(), ScalarHead(16), PLAIN)
    perturb(made)
    plain = SharedTrunk(llama(), copy.deepcopy(made.value_head), PLAIN)
    with torch.no_grad():
        values = made.evaluate(joined()).values
        assert (values - plain.evaluate(joined()).values).abs().max() > 0.05
        bare = SharedTrunk(copy_without_adapters(made.policy), made.value_head, PLAIN)
        torch.testing.assert_close(bare.evaluate(joined()).values, plain.evaluate(joined()).values)
    made.evaluate(joined()).values.sum().backward()
    moved = gradients(made)
    assert {name for name in moved if "lora_" in name} and all("lora_" in n or "value_head" in n for n in moved)


def test_gradients_are_those_of_the_product():
    """The gradient of x (W + s B A) with respect to A and B, from that of W in a plain model of merged weights."""
    policy = adapted(r=2, lora_alpha=6, target_modules=["q_proj"])
    perturb(policy)
    plain = llama()
    pairs = {}
    with torch.no_grad():
        for i, (ours, theirs) in enumerate(zip(policy.model.layers, plain.model.layers, strict=True)):
            layer, linear = ours.self_attn.q_proj, theirs.self_attn.q_proj
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            linear.weight += 3 * b @ a
            pairs[i] = (a, b, linear.weight)
    for model in (policy, plain):
        PolicyOnly(model, PLAIN).evaluate(joined()).logprobs.sum().backward()
    for a, b, weight in pairs.values():
        got = {"a": a.grad, "b": b.grad}
        assert_same_gradients(got, {"a": 3 * b.T @ weight.grad, "b": 3 * weight.grad @ a.T})


# ----- through sampling, scoring and update


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["none", "shared", "separate"])
def test_an_update_moves_adapters_and_critic_and_nothing_else(kind, precision):
    policy = llama()
    made = {
        "none": lambda: PolicyOnly(policy, PLAIN),
        "shared": lambda: SharedTrunk(policy, ScalarHead(16), PLAIN),
        "separate": lambda: SeparateCritic(policy, copy.deepcopy(policy.base_model), ScalarHead(16), PLAIN),
    }[kind]()
    add_adapters(policy, PeftConfig(), "nowhere")
    reference, masters = made.reference(), None
    if precision == "bf16":
        masters = MasterWeights(*made.backbones())
        to_bfloat16(reference.model)
    before = copy.deepcopy(made.state_dict())
    sampled = engine(policy, PLAIN, min_new_tokens=2).generate(prompts([3, 1, 6, 4], samples=2), seed=0)
    reward = FunctionReward(lambda users, replies: [float(len(reply)) for reply in replies], "length")
    scorer = Scorer(made, reference, reward, RewardScaling(), CPU, 3)
    scored = scorer.score(sampled)
    tight = 1e-5 if precision == "fp32" else 0.1
    assert abs(scored.kl_to_reference) <= 1e-6
    torch.testing.assert_close(scored.old_logprobs, sampled.sampling_logprobs, rtol=0, atol=tight)
    algorithm = "rloo" if kind == "none" else "ppo"
    given = make_experience(scored, ALGORITHMS[algorithm], Estimation(0.1))
    steps = updater(made, algorithm, lr=0.3, epochs=2, batch_size=4, masters=masters, max_grad_norm=None)
    stats = steps.update(given, 0.1, torch.Generator().manual_seed(0))
    assert stats["ppo/first_ratio_error"] < tight and stats["ppo/approx_kl"] > 1e-6
    after = made.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in moved if name.startswith("policy.")} and moved <= {
        name for name, p in made.named_parameters() if p.requires_grad
    }
    assert all(".lora_" in name or not name.startswith("policy.") for name in moved)
    assert (kind == "none") == (not any(not name.startswith("policy.") for name in moved))
    assert abs(scorer.score(sampled).kl_to_reference) > 1e-3


def test_bf16_keeps_float32_of_adapters_and_not_of_the_base():
    policy = adapted()
    masters = MasterWeights(policy)
    assert all(p.dtype == torch.bfloat16 for p in policy.parameters())
    with masters.fp32_weights():
        dtypes = {("lora_" in name): p.dtype for name, p in policy.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


# ----- on disk


@pytest.fixture
def saved(tmp_path):
    """(SFT folder, folder of adapters on it, the policy in memory)."""
    words = tokenizer()
    base, folder = tmp_path / "actor", tmp_path / "actor_rl"
    llama(vocab=len(words)).save_pretrained(base)
    policy = llama(vocab=len(words))
    add_adapters(policy, PeftConfig(), str(base))
    perturb(policy)
    for target, model in ((folder, policy),):
        model.save_pretrained(target)
    for each in (base, folder):
        words.save_pretrained(each)
        FORMATS["raw"].save(each)
    return base, folder, policy


def test_adapters_are_saved_in_pefts_format_without_their_base(saved):
    base, folder, policy = saved
    assert (folder / "adapter_config.json").exists() and not (folder / "model.safetensors").exists()
    weights = load_file(folder / "adapter_model.safetensors")
    assert weights and all("lora_" in name for name in weights)
    assert base_of(str(folder)) == str(base) and base_of(str(base)) is None


def test_everybody_loads_the_same_policy(saved):
    base, folder, policy = saved
    want = logits(policy)
    ours, words, template = load_policy(folder, CPU)
    transformers_own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pefts_own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    for model in (ours, transformers_own, pefts_own):
        torch.testing.assert_close(logits(model.eval()), want, rtol=1e-4, atol=1e-4)
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - want).abs().max() > 0.05
    assert type(ours) is type(llama()) and not has_adapters(ours)
    assert not any("lora_" in name for name, _ in ours.named_parameters())
    assert template is not None and len(words) == policy.config.vocab_size


def test_a_run_that_was_moved_finds_its_actor_beside_it(saved, tmp_path):
    base, folder, policy = saved
    new = tmp_path / "elsewhere"
    new.mkdir()
    for each in (base, folder):
        each.rename(new / each.name)
    ours, _, _ = load_policy(new / "actor_rl", CPU)
    torch.testing.assert_close(logits(ours), logits(policy), rtol=1e-4, atol=1e-4)


def test_adapters_without_their_base_are_an_error_that_names_it(saved):
    base, folder, _ = saved
    base.rename(base.parent / "gone")
    with pytest.raises(ConfigError, match="actor_config.model: .*actor"):
        load_policy(folder, CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_saves_its_adapters_by_itself(tmp_path, family):
    plain = FAMILIES[family]()
    plain.base_model.save_pretrained(tmp_path / "base")
    policy = adapted(family, str(tmp_path / "base")).eval()
    perturb(policy)
    save_model(backbone_with_adapters(policy), tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = policy.base_model(input_ids=joined().input_ids).last_hidden_state
        got = loaded(input_ids=joined().input_ids).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_plain_model_is_saved_as_it_is(tmp_path):
    save_model(llama().base_model, tmp_path / "ours")
    llama().base_model.save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs
