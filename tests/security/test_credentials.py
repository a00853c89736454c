"""Keys of the environment and passwords in URLs stand in no line, log, record or tracker."""

from __future__ import annotations

import io
import json
import sys

import pytest
import yaml
from hostile import line_about

from chatrlhf import load_config
from chatrlhf.cli import main
from chatrlhf.config.on_resume import flat
from chatrlhf.errors import ConfigError, DataError, OutsideError, RewardError, UserError
from chatrlhf.errors.boundary import doing, line_of, show_fault
from chatrlhf.errors.redaction import redacted, redacted_tree
from chatrlhf.runtime.manifest import FILE_NAME, Manifest
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.stages.resume import Resumption

CANARY = "canary-0123456789abcdef"
NAMES = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "token")
URL = f"https://me:{CANARY}@rewards.example/score?version=2&api_key={CANARY}#top"


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")


def test_it_is_hidden_and_the_rest_is_not():
    assert redacted(URL) == "https://***@rewards.example/score?version=2&api_key=***#top"
    assert redacted(f"a {URL}, b") == "a https://***@rewards.example/score?version=2&api_key=***#top, b"
    for name in NAMES:
        assert redacted(f"key={CANARY}-{name}!") == "key=***!"


@pytest.mark.parametrize(
    "url, shown",
    [
        ("http://me:p@ss@word@host:80/a@b", "http://***@host:80/a@b"),
        ("redis://:secret@host", "redis://***@host"),
        ("http://user@host/", "http://***@host/"),
        ("http://me:p%40ss@host", "http://***@host"),
        ("http://host/?access_token=abc&x=1", "http://host/?access_token=***&x=1"),
        ("http://host/?X-Amz-Signature=abc", "http://host/?X-Amz-Signature=***"),
        ("http://host/?sig=abc&se=2027", "http://host/?sig=***&se=2027"),
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("https:/me:secret@host/x", "https:/***@host/x"),
        ("c:/me@home/x", "c:/me@home/x"),
        ("http://host/?max_tokens=5&keyboard=x", "http://host/?max_tokens=5&keyboard=x"),
        ("me@host.example, see https://host.example/@me", "me@host.example, see https://host.example/@me"),
    ],
)
def test_urls(url, shown):
    assert redacted(url) == shown


def test_short_values_and_other_names_are_words(monkeypatch):
    monkeypatch.setenv("SHORT_KEY", "none")
    monkeypatch.setenv("KEYBOARD", "a german one")
    assert redacted("none of a german one") == "none of a german one"
    assert redacted_tree({"a": [URL, 1, None, (True, URL)], URL: 1.5}) == {
        "a": [redacted(URL), 1, None, [True, redacted(URL)]],
        redacted(URL): 1.5,
    }


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, RewardError, OutsideError])
def test_no_error_says_it(kind):
    for text in (URL, f"{CANARY}-HF_TOKEN"):
        error = kind(f"about {text}")
        assert CANARY not in str(error) and CANARY not in repr(error) and CANARY not in line_of(error)


def test_no_error_of_a_library_says_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail():
        with doing("reading", URL):
            raise OSError(5, "no answer", URL)

    assert CANARY not in line_about(fail)
    (log,) = tmp_path.glob("error-*.log")
    assert "no answer" in log.read_text() and CANARY not in log.read_text()


def test_no_traceback_says_it(capsys):
    try:
        raise RuntimeError(f"{URL} {CANARY}-HF_TOKEN")
    except RuntimeError:
        show_fault()
    said = capsys.readouterr().err
    assert "RuntimeError: https://***@" in said and CANARY not in said


def test_no_note_says_it(tmp_path, capsys):
    RunLog(tmp_path).warn(f"the endpoint {URL} is slow")
    assert capsys.readouterr().out == f"warning: the endpoint {redacted(URL)} is slow\n"


def test_no_tracker_gets_it(tmp_path, monkeypatch):
    from accelerate import tracking

    got = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, name):
            pass

        def store_init_configuration(self, values):
            got.append(values)

        def finish(self):
            pass

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Tracker)
    log = RunLog(tmp_path, ["mine"], {"reward_config": {"reward_fn": URL}})
    log.close()
    assert got == [{"reward_config.reward_fn": redacted(URL)}]


def test_no_manifest_has_it_and_a_run_is_resumed_all_the_same(tmp_path):
    config = load_config({"reward_config": {"reward_fn": URL}, "output_dir": str(tmp_path)})
    manifest = Manifest(tmp_path)
    manifest.begin(config, ["RL"])
    settings = flat(config.model_dump(mode="json"))
    manifest.start("RL", {"data": {}}, {"reward_config.reward_fn": URL})
    assert CANARY not in (tmp_path / FILE_NAME).read_text()
    assert "***@rewards.example" in (tmp_path / FILE_NAME).read_text()

    def resumption(url):
        changed = settings | {"reward_config.reward_fn": url}
        made_from = lambda stage: {"data": {}}  # noqa: E731
        return Resumption(Manifest.open(tmp_path, True), changed, ["RL"], made_from, lambda stage: ())

    resumption(URL).check()
    resumption(URL.replace(CANARY, "another-password")).check()  # the same endpoint
    line = line_about(lambda: resumption(URL.replace("score", "rank")).check())
    assert "reward_config.reward_fn" in line and CANARY not in line


@pytest.mark.slow  # the planner takes seconds to import
def test_the_plan_does_not_print_it(tmp_path, monkeypatch):
    from chatrlhf.tools.plan import report

    config = load_config({"reward_config": {"reward_fn": URL}})
    planned = type("Plan", (), {"inputs": type("Inputs", (), {"warnings": [URL]})})
    monkeypatch.setattr(report, "plan_run", lambda *_: planned)
    monkeypatch.setattr(report, "lines", lambda *_: [f"REWARD: skipped, the reward is {URL}"])
    monkeypatch.setattr(sys, "stdout", said := io.StringIO())
    report.show_plan(config, "RL")
    assert CANARY not in said.getvalue() and said.getvalue().count("***@rewards.example") == 3


WRONG = {
    "a wrong value": {"trainer_config": {"total_episodes": URL}},
    "an unknown key": {"trainer_config": {URL: 1}},
    "a model": {"actor_config": {"model": URL, "train_dataset_path": "nowhere.json"}},
    "a dataset": {"actor_config": {"model": "tiny", "train_dataset_path": URL}},
    "a template": {"actor_config": {"model": "tiny", "template": URL, "train_dataset_path": "nowhere.json"}},
    "a mixture": {"actor_config": {"model": "tiny", "datasets": [{"name": URL}]}},
    "a reward function": {"reward_config": {"reward_fn": f"nowhere:{CANARY}-HF_TOKEN"}},
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_no_refused_configuration_says_it(tmp_path, monkeypatch, capfd, what, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(WRONG[what]))
    assert main(["config.yaml", "--output-dir", "run", *words]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("error: ") and CANARY not in said.err + said.out
    for path in tmp_path.rglob("*"):
        assert path.name == "config.yaml" or path.is_dir() or CANARY not in path.read_text(errors="replace")


def test_no_override_says_it(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("{}")
    for word in (f"reward_config.reward_fn={{{URL}", f"{URL}=1", URL):
        assert main([str(tmp_path / "config.yaml"), "--set", word]) == 2
        assert CANARY not in capsys.readouterr().err


def test_what_a_script_writes_about_itself_has_it_not(tmp_path, monkeypatch, capfd):
    from generating import script_main
    from standins.chat_server import ChatServer

    with ChatServer(lambda body, before: "Some words of a person.") as server:
        url = server.url.replace("://", f"://me:{CANARY}@")
        words = ["--base-url", url, "--model", "judge", "--num_conversations", "1", "--exchanges", "1"]
        script_main("generate_actor_dataset")([*words, "--output_dir", str(tmp_path)])
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name.endswith("meta.json") for path in files), said
    about = json.loads(next(path for path in files if path.name.endswith("meta.json")).read_text())
    assert about["options"]["base_url"].startswith("http://***@127.0.0.1")
    assert all(CANARY not in path.read_text() for path in files)
