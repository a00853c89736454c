"""One run: everything that goes wrong on the way, limits, what is printed, what is left and continued."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from generating import ROOT, save, script_main, told, written
from standins.chat_server import Answer

from chatrlhf.tools.synth.session import LICENCE

KEY = "sk-a-secret-that-no-one-may-see"


def number_of(body) -> str:
    return str(int(hashlib.sha256(told(body).encode()).hexdigest(), 16) % 6)


def completion_of(body) -> str:
    return told(body).partition("Reply:\n")[2].partition("\n")[0]


@pytest.fixture
def rows(tmp_path):
    """Twenty completions without a score."""
    return save(tmp_path / "r.json", [{"user_input": "a", "completion": f"c{i}", "score": None} for i in range(20)])


def test_every_fault_that_may_pass_passes_and_what_stays_is_put_aside(serve, command, rows, tmp_path):
    faults = {
        "c0": Answer("slow down", status=429, headers={"Retry-After": "0.1"}),
        "c1": Answer("broken", status=500),
        "c2": Answer("late", delay=1.5),
        "c3": Answer("a" * 500, cut=True),
        "c4": Answer(drop=True),
        "c5": Answer(raw=b'{"choices": [{"mess'),
        "c6": Answer(choices=False),
        "c7": Answer("busy", status=503),
    }
    lasting = {
        "c8": Answer(None, refusal="no"),
        "c9": "I'd rather not say.",
        "c10": "I would give it a 4, with words around it.",
        "c11": Answer("the prompt is too long", status=400),
        "c12": Answer("always broken", status=500),
    }

    def script(body, before):
        completion = completion_of(body)
        if completion in faults and before == 0:
            return faults[completion]
        return lasting.get(completion, number_of(body))

    server = serve(script)
    assert command("generate_rewards", server, rows, "--timeout", 0.7, "--retries", 2) == 1
    scored = written(tmp_path / "r_scored.json")
    gone = {"c8", "c9", "c11", "c12"}
    assert [row["completion"] for row in scored] == [f"c{i}" for i in range(20) if f"c{i}" not in gone]
    assert {row["completion"]: row["score"] for row in scored}["c10"] == 4.0
    aside = written(tmp_path / "r_scored.quarantine.jsonl")
    assert [(each["row"], each.get("unanswered", False)) for each in aside] == [
        (9, False), (10, False), (12, True), (13, True)
    ]  # fmt: skip
    for each, reason in zip(
        aside, ("declined", "no number", "400: .*too long", "no answer after 3 tries"), strict=True
    ):
        assert re.search(reason, each["reason"])
    # The same command asks those two again, and no one else.
    lasting.clear()
    before = len(server.asked)
    assert command("generate_rewards", server, rows, "--timeout", 0.7, "--retries", 2) == 0
    assert sorted(map(completion_of, server.asked[before:])) == ["c11", "c12"]
    assert len(written(tmp_path / "r_scored.json")) == 18


def test_a_wrong_key_ends_it_at_once_and_is_never_shown(serve, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda *_: Answer(f"Incorrect API key provided: {KEY}", status=401))
    main = script_main("generate_rewards")
    assert main([str(rows), "--base-url", server.url, "--model", "judge"]) == 2
    captured = capsys.readouterr()
    assert len(server.asked) == 1
    assert server.keys == [f"Bearer {KEY}"]
    assert "does not take the key in OPENAI_API_KEY (401)" in captured.err
    assert KEY not in captured.out + captured.err
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text(encoding="utf-8", errors="replace")
    assert not (tmp_path / "r_scored.json").exists()


def test_the_estimate_comes_first_and_a_dry_run_is_nothing_else(serve, command, rows, tmp_path, capsys):
    server = serve(lambda body, before: number_of(body))
    assert command("generate_rewards", server, rows, "--dry-run", "--price", 1, 2, "--max-requests", 7) == 0
    out = capsys.readouterr().out
    assert out.startswith("20 completions, 20 requests to judge: about ")
    assert "$0.0" in out and "--max-requests 7 will stop it before the end" in out
    assert not server.asked
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_the_licence_is_said_once_and_kept(serve, command, rows, tmp_path, capsys):
    server = serve(lambda body, before: number_of(body))
    assert command("generate_rewards", server, rows) == 0
    assert capsys.readouterr().out.count(LICENCE) == 1
    meta = json.loads((tmp_path / "r_scored.meta.json").read_text())
    assert meta["licence"] == LICENCE
    assert (meta["model"], meta["this_run"]["requests"], meta["this_run"]["prompt_tokens"]) == ("judge", 20, 400)
    assert meta["options"]["dataset"] == str(rows)


def test_limits_stop_it_with_what_is_there_and_the_same_command_goes_on(serve, command, rows, tmp_path, capsys):
    server = serve(lambda body, before: number_of(body))
    assert command("generate_rewards", server, rows, "--max-requests", 5) == 1
    out = capsys.readouterr().out
    assert "stopped by --max-requests 5" in out and "run the same command again" in out
    assert len(written(tmp_path / "r_scored.json")) == len(server.asked) == 5
    # At a dollar a token each costs 25, and could have cost a thousand.
    assert command("generate_rewards", server, rows, "--max-cost", 1100, "--price", 1e6, 1e6) == 1
    assert "stopped by --max-cost 1100" in capsys.readouterr().out
    assert 5 < len(server.asked) < 20
    assert command("generate_rewards", server, rows) == 0
    assert len(server.asked) == 20
    assert [row["completion"] for row in written(tmp_path / "r_scored.json")] == [f"c{i}" for i in range(20)]


def test_a_cost_needs_a_price(serve, command, rows, capsys):
    assert command("generate_rewards", serve(lambda *_: "1"), rows, "--max-cost", 1) == 2
    assert "--max-cost needs --price" in capsys.readouterr().err


def test_a_users_file_is_not_overwritten(serve, command, rows, tmp_path, capsys):
    server = serve(lambda body, before: number_of(body))
    output = save(tmp_path / "mine.json", ["precious"])
    assert command("generate_rewards", server, rows, "-o", output) == 2
    assert "refused to overwrite" in capsys.readouterr().err
    assert command("generate_rewards", server, rows, "-o", tmp_path / "mine.csv") == 2
    assert not server.asked
    assert written(output) == ["precious"]
    assert command("generate_rewards", server, rows, "-o", output, "--force") == 0
    assert len(written(output)) == 20
    # An unfinished one of ours that somebody has worked on is a user's again.
    part = tmp_path / "part.json"
    assert command("generate_rewards", server, rows, "-o", part, "--max-requests", 5) == 1
    save(part, ["worked on"])
    assert command("generate_rewards", server, rows, "-o", part) == 2
    assert written(part) == ["worked on"]


def test_a_finished_file_is_made_again_for_nothing(serve, command, rows, tmp_path):
    server = serve(lambda body, before: number_of(body))
    assert command("generate_rewards", server, rows) == 0
    first = (tmp_path / "r_scored.json").read_bytes()
    assert command("generate_rewards", server, rows) == 2
    assert command("generate_rewards", server, rows, "--force") == 0
    assert len(server.asked) == 20
    assert (tmp_path / "r_scored.json").read_bytes() == first


def test_jsonl_by_its_name(serve, command, rows, tmp_path):
    assert command("generate_rewards", serve(lambda *_: "1"), rows, "-o", tmp_path / "x.jsonl") == 0
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion"] for line in lines] == [f"c{i}" for i in range(20)]


@pytest.mark.parametrize("name", ["davinci-003", "text-davinci-003"])
def test_old_models_are_refused_by_the_scripts(serve, rows, capsys, name):
    server = serve(lambda *_: "1")
    assert script_main("generate_rewards")([str(rows), "--model", name, "--base-url", server.url]) == 2
    err = capsys.readouterr().err
    assert name in err and "google/flan-t5-xl" in err
    assert not server.asked


def test_without_a_model_the_endpoints_only_one_is_asked_or_the_ways_are_named(serve, rows, tmp_path, capsys):
    main = script_main("generate_rewards")
    assert main([str(rows)]) == 2
    assert "which model? --model google/flan-t5-xl" in capsys.readouterr().err
    server = serve(lambda body, before: number_of(body), models=("only",))
    assert main([str(rows), "--base-url", server.url]) == 0
    assert {body["model"] for body in server.asked} == {"only"}
    prompts = ("-n", "2", "-d", str(tmp_path / "p"))
    assert script_main("extend_rlhf_dataset")([*prompts, "--base-url", server.url, "--dry-run"]) == 0
    assert "requests to only: " in capsys.readouterr().out
    assert script_main("extend_rlhf_dataset")([*prompts, "--dry-run"]) == 0  # nothing is loaded for that
    assert "requests to google/flan-t5-xl: " in capsys.readouterr().out
    several = serve(lambda *_: "1", models=("one", "two"))
    assert main([str(rows), "--base-url", several.url, "--force"]) == 2
    assert "has one, two; name one with --model" in capsys.readouterr().err


def test_the_endpoint_of_the_environment(serve, rows, monkeypatch):
    server = serve(lambda body, before: number_of(body))
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert script_main("generate_rewards")([str(rows), "--model", "judge"]) == 0
    assert len(server.asked) == 20


@pytest.mark.parametrize(
    "words",
    [("--concurrency", "0"), ("--temperature", "-1"), ("--max-cost", "nan"), ("--price", "1"), ("--timeout", "0")],
)
def test_options_are_checked(words, rows, capsys):
    with pytest.raises(SystemExit) as end:
        script_main("generate_rewards")([str(rows), *words])
    assert end.value.code == 2


@pytest.mark.parametrize("name", ["generate_rewards", "generate_actor_dataset", "extend_rlhf_dataset"])
def test_help_answers_without_torch(name):
    code = f"""import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_path("artifacts/{name}.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules and "openai" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "--max-cost" in done.stdout
