"""Rows in the shapes of TRL's and transformers' users."""

import json

import pytest

from chatrlhf.config import load_config
from chatrlhf.conversation import Conversation, Pair, Prompt, Provenance, Scored, Turn
from chatrlhf.data.inputs import read_inputs
from chatrlhf.data.json_row import Row
from chatrlhf.data.records import from_json, read_demonstrations, read_judgements, read_prompts, read_records, to_json
from chatrlhf.data.stage_rows import Demonstration, Preference
from chatrlhf.errors import DataError
from chatrlhf.tools.inspect.validation import faults_in


def says(role: str, text: str, **more) -> dict:
    return {"role": role, "content": text, **more}


def share(by: str, text: str) -> dict:
    return {"from": by, "value": text}


SYSTEM, HI, HO, WHY = says("system", "Be brief."), says("user", "Hi?"), says("assistant", "Ho."), says("user", "Why?")
SO, NO = says("assistant", "So."), says("assistant", "No.")
LONG = Prompt((Turn("user", "Hi?"), Turn("assistant", "Ho."), Turn("user", "Why?")), system="Be brief.")
SHORT = Prompt.of("Why?")

SHAPES = {
    "messages": ({"messages": [SYSTEM, HI, HO, WHY, SO]}, Conversation(LONG, "So.")),
    "a prompt in messages": ({"messages": [SYSTEM, HI, HO, WHY]}, Conversation(LONG)),
    "prompt and completion": ({"prompt": "Why?", "completion": "So."}, Conversation(SHORT, "So.")),
    "prompt and completion in messages": (
        {"prompt": [SYSTEM, HI, HO, WHY], "completion": [SO]},
        Conversation(LONG, "So."),
    ),
    "a prompt": ({"prompt": "Why?", "completion": None}, Conversation(SHORT)),
    "a prompt in a list": ({"prompt": [WHY]}, Conversation(SHORT)),
    "a preference": (
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        Conversation(SHORT, pair=Pair("So.", "No.")),
    ),
    "a preference in messages": (
        {"prompt": [SYSTEM, HI, HO, WHY], "chosen": [SO], "rejected": [NO]},
        Conversation(LONG, pair=Pair("So.", "No.")),
    ),
    "a prompt in what is preferred": (
        {"chosen": [SYSTEM, HI, HO, WHY, SO], "rejected": [SYSTEM, HI, HO, WHY, NO]},
        Conversation(LONG, pair=Pair("So.", "No.")),
    ),
    "a prompt in messages beside the whole": (
        {"prompt": [SYSTEM, HI, HO, WHY], "messages": [SYSTEM, HI, HO, WHY, SO]},
        Conversation(LONG, "So."),
    ),
    "a completion beside a preference": (
        {"prompt": "Why?", "completion": "Oh.", "chosen": "So.", "rejected": "No."},
        Conversation(SHORT, "Oh.", pair=Pair("So.", "No.")),
    ),
    "the same reply twice": (
        {"chosen": [WHY, SO], "rejected": [WHY, SO]},
        Conversation(SHORT, pair=Pair("So.", "So.")),
    ),
    "ultrafeedback": (
        {"prompt": "Why?", "messages": [WHY, SO], "chosen": [WHY, SO], "rejected": [WHY, NO], "score_chosen": 9.0},
        Conversation(SHORT, pair=Pair("So.", "No.")),
    ),
    "ultrachat": ({"prompt": "Hi? ", "messages": [SYSTEM, HI, HO, WHY, SO]}, Conversation(LONG, "So.")),
    "sharegpt": (
        {
            "conversations": [
                share("system", "Be brief."),
                share("human", "Hi?"),
                share("gpt", "Ho."),
                share("human", "Why?"),
                share("gpt", "So."),
            ]
        },
        Conversation(LONG, "So."),
    ),
    "sharegpt, its system text beside it": (
        {"system": "Be brief.", "conversations": [share("human", "Hi?"), share("gpt", "Ho."), share("human", "Why?")]},
        Conversation(LONG),
    ),
    "sharegpt with a preference": (
        {"conversations": [share("human", "Why?")], "chosen": share("gpt", "So."), "rejected": share("gpt", "No.")},
        Conversation(SHORT, pair=Pair("So.", "No.")),
    ),
    "a score": (
        {"prompt": "Why?", "completion": "So.", "score": 0, "provenance": {"group": "g"}},
        Conversation(SHORT, scored=(Scored("So.", 0.0),), provenance=Provenance(group="g")),
    ),
    "names, and fields that Parquet fills with null": (
        {
            "messages": [says("user", "Why?", name="Ann", tool_calls=None), says("assistant", "So.", name=None)],
            "tools": None,
        },
        Conversation(Prompt((Turn("user", "Why?", "Ann"),)), "So."),
    ),
    "an empty reply": ({"messages": [WHY, says("assistant", "")]}, Conversation(SHORT, "")),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_becomes_a_record(shape):
    row, record = SHAPES[shape]
    assert from_json(Row(row, "here")) == record
    written = to_json(record)
    assert not {"messages", "prompt", "conversations"} & written.keys() and from_json(Row(written, "here")) == record


@pytest.mark.parametrize(
    "row",
    [
        {"user_input": "a", "completion": "b", "messages": "not looked at", "prompt": 3},
        {"user_input": "a", "chosen": "b", "rejected": "c", "tools": []},
        {"text": "Once.", "prompt": "not looked at"},
    ],
)
def test_a_row_of_ours_stays_ours(row):
    assert from_json(Row(row, "here")) == from_json(
        Row({k: v for k, v in row.items() if k not in ("messages", "prompt", "tools")}, "here")
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hi?"}, ", field 'messages': expected a list, got str"),
        ({"messages": []}, ", field 'messages': it holds no message"),
        ({"messages": [HI, "Ho."]}, ", field 'messages', number 2: expected an object"),
        ({"messages": [HI, {"role": "assistant"}]}, "'messages', number 2: field 'content' is missing"),
        (
            {"messages": [HI, says("assistant", [{"type": "text"}])]},
            "number 2, field 'content': expected text, got list",
        ),
        ({"messages": [{"content": "Hi?"}]}, "number 1: field 'role' is missing"),
        (
            {"messages": [says("critic", "a")]},
            "number 1, field 'role': expected 'system', 'user' or 'assistant', got str",
        ),
        ({"messages": [HI, says("tool", "42")]}, "number 2, field 'role': .*calls of tools have no place in a record"),
        ({"messages": [HI, says("assistant", None, tool_calls=[{}])]}, "number 2, field 'tool_calls': calls of tools"),
        ({"messages": [HI, HO], "tools": [{"type": "function"}]}, ", field 'tools': calls of tools"),
        ({"messages": [HI, SYSTEM, HO]}, ", field 'messages': number 2 is a system text"),
        ({"messages": [SYSTEM, HI], "system": "Be long."}, ", field 'system': it is not what the first message says"),
        ({"messages": [HI, HO], "completion": "So."}, ", field 'completion': 'messages' ends with a reply, too"),
        ({"messages": [HI, HO], "prompt": "Why?"}, ", field 'prompt': it is not what 'messages' says"),
        ({"messages": [WHY, HO], "prompt": [HI]}, ", field 'prompt': it is not what 'messages' says"),
        (
            {"conversations": [share("human", "a"), share("bot", "b")]},
            "field 'from': expected 'system', 'human' or 'gpt'",
        ),
        ({"conversations": [share("human", "a"), share("observation", "b")]}, "field 'from': .*calls of tools"),
        ({"prompt": 3, "completion": "a"}, ", field 'prompt': expected text, got int 3"),
        ({"prompt": "a", "completion": 3}, ", field 'completion': expected text, got int 3"),
        (
            {"prompt": "a", "completion": [HI]},
            "'completion': expected one message of the assistant .* got one of the user",
        ),
        ({"prompt": "a", "completion": [HO, HI, HO]}, "'completion': expected one message .* got 3 messages"),
        ({"prompt": [HI, HO], "completion": [SO]}, ", field 'prompt': it ends with a message of the assistant"),
        ({"prompt": "a", "completion": "b", "label": False}, ", field 'label': no stage trains on single replies"),
        ({"prompt": "a", "chosen": "b"}, ": field 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, ", field 'rejected': expected text, got null"),
        ({"chosen": [HI, HO], "rejected": [WHY, NO]}, ", field 'rejected': it has no message in common with 'chosen'"),
        ({"chosen": [HI, HO, WHY, SO], "rejected": [HI, NO]}, "'chosen': expected one message .* got 3 messages"),
        (
            {"chosen": [HI, HO], "rejected": [HI, NO], "prompt": "Why?"},
            ", field 'prompt': it is not what 'chosen' says",
        ),
        ({"chosen": [HI, HO], "rejected": "No."}, "it has no message in common"),
        ({"messages": [says("user", "b \ud83d")]}, "number 1, field 'content': character 3 is half of a surrogate"),
    ],
)
def test_errors_name_file_row_and_field(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}, row 2") and "\n" not in str(error.value)
    assert list(faults_in(path)) == [str(error.value)]


def write(tmp_path, rows) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_stages_read_them_from_a_file(tmp_path):
    path = write(tmp_path, [{"messages": [SYSTEM, HI, HO, WHY, SO]}, {"prompt": "Why?", "completion": "So."}])
    assert read_demonstrations(path) == [Demonstration(LONG, "So."), Demonstration(SHORT, "So.")]
    assert read_prompts(path) == [LONG, SHORT]
    assert list(faults_in(path, stage="actor")) == []
    path = write(tmp_path, [{"chosen": [WHY, SO], "rejected": [WHY, NO]}])
    assert read_judgements(path) == [Preference(SHORT, "So.", "No.")]
    assert list(faults_in(path, stage="reward")) == []
    for row, message in (
        ({"messages": [HI, HO, WHY]}, "row 1: no completion follows its turns; add one, in messages as the last"),
        ({"prompt": "Why?"}, "row 1: field 'completion' is missing"),
    ):
        with pytest.raises(DataError, match=message):
            read_demonstrations(write(tmp_path, [row]))


def test_what_is_made_from_a_file_is_made_of_our_fields(tmp_path):
    rows = [
        {"messages": [SYSTEM, WHY, SO], "id": 7},
        {"prompt": "Why?", "completion": "So."},
        {"messages": [HI, HO, WHY]},
    ]
    turns = [{"role": "user", "text": "Hi?"}, {"role": "assistant", "text": "Ho."}, {"role": "user", "text": "Why?"}]
    assert [row.values for row, _ in read_records(write(tmp_path, rows))] == [
        {"id": 7, "system": "Be brief.", "user_input": "Why?", "completion": "So."},
        {"user_input": "Why?", "completion": "So."},
        {"turns": turns},
    ]


def test_every_row_is_looked_at(tmp_path):
    path = write(tmp_path, [{"messages": []}, {"prompt": "a"}, {"prompt": 3}, {"prompt": " ", "completion": ""}])
    assert [fault.removeprefix(f"{path}, ") for fault in faults_in(path)] == [
        "row 1, field 'messages': it holds no message",
        "row 3, field 'prompt': expected text, got int 3",
        "row 4, field 'user_input': it is empty",
        "row 4: a completion is empty",
    ]


def test_a_mixture_reads_them_by_columns_of_their_own(tmp_path):
    rows = [{"dialogue": [says("user", f"Why {i}?"), SO]} for i in range(4)]
    entry = {"name": str(write(tmp_path, rows)), "columns": {"messages": "dialogue"}, "val_split": 0}
    made = read_inputs(load_config({"actor_config": {"datasets": [entry]}}), ["ACTOR"], needs_judgements=True)
    assert set(made.actor.train) == {Demonstration(Prompt.of(f"Why {i}?"), "So.") for i in range(4)}
