"""Rows in the exact shapes of the public datasets, awkward ones among them, to records."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from chatrlhf.conversation import Conversation, Pair, Prompt, Ranked, Turn
from chatrlhf.data.files import read_rows
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import LeftOut, Source, oasst1, shp
from chatrlhf.data.sources.catalogue import SOURCES
from chatrlhf.data.stage_rows import demonstrations, preferences, prompts
from chatrlhf.errors import DataError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
ASK = "\n\nHuman: {}\n\nAssistant:{}"


def of(name: str, **values) -> list[Conversation | LeftOut]:
    return list(SOURCES[name].convert(Row(values, "here, row 7")))


def one(name: str, **values) -> Conversation:
    (record,) = of(name, **values)
    assert isinstance(record, Conversation), record
    return record


def left_out(name: str, **values) -> str:
    (record,) = of(name, **values)
    assert isinstance(record, LeftOut), record
    return record.reason


def said(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


# --- HH-RLHF


def test_hh_transcripts_become_turns():
    before = "Tea?\n\nAssistant: Yes. \n\nHuman: With {milk}?"
    record = one("ARLHF", chosen=ASK.format(before, " No,\n\nthank you."), rejected=ASK.format(before, " \tMaybe \n"))
    assert record.prompt == Prompt(said("Tea?", "Yes. ", "With {milk}?"))
    assert record.pair == Pair("No,\n\nthank you.", "\tMaybe \n")


def test_hh_sides_that_speak_twice():
    before = "Tea?\n\nHuman: Hello?\n\nAssistant: Yes.\n\nAssistant: Sorry.\n\nHuman: Well?"
    record = one("ARLHF", chosen=ASK.format(before, " a"), rejected=ASK.format(before, " b"))
    assert [turn.role for turn in record.prompt.turns] == ["user", "user", "assistant", "assistant", "user"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (ASK.format("a", " "), ASK.format("a", " b"), "empty replies"),
        (ASK.format("a\n\nAssistant: x\n\nHuman: y", " b"), ASK.format("a", " c"), "unequal numbers of turns"),
        (ASK.format("other", " b"), ASK.format("a", " c"), "differ before the last reply"),
        (ASK.format("a", "b"), ASK.format("a", " c"), "without a blank behind the colon"),
        (ASK.format("a", " b\n\nHuman: c"), ASK.format("a", " d"), "do not go from a human turn"),
        ("\n\nAssistant: b", "\n\nAssistant: c", "do not go from a human turn"),
        ("Hello" + ASK.format("a", " b"), "Hello" + ASK.format("a", " c"), "do not go from a human turn"),
        ("", "", "do not go from a human turn"),
    ],
)
def test_hh_rows_that_are_left_out(chosen, rejected, reason):
    assert reason in left_out("ARLHF", chosen=chosen, rejected=rejected)


# --- SHP


def shp_row(post: str, a: str, b: str, label: object = 1) -> dict:
    return {"post_id": "x1", "history": post, "human_ref_A": a, "human_ref_B": b, "labels": label, "score_ratio": 2.0}


@pytest.mark.parametrize(("label", "chosen", "rejected"), [(1, "A", "B"), (0, "B", "A")])
def test_shp_labels_say_which_comment_was_preferred(label, chosen, rejected):
    record = one("SHP", **shp_row("Why?", "A", "B", label))
    assert (record.prompt, record.pair) == (Prompt.of("Why?"), Pair(chosen, rejected))
    assert record.provenance.group == "x1"


@pytest.mark.parametrize("label", [2, None, "1", True, [1]])
def test_shp_refuses_an_unknown_label(label):
    with pytest.raises(DataError, match=r"here, row 7, field 'labels': expected 1 \(A preferred\)"):
        of("SHP", **shp_row("Why?", "A", "B", label))


def test_shp_shortens_posts_between_words_and_never_comments():
    post, comment = "word " * 1000, "comment " * 1000
    record = one("SHP", **shp_row(post, comment, "B"))
    assert record.pair.chosen == comment
    kept = record.prompt.text
    assert post.startswith(kept) and kept.endswith("word")
    assert shp.POST_CHARS - len("word ") <= len(kept) <= shp.POST_CHARS
    limit = shp.POST_CHARS
    assert shp.shorten("x" * limit) == "x" * limit
    assert shp.shorten("x" * limit + " y") == "x" * limit
    assert shp.shorten("x" * (limit + 1)) == "x" * limit
    assert shp.shorten("a" + "x" * (limit - 2) + " yz") == "a" + "x" * (limit - 2)


# --- OASST1


def message(text: str, role: str, *replies: dict, **values) -> dict:
    given = {"message_id": text, "text": text, "role": role, "lang": "en", "deleted": False, "synthetic": False}
    return given | {"rank": None, "replies": list(replies)} | values


TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": message(
        "root",
        "prompter",
        message("second", "assistant", rank=1),
        message(
            "best",
            "assistant",
            message("more", "prompter", message("only", "assistant")),
            message("silence", "prompter"),
            message("gone", "prompter", message("below", "assistant"), deleted=True),
            rank=0,
        ),
        message("unplaced", "assistant", synthetic=True, model_name="a model"),
        message("also second", "assistant", rank=1),
    ),
}


def paths(record: Conversation) -> list[str]:
    return [turn.text for turn in record.prompt.turns]


def test_a_tree_of_messages():
    made = of("OASST1", **TREE)
    records = [record for record in made if isinstance(record, Conversation)]
    rows = [(paths(record), row.completion) for record in records for row in demonstrations(record)]
    # Every path from the root to an assistant's message that is there, the best reply first.
    assert rows == [
        (["root"], "best"),
        (["root"], "second"),
        (["root"], "also second"),
        (["root"], "unplaced"),
        (["root", "best", "more"], "only"),
    ]
    assert {record.provenance.group for record in records} == {"t"}  # a tree is never parted
    assert records[0].ranked == (Ranked("best", 0), Ranked("second", 1), Ranked("also second", 1))
    pairs = [(pair.chosen, pair.rejected) for record in records for pair in preferences(record)]
    assert pairs == [("best", "second"), ("best", "also second")]  # no pair of equals
    asked = list(dict.fromkeys(prompt for record in records for prompt in prompts(record)))
    assert [[turn.text for turn in prompt.turns] for prompt in asked] == [
        ["root"],
        ["root", "best", "more"],
        ["root", "best", "silence"],
    ]
    assert [record.reason for record in made if isinstance(record, LeftOut)] == [
        "messages that are deleted or empty, with what follows them"
    ]
    assert [r.provenance.generated_by for r in records if r.completion == "unplaced"] == ["a model"]


def flat(node: dict, parent: str | None = None) -> list[dict]:
    values = {name: value for name, value in node.items() if name != "replies"}
    own = values | {"message_tree_id": "t", "parent_id": parent}
    return [own, *(row for reply in node["replies"] for row in flat(reply, node["message_id"]))]


def test_messages_give_what_their_tree_gives():
    messages = [Row(values, f"row {i}") for i, values in enumerate(flat(TREE["prompt"]))]
    (tree,) = oasst1.trees(iter(messages))
    assert list(oasst1.records(tree)) == of("OASST1", **TREE)
    (same,) = oasst1.trees(iter([Row(TREE, "row 1")]))
    assert same.values is TREE
    with pytest.raises(DataError, match="row 2, field 'parent_id': no message 'best' stands before it"):
        list(oasst1.trees(iter([messages[0], *messages[3:]][:1] + [Row(flat(TREE["prompt"])[3], "row 2")])))


def test_trees_that_are_left_out_or_broken():
    assert left_out("OASST1", **(TREE | {"tree_state": "growing"})) == "trees that are not ready for export"
    assert "deleted or empty" in left_out("OASST1", prompt=message(" ", "prompter"))
    with pytest.raises(DataError, match="field 'prompt', field 'role': expected 'prompter'"):
        of("OASST1", prompt=message("x", "assistant"))


# --- SODA

SCENE = {"narrative": "It rains.", "original_index": 3, "split": "train", "PersonX": "Ann"}


def test_soda():
    record = one("SODA", **SCENE, dialogue=["Hi.", "Ho.", "Bye."], speakers=["Ann", "Bob", "Ann"])
    turns = (Turn("assistant", "Hi.", "Ann"), Turn("user", "Ho.", "Bob"))
    assert record.prompt == Prompt(turns, narrative="It rains.", reply_name="Ann")
    assert record.completion == "Bye." and record.provenance.row == "3"
    alone = one("SODA", **SCENE, dialogue=["Hi."], speakers=["Ann"])
    assert alone.prompt == Prompt((), narrative="It rains.", reply_name="Ann")
    assert left_out("SODA", **SCENE, dialogue=[], speakers=[]) == "dialogues without turns"
    assert "unequal numbers" in left_out("SODA", **SCENE, dialogue=["a", "b"], speakers=["Ann"])
    assert left_out("SODA", **SCENE, dialogue=["a", ""], speakers=["Ann", "Bob"]) == "empty replies"
    with pytest.raises(DataError, match="field 'dialogue', field '2': expected text, got null"):
        of("SODA", **SCENE, dialogue=["a", None], speakers=["Ann", "Bob"])
    assert SOURCES["SODA"].key(Row(SCENE, "")) == 3


# --- instructions


def test_alpaca():
    assert one("ALPACA", instruction="Add.", input="1 2", output="3").prompt.text == "Add.\n\n1 2"
    record = one("ALPACA", instruction="Sing.", input="", output="La.")
    assert (record.prompt.text, record.completion) == ("Sing.", "La.")
    assert record.provenance.generated_by == "text-davinci-003"
    assert left_out("ALPACA", instruction="Sing.", input="", output=" ") == "empty replies"
    with pytest.raises(DataError, match="field 'output' is missing"):
        of("ALPACA", instruction="Sing.")


def test_self_instruct():
    made = of(
        "SELF_INSTRUCT",
        id="1",
        instruction="Add.",
        instances=[{"input": "1", "output": "1"}, {"input": "", "output": "0"}],
    )
    assert [(record.prompt.text, record.completion) for record in made] == [("Add.\n\n1", "1"), ("Add.", "0")]
    assert left_out("SELF_INSTRUCT", id="1", instruction="Add.", instances=[]) == "tasks without an instance"


def test_gpt4all():
    marked = "<p>Why is <code>a &lt; b</code>?</p>\n<pre><code>if a &lt; b:\n    go()\n</code></pre>"
    assert (
        one("GPT4ALL", prompt=marked, response="So.", source="so").prompt.text == "Why is a < b?\nif a < b:\n    go()"
    )
    assert one("GPT4ALL", prompt="Is &lt; a sign?", response="Yes.", source="").prompt.text == "Is &lt; a sign?"
    assert left_out("GPT4ALL", prompt="<p></p>", response="x", source="") == "empty prompts"


def test_orca_chat():
    exchanges = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    record = one("ORCA_CHAT", instruction="Be brief.", conversation=exchanges)
    assert record.prompt == Prompt(said("a", "b", "c"), system="Be brief.") and record.completion == "d"
    assert one("ORCA_CHAT", instruction="", conversation=exchanges).prompt.system is None
    assert left_out("ORCA_CHAT", instruction="x", conversation=[]) == "conversations without turns"
    assert "an empty turn" in left_out("ORCA_CHAT", instruction="x", conversation=[{"input": "a", "output": ""}])
    with pytest.raises(DataError, match="field 'conversation', number 1: field 'output' is missing"):
        of("ORCA_CHAT", instruction="x", conversation=[{"input": "a"}])


def test_dolphin_and_airoboros():
    record = one("DOLPHIN", instruction="Be brief.", input="Why?", output="So.")
    assert record.prompt == Prompt(said("Why?"), system="Be brief.") and record.completion == "So."
    assert one("DOLPHIN", instruction="", input="Why?", output="So.").prompt == Prompt.of("Why?")
    assert one("AIROBOROS", instruction="Why?", response="So.", category="x").completion == "So."
    assert left_out("AIROBOROS", instruction=" ", response="x") == "empty prompts"


@pytest.mark.parametrize(("name", "field"), [("RED_PAJAMA", "text"), ("PILE", "text"), ("FANFICS", "TEXT")])
def test_plain_text(name, field):
    assert one(name, **{field: "Once.", "meta": "{'url': 'x'}"}) == Conversation(text="Once.")
    assert left_out(name, **{field: "\n"}) == "empty texts"


# --- real files, where they lie


def drawn(source: Source, path: Path) -> tuple[list[Conversation], Counter]:
    made = [record for row in read_rows(path) for record in source.convert(row)]
    records = [record for record in made if isinstance(record, Conversation)]
    return records, Counter(record.reason for record in made if isinstance(record, LeftOut))


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
def test_real_trees():
    path = REAL / "oasst1" / "trees.jsonl.gz"
    records, reasons = drawn(SOURCES["OASST1"], path)
    roles: Counter[str] = Counter()
    pairs = 0

    def count(node: dict) -> None:
        nonlocal pairs
        roles[node["role"]] += 1
        places = [reply["rank"] for reply in node["replies"] if reply.get("rank") is not None]
        if node["role"] == "prompter":
            pairs += sum(a < b for a in places for b in places)
        for reply in node["replies"]:
            count(reply)

    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            count(json.loads(line)["prompt"])
    assert roles == {"assistant": 475, "prompter": 322} and not reasons
    assert sum(len(demonstrations(record)) for record in records) == roles["assistant"]
    assert len({prompt for record in records for prompt in prompts(record)}) == roles["prompter"]
    assert sum(len(preferences(record)) for record in records) == pairs


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
def test_real_seed_tasks_and_transcripts():
    records, reasons = drawn(SOURCES["SELF_INSTRUCT"], REAL / "self-instruct" / "seed_tasks.jsonl")
    assert len(records) == 175 and not reasons
    records, reasons = drawn(SOURCES["ARLHF"], REAL / "hh-rlhf" / "harmless-base" / "test.jsonl.gz")
    assert len(records) == 1495
    assert reasons == {"empty replies": 4, "transcripts with unequal numbers of turns": 1}
    (row,) = read_rows(REAL / "tinyshakespeare" / "input.txt")
    (text,) = SOURCES["PILE"].convert(row)
    assert text.text.startswith("First Citizen:") and len(text.text) > 10**6
