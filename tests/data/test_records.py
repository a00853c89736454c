"""Reading rows: the shapes that are accepted, and errors that name file, row and field."""

import json

import pytest

from chatrlhf.data.records import (
    Demonstration,
    Preference,
    ScoredCompletion,
    read_demonstrations,
    read_judgements,
    read_prompts,
)
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
    expected = [Demonstration("Hi?", "Hello."), Demonstration("«{x}»", "")]
    assert read_demonstrations(write(ACTOR)) == expected
    assert read_demonstrations(write(lines(ACTOR) + ending, "rows.jsonl")) == expected
    assert read_demonstrations(write(lines(ACTOR) + ending, "lines.json")) == expected  # seen by its first character


def test_a_byte_order_mark_is_not_part_of_the_file(write):
    assert read_prompts(write("\ufeff" + json.dumps([{"user_input": "Hi?"}]))) == ["Hi?"]


def test_a_number_that_python_declines_to_read(write):
    with pytest.raises(DataError, match="rows.jsonl, row 1: cannot be read"):
        read_judgements(write('{"user_input": "a", "completion": "b", "score": ' + "9" * 5000 + "}", "rows.jsonl"))


def test_a_line_separator_inside_a_text_does_not_end_a_row(write):
    row = '{"user_input": "one\u2028two\x85three"}'
    assert read_prompts(write(row, "rows.jsonl")) == ["one\u2028two\x85three"]


def test_prompts_ignore_other_fields(write):
    assert read_prompts(write([{"user_input": "Hi?", "id": 3, "completion": None}])) == ["Hi?"]


def test_a_score_of_zero_is_a_score(write):
    rows = read_judgements(write([{"user_input": "a", "completion": "b", "score": s} for s in (0, 0.0, -1, 2.5)]))
    assert rows == [ScoredCompletion("a", "b", score) for score in (0.0, 0.0, -1.0, 2.5)]
    assert all(type(row.score) is float for row in rows)


def test_pairs_keep_both_replies(write):
    rows = read_judgements(write([{"user_input": "a", "chosen": "b", "rejected": "c"}]))
    assert rows == [Preference("a", "b", "c")]


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
