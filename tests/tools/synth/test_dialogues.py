"""`generate_actor_dataset.py`: two sides that see the same dialogue, topics, and more like a user's own examples."""

from __future__ import annotations

import hashlib

from generating import save, told, written
from standins.chat_server import Answer

from chatrlhf.conversation import Turn
from chatrlhf.data.files import read_rows
from chatrlhf.data.records import from_json, read_demonstrations
from chatrlhf.tools.synth.dialogues import plan_dialogues
from chatrlhf.tools.synth.topics import TOPICS

FILE = "actor_training_data.json"


def words(body) -> str:
    """Eight words that depend on the whole request."""
    digest = hashlib.sha256(str(body["messages"]).encode()).hexdigest()
    return " ".join(f"w{letter}" for letter in digest[:8]) + "."


def is_person(body) -> bool:
    return body["messages"][0]["role"] == "user"


def test_each_side_sees_the_dialogue_as_its_own(serve, command, tmp_path):
    def script(body, before):
        return f"{'Q' if is_person(body) else 'A'}{len(body['messages'])} {words(body)}"

    server = serve(script)
    templates = save(tmp_path / "t.json", {"actor": "Talk about {things}."})
    assert command("generate_actor_dataset", server, "-n", 8, "-o", tmp_path, "--templates", templates) == 0
    records = [from_json(row) for row in read_rows(tmp_path / FILE)]
    assert len(records) == 8
    lengths = {len(record.prompt.turns) for record in records}
    assert lengths == {1, 3}  # one exchange or two
    for record in records:
        turns = [*record.prompt.turns, Turn("assistant", record.completion)]
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert [turn.text[:2] for turn in turns] == ["Q1", "A2", "Q3", "A4"][: len(turns)]
        assert record.provenance.generated_by == "judge"
        # What was asked for the last reply: the whole dialogue, the person as the user.
        (asked,) = [
            body
            for body in server.asked
            if not is_person(body) and told(body) == turns[-2].text and len(body["messages"]) == len(turns)
        ]
        assert asked["messages"][0]["content"].startswith("Talk about {things}.")
        assert [(m["role"], m["content"]) for m in asked["messages"][1:]] == [(t.role, t.text) for t in turns[:-1]]
        # And for the person's last message: the same with the sides changed.
        if len(turns) == 4:
            (asked,) = [body for body in server.asked if is_person(body) and told(body).startswith(turns[1].text)]
            roles = [message["role"] for message in asked["messages"]]
            assert roles == ["user", "assistant", "user"]
            assert asked["messages"][1]["content"] == turns[0].text
    assert all(is_person(body) == ("You play the person" in body["messages"][0]["content"]) for body in server.asked)


def test_what_a_dialogue_is_about_is_drawn_by_the_seed():
    wanted = plan_dialogues(200, TOPICS, 3, seed=1)
    assert wanted == plan_dialogues(300, TOPICS, 3, seed=1)[:200]
    assert wanted != plan_dialogues(200, TOPICS, 3, seed=2)
    assert {each.exchanges for each in wanted} == {1, 2, 3}
    assert len({each.topic for each in wanted}) > 50
    assert [each.requests for each in wanted] == [2 * each.exchanges for each in wanted]


def test_topics_of_the_user(serve, command, tmp_path, capsys):
    topics = tmp_path / "topics.txt"
    topics.write_text("keys\n\n  lamps  \n")
    server = serve(lambda body, before: words(body))
    assert command("generate_actor_dataset", server, "-n", 6, "-o", tmp_path, "--topics", topics, "--exchanges", 1) == 0
    subjects = [
        told(body).partition("The subject is: ")[2].partition(".")[0] for body in server.asked if is_person(body)
    ]
    assert set(subjects) == {"keys", "lamps"}
    assert len(server.asked) == 12
    topics.write_text("\n")
    assert command("generate_actor_dataset", server, "-o", tmp_path / "b", "--topics", topics) == 2
    assert "it holds no topics" in capsys.readouterr().err


def test_a_side_that_says_nothing_puts_the_dialogue_aside(serve, command, tmp_path):
    def script(body, before):
        if not is_person(body):
            return words(body)
        kind = int(hashlib.sha256(told(body).encode()).hexdigest(), 16) % 4
        return ["  ", "<think>what to ask", Answer("a cut message without an end", finish_reason="length"), "Why so?"][
            kind
        ]

    server = serve(script)
    assert command("generate_actor_dataset", server, "-n", 40, "-o", tmp_path, "--exchanges", 1) == 0
    rows, aside = written(tmp_path / FILE), written(tmp_path / "actor_training_data.quarantine.jsonl")
    assert len(rows) + len(aside) == 40
    assert {row["user_input"] for row in rows} == {"a cut message without an end", "Why so?"}
    assert {each["reason"] for each in aside} == {
        "the person's message 1: it is empty",
        "the person's message 1: it was cut while the model was still thinking; allow more --max_tokens",
    }


def test_an_assistants_reply_that_was_cut_ends_with_its_last_sentence(serve, command, tmp_path):
    def script(body, before):
        if is_person(body):
            return f"User: {words(body)}"
        ends = int(hashlib.sha256(told(body).encode()).hexdigest(), 16) % 2
        return Answer("Assistant: One thing. Another" if ends else "no end of a sentence", finish_reason="length")

    assert command("generate_actor_dataset", serve(script), "-n", 20, "-o", tmp_path, "--exchanges", 1) == 0
    rows, aside = written(tmp_path / FILE), written(tmp_path / "actor_training_data.quarantine.jsonl")
    assert {row["completion"] for row in rows} == {"One thing."}
    assert all(not row["user_input"].startswith("User") for row in rows)
    assert {each["reason"] for each in aside} == {
        "the assistant's message 1: it was cut at --max_tokens before the end of a sentence"
    }
    assert len(rows) + len(aside) == 20


def test_more_like_ten_of_the_users_own(serve, command, tmp_path, capsys):
    examples = [{"user_input": f"what is the opposite of {w}?", "completion": f"{w[::-1]}!"} for w in "abcdefghij"]
    path = save(tmp_path / "mine.json", examples)

    def script(body, before):
        if "Write one more" not in told(body):
            return f"answered after {len(body['messages'])} messages"
        return examples[0]["user_input"] if before == 0 and len(server.asked) < 4 else words(body)

    server = serve(script)
    assert command("generate_actor_dataset", server, "-n", 9, "-o", tmp_path, "--from", path) == 0
    rows = written(tmp_path / FILE)
    assert rows[:10] == examples
    rows = rows[10:]
    assert len(rows) == 9 and len({row["user_input"] for row in rows}) == 9
    assert not {row["user_input"] for row in rows} & {row["user_input"] for row in examples}
    assert {row["completion"] for row in rows} == {"answered after 9 messages"}  # four examples and the request
    assert "near-duplicates" in capsys.readouterr().out
    for body in server.asked:
        if "Write one more" in told(body):
            assert sum(example["user_input"] in told(body) for example in examples) == 4
        else:
            shown = [
                (m["content"], n["content"])
                for m, n in zip(body["messages"][:-1:2], body["messages"][1::2], strict=True)
            ]
            assert all({"user_input": q, "completion": a} in examples for q, a in shown)
    assert len(read_demonstrations(tmp_path / FILE)) == 19


def test_nine_examples_are_too_few(serve, command, tmp_path, capsys):
    path = save(tmp_path / "mine.json", [{"user_input": str(i), "completion": "a"} for i in range(9)])
    server = serve(lambda *_: "a")
    assert command("generate_actor_dataset", server, "-o", tmp_path, "--from", path) == 2
    assert "9 examples are too few" in capsys.readouterr().err
    assert not server.asked
