"""Killed at any moment and run again: the same file, nothing asked twice that was written down."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from generating import ROOT, save, told
from standins.chat_server import Answer, ChatServer

from chatrlhf.tools.synth.llm import Message, Request

pytestmark = pytest.mark.slow

CONCURRENCY, DELAY = 4, 0.02
ROWS = [{"user_input": f"question {i}", "completion": f"answer {i}", "score": None} for i in range(60)]
PROMPTS = [{"user_input": " ".join(f"{letter}{i}" for letter in "abcdef")} for i in range(12)]

COMMANDS = {
    "rewards": (["generate_rewards.py", "{folder}/rows.json"], "rows_scored.json", 60),
    "dialogues": (["generate_actor_dataset.py", "-n", "20", "-o", "{folder}"], "actor_training_data.json", 52),
    "prompts": (
        ["extend_rlhf_dataset.py", "-n", "60", "-d", "{folder}"],
        "rlhf_training_data_extended.json",
        60,
    ),
}


def answer(body, before) -> Answer:
    """By the request alone, as late as some others."""
    number = int(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), 16)
    if "Score:" in told(body):
        return Answer(f"Score: {number % 6}", delay=DELAY * (1 + number % 3))
    return Answer(" ".join(f"w{digit}" for digit in f"{number}"[:8]) + ".", delay=DELAY * (1 + number % 3))


def start(name: str, folder: Path, server: ChatServer) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    save(folder / "rows.json", ROWS)
    save(folder / "rlhf_training_data.json", PROMPTS)
    words = [word.replace("{folder}", str(folder)) for word in COMMANDS[name][0]]
    words = [str(ROOT / "artifacts" / words[0]), *words[1:], "--base-url", server.url, "--model", "judge"]
    return subprocess.Popen(
        [sys.executable, *words, "--concurrency", str(CONCURRENCY)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def journalled(folder: Path) -> set[str]:
    """The keys of all whole lines of a journal."""
    keys = set()
    for path in folder.glob("*.journal.jsonl"):
        lines = path.read_bytes().split(b"\n")[:-1]
        keys |= {json.loads(line)["key"] for line in lines}
    return keys


def keys_of(body) -> list[str]:
    """The keys that a request as it was sent can have: which of several it is does not stand in it."""
    messages = tuple(Message(each["role"], each["content"]) for each in body["messages"])
    return [Request(messages, body["temperature"], body["max_tokens"], nth).key("judge") for nth in range(300)]


@pytest.mark.parametrize(
    ("name", "kills"),
    [("rewards", 2), *(pytest.param(name, 10, marks=pytest.mark.slow) for name in COMMANDS)],
)
def test_killed_and_run_again(tmp_path, name, kills):
    _, output, requests = COMMANDS[name]
    with ChatServer(answer) as server:
        undisturbed = start(name, tmp_path / "undisturbed", server)
        said, _ = undisturbed.communicate(timeout=60)
        assert undisturbed.returncode == 0, said.decode()
        wanted = Counter(map(json.dumps, server.asked))
        expected = (tmp_path / "undisturbed" / output).read_bytes()
    assert sum(wanted.values()) >= requests

    folder, total, in_flight, known = tmp_path / "killed", 0, 0, set()
    asked: Counter[str] = Counter()
    places = [requests * (i + 1) // (kills + 1) for i in range(kills)]
    with ChatServer(answer) as server:
        for place in places:
            process = start(name, folder, server)
            before = len(server.asked)
            while len(journalled(folder)) < place and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, process.stdout.read().decode()
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (folder / output).exists()
            in_flight += len(server.asked) - before - (len(journalled(folder)) - len(known))
            for body in server.asked[before:]:
                assert not known & set(keys_of(body))
            known = journalled(folder)
            time.sleep(4 * DELAY)  # the server ends what was in flight
        process = start(name, folder, server)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
        asked, total = Counter(map(json.dumps, server.asked)), len(server.asked)
    assert (folder / output).read_bytes() == expected
    assert asked.keys() == wanted.keys()
    repeats = total - sum(wanted.values())
    assert 0 <= repeats <= in_flight <= CONCURRENCY * kills
