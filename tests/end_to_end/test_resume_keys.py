"""Each configuration key, changed once between a stop and --resume: in force, or refused by name.

The cases are made from the schema: a key that is added stands in the table and has a probe here, or these tests fail.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resuming import configured, resumed, stop, write_case
from transformers import get_scheduler

from chatrlhf.config.on_resume import LENGTH, RULES, OnResume, flat, rules
from chatrlhf.config.schema import STAGES, Config
from chatrlhf.errors import CheckpointError
from chatrlhf.runtime.manifest import Manifest
from chatrlhf.stages.resume import Resumption

SECTION = {
    "PRETRAIN": "pretrain_config",
    "ACTOR": "actor_config",
    "REWARD": "reward_config",
    "RL": "trainer_config",
}
OTHER = "something else"  # than any value


def keys_of(on_resume: OnResume, stage: str | None = None) -> list[str]:
    return [key for key, rule in rules().items() if rule.on_resume is on_resume and stage in (None, *rule.stages)]


# ----- the table, without models


def test_each_key_of_the_schema_has_one_rule():
    counts = Counter(key for rule in RULES for key in rule.dotted())
    assert set(counts.values()) == {1} and counts.keys() == flat({}).keys()
    assert len(counts) > 200


def begun(tmp_path: Path, status: str = "begun", **record: Any) -> Manifest:
    old = flat({})
    stages = {
        stage: {
            "status": status,
            "made_from": {"data": {}},
            "settings": {key: old[key] for key, rule in rules().items() if stage in rule.stages},
            **record,
        }
        for stage in STAGES
    }
    manifest = Manifest(tmp_path, stages, Config().model_dump(mode="json"))
    manifest.begin(Config(), list(STAGES))
    return manifest


def resumption(manifest: Manifest, stages: tuple[str, ...] = STAGES, made_from: Any = None, **changes: Any):
    new = flat({}) | {key.replace("__", "."): value for key, value in changes.items()}
    return Resumption(manifest, new, list(stages), lambda stage: made_from or {"data": {}}, lambda stage: ())


@pytest.mark.parametrize("key", keys_of(OnResume.REFUSED))
def test_what_may_not_change_is_refused_by_name(tmp_path, key):
    with pytest.raises(CheckpointError, match=f"^--resume: {key}: .* -> '{OTHER}' cannot change, .* was begun with it"):
        resumption(begun(tmp_path), **{key: OTHER}).check()
    # Whoever is finished was made with it, too.
    with pytest.raises(CheckpointError, match=f"{key}: "):
        resumption(begun(tmp_path, "done"), **{key: OTHER}).check()
    fresh = Manifest(tmp_path / "fresh", {}, Config().model_dump(mode="json"))
    assert resumption(fresh, **{key: OTHER}).check()[0].endswith(f"'{OTHER}' takes effect")


@pytest.mark.parametrize("key", keys_of(OnResume.NO_EFFECT))
def test_what_has_no_effect_is_free_and_said_to_have_none(tmp_path, key):
    (line,) = resumption(begun(tmp_path), **{key: OTHER}).check()
    assert line.startswith("settings differ from the run that is resumed: ")
    assert line.endswith(f"{key}: {flat({})[key]!r} -> '{OTHER}' has no effect on training")


@pytest.mark.parametrize("key", keys_of(OnResume.TAKES_EFFECT))
def test_what_takes_effect_is_said_to_and_of_finished_stages_that_it_does_not(tmp_path, key):
    value = 10**6 if key in LENGTH.values() else OTHER
    (line,) = resumption(begun(tmp_path), **{key: value}).check()
    assert line.endswith(f"{value!r} takes effect")
    if key not in LENGTH.values():
        (line,) = resumption(begun(tmp_path, "done"), **{key: value}).check()
        assert line.endswith("finished") and "has no effect" in line
    others = tuple(stage for stage in STAGES if stage not in rules()[key].stages)
    if others:
        (line,) = resumption(begun(tmp_path), others, **{key: value}).check()
        assert line.endswith(f"has no effect on {' and '.join(others)}")


@pytest.mark.parametrize("key", keys_of(OnResume.BY_CONTENT))
def test_what_names_content_is_compared_by_content(tmp_path, key):
    stage = rules()[key].stages[-1]
    before = {"data": {}, key: ["old place", "hash"]}
    manifest = begun(tmp_path, made_from=before)
    same, other = before | {key: [OTHER, "hash"]}, before | {key: [OTHER, "another"]}
    (line,) = resumption(manifest, (stage,), same, **{key: OTHER}).check()
    assert line.endswith("takes effect, the content is the same")
    with pytest.raises(CheckpointError, match=f"{key}: the content of {OTHER} is not what {stage} was begun with"):
        resumption(manifest, (stage,), other, **{key: OTHER}).check()


# ----- in force: a resumed trainer with the key changed


def lrs(optimizer: Any, scheduler: Any, steps: int = 3) -> list[float]:
    """Learning rates of the first group, now and in the next steps."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer steps here
            scheduler.step()
    return found


def schedule_by_hand(section: Any, lr: float, done: int, total: int, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_scheduler(section.lr_scheduler, optimizer, section.warmup_steps, total)
    return lrs(optimizer, scheduler, done + steps)[done:]


def of_group(name: str) -> Callable[[Any], Any]:
    return lambda trainer: trainer.optimizer.param_groups[0][name]


def of_args(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.args, name)


def callback(trainer: Any) -> Any:
    return next(each for each in trainer.callback_handler.callbacks if hasattr(each, "store"))


# key -> (its new value, what a resumed trainer shows of it)
ON_TRL = {
    "lr_scheduler": ("linear", of_args("lr_scheduler_type")),
    "warmup_steps": (5, of_args("warmup_steps")),
    "weight_decay": (0.25, of_group("weight_decay")),
    "betas": ([0.5, 0.75], lambda trainer: list(trainer.optimizer.param_groups[0]["betas"])),
    "max_grad_norm": (0.125, of_args("max_grad_norm")),
    "precision": ("bf16", lambda trainer: trainer.accelerator.mixed_precision),
    "gradient_checkpointing": (
        True,
        lambda trainer: getattr(trainer.model, "backbone", trainer.model).is_gradient_checkpointing,
    ),
    "lr": (0.5, of_args("learning_rate")),
    "batch_size": (4, lambda trainer: trainer.order.batch_size),
    "micro_batch_size": (2, of_args("per_device_train_batch_size")),
    "eval_interval": (5, lambda trainer: trainer.state.eval_steps),
    "checkpoint_steps": (7, lambda trainer: trainer.state.save_steps),
    "n_checkpoints_to_keep": (9, lambda trainer: callback(trainer).store.keep),
    "epochs": (4, lambda trainer: trainer.state.num_train_epochs),
    "steps": (11, lambda trainer: trainer.state.max_steps),
    "label_smoothing_factor": (0.25, lambda trainer: trainer.label_smoother.epsilon),
    "neftune_noise_alpha": (3.0, lambda trainer: trainer.model.get_input_embeddings().neftune_noise_alpha),
    "attn_implementation": ("eager", lambda trainer: trainer.model.config._attn_implementation),
}
STOPPED_AT = 4  # of 7 optimizer steps an epoch


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """The configuration of a run in which a stage was stopped."""
    trees: dict[str, Any] = {}

    def of(stage: str) -> dict[str, Any]:
        if stage not in trees:
            folder = tmp_path_factory.mktemp(stage.lower())
            trees[stage] = write_case(folder)
            if stage == "RL":
                trees[stage]["reward_config"] = {"reward_fn": f"judge_{folder.name}:length"}
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(str(folder))
                stop(configured(trees[stage]), stage, 3 if stage == "RL" else STOPPED_AT)
        return trees[stage]

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path_factory.getbasetemp()))
        yield of


def shown_on_trl(trainer: Any, config: Any, done: int) -> None:
    """The schedule is that of this configuration at the step that was reached."""
    assert trainer.state.max_steps == trainer.total_steps > done
    want = schedule_by_hand(config, config.lr, done, trainer.total_steps)
    assert lrs(trainer.optimizer, trainer.lr_scheduler) == pytest.approx(want, rel=1e-12)


ALL_AT_ONCE = pytest.mark.parametrize("at_once", [True, pytest.param(False, marks=pytest.mark.slow)])


@ALL_AT_ONCE
@pytest.mark.parametrize("stage", ["PRETRAIN", "ACTOR", "REWARD"])
def test_keys_of_stages_on_trl_are_in_force(stopped, stage, at_once):
    tree, section = stopped(stage), SECTION[stage]
    names = [key.partition(".")[2] for key in keys_of(OnResume.TAKES_EFFECT, stage) if key.startswith(section)]
    assert set(names) <= ON_TRL.keys() and len(names) > 10
    for together in [names] if at_once else [[name] for name in names]:
        config = configured(tree, **{f"{section}.{name}": ON_TRL[name][0] for name in together})
        trainer = resumed(config, stage)
        for name in together:
            value, shown = ON_TRL[name]
            assert shown(trainer) == value, name
        shown_on_trl(trainer, getattr(config, section), STOPPED_AT)


def engine(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.engine.limits, name)


def of_settings(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.updater.settings, name)


def of_scaling(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.scorer.scaling, name)


def of_kl(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.kl, name)


def of_estimation(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.estimation(1.0), name)


def of_policy_group(name: str) -> Callable[[Any], Any]:
    return lambda trainer: trainer.updater.backend.optimizer.param_groups[0][name]


def distribution(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.updater.actor_critic.distribution, name)


def forbidden(trainer: Any) -> tuple[int, ...]:
    return distribution("forbidden_ids")(trainer)


def policy(trainer: Any) -> Any:
    return trainer.updater.actor_critic.policy


def of_vllm(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.engine.asked, name)


def recomputes(trainer: Any) -> bool:
    forwards = [vars(each).get("forward") for each in trainer.updater.actor_critic.modules()]
    return any(each is not None and each.__code__.co_name == "forward_of_block" for each in forwards)


def in_bfloat16(trainer: Any) -> str:
    return "fp32" if trainer.updater.backend.masters is None else "bf16"


def of_guards(name: str) -> Callable[[Any], Any]:
    def asked(trainer: Any) -> Any:
        value = getattr(trainer.guards.keys, name)
        return list(value) if isinstance(value, tuple) else value

    return asked


BANDS = [
    "silence",
    "kl_per_token",
    "kl_per_reply",
    "entropy",
    "repetition",
    "distinct_2",
    "length_change",
    "finished_drop",
    "clip_fraction",
    "explained_variance",
    "flat_rewards",
    "forgotten",
]
IN_RL = {
    "trainer_config.lr_scheduler": ("linear", None),
    "trainer_config.warmup_steps": (9, None),
    "trainer_config.weight_decay": (0.25, of_policy_group("weight_decay")),
    "trainer_config.betas": ([0.5, 0.75], lambda trainer: list(of_policy_group("betas")(trainer))),
    "trainer_config.max_grad_norm": (0.125, of_settings("max_grad_norm")),
    "trainer_config.precision": ("bf16", in_bfloat16),
    "trainer_config.gradient_checkpointing": (True, recomputes),
    "trainer_config.actor_lr": (0.5, of_policy_group("initial_lr")),
    "trainer_config.critic_lr": (0.5, lambda trainer: trainer.updater.backend.optimizer.param_groups[-1]["initial_lr"]),
    "trainer_config.batch_size": (8, of_settings("batch_size")),
    "trainer_config.micro_batch_size": (1, of_settings("micro_batch_size")),
    "trainer_config.ppo_epochs": (3, of_settings("epochs")),
    "trainer_config.total_episodes": (64, lambda trainer: trainer.progress(trainer.num_steps).episodes),
    "trainer_config.num_rollouts": (12, lambda trainer: trainer.prompts.prompts_per_step),
    "trainer_config.samples_per_prompt": (2, lambda trainer: trainer.prompts.samples_per_prompt),
    "trainer_config.chunk_size": (3, lambda trainer: trainer.engine.chunk_size),
    "trainer_config.init_kl_coef": (0.5, of_kl("coef")),
    "trainer_config.target": (0.75, of_kl("target")),
    "trainer_config.horizon": (70, of_kl("horizon")),
    "trainer_config.gamma": (0.5, of_estimation("gamma")),
    "trainer_config.lam": (0.5, of_estimation("lam")),
    "trainer_config.cliprange": (0.5, of_settings("cliprange")),
    "trainer_config.cliprange_value": (0.5, of_settings("cliprange_value")),
    "trainer_config.vf_coef": (0.5, of_settings("vf_coef")),
    "trainer_config.entropy_coef": (0.5, of_settings("entropy_coef")),
    "trainer_config.whiten_advantages": (False, of_estimation("whiten_advantages")),
    "trainer_config.cliprange_reward": (0.5, of_scaling("cliprange")),
    "trainer_config.scale_reward": ("ref", of_scaling("mode")),
    "trainer_config.ref_std": (0.5, of_scaling("ref_std")),
    "trainer_config.missing_eos_penalty": (0.5, of_scaling("missing_eos_penalty")),
    "trainer_config.rollout_backend": ("vllm", lambda trainer: trainer.engine.name),
    "trainer_config.model_kernels": ("off", lambda trainer: "auto" if trainer.engine.fused_step else "off"),
    "trainer_config.importance_cap": (0.5, of_settings("importance_cap")),
    "trainer_config.eval_interval": (5, lambda trainer: trainer.eval_interval),
    "trainer_config.checkpoint_steps": (7, lambda trainer: trainer.checkpoint_steps),
    "trainer_config.n_checkpoints_to_keep": (9, lambda trainer: trainer.checkpoints.keep),
    "trainer_config.gen_kwargs.max_new_tokens": (5, engine("max_new_tokens")),
    "trainer_config.gen_kwargs.min_new_tokens": (3, engine("min_new_tokens")),
    "trainer_config.gen_kwargs.min_length": (3, engine("min_length")),
    "trainer_config.gen_kwargs.temperature": (0.75, distribution("temperature")),
    "trainer_config.gen_kwargs.stop": (["\n"], lambda trainer: trainer.engine.stop),
    "trainer_config.gen_kwargs.forbidden_tokens": ([7], lambda trainer: [7] if 7 in forbidden(trainer) else []),
    "trainer_config.gen_kwargs.eos_token_id": (9, lambda trainer: distribution("eos_token_ids")(trainer)[0]),
    "trainer_config.vllm.mode": ("server", of_vllm("mode")),
    "trainer_config.vllm.gpu_memory_utilization": (0.5, of_vllm("gpu_memory_utilization")),
    "trainer_config.vllm.enable_sleep_mode": (True, of_vllm("enable_sleep_mode")),
    "trainer_config.vllm.server_base_url": ("http://there:1", of_vllm("server_base_url")),
    "trainer_config.vllm.server_timeout": (1.0, of_vllm("server_timeout")),
    "trainer_config.vllm.group_port": (99, of_vllm("group_port")),
    "reward_config.reward_timeout": (40.0, lambda trainer: trainer.scorer.reward.seconds),
    "guards_config.skipped_steps": (9, lambda trainer: trainer.skipped.limit),
    "guards_config.window": (7, of_guards("window")),
    "guards_config.allow_untrained_actor": (False, of_guards("allow_untrained_actor")),
    "guards_config.stop_at_coin_flip": (True, of_guards("stop_at_coin_flip")),
    **{f"guards_config.{name}": ([0.5, None], of_guards(name)) for name in BANDS},
    "actor_config.max_tokens": (5, engine("max_new_tokens")),
    "actor_config.min_tokens": (3, engine("min_new_tokens")),
    "actor_config.temperature": (0.75, distribution("temperature")),
    "actor_config.attn_implementation": ("eager", lambda trainer: policy(trainer).config._attn_implementation),
}
# Keys without which another one would not matter.
TOGETHER = {
    "trainer_config.num_rollouts": {"trainer_config.batch_size": 4, "trainer_config.total_episodes": 48},
    "trainer_config.ref_std": {"trainer_config.scale_reward": "ref"},
    "actor_config.max_tokens": {"trainer_config.gen_kwargs.max_new_tokens": None},
} | {key: {"trainer_config.rollout_backend": "vllm"} for key in IN_RL if ".vllm." in key}


@pytest.fixture
def no_vllm(monkeypatch):
    """vLLM is not needed to see what it would be asked."""
    from chatrlhf import preflight
    from chatrlhf.stages import build_ppo

    class Sampler(SimpleNamespace):
        name = "vllm"

        def __init__(self, *args: Any) -> None:
            super().__init__(asked=args[5])

    monkeypatch.setattr(build_ppo, "VllmSampler", Sampler)
    monkeypatch.setattr(preflight, "require_vllm", lambda *_: None)


@ALL_AT_ONCE
def test_keys_of_rl_are_in_force(stopped, no_vllm, at_once):
    tree = stopped("RL")
    assert IN_RL.keys() == set(keys_of(OnResume.TAKES_EFFECT, "RL"))
    alone = [key for key in IN_RL if key in TOGETHER or key.endswith(("total_episodes", "rollout_backend"))]
    for together in [[key for key in IN_RL if key not in alone]] if at_once else [[key] for key in IN_RL]:
        changes = {key: IN_RL[key][0] for key in together}
        config = configured(tree, **changes, **TOGETHER.get(together[0], {}))
        trainer, section = resumed(config, "RL"), config.trainer_config
        for key in together:
            value, shown = IN_RL[key]
            assert shown is None or shown(trainer) == value, key
        done = trainer.done.optimizer_steps
        assert done == 3 * 2 * 2  # steps, epochs, minibatches
        left = (section.total_episodes - 24) // section.num_rollouts
        total = done + left * section.ppo_epochs * (section.num_rollouts // section.batch_size)
        want = schedule_by_hand(section, section.actor_lr, done, total)
        assert lrs(trainer.updater.backend.optimizer, trainer.updater.backend.scheduler) == pytest.approx(
            want, rel=1e-12
        ), together


def test_an_adapted_coefficient_goes_on_where_its_initial_one_is_unchanged(stopped):
    tree = stopped("RL")
    state = json.loads((Path(tree["output_dir"]) / "checkpoints/RL/step-000003/state.json").read_text())
    assert resumed(configured(tree), "RL").kl.coef == state["kl"]["coef"] != 0.05
