"""Files of rows and of settings that say two things, or not what they seem to say: refused by name and place."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from field_reports import report
from pyarrow import parquet

from chatrlhf import cli
from chatrlhf.config import load_config
from chatrlhf.config.load import load_peft_config
from chatrlhf.conversation import Scored
from chatrlhf.data.files import open_rows
from chatrlhf.data.inputs import read_inputs
from chatrlhf.data.records import from_json, read_records
from chatrlhf.errors import ConfigError, DataError
from chatrlhf.models.loading.lora import base_of
from chatrlhf.sharding.deepspeed_config import read_deepspeed_config
from chatrlhf.tools.inspect.statistics import records_in
from chatrlhf.tools.inspect.validation import faults_in
from chatrlhf.tools.synth.instructions import read_templates
from chatrlhf.tools.synth.journal import Journal


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def faults(path: Path) -> list[str]:
    """What `data check` finds; training and mixtures stop at the first of it."""
    found = list(faults_in(path))
    for read in (lambda: list(read_records(path)), lambda: [from_json(row) for row in open_rows(path)]):
        with pytest.raises(DataError) as error:
            read()
        assert str(error.value) in found
    return [fault.replace(str(path), "F") for fault in found]


def records(path: Path) -> list:
    """The records of a file in which there is no fault, the same for training and mixtures."""
    assert list(faults_in(path)) == []
    read = [record for _, record in read_records(path)]
    assert [from_json(row) for row in open_rows(path)] == read
    return read


HEADER = "user_input,completion\n"


@report(
    "tidyverse/vroom#484",
    "JuliaData/CSV.jl#1096",
    fault="CSV: a quote that is never closed, text behind a closing quote, rows of other lengths, a column twice",
    expected="refused with row and line; nothing swallowed",
)
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (HEADER + 'a,b\nc,"d\ne,f\ng,h\n', "F, row 2 (line 3): a cell is opened by a quote that is never closed"),
        (HEADER + 'a,"5" pipe"\nc,d\n', "F, row 1 (line 2): there is text behind a closing quote, in line 2"),
        (HEADER + 'a,"b\nc,"d"\n', "F, row 1 (line 2): there is text behind a closing quote, in line 3"),
        (HEADER + '"a\nb",c\nd,5" pipe\n', "F, row 2 (line 4): there is a quote in a cell without quotes"),
        (HEADER + "a,b\nc\n", "F, row 2 (line 3): it has 1 cells, and the first line names 2"),
        (HEADER + "a,b, c\n", "F, row 1 (line 2): it has 3 cells, and the first line names 2"),
        (HEADER + "a,b\0c\n", "F, row 1 (line 2): it holds a NUL byte"),
        (HEADER + "a,b\n\ufeff" + HEADER + "c,d\n", "F, row 2 (line 3): it is the first line again"),
        (HEADER + "a,\n,b\n", "F, row 2 (line 3), field 'user_input': expected text, got null"),
        ("user_input,completion,completion\na,b,c\n", "F: column 'completion' is given twice in the first line"),
        ("user_input,,completion\na,b,c\n", "F: column 2 has no name in the first line"),
        ("user_input;completion\na;b\n", "F: its cells are separated by semicolons"),
        ("user_input\tcompletion\na\tb\n", "F: its cells are separated by tabs"),
        ("sep=;\nuser_input;completion\na;b\n", "F: its cells are separated by semicolons"),
        ('messages\n"[{""role"": ""user""}]"\n', "F, row 1 (line 2), field 'messages': expected a list, got str"),
        (
            "prompt,chosen,rejected\na,\"[{'role': 'assistant', 'content': 'b'}]\",c\n",
            "F, row 1 (line 2), field 'chosen': its text is a list of messages",
        ),
    ],
)
def test_csv_that_others_forgive(write, text, fault):
    found = faults(write("rows.csv", text))
    assert len(found) == 1 and found[0].startswith(fault), found


@report(
    "metmuseum/openaccess#10",
    fault="CSV: cells of several lines, doubled quotes, CRLF and a byte-order mark",
    expected="read as they are meant",
)
def test_csv_that_is_right(write):
    text = 'user_input,completion\r\n"two\r\nlines","say ""hi"""\r\n\r\n a , b \r\n'
    read = records(write("rows.csv", text.encode("utf-8-sig")))
    assert [(each.prompt.text, each.completion) for each in read] == [("two\r\nlines", 'say "hi"'), (" a ", " b ")]
    index = records(write("index.CSV", ",user_input,completion\n0,a,b\n"))  # as pandas writes it
    assert [(each.prompt.text, each.completion) for each in index] == [("a", "b")]


@report("JuliaData/CSV.jl#1096", fault="scores in a CSV file, which knows text alone", expected="numbers, or refused")
def test_numbers_in_csv(write):
    text = "user_input,completion,score,chosen,rejected\n"
    given = {"3": 3.0, " -2.5 ": -2.5, ".5": 0.5, "1e-3": 0.001, "+4.": 4.0, "": None, "  ": None}
    path = write("rows.csv", text + "".join(f"a,b,{number},,\n" for number in given))
    assert [each.scored for each in records(path)] == [(Scored("b", score),) for score in given.values()]
    assert [row.values["score"] for row, _ in read_records(path)] == list(given.values())  # as they are written again
    for number in ("nan", '"1,5"', "1e400", "1_000", "high", "True", "٣", "0x10"):
        (fault,) = faults(write("rows.csv", f"user_input,completion,score\na,b,1\na,b,{number}\n"))
        assert fault.startswith("F, row 2 (line 3), field 'score': ")
    # Text that holds a number is text in JSON, in a mixture as in a file.
    path = write("rows.jsonl", '{"user_input": "a", "completion": "b", "score": "3"}\n')
    assert faults(path) == ["F, row 1, field 'score': expected a number, got str \"3\""]
    entry = {"name": str(path), "columns": {"completion": "completion"}}
    with pytest.raises(DataError, match="row 1, field 'score': expected a number, got str"):
        read_inputs(load_config({"actor_config": {"datasets": [entry]}}), ["ACTOR"], True)


def test_numbers_and_flags_of_a_public_dataset_in_csv(write):
    text = "message_tree_id,message_id,parent_id,role,text,rank,deleted\n"
    text += "t,1,,prompter,Why?,,False\nt,2,1,assistant,No.,1,False\nt,3,1,assistant,So.,0,False\n"
    path = write("trees.csv", text + "t,4,1,assistant,Gone.,2,True\n")
    made = [record for _, record in records_in(path, "OASST1")]
    assert [[(answer.completion, answer.rank) for answer in each.ranked] for each in made[1:2]] == [
        [("So.", 0), ("No.", 1)]
    ]


def test_half_a_character_is_a_fault_in_a_mixture_too(write):
    path = write("rows.jsonl", '{"user_input": "a", "completion": "b"}\n{"user_input": "c", "completion": "\\ud83d"}\n')
    (fault,) = faults(path)
    entry = {"name": str(path), "val_split": 0}
    with pytest.raises(DataError) as error:
        read_inputs(load_config({"actor_config": {"datasets": [entry]}}), ["ACTOR"], True)
    assert str(error.value).replace(str(path), "F") == fault


ROW = json.dumps({"user_input": "a", "completion": "b"}) + "\n"
TWICE = '{"user_input": "a", "completion": "first", "completion": "second"}'


@report(
    "snowflakedb/ArcticTraining#85",
    fault="a field twice in a row of JSON or JSONL",
    expected="refused with row and field",
)
@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("rows.jsonl", ROW + TWICE, ["F, row 2: key 'completion' is given twice; correct the file"]),
        (
            "rows.jsonl",
            '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}\n',
            ["F, row 1: key 'role' is given twice; correct the file"],
        ),
        (
            "rows.json",
            f"[{ROW},\n{TWICE},\n{TWICE}]",
            [
                "F, row 2 (line 3): key 'completion' is given twice; correct it",
                "F, row 3 (line 4): key 'completion' is given twice; correct it",
            ],
        ),
        (
            "rows.json",
            '[{"user_input": "a", "scored": [{"completion": "b", "score": 1, "score": 2}]}]',
            ["F, row 1 (line 1): key 'score' is given twice; correct it"],
        ),
    ],
)
def test_a_field_twice(write, name, text, found):
    assert faults(write(name, text)) == found
    assert faults(write(f"{name}.gz", gzip.compress(text.encode()))) == found


def parquet_bytes(table: pa.Table) -> bytes:
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


BROKEN_TEXT = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
PACKED = gzip.compress((ROW * 5000).encode(), mtime=0)  # or the names of cases hold the time
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"


@report(
    "met while testing",
    fault="files that are damaged, in another encoding, or of another kind than their name says",
    expected="one line with the file, what it is and what to do",
)
@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("r.jsonl.gz", PACKED[: len(PACKED) // 2], "it cannot be read (Compressed file ended"),
        (
            "r.jsonl.gz",
            PACKED[:30] + b"\xff" * 9 + PACKED[39:],
            "it cannot be read (Error -3 while decompressing",
        ),
        ("r.jsonl.gz", ROW, "it cannot be read, since it is not compressed by gzip"),
        ("r.csv.gz", POINTER, "it is a pointer of Git LFS"),
        ("r.jsonl", POINTER, "it is a pointer of Git LFS"),
        ("r.parquet", POINTER, "it is a pointer of Git LFS"),
        ("r.jsonl", PACKED, "it is compressed by gzip"),
        ("r.jsonl.gz", gzip.compress(PACKED, mtime=0), "it is compressed by gzip twice"),
        ("r.jsonl", parquet_bytes(pa.table({"text": ["a"]})), "it is a Parquet file"),
        ("r.csv", b"PK\x03\x04zip", "it is a zip archive"),
        ("r.txt", "text".encode("utf-16"), "it is not UTF-8 text, but UTF-16"),
        ("r.csv", HEADER.encode("utf-16"), "it is not UTF-8 text, but UTF-16"),
        ("r.jsonl", (ROW * 3).encode("utf-16-le"), "it is not UTF-8 text, but UTF-16"),
        ("r.json", "<!DOCTYPE html>\n<html>", "it is a web page"),
        ("r.tsv", "user_input\tcompletion\n", "it is no JSON, and its name does not end with"),
        ("r.parquet", b"", "it cannot be read (Parquet file size is 0 bytes)"),
        ("r.parquet", parquet_bytes(pa.table({"text": ["a"]}))[:-9], "it cannot be read (Parquet magic bytes"),
        (
            "r.parquet",
            parquet_bytes(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])),
            "column 'text' is there twice",
        ),
        ("r.jsonl", json.dumps(json.loads(ROW), indent=2), "it is one JSON object over several lines, with 'user_in"),
        ("r.json", json.dumps({"data": [json.loads(ROW)] * 99}, indent=2), "it is one JSON object over several lines"),
        ("r.json", json.dumps({"data": [json.loads(ROW)]}), "it is one JSON object with its rows in 'data'"),
        ("r.jsonl", json.dumps([json.loads(ROW)] * 99, indent=2), "it is a JSON list over several lines"),
        ("r.jsonl", f"{json.dumps(json.loads(ROW), indent=2)}\n" * 99, "its JSON objects are written over several"),
    ],
)
def test_files_of_another_kind(write, name, content, fault):
    (found,) = faults(write(name, content))
    assert found.startswith(f"F: {fault}"), found


def test_an_object_over_several_lines_that_is_broken(write):
    (found,) = faults(write("r.json", "{\n  'data': [\n    {\n      'user_input': 'a'\n    }\n  ]\n}\n"))
    assert found.startswith("F, line 2, column 3: broken JSON (Expecting property name")


def test_single_rows_that_cannot_be_read(write):
    path = write("rows.parquet", parquet_bytes(pa.table({"text": BROKEN_TEXT})))
    assert [fault[:44] for fault in faults(path)] == ["F, row 2: field 'text' cannot be read ('utf-"]
    deep = '{"user_input": "a", "x": ' + "[" * 200 + "]" * 200 + "}\n"
    path = write("rows.jsonl", deep + '{"user_input": ' + "[" * 5000 + "\n" + ROW)
    too_deep = "it is nested more than 100 levels deep; correct the file"
    assert faults(path) == [f"F, row 1: {too_deep}", f"F, row 2: {too_deep}"]
    assert faults(write("rows.jsonl", '{"text": "é"}\n'.encode("latin-1"))) == [
        "F, row 1: it is not UTF-8 text (byte 10); save it as UTF-8"
    ]
    assert faults(write("rows.csv", (HEADER + "a,b\nc,é\n").encode("latin-1"))) == [
        "F, row 2 (line 3): it is not UTF-8 text; save the file as UTF-8"
    ]
    assert faults(write("rows.jsonl", '{"text": "b \\ud83d"}\n'))[0].startswith("F, row 1, field 'text': character 3")
    assert len(records(write("gene.txt", "PAR1 is the name of a gene."))) == 1
    assert len(records(write("joined.jsonl", "\ufeff" + ROW + "\ufeff" + ROW))) == 2  # joined files, with their marks


def test_what_is_said_can_be_written_to_any_terminal(write, capsys):
    path = write("rows.jsonl", '{"user_input": ["\\ud800"]}\n')
    assert cli.main(["data", "check", str(path)]) == 1
    assert 'expected text, got list ["\\ud800"]' in capsys.readouterr().out


SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@report(
    "met while testing",
    fault="rows with pictures, tools, documents, reasoning or parts of a message, all of them dropped",
    expected="refused by row and field; ids and other fields are ignored",
)
@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"user_input": "a", "completion": "b", "images": ["x.png"]}, "'images'"),
        ({"user_input": "a", "completion": "b", "tools": [{"name": "f"}]}, "'tools'"),
        ({"prompt": "a", "completion": "b", "audio": {"path": "x"}}, "'audio'"),
        ({"messages": SAID, "documents": [{"text": "c"}]}, "'documents'"),
        ({"messages": SAID, "chat_template_kwargs": {"enable_thinking": False}}, "'chat_template_kwargs'"),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, "'history'"),
        ({"prompt": "a", "completion": "b", "system_prompt": "Be brief."}, "'system_prompt'"),
        (
            {"messages": [SAID[0], SAID[1] | {"reasoning_content": "Hm."}]},
            "'messages', number 2, field 'reasoning",
        ),
        ({"messages": [SAID[0] | {"images": ["x"]}, SAID[1]]}, "'messages', number 1, field 'images'"),
        ({"turns": [{"role": "user", "text": "a", "tool_calls": [1]}]}, "'turns', number 1, field 'tool_calls'"),
        (
            {"messages": [SAID[0] | {"content": [{"type": "text", "text": "a"}]}]},
            "'messages', number 1, field 'content'",
        ),
    ],
)
def test_fields_that_would_be_dropped(write, row, field):
    empty = {"images": [], "tools": None, "documents": "", "id": 7, "source": {"a": [1]}}
    path = write("rows.jsonl", json.dumps(json.loads(ROW) | empty) + "\n" + json.dumps(row) + "\n")
    (found,) = faults(path)
    assert found.startswith(f"F, row 2, field {field}"), found


# ----- settings


@report(
    "snowflakedb/ArcticTraining#85",
    "rbgirshick/yacs#17",
    "yaml/pyyaml#165",
    fault="a key, or a whole section, twice in YAML, on the command line or in JSON beside it",
    expected="refused by name, with the line; a key may override an anchor that is merged in",
)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("actor_config:\n  lr: 1.0e-5\n  epochs: 1\n  lr: 1.0e-3\n", "line 4: .*'lr' is given twice, first in line 2"),
        ("actor_config: {lr: 1.0e-5}\nseed: 1\nactor_config: {epochs: 1}\n", "line 3: .*'actor_config' is given twice"),
        ("actor_config: {lr: 1.0e-5, 'lr': 1.0e-3}\n", "line 1: .*'lr' is given twice"),
        (
            "actor_config:\n  datasets:\n    - {name: a, size: 1}\n    - {name: b, size: 1, size: 2}\n",
            "line 4: .*'size'",
        ),
        ("trainer_config:\n  gen_kwargs:\n    top_p: 1\n    top_p: 0.9\n", "line 4: .*'top_p' is given twice"),
        ("actor_config: {<<: {lr: 1.0e-5}, <<: {lr: 1.0e-3}}\n", "line 1: .*'<<' is given twice"),
    ],
)
def test_a_key_twice_in_yaml(write, text, said):
    with pytest.raises(ConfigError, match=said):
        load_config(write("c.yaml", text))
    adapters = write("peft.yaml", text)
    with pytest.raises(ConfigError, match=said):
        load_peft_config(load_config({"actor_config": {"peft_config_path": str(adapters)}}))


def test_a_key_that_overrides_an_anchor(write):
    text = "actor_config: &a {<<: {lr: 1.0e-5, epochs: 2}, lr: 1.0e-3}\nreward_config: {<<: *a, lr: 1.0e-4}\n"
    config = load_config(write("c.yaml", text))
    assert (config.actor_config.lr, config.reward_config.lr, config.reward_config.epochs) == (1e-3, 1e-4, 2)


@pytest.mark.parametrize(
    "words",
    [
        ["actor_config.lr=1e-5", "actor_config.lr=1e-3"],
        ["actor_config={lr: 1.0e-5}", "actor_config.lr=1e-3"],
        ["actor_config.lr=1e-5", "actor_config={lr: 1.0e-3}"],
        ["actor_config={lr: 1.0e-5, lr: 1.0e-3}"],
        ["trainer_config.epochs=1", "trainer_config.ppo_epochs=2"],
    ],
)
def test_a_key_twice_on_the_command_line(words):
    with pytest.raises(ConfigError, match="--set .*given twice|are one setting"):
        load_config({}, words)
    config = load_config({}, ["actor_config.lr=1e-5", "actor_config={epochs: 3}"])
    assert (config.actor_config.lr, config.actor_config.epochs) == (1e-5, 3)


def test_a_key_twice_in_json_that_holds_settings(write, tmp_path):
    path = write("ds.json", '{"zero_optimization": {\n"stage": 2,\n"stage": 3}}')
    with pytest.raises(ConfigError, match="ds.json, line 3: cannot be read as JSON .key 'stage' is given twice"):
        read_deepspeed_config(load_config({"actor_config": {"deepspeed_config_path": str(path)}}), "actor_config")
    with pytest.raises(ConfigError, match="t.json, line 1: .*'rlhf' is given twice"):
        read_templates(write("t.json", '{"rlhf": "a", "rlhf": "b"}'))
    write("adapters/adapter_config.json", '{"r": 4, "base_model_name_or_path": "a", "r": 8}')
    with pytest.raises(ConfigError, match="adapter_config.json, line 1: .*'r' is given twice"):
        base_of(str(tmp_path / "adapters"))
    with pytest.raises(DataError, match="j.jsonl, line 1: this is no journal"):
        Journal(write("j.jsonl", '{"key": "a", "text": "b", "text": "c"}\n'))
    with pytest.raises(ConfigError, match="NaN is not a JSON number"):
        read_templates(write("t.json", '{"rlhf": NaN}'))


# Thirty lists, each of nine times the one before.
ENDLESS = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]\n" for n in range(1, 30)) + "seed: *a29\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 2024-13-45\n", "line 1: not valid YAML .'2024-13-45' cannot be read as timestamp"),
        ("seed: !!bool maybe\n", "line 1: not valid YAML .'maybe' cannot be read as bool"),
        ("seed: !!timestamp x\n", "line 1: not valid YAML .'x' cannot be read as timestamp"),
        ("seed: " + "[" * 900, "nested more than 100 levels deep"),
        ("seed: \0\n", "not valid YAML .unacceptable character"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML .expected a single document"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]\n" for n in range(1, 30)) + "seed: *a29\n",
            "more than 20,000 values, with what its aliases .* repeat",
        ),
    ],
)
def test_yaml_that_is_none(write, text, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_config(write("c.yaml", text))
    assert "\n" not in str(error.value)


@report(
    "met while testing",
    fault='the stop string "None", quoted, was null',
    expected="a word in quotes is that word; a bare None is null, as in ChatLLaMA's files",
)
def test_none_in_quotes_is_a_word(write):
    text = "trainer_config: {target: None, gen_kwargs: {stop: [\"None\", 'None.', None of it]}}\n"
    config = load_config(write("c.yaml", text))
    assert config.trainer_config.gen_kwargs.stop == ["None", "None.", "None of it"]
    assert config.trainer_config.target is None
    assert load_config(config).trainer_config.gen_kwargs.stop == ["None", "None.", "None of it"]
    config = load_config({}, ['trainer_config.gen_kwargs.stop=["None"]', "trainer_config.target=None"])
    assert (config.trainer_config.gen_kwargs.stop, config.trainer_config.target) == (["None"], None)
    with pytest.raises(ConfigError, match="stop.0: input should be a valid string, got None"):
        load_config({}, ["trainer_config.gen_kwargs.stop=[None]"])
    adapters = write("peft.yaml", "target_modules: ['None']\n")
    assert load_peft_config(load_config({"actor_config": {"peft_config_path": str(adapters)}})).target_modules == [
        "None"
    ]
