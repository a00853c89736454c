"""Reading rows: the shapes that are accepted, and errors that name file, row and field."""

import gzip
import json
import random

import pytest

from chatrlhf.conversation import Conversation, Pair, Prompt, Provenance, Ranked, Scored, Turn
from chatrlhf.data.files import read_rows
from chatrlhf.data.json_row import Row
from chatrlhf.data.records import from_json, read_demonstrations, read_judgements, read_prompts, to_json
from chatrlhf.data.stage_rows import Demonstration, PlainText, Preference, ScoredCompletion
from chatrlhf.errors import DataError

ACTOR = [{"user_input": "Hi?", "completion": "Hello."}, {"user_input": "«{x}»", "completion": ""}]


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def lines(rows) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize("ending", ["\n", "", "\n\n\n"])
def test_json_and_jsonl_are_the_same(write, ending):
    expected = [Demonstration(Prompt.of("Hi?"), "Hello."), Demonstration(Prompt.of("«{x}»"), "")]
    assert read_demonstrations(write(ACTOR)) == expected
    assert read_demonstrations(write(lines(ACTOR) + ending, "rows.jsonl")) == expected
    assert read_demonstrations(write(lines(ACTOR) + ending, "lines.json")) == expected  # seen by its first character


def test_a_byte_order_mark_is_not_part_of_the_file(write):
    assert read_prompts(write("\ufeff" + json.dumps([{"user_input": "Hi?"}]))) == [Prompt.of("Hi?")]


def test_a_number_that_python_declines_to_read(write):
    with pytest.raises(DataError, match="rows.jsonl, row 1: cannot be read"):
        read_judgements(write('{"user_input": "a", "completion": "b", "score": ' + "9" * 5000 + "}", "rows.jsonl"))


def test_a_line_separator_inside_a_text_does_not_end_a_row(write):
    row = '{"user_input": "one\u2028two\x85three"}'
    assert read_prompts(write(row, "rows.jsonl")) == [Prompt.of("one\u2028two\x85three")]


def test_prompts_ignore_other_fields(write):
    assert read_prompts(write([{"user_input": "Hi?", "id": 3, "completion": None}])) == [Prompt.of("Hi?")]


def test_a_score_of_zero_is_a_score(write):
    rows = read_judgements(write([{"user_input": "a", "completion": "b", "score": s} for s in (0, 0.0, -1, 2.5)]))
    assert rows == [ScoredCompletion(Prompt.of("a"), "b", score) for score in (0.0, 0.0, -1.0, 2.5)]
    assert all(type(row.score) is float for row in rows)


def test_pairs_keep_both_replies(write):
    rows = read_judgements(write([{"user_input": "a", "chosen": "b", "rejected": "c"}]))
    assert rows == [Preference(Prompt.of("a"), "b", "c")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"user_input": "a", "completion": "b", "score": None}, "'score': it is null.*generate_rewards.py"),
        ({"user_input": "a", "completion": "b"}, "'score' is missing.*'chosen' and 'rejected'"),
        ({"user_input": "a", "completion": "b", "score": True}, "'score': expected a number, got bool"),
        ({"user_input": "a", "completion": "b", "score": "4"}, "'score': expected a number, got str"),
        ({"user_input": "a", "completion": "b", "score": float("nan")}, "'score': nan is not a finite"),
        ({"user_input": "a", "completion": "b", "score": float("inf")}, "'score': inf is not a finite"),
        ({"user_input": "a", "completion": "b", "score": -1e39}, "'score': -1e\\+39 is not a finite"),
        ({"user_input": "a", "completion": "b", "score": 10**400}, "'score': 10*\\.\\.\\. is not a finite"),
        ({"user_input": "a", "completion": "b \ud83d", "score": 1}, "'completion': character 3 is half of a surrogate"),
        ({"user_input": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"user_input": "a", "chosen": "b", "rejected": None}, "'rejected': expected text, got null"),
        ({"completion": "b", "score": 1}, "'user_input' is missing.*found 'completion', 'score'"),
        ({"user_input": ["a"], "completion": "b", "score": 1}, "'user_input': expected text, got list"),
        ([1], "expected an object with fields, got list"),
    ],
)
def test_errors_name_file_row_and_field(write, row, message):
    path = write([{"user_input": "a", "completion": "b", "score": 1}, row])
    with pytest.raises(DataError, match=message) as error:
        read_judgements(path)
    assert str(error.value).startswith(f"{path}, row 2")
    assert "\n" not in str(error.value)


def test_mixed_shapes_name_the_odd_row(write):
    scored = {"user_input": "a", "completion": "b", "score": 1}
    with pytest.raises(DataError, match="row 3: scored rows .* and preference rows .* are mixed"):
        read_judgements(write([scored, scored, {"user_input": "a", "chosen": "b", "rejected": "c"}]))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("[]", "rows.json", "holds no rows"),
        ("", "rows.jsonl", "holds no rows"),
        ('[{"user_input": "a"},', "rows.json", "line 1, column 22: broken JSON"),
        ('{"user_input": "a"}\n{"user_input": ', "rows.jsonl", "row 2, column 16: broken JSON"),
        ('"text"', "rows.json", "expected a list of rows, got str"),
    ],
)
def test_broken_files(write, content, name, message):
    path = write(content, name)
    with pytest.raises(DataError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="nowhere.json: the file does not exist"):
        read_prompts(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="it is a folder"):
        read_prompts(tmp_path)
    (tmp_path / "latin.json").write_bytes('[{"user_input": "é"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.json: it is not UTF-8 text \(byte 17\)"):
        read_prompts(tmp_path / "latin.json")


def test_a_long_value_is_shown_in_short(write):
    with pytest.raises(DataError) as error:
        read_prompts(write([{"user_input": ["x" * 500]}]))
    assert len(str(error.value)) < 250


SPOKEN = Prompt(
    (Turn("user", "Hi?", "Garry"), Turn("assistant", "Ho."), Turn("user", "{x} \u2028")), "Be brief.", "Rain.", "Bob"
)
RECORDS = [
    Conversation(Prompt.of("Hi?")),
    Conversation(Prompt.of(""), completion=""),
    Conversation(SPOKEN, completion="Hello."),
    Conversation(Prompt.of("a"), scored=(Scored("b", 0.0),)),
    Conversation(Prompt.of("a"), scored=(Scored("b", None),)),
    Conversation(Prompt.of("a"), completion="b", scored=(Scored("c", 1.5),)),
    Conversation(Prompt.of("a"), scored=(Scored("b", 1.0), Scored("c", -2.0))),
    Conversation(SPOKEN, ranked=(Ranked("b", 0), Ranked("c", 1), Ranked("d", 1))),
    Conversation(Prompt.of("a"), pair=Pair("b", "")),
    Conversation(Prompt.of("a"), "b", (Scored("c", 1.0),), (Ranked("d", 0),), Pair("e", "f")),
    Conversation(Prompt(), completion="b"),
    Conversation(Prompt((Turn("user", "a", "Garry"),)), completion="b"),
    Conversation(Prompt((Turn("assistant", "a"),)), completion="b"),
    Conversation(Prompt(narrative="It rains.", reply_name="Bob"), completion="b"),
    Conversation(text="Long ago."),
    Conversation(Prompt.of("a"), provenance=Provenance("oasst1", "7", "Apache-2.0", "a model", "tree 3", "a judge")),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "-".join(to_json(record)))
def test_a_record_comes_back_from_json(record):
    values = json.loads(json.dumps(to_json(record)))
    assert from_json(Row(values, "here")) == record
    if record.text is None:
        assert values["user_input"] == record.prompt.text  # for programs that know ChatLLaMA's fields alone


def test_records_made_at_random_come_back():
    chance = random.Random(0)
    words = ["", "a", "{x}", '"', "\\", "\n\n", "é\u2028", "Human:", "𝄞", "null"]

    def text():
        return "".join(chance.choices(words, k=chance.randrange(4)))

    def maybe():
        return text() if chance.random() < 0.5 else None

    for _ in range(500):
        turns = [Turn(chance.choice(["user", "assistant"]), text(), maybe()) for _ in range(chance.randrange(4))]
        record = Conversation(
            Prompt(tuple(turns), maybe(), maybe(), maybe()),
            maybe(),
            tuple(Scored(text(), chance.choice([None, 0.0, -1.25])) for _ in range(chance.randrange(3))),
            tuple(Ranked(text(), chance.randrange(3)) for _ in range(chance.randrange(3))),
            chance.choice([None, Pair(text(), text())]),
            provenance=Provenance(*(maybe() for _ in range(6))),
        )
        assert from_json(Row(json.loads(json.dumps(to_json(record))), "here")) == record


def test_a_chatllama_row_is_written_as_one():
    assert to_json(Conversation(Prompt.of("a"), completion="b")) == {"user_input": "a", "completion": "b"}
    scored = Conversation(Prompt.of("a"), scored=(Scored("b", 0.0),))
    assert to_json(scored) == {"user_input": "a", "completion": "b", "score": 0.0}
    assert to_json(Conversation(Prompt.of("a"), pair=Pair("b", "c"))) == {
        "user_input": "a",
        "chosen": "b",
        "rejected": "c",
    }


def test_a_system_text_beside_a_user_input():
    record = from_json(Row({"system": "Be brief.", "user_input": "Hi?"}, "here"))
    assert record.prompt == Prompt((Turn("user", "Hi?"),), system="Be brief.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": [{"role": "human", "text": "a"}]}, "field 'turns', number 1, field 'role': expected 'user' or 'ass"),
        ({"turns": [{"role": "user"}]}, "number 1: field 'text' is missing"),
        ({"turns": "Hi?"}, "field 'turns': expected a list, got str"),
        ({"turns": [], "user_input": "Hi?"}, "'user_input': it is not what 'turns' says; correct one of them"),
        (
            {"user_input": "a", "ranked": [{"completion": "b", "rank": 0.5}]},
            "'rank': expected a whole number, got float",
        ),
        (
            {"user_input": "a", "ranked": [{"completion": "b", "rank": True}]},
            "'rank': expected a whole number, got bool",
        ),
        ({"user_input": "a", "scored": [{"completion": "b"}]}, "field 'score' is missing; give a number, or null"),
        ({"user_input": "a", "system": 3}, "field 'system': expected text, got int 3"),
        ({"user_input": "a", "provenance": "x"}, "field 'provenance': expected an object"),
    ],
)
def test_errors_of_longer_rows(row, message):
    with pytest.raises(DataError, match=f"here, row 3.*{message}"):
        from_json(Row(row, "here, row 3"))


def test_ranked_rows_are_preferences(write):
    ranked = [{"completion": "b", "rank": 1}, {"completion": "c", "rank": 0}, {"completion": "d", "rank": 1}]
    path = write([{"user_input": "a", "ranked": ranked}, {"user_input": "x", "chosen": "y", "rejected": "z"}])
    a = Prompt.of("a")
    assert read_judgements(path) == [
        Preference(a, "c", "b"),
        Preference(a, "c", "d"),
        Preference(Prompt.of("x"), "y", "z"),
    ]
    assert read_demonstrations(path) == [Demonstration(a, "c"), Demonstration(Prompt.of("x"), "y")]
    with pytest.raises(DataError, match="no two of its ranked completions differ in rank"):
        read_judgements(write([{"user_input": "a", "ranked": ranked[::2]}]))


def test_plain_text_is_for_the_actor_alone(write):
    path = write([{"text": "Once."}])
    assert read_demonstrations(path) == [PlainText("Once.")]
    with pytest.raises(DataError, match="row 1: it holds plain text and no prompt"):
        read_prompts(path)


def test_a_file_compressed_by_gzip(tmp_path):
    for name, text in (("rows.jsonl.gz", lines(ACTOR)), ("rows.json.gz", json.dumps(ACTOR))):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert len(read_demonstrations(tmp_path / name)) == 2
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="rows.jsonl.gz: it cannot be read"):
        read_prompts(tmp_path / "rows.jsonl.gz")


def test_a_jsonl_file_is_read_as_it_is_asked_for(write):
    rows = read_rows(write('{"user_input": "a"}\n{"user_input": ', "rows.jsonl"))
    assert next(rows).values == {"user_input": "a"}
    with pytest.raises(DataError, match="row 2"):
        next(rows)


def test_blank_lines_count_where_rows_are_named(write):
    with pytest.raises(DataError, match="rows.jsonl, row 5"):
        read_prompts(write('\n\n{"user_input": "a"}\n\n{"user_input": 1}', "rows.jsonl"))
