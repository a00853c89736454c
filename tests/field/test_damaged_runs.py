"""A file of a run that is not what it was is named before anything long begins, or is provably of no use to the end.

Each file that a whole run leaves has a bit flipped, is cut in half, emptied, removed; then the run is resumed, RL is
made again from what is there, and the models are exported and read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import differences, left_behind, settings, write_files

from chatrlhf.config import load_config
from chatrlhf.errors import UserError
from chatrlhf.models.reward_model import load_reward_model
from chatrlhf.pipeline import run
from chatrlhf.tools.export.weights import Weights


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    write_files(folder)
    run(load_config(tree(folder, folder / "run")))
    return folder


def tree(files: Path, run_dir: Path) -> dict[str, Any]:
    return settings(files) | {"output_dir": str(run_dir)}


def resumed(files: Path, run_dir: Path) -> None:
    run(load_config(tree(files, run_dir)), resume=True)


def rl_again(files: Path, run_dir: Path) -> None:
    run(load_config(tree(files, run_dir)), type="RL")


def judged(files: Path, run_dir: Path) -> None:
    load_reward_model(run_dir / "reward")
    load_reward_model(run_dir / "critic")


def exported(files: Path, run_dir: Path) -> None:
    Weights(run_dir / "actor_rl", "--model").sha256()


WORKS = {"resumed": resumed, "RL again": rl_again, "judged": judged, "exported": exported}
# What each work reads of a finished run, by the first part of a path; of all else the end does not depend.
READ = {
    "resumed": {"actor", "reward", "actor_rl", "critic", "manifest.json"},
    "RL again": {"actor", "reward", "manifest.json"},
    "judged": {"reward", "critic"},
    "exported": {"actor_rl"},
}
LOGS = {"metrics.jsonl", "samples.jsonl"}
IN_CI = [
    ("resumed", "actor/model.safetensors", "a bit"),
    ("resumed", "actor_rl/contents.json", "removed"),
    ("RL again", "reward/tokenizer.json", "cut"),
    ("RL again", "manifest.json", "a bit"),
    ("judged", "critic/reward_model.json", "emptied"),
    ("exported", "actor_rl/generation_config.json", "a bit"),
]


def check(finished: Path, place: Path, work: str, name: str, damage: str, capsys: Any) -> None:
    shutil.copytree(finished / "run", place)
    DAMAGES[damage](place / name)
    first = name.split("/")[0]
    try:
        WORKS[work](finished, place)
    except UserError as error:
        assert "\n" not in str(error)
        assert first in READ[work], f"{name} ({damage}) is not needed, yet: {error}"
        assert Path(name).name in str(error) or first in str(error), error
        return
    harmless = first not in READ[work]
    assert harmless, f"{name} ({damage}) was used in silence"
    if work == "resumed" and first not in LOGS:
        assert differences(left_behind(place), left_behind(finished / "run")) in ([], sorted([name]))


def files_of(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(("work", "name", "damage"), IN_CI)
def test_a_damaged_file_is_named(finished, tmp_path, work, name, damage, capsys):
    check(finished, tmp_path / "run", work, name, damage, capsys)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("work", WORKS)
def test_every_file_in_every_way(finished, tmp_path, work, capsys):
    wrong = []
    names = [
        name
        for name in files_of(finished / "run")
        if work not in ("judged", "exported") or name.split("/")[0] in READ[work]
    ]
    for number, (name, damage) in enumerate((name, damage) for name in names for damage in DAMAGES):
        try:
            check(finished, tmp_path / str(number), work, name, damage, capsys)
        except Exception as error:
            wrong.append(f"{name}, {damage}: {type(error).__name__}: {error}")
        shutil.rmtree(tmp_path / str(number), ignore_errors=True)
    with capsys.disabled():
        print(f"\n{work}: {len(names)} files, {len(names) * len(DAMAGES)} damages, {len(wrong)} wrong")
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a bit", "cut"])
def test_a_log_that_was_changed_is_said_and_stops_nothing(finished, tmp_path, damage, capsys):
    place = tmp_path / "run"
    shutil.copytree(finished / "run", place)
    DAMAGES[damage](place / "metrics.jsonl")
    more = {"trainer_config.total_episodes": 56}
    run(load_config(tree(finished, place), more), resume=True)
    assert "metrics.jsonl: what it has of RL is not what was written; the run continues" in capsys.readouterr().out


@pytest.mark.slow
def test_whoever_changed_a_folder_on_purpose_names_a_copy(finished, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(finished / "run", place)
    copy = tmp_path / "mine"
    shutil.copytree(place / "actor", copy, ignore=shutil.ignore_patterns("contents.json"))
    (copy / "generation_config.json").write_text('{"max_new_tokens": 5, "eos_token_id": 1}')
    run(load_config(tree(finished, tmp_path / "other"), {"actor_config.model": str(copy)}), type="ACTOR")
