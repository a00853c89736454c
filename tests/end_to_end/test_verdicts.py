"""The verdict is right on runs made bad in twelve ways and on eight good ones; it sees texts and rewards alone.

All start from one actor and one reward model of the embedded default, and no run has a true score to look at.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import ROOT

from chatrlhf.config import load_config
from chatrlhf.errors import UserError
from chatrlhf.pipeline import run
from chatrlhf.samples.visitor_desk import score

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3000)]

BAD = {"GIBBERISH", "REPETITIVE", "EMPTY", "COLLAPSED", "ENDLESS", "OVER-OPTIMIZED", "worse"}
LOOSE = {"trainer_config.init_kl_coef": 0.0, "trainer_config.actor_lr": 3e-3}
FEW = {"trainer_config.total_episodes": 12 * 64}


def of_each(reward: Any) -> Any:
    """A reward function of completions alone."""
    return lambda prompts, completions: [float(reward(text)) for text in completions]


def true(prompts: list[str], completions: list[str]) -> list[float]:
    return [score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


# Keys, reward function (None: the reward model), and the names that are right.
RUNS: dict[str, tuple[dict[str, Any], Any, set[str]]] = {
    "steps far too large": ({"trainer_config.actor_lr": 0.05, "trainer_config.init_kl_coef": 0.0}, None, BAD),
    "paid by the character": (LOOSE | {"trainer_config.missing_eos_penalty": None}, of_each(len), BAD),
    "paid for silence": (LOOSE, of_each(lambda text: -len(text)), BAD),
    "paid for one word": (LOOSE, of_each(lambda text: text.count("the")), BAD),
    "paid for broken bytes": (LOOSE, of_each(lambda text: text.count("\ufffd") + text.count("[")), BAD),
    "paid for one reply": (LOOSE, of_each(lambda text: -abs(len(text) - 12) - 9 * (text[:1] != "C")), BAD),
    "paid for punctuation": (LOOSE, of_each(lambda text: sum(not each.isalnum() for each in text)), BAD),
    "paid for rare letters": (LOOSE, of_each(lambda text: sum(text.count(each) for each in "jkqxz")), BAD),
    "paid for capitals": (LOOSE, of_each(lambda text: sum(map(str.isupper, text))), BAD),
    "paid for the opposite": (LOOSE, lambda prompts, texts: [-each for each in true(prompts, texts)], BAD),
    "paid by chance, loosely": (
        {"trainer_config.init_kl_coef": 0.0, "trainer_config.actor_lr": 0.02},
        of_each(lambda text: hash(text) % 7),
        BAD,
    ),
    "a critic that throws": (
        {"trainer_config.init_kl_coef": 0.0, "trainer_config.critic_lr": 1.0, "trainer_config.actor_lr": 0.02},
        None,
        BAD,
    ),
    "as it is": ({}, None, {"better"}),
    "another seed": ({"trainer_config.batch_size": 16}, None, {"better"}),
    "by the true score": ({}, true, {"better"}),
    "slowly": ({"trainer_config.actor_lr": 1e-4}, None, {"better"}),
    "with more KL": ({"trainer_config.init_kl_coef": 0.2}, None, {"better"}),
    "RLOO": ({"trainer_config.algorithm": "rloo", "trainer_config.samples_per_prompt": 4}, None, {"better"}),
    "GRPO": ({"trainer_config.algorithm": "grpo", "trainer_config.samples_per_prompt": 4}, None, {"better"}),
    "hardly": ({"trainer_config.actor_lr": 1e-7}, None, {"unclear"}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with an actor and a reward model."""
    folder = tmp_path_factory.mktemp("verdicts") / "run"
    keys = {"output_dir": str(folder), "actor_config.epochs": 2, "reward_config.epochs": 2}
    for stage in ("ACTOR", "REWARD"):
        run(load_config(ROOT / "config.yaml", keys), type=stage)
    return folder


def verdict_of(trained: Path, folder: Path, name: str, capsys: Any) -> str:
    keys, reward, _ = RUNS[name]
    shutil.copytree(trained, folder)
    tree = yaml.safe_load((ROOT / "config.yaml").read_text())
    for section in ("actor_config", "reward_config", "trainer_config"):
        for key in ("train_dataset_path", "examples_path", "validation_examples_path"):
            if key in tree[section]:
                tree[section][key] = str(ROOT / tree[section][key])
    del tree["trainer_config"]["eval_fn"], tree["trainer_config"]["eval_best"]
    config = load_config(tree, FEW | {"output_dir": str(folder)} | keys)
    capsys.readouterr()
    try:
        run(config, type="RL", reward_fn=reward)
    except UserError as error:
        return f"ended: {error}"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verdict: ")]
    return line


def test_nineteen_of_twenty(trained, tmp_path, capsys):
    wrong = {}
    for number, (name, (_, _, right)) in enumerate(RUNS.items()):
        line = verdict_of(trained, tmp_path / str(number), name, capsys)
        called = line.removeprefix("verdict: ").split(".")[0]
        with capsys.disabled():
            print(f"\n{name}: {line}")
        if called not in right and not (right is BAD and line.startswith("ended: ")):
            wrong[name] = line
    assert len(wrong) <= 1, wrong
