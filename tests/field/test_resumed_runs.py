"""Public reports about --resume: other settings, other data, the place in the data, the ends of epochs and runs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from field_reports import report
from resuming import configured, stop, write_case
from safetensors.torch import load_file, save_file
from small_run import read_manifest

from chatrlhf import run
from chatrlhf.errors import CheckpointError, ConfigError
from chatrlhf.runtime.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow

STOPS_IN_ACTOR = 4  # of 7 optimizer steps of 8 rows an epoch, 54 rows


def metrics(tree: dict[str, Any], name: str) -> list[float]:
    lines = (Path(tree["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> dict[str, Any]:
    made = write_case(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return made


def judge(tree: dict[str, Any]) -> str:
    """The module of the reward function."""
    return f"judge_{Path(tree['output_dir']).parent.name}"


def rewarded(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"reward_config": {"reward_fn": f"{judge(tree)}:length"}}


@report(
    "labs-molt#130",
    "pytorch/examples#816",
    "bghira/SimpleTuner#163",
    fault="learning rates, KL coefficient, weight decay and betas changed before a resume: the old ones stay in force",
    expected="the new ones are in force from the next step on, and the line that lists them says so",
)
def test_changed_settings_are_in_force(tree, capsys):
    plain = rewarded(tree)
    plain["trainer_config"] = plain["trainer_config"] | {"target": None, "lr_scheduler": "constant"}
    stop(configured(plain), "RL", 3)
    run(configured(plain, trainer_config__init_kl_coef=0.5, trainer_config__actor_lr=1e-5), type="RL", resume=True)
    assert metrics(plain, "kl/coef") == [0.05] * 3 + [0.5] * 3
    assert metrics(plain, "lr/actor") == [1e-3] * 3 + [1e-5] * 3
    out = capsys.readouterr().out
    assert "trainer_config.init_kl_coef: 0.05 -> 0.5 takes effect" in out
    assert "trainer_config.actor_lr: 0.001 -> 1e-05 takes effect" in out


def replace_data(tree: dict[str, Any], folder: Path) -> str:
    rows = json.loads((folder / "prompts.json").read_text())
    (folder / "prompts.json").write_text(json.dumps(rows[1:] + rows[:1]))
    return f"{folder / 'prompts.json'} does not hold the data that RL was trained on"


def replace_weights(tree: dict[str, Any], folder: Path) -> str:
    """One row of one tensor."""
    path = folder / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][17] += 0.01
    save_file(weights, path, {"format": "pt"})
    return f"actor_config.model: the content of {folder / 'base'} is not what RL was begun with"


def replace_tokenizer(tree: dict[str, Any], folder: Path) -> str:
    path = folder / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}))
    return f"actor_config.tokenizer_path: the content of {folder / 'base'} is not what RL was begun with"


def replace_template(tree: dict[str, Any], folder: Path) -> str:
    path = folder / "own.jinja"
    path.write_text(path.read_text().replace("User", "Human"))
    return f"actor_config.template: the content of {path} is not what RL was begun with"


def replace_reward(tree: dict[str, Any], folder: Path) -> str:
    path = folder / f"{judge(tree)}.py"
    path.write_text(path.read_text().replace("len(completion)", "-len(completion)"))
    del sys.modules[judge(tree)]
    return f"reward_config.reward_fn: the content of {judge(tree)}:length is not what RL was begun with"


def change_nothing_that_matters(tree: dict[str, Any], folder: Path) -> None:
    """A comment, a model card, and the data under another name."""
    path = folder / f"{judge(tree)}.py"
    path.write_text("# how long a reply is\n" + path.read_text())
    del sys.modules[judge(tree)]
    (folder / "base" / "README.md").write_text("a model")
    (folder / "prompts.json").rename(folder / "moved.json")
    tree["trainer_config"]["examples_path"] = str(folder / "moved.json")


@report(
    "NVIDIA-NeMo/RL#2519",
    "PrimeIntellect-ai/prime-rl#3299",
    fault="a resume with other data, base weights, tokenizer, template or reward continues as if they were the same",
    expected="refused by name and place, before a model is loaded; moved files and comments are no change",
)
@pytest.mark.parametrize(
    "replace",
    [
        replace_data,
        replace_weights,
        replace_tokenizer,
        replace_template,
        replace_reward,
        change_nothing_that_matters,
    ],
)
def test_what_was_replaced_is_refused_by_name(tree, tmp_path, monkeypatch, replace):
    (tmp_path / "own.jinja").write_text(
        "{%- for m in messages -%}{%- if m.role == 'user' -%}User: {{ m.content }}\n{%- else -%}Answer: {{ m.content }}"
        "{{ eos_token }}\n{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}Answer: {%- endif -%}"
    )
    tree["actor_config"]["template"] = str(tmp_path / "own.jinja")
    stop(configured(rewarded(tree)), "RL", 1)
    manifest = tmp_path / "run" / "manifest.json"
    assert json.loads(manifest.read_text())["stages"]["RL"]["status"] == "begun"
    said, before = replace(tree, tmp_path), manifest.read_bytes()
    if said is None:
        run(configured(rewarded(tree)), type="RL", resume=True)
        return
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)  # nothing may be loaded
    with pytest.raises(CheckpointError) as error:
        run(configured(rewarded(tree)), type="RL", resume=True)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert manifest.read_bytes() == before


def test_a_finished_stage_whose_data_changed_is_refused_and_not_kept(tree, tmp_path):
    run(configured(tree, actor_config__epochs=1), type="ACTOR")
    rows = json.loads((tmp_path / "actor.json").read_text())
    (tmp_path / "actor.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(CheckpointError, match="actor.json does not hold the data that ACTOR was trained on"):
        run(configured(tree, actor_config__epochs=1), type="ACTOR", resume=True)


def rows_of_batches(monkeypatch) -> list[tuple[int, ...]]:
    """The rows that are trained on, as their ids."""
    from transformers import Trainer

    seen: list[tuple[int, ...]] = []
    step = Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return seen


@report(
    "OpenRLHF/OpenRLHF#1103",
    "OpenRLHF/OpenRLHF#1067",
    fault="the place in the data is lost: rows of the epoch are skipped or seen twice behind a resume",
    expected="each row of each epoch once, with a batch size that does not divide them, and with another one behind it",
)
@pytest.mark.parametrize(
    "stop_at, changes",
    [
        (4, {"batch_size": 5, "micro_batch_size": 1}),  # 32 rows are seen, 22 left: 5 steps, the last of 2 rows
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(4, {"batch_size": 20, "micro_batch_size": 4, "sort_by_length": True}, marks=pytest.mark.slow),
        pytest.param(7, {}, marks=pytest.mark.slow),  # the end of the first epoch
        pytest.param(7, {"batch_size": 5}, marks=pytest.mark.slow),
        pytest.param(9, {"batch_size": 54}, marks=pytest.mark.slow),
    ],
)
def test_each_row_of_an_epoch_is_seen_once(tree, monkeypatch, stop_at, changes):
    seen = rows_of_batches(monkeypatch)
    tree["actor_config"]["sort_by_length"] = changes.pop("sort_by_length", False)
    stop(configured(tree), "ACTOR", stop_at)
    run(configured(tree, **{f"actor_config__{name}": value for name, value in changes.items()}), "ACTOR", resume=True)
    first, second = Counter(seen[:54]), Counter(seen[54:])
    assert sum(first.values()) == 54 == sum(second.values()) and first == second
    assert len(first) > 40  # texts differ, so that a row twice would be seen


@report(
    "volcengine/verl#7401",
    fault="a resume behind the last step of an epoch, or of the run, ends at once with exit code 0 and no word",
    expected="the next epoch is trained; at the end of the run the line says that nothing is left to do",
)
def test_at_the_end_of_a_run_it_is_said_that_nothing_is_left(tree, capsys, monkeypatch):
    stop(configured(tree), "ACTOR", 13)
    stop_at_last = configured(tree)
    with pytest.MonkeyPatch.context() as patch:  # killed between the last step and the publication
        patch.setattr("chatrlhf.stages.sft.publish_policy", None)
        with pytest.raises(TypeError):
            run(stop_at_last, "ACTOR", resume=True)
    run(configured(tree), "ACTOR", resume=True)
    assert "ACTOR: all its 14 steps were trained before, there is nothing left to do" in capsys.readouterr().out
    run(configured(tree), "ACTOR", resume=True)
    assert "ACTOR: finished before, nothing is left to do, kept" in capsys.readouterr().out
    # Asked for more, a finished stage continues.
    run(configured(tree, actor_config__epochs=3), "ACTOR", resume=True)
    assert (
        "ACTOR: finished before, and asked for more: it continues from its last checkpoint" in capsys.readouterr().out
    )
    assert len(metrics(tree, "loss/train")) == 21
    # But not under the feet of a stage that started from it.
    run(configured(rewarded(tree), actor_config__epochs=3, trainer_config__total_episodes=8), "RL")
    with pytest.raises(CheckpointError, match="ACTOR is to be trained on, and RL started from what it had left"):
        run(configured(rewarded(tree), actor_config__epochs=4, trainer_config__total_episodes=8), "ALL", resume=True)


def test_more_episodes_of_another_number_go_on_behind_the_last(tree, capsys):
    short = configured(rewarded(tree), trainer_config__total_episodes=16)
    run(short, type="RL")
    run(configured(rewarded(tree), trainer_config__total_episodes=16), type="RL", resume=True)
    assert "RL: finished before, nothing is left to do, kept" in capsys.readouterr().out
    more = {"trainer_config__total_episodes": 24, "trainer_config__num_rollouts": 4, "trainer_config__batch_size": 4}
    run(configured(rewarded(tree), **more), type="RL", resume=True)
    assert metrics(tree, "episodes") == [8, 16, 20, 24]
    other = {"trainer_config__num_rollouts": 16, "trainer_config__batch_size": 4}
    with pytest.raises(ConfigError, match="num_rollouts: 16 does not divide the 40 .* set it to one of 8, 12, 24"):
        run(configured(rewarded(tree), trainer_config__total_episodes=64, **other), type="RL", resume=True)


def test_runs_of_an_earlier_version_are_resumed_and_it_is_said_what_is_not_known(tree, tmp_path, capsys):
    """Whose manifests know of finished stages alone, and whose checkpoints hold a step."""
    stop(configured(tree), "ACTOR", STOPS_IN_ACTOR)
    manifest = tmp_path / "run" / "manifest.json"
    stored = read_manifest(tmp_path / "run")
    manifest.write_text(json.dumps(stored | {"stages": {}, "facts": {}}))
    (folder,) = (tmp_path / "run" / "checkpoints" / "ACTOR").glob("step-000004")
    (folder / "order.json").unlink()
    contents = json.loads((folder / "contents.json").read_text())
    del contents["order.json"]
    (folder / "contents.json").write_text(json.dumps(contents))
    with pytest.raises(
        CheckpointError, match="actor_config.batch_size: 8 -> 4 cannot change, ACTOR was begun by an ear"
    ):
        run(configured(tree, actor_config__batch_size=4), type="ACTOR", resume=True)
    capsys.readouterr()
    run(configured(tree, actor_config__lr=1e-5), type="ACTOR", resume=True)
    out = capsys.readouterr().out
    assert out.count("ACTOR began with an earlier version, which kept no hashes") == 1
    assert metrics(tree, "lr")[-1] < 1e-5 and len(metrics(tree, "loss/train")) == 14


@report(
    "none, found by reading the code",
    fault="checkpoints sorted as text: beyond step 999,999 the newest counts as the oldest, and is deleted",
    expected="sorted by number",
)
def test_checkpoints_are_sorted_by_number(tmp_path):
    store = CheckpointStore(tmp_path / "RL", 2, print)
    for step in (999_998, 999_999, 1_000_000):
        store.publish(step, lambda folder: (folder / "state.json").write_text("{}"))
    (tmp_path / "RL" / "step-of-mine").mkdir()  # no checkpoint, and no one's to delete
    assert store.newest() == (1_000_000, tmp_path / "RL" / "step-1000000")
    assert {path.name for path in (tmp_path / "RL").iterdir()} == {"step-999999", "step-1000000", "step-of-mine"}


def test_a_second_run_that_was_stopped_does_not_keep_results_of_the_first(tree, capsys):
    """All that it makes anew is set aside when its first stage begins."""
    both = rewarded(tree) | {"pretrain_config": {}}
    run(configured(both), type="ALL")
    stop(configured(both, seed=6), "ALL", 2)
    folder = Path(both["output_dir"])
    assert sorted(path.name for path in (folder / "previous").iterdir()) == ["ACTOR-1", "RL-1"]
    assert (folder / "previous" / "RL-1" / "actor_rl" / "config.json").exists() and not (folder / "actor_rl").exists()
    capsys.readouterr()
    run(configured(both, seed=6), type="ALL", resume=True)
    out = capsys.readouterr().out
    assert "kept" not in out and (folder / "actor_rl" / "config.json").exists()
    assert not (folder / ".lock").exists()
