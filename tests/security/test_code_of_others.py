"""YAML makes nothing but data; of Python what the user named is run, and files beside it replace none of Python's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import line_about

from chatrlhf import load_config
from chatrlhf.config.load import load_peft_config
from chatrlhf.rl.user_functions import load_function
from chatrlhf.runtime import import_path

ROOT = Path(__file__).parents[2]
TAGS = {
    "os.system": "!!python/object/apply:os.system ['mkdir {proof}']",
    "os.mkdir": "!!python/object/apply:os.mkdir ['{proof}']",
    "subprocess": "!!python/object/apply:subprocess.call [['mkdir', '{proof}']]",
    "new": "!!python/object/new:os.mkdir ['{proof}']",
    "eval": "!!python/object/apply:eval [\"__import__('os').mkdir('{proof}')\"]",
    "name": "!!python/name:os.mkdir ''",
    "module": "!!python/module:antigravity ''",
    "state": "!!python/object/new:type {{args: [x, [], {{}}], state: {{}}}}",
    "tag of one's own": "!evil ['{proof}']",
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
SHADOWED = ("random", "json", "queue", "statistics", "tempfile", "csv", "secrets", "uuid", "bisect", "select")


@pytest.fixture
def proof(tmp_path):
    return tmp_path / "proof"


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("place", ["value", "section", "override", "adapters"])
def test_tags_of_yaml(tmp_path, proof, name, place):
    tag, path = TAGS[name].format(proof=proof), tmp_path / "config.yaml"
    texts = {"value": f"actor_config:\n  model: {tag}\n", "section": f"{tag}\n", "adapters": f"r: {tag}\n"}
    path.write_text(texts.get(place, "{}"))
    overrides = [f"actor_config.model={tag}"] if place == "override" else []
    if place == "adapters":
        config = load_config({"actor_config": {"peft_config_path": str(path)}})
        line_about(lambda: load_peft_config(config))
    else:
        line_about(lambda: load_config(path, overrides))
    assert not proof.exists() and "antigravity" not in sys.modules


def test_a_bomb_of_aliases(tmp_path):
    (tmp_path / "config.yaml").write_text(BOMB)
    assert "its aliases (*name) repeat" in line_about(lambda: load_config(tmp_path / "config.yaml"))


# ----- a reward function


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A user's folder, from which a command is started."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in SHADOWED:
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'proof')!r})\n")
    (folder / "judge.py").write_text("def score(prompts, completions):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(sys.modules)
    yield folder
    for name in [name for name in sys.modules if sys.modules[name] is not before.get(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def test_files_beside_a_reward_function_replace_none_of_pythons(here, proof):
    load_function("judge:score", "reward_config.reward_fn")
    for name in SHADOWED:
        sys.modules.pop(name, None)
        __import__(name)
    assert not proof.exists()
    assert sys.path.index(str(here)) > sys.path.index(os.path.dirname(os.__file__))


@pytest.mark.parametrize("name", ["random:score", "json:score", "select:score"])
def test_a_reward_function_by_the_name_of_one_of_pythons_is_refused(here, proof, name):
    assert "not of yours; rename your file" in line_about(lambda: load_function(name, "reward_config.reward_fn"))
    assert not proof.exists()


def test_a_users_module_comes_before_an_installed_one(here):
    (here / "peft.py").write_text("def score(prompts, completions):\n    return [2.0 for _ in completions]\n")
    sys.modules.pop("peft", None)
    assert load_function("peft:score", "reward_config.reward_fn")(["a"], ["b"]) == [2.0]


def test_a_folder_on_the_path_stays_where_it_is(here):
    sys.path.insert(0, str(here))
    import_path.put_behind_stdlib(str(here))
    assert sys.path[0] == str(here) and sys.path.count(str(here)) == 1


@pytest.mark.parametrize("words", ["main.py", pytest.param("-m chatrlhf", marks=pytest.mark.slow)])
def test_files_beside_the_driver_replace_none_of_pythons(here, proof, words):
    (here / "main.py").write_bytes((ROOT / "main.py").read_bytes())
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words.split(), "nowhere.yaml"], env=environment, cwd=here, capture_output=True, text=True
    )
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr, done.stderr
    assert not proof.exists()
